"""Each dense block checked against float64, then timed in turns: what a process of --block auto does.

On a GPU, what is compared are steps that are replayed as CUDA graphs, once these have proved to be the same. bench/
checks and times its candidates by the same functions.

A job is a dict: model (arguments of DenseNet), batch_size, image_size, precision, device, graph (True if steps may be
replayed as a CUDA graph), checked_images and blocks, naive first.
"""

import contextlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from common.console import memory_problem
from common.hardware import choose_precision, set_up_device, synchronize
from densenet import DenseNet
from inputs.batches import memory_format
from training.step import GraphedStep, Step

DRAWS = 3  # of images to check with: rounding may carry a value across a ReLU's kink, which is a matter of luck
TURNS = 5  # timed, after one that is not
STEPS = 20  # of a turn on a GPU, where one is too short to time
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
    """True if errors are at most twice those of naive in the same precision: their median, and roughly all."""
    for kind in draws[0]:
        found, allowed = [draw[kind] for draw in draws], 2 * max(draw[kind] for draw in naive) + 1e-6
        if not (all(error <= 10 * allowed for error in found) and statistics.median(found) <= allowed):  # nor NaN
            return False
    return True


def is_rounding(draws, precision):
    """True if errors may be those of plain torch in a precision: of outputs in fp32, TF32 would make 500 times as much.

    All are below 1, beyond which a comparison says nothing.
    """
    most = 1e-4 if precision == "fp32" else 1
    return all(draw["output"] < most and max(draw.values()) < 1 for draw in draws)


def say(answer):
    print(json.dumps(answer), flush=True)


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
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
            room = min(room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        resource.setrlimit(resource.RLIMIT_DATA, (max(room, 2**28), -1))


@contextlib.contextmanager
def attempt(answer, what):
    """Print the answer so far, then refuse ``what`` if the block proves it wrong or without room. Raises other errors.

    After those a GPU may be unusable.
    """
    answer["at"] = what
    say(answer)
    try:
        yield
    except (RuntimeError, MemoryError, Wrong) as error:
        full = memory_problem(error)
        answer["refused"][what] = "out of memory" if full else str(error).partition("\n")[0]
        answer["lasting"] &= isinstance(error, Wrong)
        answer["seconds"].pop(what, None)
        if not (full or isinstance(error, Wrong)):
            say(answer)
            raise


def try_blocks(job):
    """Check and time the blocks of a job. Prints the answer as far as it is known, and returns all of it.

    "at": what is being tried, None in the end; "seconds": {block: [by turn]}; "refused": {block or GRAPH: reason};
    "graph": True if the steps were replayed; "lasting": False if another time may differ, as where memory ran out.
    """
    device = torch.device(job["device"])
    set_up_device(device)
    torch.backends.cudnn.benchmark = True
    answer = {"at": "reference", "seconds": {}, "refused": {}, "graph": False, "lasting": True}
    say(answer)
    exact, naive, steps = reference(job, device), [], {}
    for block in job["blocks"]:
        with attempt(answer, block):
            draws = check(job, block, device, exact)
            plain = not naive and block != "fused"  # naive or, if that has no room, the other one in plain torch
            if not (is_rounding(draws, job["precision"]) if plain else naive and is_as_exact(draws, naive)):
                raise Wrong(f"computes something else (relative errors {draws[-1]})")
            naive = naive or draws
            steps[block], answer["seconds"][block] = make_step(job, block, device)[0], []
    if job["graph"]:
        with attempt(answer, GRAPH):
            steps = replayed(job, device, steps, answer)
            answer["graph"] = True
    for turn in range(1 + TURNS):
        for block in [name for name in steps if name in answer["seconds"]]:
            with attempt(answer, block):
                taken = seconds(steps[block], device)
                answer["seconds"][block] += [taken] if turn else []
    return answer | {"at": None}


def replayed(job, device, steps, answer):
    """The steps as CUDA graphs. naive's, which takes most memory, comes last; what has no room is refused.

    Raises Wrong if one is not the same.
    """
    graphs = {}
    for block in reversed(steps):
        try:
            graphs[block] = graphed(job, block, device)
        except (RuntimeError, MemoryError) as error:
            if not memory_problem(error):
                raise
            answer["refused"][block], answer["lasting"] = NO_ROOM, False
    for block in steps.keys() - graphs.keys():
        del answer["seconds"][block]
    return graphs


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


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    limit_memory(torch.device(job["device"]))
    say(try_blocks(job))
