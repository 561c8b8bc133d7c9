"""Which dense block is fastest here: each checked against float64, then timed in turns, in a process of its own.

On a GPU, what is compared are steps that are replayed as CUDA graphs, once these have proved to be the same.

train.py asks ``fastest_block`` for the block of ``--block auto``; bench/ checks and times its candidates by the same
functions. A job is a dict: model (arguments of DenseNet), batch_size, image_size, precision, device, graph (whether
steps may be replayed as a CUDA graph) and blocks, naive first. Its process prints a line of JSON for each thing that it
begins and, last, what it found.
"""

import contextlib
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import platformdirs
import psutil
import torch
import torch.nn.functional as F

import fused
from common.console import Parser, command, memory_problem
from common.files import written_whole
from common.hardware import choose_precision, device_name, set_up_device, synchronize
from densenet import DenseNet
from inputs.batches import memory_format
from training.run import ROOT, versions
from training.step import GraphedStep, Step


def choose_block(device):
    """The block to use where none is measured: the one that was the fastest on every device of this kind so far."""
    return "fused" if device.type == "cpu" and fused.loops is not None else "naive"


DRAWS = 3  # of images to check with: rounding may carry a value across a ReLU's kink, which is a matter of luck
TURNS = 5  # timed, after one that is not
STEPS = 20  # of a turn on a GPU, where one is too short to time
GAIN = 0.05  # by which another block must be faster than naive, at least
SHARE = 0.02  # of the time of all training steps, eager ones, that measuring may take
START = {"cpu": 10, "cuda": 20}  # seconds that the start of a process and its compilers take, about
WORK = {"cpu": 60, "cuda": 500}  # training steps that take as long as the checks and turns of three blocks, about
GRAPH, NO_ROOM = "--cuda-graph", "out of memory as a CUDA graph"
GRAPHED = 10  # steps at each of two learning rates that it has to repeat


class Wrong(Exception):
    """A block computes something else than naive."""


def make_images(count, job, seed, dtype=torch.float32, device="cpu"):
    """Random images and labels of the job's shape, the same for every device and dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, job["model"].get("in_channels", 3), job["image_size"], job["image_size"]
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(job["model"].get("num_classes", 10), (count,), generator=generator)
    return images.to(device, dtype, memory_format=memory_format(device)), labels.to(device)


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
    """Whether errors are at most twice those of naive in the same precision: their median, and roughly all."""
    for kind in draws[0]:
        found, allowed = [draw[kind] for draw in draws], 2 * max(draw[kind] for draw in naive) + 1e-6
        if not (all(error <= 10 * allowed for error in found) and statistics.median(found) <= allowed):  # nor NaN
            return False
    return True


def is_rounding(draws, precision):
    """Whether errors may be those of plain torch in a precision: of outputs in fp32, TF32 would make 500 times as much.

    All are below 1, beyond which a comparison says nothing.
    """
    most = 1e-4 if precision == "fp32" else 1
    return all(draw["output"] < most and max(draw.values()) < 1 for draw in draws)


# In the process of a job.


def say(**message):
    print(json.dumps(message), flush=True)


def make_model(job, block, device="cpu", **options):
    torch.manual_seed(0)
    return DenseNet(**job["model"] | options, block=block).to(device, memory_format=memory_format(device))


def reference(job, device):
    """The outcome in float64, by draw, of a block that was compared with naive: one whose memory is linear in depth."""
    block = "checkpoint" if "checkpoint" in job["blocks"] else "naive"
    model = make_model(job, block, device, drop_rate=0.0).double()
    amp, _ = choose_precision("fp32", device)
    images = (make_images(job["checked_images"], job, seed, torch.float64, device) for seed in range(DRAWS))
    return [outcome(model, *batch, amp) for batch in images]


def check(job, block, device, exact):
    """Errors of a block in the job's precision, by draw."""
    model, (amp, _) = make_model(job, block, device, drop_rate=0.0), choose_precision(job["precision"], device)
    return [
        errors(outcome(model, *make_images(job["checked_images"], job, seed, device=device), amp), draw)
        for seed, draw in enumerate(exact)
    ]


def make_step(job, block, device, kind=Step, **options):
    """A function that takes one training step on one of two random batches in turn, and the Step in it."""
    amp, _ = choose_precision(job["precision"], device)
    model = make_model(job, block, device, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    step = kind(model, optimizer, amp, **({"scaled": True} if job["precision"] == "fp16" else {}))
    batches = itertools.cycle([make_images(job["batch_size"], job, seed, device=device) for seed in range(2)])

    def call():
        images, labels = next(batches)
        return step(images, labels, len(labels))

    return call, step


def seconds(function, device, times=None):
    """Of one call out of so many, on a GPU of STEPS."""
    times = times or (1 if device.type == "cpu" else STEPS)
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / times


def limit_memory(device):
    """Let this process run out of memory before the machine does, and be the one that Linux ends if that happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if device.type == "cpu" and sys.platform == "linux":
        import resource

        room, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # "max"
            taken = int((group / "memory.current").read_text())
            room = min(room, int((group / "memory.max").read_text()) - taken)
        resource.setrlimit(resource.RLIMIT_DATA, (max(room, 2**28), -1))


def measure(job):
    """What a job's process finds: {"seconds": {block: [by turn]}, "refused": {block or GRAPH: reason}, "graph": whether
    the steps were replayed, "lasting": whether the same would be found again, which is not so where memory ran out}.
    """
    device = torch.device(job["device"])
    set_up_device(device)
    torch.backends.cudnn.benchmark = True
    say(begins="reference")
    exact, naive, steps, turns, refused, lasting = reference(job, device), [], {}, {}, {}, True

    def attempt(block, function):
        nonlocal lasting
        say(begins=block)
        try:
            function(block)
        except (RuntimeError, MemoryError, Wrong) as error:
            reason = "out of memory" if memory_problem(error) else str(error).partition("\n")[0]
            if not (isinstance(error, Wrong) or memory_problem(error)):  # which may have left the GPU unusable
                say(begins=block, error=reason)
                raise
            refused[block], lasting = reason, lasting and isinstance(error, Wrong)
            steps.pop(block, None)

    def verify(block):
        draws = check(job, block, device, exact)
        if not naive and block != "fused":  # naive or, where that runs out of memory, the other one in plain torch
            right = is_rounding(draws, job["precision"])
            naive.extend(draws if right else ())
        else:
            right = naive and is_as_exact(draws, naive)
        if not right:
            raise Wrong(f"computes something else (relative errors {draws[-1]})")
        steps[block], turns[block] = make_step(job, block, device)[0], []

    def time_turn(block):
        turns[block].append(seconds(steps[block], device))

    for block in job["blocks"]:
        attempt(block, verify)
    if job["graph"]:
        attempt(GRAPH, lambda _: replace_by_graphs(job, device, steps, refused))
    for _ in range(1 + TURNS):
        for block in list(steps):
            attempt(block, time_turn)
    timed = {block: turns[block][1:] for block in steps}
    graph, lasting = job["graph"] and GRAPH not in refused, lasting and NO_ROOM not in refused.values()
    return {"seconds": timed, "refused": refused, "graph": graph, "lasting": lasting}


def replace_by_graphs(job, device, steps, refused):
    """Let each block's step be one that is replayed. naive's, which takes most memory, comes last, and may not fit.

    Raises Wrong, and replaces none, where one is not the same.
    """
    graphs = {}
    for block in reversed(steps):
        try:
            graphs[block] = graphed(job, block, device)
        except (RuntimeError, MemoryError) as error:
            if not memory_problem(error):
                raise
            refused[block] = NO_ROOM
    for block in steps.keys() - graphs.keys():
        del steps[block]
    steps.update(graphs)


def graphed(job, block, device, kind=GraphedStep):
    """A function that takes one training step as a CUDA graph. Raises Wrong where its steps are not the same as eager.

    They are where they lead to the same weights across a change of the learning rate, up to 5 % of the way or to twice
    what lies between two eager trainings: rounding and the order of sums differ.
    """
    start, ends = weights(make_model(job, block, device)), []
    for k in (Step, Step, kind):
        call, step = make_step(job, block, device, k, drop_rate=0.0)
        for rate in (0.1, 0.01):
            step.set_learning_rate(rate)
            for _ in range(GRAPHED):
                call()
        ends.append(weights(step.model))
    eager, again, replayed = ends
    images, labels = make_images(max(1, job["batch_size"] - 1), job, 0, device=device)
    step(images, labels, len(labels))  # an odd batch needs memory beside the graph's
    if not (replayed - eager).norm() <= max(0.05 * (eager - start).norm(), 2 * (again - eager).norm()):  # nor NaN
        raise Wrong(f"computes something else with block {block}")
    return make_step(job, block, device, kind)[0]  # with dropout, if there is any


def weights(model):
    """A copy of all parameters, in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def fastest(found):
    """(block, how many times as fast as naive, or None where that cannot run) from the seconds of turns.

    naive stands unless another one gains more than GAIN, and more than what lies between the 20th and the 80th
    percentile of its gains turn by turn.
    """
    if "naive" not in found:
        return min(found, key=lambda block: statistics.median(found[block]), default=None), None
    best = "naive", 1.0
    for block, values in found.items():
        gains = sorted(slow / fast for slow, fast in zip(found["naive"], values, strict=True))
        low, median, high = (gains[round(q * (len(gains) - 1))] for q in (0.2, 0.5, 0.8))
        if median - 1 > max(GAIN, high - low) and median > best[1]:
            best = block, median
    return best


# In the process that is to train.


def fastest_block(job, default, steps, graph=False):
    """The block to train ``steps`` steps with, whether to replay them as a CUDA graph, and a line about it or None.

    They are ``default`` and ``graph`` where the training is too short to repay measuring.
    """
    device = torch.device(job["device"])
    path = cache_path(job, device)
    found = read_cache(path)
    if found is None:
        share = SHARE * steps - WORK[device.type]  # steps whose time is left for the start
        if share < 0:
            return default, graph, None
        step = expected_seconds(job, device)
        if share * step < START[device.type]:
            return default, graph, None
        budget = SHARE * steps * step
        print(f"measuring which --block is fastest here, {budget:.0f} s at most; naming one skips this", flush=True)
        found = measure_apart(job, budget)
        if "naive" in found["seconds"] and found["lasting"]:
            write_cache(path, found)
    return describe(found, default, graph)


def describe(found, default, graph=False):
    """The block that was found to be the fastest, whether with a CUDA graph, and a line that says by how much.

    They are ``default``, or naive where that block did not pass, and ``graph`` where nothing was found.
    """
    block, gain = fastest(found["seconds"])
    reasons = [f"{name}: {reason}" for name, reason in found["refused"].items()]
    if block is None:
        block = "naive" if default in found["refused"] else default
        return block, graph, "; ".join(["--block auto could not measure", *reasons, f"it takes {block}"])
    speed = "which runs" if gain is None else "the fastest" if gain == 1 else f"{gain:.2f} times as fast as naive"
    chosen = f"{block} {GRAPH}" if found["graph"] else block
    parts = [f"--block auto took {chosen}, {speed} here", *reasons, f"--block {chosen} pins it"]
    return block, found["graph"], "; ".join(parts)


def expected_seconds(job, device):
    """About how long a training step takes, from a forward pass: the backward pass takes twice as long."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's own draws stay as they are
        model = make_model(job, "naive", device).eval()
    amp, _ = choose_precision(job["precision"], device)
    images, _ = make_images(job["batch_size"], job, 0, device=device)
    with torch.no_grad(), amp():
        model(images)  # which allocates, and chooses algorithms
        forward = min(seconds(lambda: model(images), device) for _ in range(2))
    if device.type == "cuda":
        del model, images
        torch.cuda.empty_cache()  # the other process needs the room
    return 3 * forward


def run_process(job, timeout):
    return lines_of([sys.executable, "-m", "training.fastest", json.dumps(job)], timeout)


def lines_of(command, timeout):
    """The dicts that a process prints as lines of JSON within so many seconds, and its exit status or None."""
    with tempfile.TemporaryFile() as file:  # read even where the process hangs
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
                process.wait(10)
        file.seek(0)
        lines = []
        for line in file.read().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # what a library prints
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)], status


def measure_apart(job, budget):
    """What ``measure`` finds, in other processes: one that dies or hangs drops the block it was at, and a next begins.

    After ``budget`` seconds, or where nothing can be checked, there is only what was refused.
    """
    job, refused = job | {"checked_images": job["batch_size"]}, {}
    end = time.monotonic() + budget
    while job["blocks"] and time.monotonic() < end:
        try:
            lines, status = run_process(job, end - time.monotonic())
        except OSError as error:
            return {"seconds": {}, "refused": {"the process": str(error)}, "graph": False}
        for line in reversed(lines):
            if "seconds" in line:
                return line | {"refused": refused | line["refused"], "lasting": line["lasting"] and not refused}
        last = lines[-1] if lines else {}
        block = last.get("begins")
        if block == "reference" and status is not None and job["checked_images"] > 1:
            job["checked_images"] //= 2
        elif block in (*job["blocks"], GRAPH):
            end_of_it = "did not end in time" if status is None else f"ended the process ({status})"
            refused[block] = last.get("error", end_of_it)
            job["blocks"] = [name for name in job["blocks"] if name != block]
            job["graph"] = job["graph"] and block != GRAPH
        else:
            break
    return {"seconds": {}, "refused": refused, "graph": False}


def cache_path(job, device):
    """The file that keeps the answer to a job, named by everything that it depends on."""
    parts = ("densenet.py", "common/hardware.py", "training/fastest.py", "training/step.py")
    sources = [*sorted(ROOT.glob("fused/*.py")), *(ROOT / name for name in parts)]
    threads = {name: text for name, text in os.environ.items() if name.startswith(("OMP", "GOMP", "KMP", "MKL", "THP"))}
    key = job | {
        "hardware": device_name(device),
        "gpu": gpu(device) if device.type == "cuda" else None,
        "versions": versions(),
        "threads": threads,
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return platformdirs.user_cache_path("densenet.pytorch") / f"{name}.json"


def gpu(device):
    """What a GPU's speed depends on beside its name."""
    properties, driver = torch.cuda.get_device_properties(device), Path("/proc/driver/nvidia/version")
    libraries = torch.version.cuda, torch.backends.cudnn.version()
    return [properties.total_memory, *libraries, driver.read_text() if driver.exists() else None]


def read_cache(path):
    try:
        found = json.loads(path.read_text())
        describe(found, "naive")
        return found
    except Exception:  # whatever another program has left there
        return None


def write_cache(path, found):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, f".{os.getpid()}.tmp") as file:
            file.write(json.dumps(found).encode())
    except OSError:  # then it is measured again next time
        pass


@command
def main(argv=None):
    parser = Parser(prog="measure.py", description=__doc__)
    parser.add_argument("job", type=json.loads, help="as JSON; train.py makes them")
    job = parser.parse_args(argv).job
    limit_memory(torch.device(job["device"]))
    say(**measure(job))


if __name__ == "__main__":
    sys.exit(main())
