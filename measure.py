"""Which dense block is fastest here: each checked against float64, then timed in turns, in a process of its own.

train.py asks ``fastest_block`` for the block of ``--block auto``; bench/ checks and times its candidates by the same
functions. A job is a dict: model (arguments of DenseNet), batch_size, image_size, precision, device and blocks, naive
first. Its process prints a line of JSON for each thing that it begins and, last, what it found.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F

from cli import written_whole
from densenet import DenseNet
from device import choose_precision, device_name, set_up_device
from step import GraphedStep, Step

DRAWS = 3  # of images to check with: rounding may carry a value across a ReLU's kink, which is a matter of luck
TURNS = 5  # timed, after one that is not
STEPS = 20  # of a turn on a GPU, where one is too short to time
GAIN = 0.05  # by which another block must be faster than naive, at least
SHARE = 0.02  # of the expected training time that measuring may take
START = 10  # seconds that the start of a process takes, about
WORK = 60  # training steps that take as long as the checks and turns of three blocks, about
GRAPHED = 10  # steps at each of two learning rates that a CUDA graph has to repeat


def make_images(count, job, seed, dtype=torch.float32, device="cpu"):
    """Random images and labels of the job's shape, the same for every device and dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, job["model"].get("in_channels", 3), job["image_size"], job["image_size"]
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(job["model"].get("num_classes", 10), (count,), generator=generator)
    return images.to(device, dtype, memory_format=torch.channels_last), labels.to(device)


def outcome(model, images, labels, amp, rename=str):
    """What a training step computes, in float64 on the CPU: output, all gradients, all running statistics.

    ``rename`` says what a parameter of another implementation is called here.
    """
    model.zero_grad()
    with amp():
        out = model(images)
    F.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), labels).backward()
    gradients = {rename(name): parameter.grad for name, parameter in model.named_parameters()}
    running = {rename(name): buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    result = {"output": out.detach().double().cpu()}
    for kind, tensors in (("gradients", gradients), ("statistics", running)):
        result[kind] = torch.cat([tensors[name].double().cpu().flatten() for name in sorted(tensors)])
    return result


def errors(found, exact):
    """Relative error of each kind of result of ``outcome``."""
    return {kind: ((found[kind] - value).norm() / value.norm()).item() for kind, value in exact.items()}


def is_as_exact(draws, naive):
    """Whether errors, by draw, are at most twice those of naive in the same precision."""
    return all(
        statistics.median(draw[kind] for draw in draws) <= 2 * max(draw[kind] for draw in naive) + 1e-6
        for kind in draws[0]
    )


def is_out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


# In the process of a job.


def say(**message):
    print(json.dumps(message), flush=True)


def make_model(job, block, device="cpu", **options):
    torch.manual_seed(0)
    return DenseNet(**job["model"] | options, block=block).to(device, memory_format=torch.channels_last)


def reference(job):
    """The outcome in float64, by draw."""
    model = make_model(job, "checkpoint", drop_rate=0.0).double()  # whose memory is linear in depth
    amp, _ = choose_precision("fp32", torch.device("cpu"))
    draws = []
    for seed in range(DRAWS):
        images, labels = make_images(job["checked_images"], job, seed, torch.float64)
        draws.append(outcome(model, images, labels, amp))
    return draws


def check(job, block, device, exact):
    """Errors of a block in the job's precision, by draw."""
    model, (amp, _) = make_model(job, block, device, drop_rate=0.0), choose_precision(job["precision"], device)
    return [
        errors(outcome(model, *make_images(job["checked_images"], job, seed, device=device), amp), draw)
        for seed, draw in enumerate(exact)
    ]


def make_step(job, block, device, kind=Step):
    """A function that takes one training step on random images, and the Step in it."""
    amp, _ = choose_precision(job["precision"], device)
    model = make_model(job, block, device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    step = kind(model, optimizer, amp)
    images, labels = make_images(job["batch_size"], job, 0, device=device)
    return (lambda: step(images, labels, len(labels))), step


def seconds(function, device):
    """Of one call, on a GPU of one of STEPS calls."""
    times = STEPS if device.type == "cuda" else 1
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


def measure(job):
    """What a job's process finds: {"seconds": {block: [by turn]}, "refused": {block: reason}, "graph": …}."""
    device = torch.device(job["device"])
    with contextlib.suppress(OSError):  # where memory runs out, Linux shall end this process, not the one that trains
        Path("/proc/self/oom_score_adj").write_text("1000")
    set_up_device(device)
    torch.backends.cudnn.benchmark = True
    say(begins="reference")
    exact, naive, steps, found, refused = reference(job), [], {}, {}, {}

    def attempt(block, function):
        say(begins=block)
        try:
            function(block)
        except (RuntimeError, MemoryError) as error:
            refused[block] = "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]
            steps.pop(block, None)
            found.pop(block, None)

    def verify(block):
        draws = check(job, block, device, exact)
        if not naive and block != "fused":  # naive or, where that runs out of memory, the other one in plain torch
            naive.extend(draws)
        if not naive or not is_as_exact(draws, naive):
            raise RuntimeError(f"computes something else (relative errors {draws[-1]})")
        steps[block], found[block] = make_step(job, block, device)[0], []

    def time_turn(block):
        found[block].append(seconds(steps[block], device))

    for block in job["blocks"]:
        attempt(block, verify)
    for _ in range(1 + TURNS):
        for block in list(steps):
            attempt(block, time_turn)
    found = {block: values[1:] for block, values in found.items()}
    graph = try_graph(job, fastest(found)[0], device) if found and device.type == "cuda" else None
    return {"seconds": found, "refused": refused, "graph": graph}


def try_graph(job, block, device, kind=GraphedStep):
    """How many times as fast a CUDA graph makes a block's step, or 0 where its steps are not the same.

    They are where they lead to the same weights across a change of the learning rate, up to 5 % of the way: rounding
    and the order of sums differ.
    """
    say(begins="graph")
    (eager, eager_step), (graphed, graphed_step) = (make_step(job, block, device, k) for k in (Step, kind))
    start = weights(eager_step.model)
    for call, step in ((eager, eager_step), (graphed, graphed_step)):
        for rate in (0.1, 0.01):
            step.set_learning_rate(rate)
            for _ in range(GRAPHED):
                call()
    end = weights(eager_step.model)
    same = (weights(graphed_step.model) - end).norm() <= 0.05 * (end - start).norm()
    return seconds(eager, device) / seconds(graphed, device) if same else 0.0


def weights(model):
    """A copy of all parameters, in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def fastest(found):
    """(block, how many times as fast as naive, or None where that cannot run) from the seconds of turns.

    naive stands unless another one gains more than GAIN, and more than half of what lies between the 20th and the 80th
    percentile of its gains turn by turn.
    """
    if "naive" not in found:
        return min(found, key=lambda block: statistics.median(found[block]), default=None), None
    best = "naive", 1.0
    for block, values in found.items():
        gains = sorted(slow / fast for slow, fast in zip(found["naive"], values, strict=True))
        low, median, high = (gains[round(q * (len(gains) - 1))] for q in (0.2, 0.5, 0.8))
        if median - 1 > max(GAIN, (high - low) / 2) and median > best[1]:
            best = block, median
    return best


# In the process that is to train.


def fastest_block(job, default, steps):
    """The block to train ``steps`` steps with, and a line about it or None.

    It is ``default`` where the training is too short to repay measuring, or where that fails.
    """
    device = torch.device(job["device"])
    path = cache_path(job, device)
    found = read_cache(path)
    if found is None:
        if SHARE * steps < WORK:
            return default, None
        budget = SHARE * expected_seconds(job, steps, device)
        if budget * (1 - WORK / (SHARE * steps)) < START:
            return default, None
        print(f"measuring which --block is fastest here, {budget:.0f} s at most; naming one skips this", flush=True)
        found = measure_apart(job, budget)
        if found is None:
            return default, f"--block auto could not measure in that time, and takes {default}"
        write_cache(path, found)
    return describe(found, default)


def describe(found, default):
    """The block that was found to be the fastest, and a line that says by how much."""
    block, gain = fastest(found["seconds"])
    if block is None:
        return default, f"--block auto measured nothing that runs ({found['refused']}), and takes {default}"
    speed = "which runs" if gain is None else "the fastest" if gain == 1 else f"{gain:.2f} times as fast as naive"
    parts = [f"--block auto took {block}, {speed} here"]
    parts += [f"{name}: {reason}" for name, reason in found["refused"].items()]
    if found.get("graph") is not None:
        graph = f"makes it {found['graph']:.2f} times as fast" if found["graph"] else "computes something else"
        parts.append(f"--cuda-graph {graph}")
    return block, "; ".join([*parts, f"--block {block} pins it"])


def expected_seconds(job, steps, device):
    """About how long so many training steps take, from a forward pass: the backward pass takes twice as long."""
    with torch.random.fork_rng():  # the run's own draws stay as they are
        model = make_model(job, "naive", device).eval()
    amp, _ = choose_precision(job["precision"], device)
    images, _ = make_images(job["batch_size"], job, 0, device=device)
    with torch.no_grad(), amp():
        model(images)  # which allocates, and chooses algorithms
        forward = min(seconds(lambda: model(images), device) for _ in range(2))
    if device.type == "cuda":
        del model, images
        torch.cuda.empty_cache()  # the other process needs the room
    return 3 * steps * forward


def run_process(job, timeout):
    return lines_of([sys.executable, __file__, json.dumps(job)], timeout)


def lines_of(command, timeout):
    """What a process prints, as far as it is JSON, and whether it came to its end in that many seconds."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout, text=True)
        return [json.loads(line) for line in result.stdout.splitlines()], result.returncode == 0
    except (subprocess.TimeoutExpired, ValueError):
        return [], False


def measure_apart(job, budget):
    """What ``measure`` finds, in another process: one that crashes or is killed drops what it was at, and begins anew.

    Returns None where that takes more than ``budget`` seconds or nothing can be checked.
    """
    job, refused = job | {"checked_images": job["batch_size"]}, {}
    end = time.monotonic() + budget
    while job["blocks"] and time.monotonic() < end:
        lines, finished = run_process(job, end - time.monotonic())
        if finished:
            return lines[-1] | {"refused": refused | lines[-1]["refused"]}
        if not lines:
            return None
        last = lines[-1]["begins"]
        if last == "reference" and job["checked_images"] > 1:
            job["checked_images"] //= 2
        elif last not in job["blocks"]:
            return None
        else:
            refused[last] = "ended the process that tried it"
            job["blocks"] = [block for block in job["blocks"] if block != last]
    return None


def cache_path(job, device):
    """The file that keeps the answer to a job, named by everything that it depends on."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("fused/*.py")), here / "densenet.py", here / "step.py", Path(__file__)]
    packages = ("torch", "triton", "numba", "numpy")
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.name in packages}
    key = job | {
        "hardware": device_name(device),
        "driver": torch._C._cuda_getDriverVersion() if device.type == "cuda" else None,
        "versions": sorted(versions.items()),
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return platformdirs.user_cache_path("densenet.pytorch") / f"{name}.json"


def read_cache(path):
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found["seconds"], dict) and isinstance(found["refused"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(path, found):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(json.dumps(found).encode())
    except OSError:  # then it is measured again next time
        pass


def main():
    job = json.loads(sys.argv[1])
    say(**measure(job))


if __name__ == "__main__":
    main()
