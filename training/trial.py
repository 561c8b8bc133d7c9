"""Each dense block checked against float64, then timed in turns: what --block auto does.

On a CPU, this is a process of its own. bench/ checks and times its candidates by the same functions.

A job is a dict: model (arguments of DenseNet), batch_size, image_size, precision, device, graph (True if steps are to
be replayed as CUDA graphs) and blocks, naive first.
"""

import contextlib
import functools
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from common.hardware import choose_precision, set_up_device, synchronize
from densenet import DenseNet
from inputs.batches import memory_format
from training.step import GraphedStep, Step, in_words

DRAWS = 3  # of images to check with: rounding may carry a value across a ReLU's kink, which is a matter of luck
TURNS = 5  # timed, after one that is not
STEPS = 20  # of a turn on a GPU, where one is too short to time


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


def make_model(job, block, device="cpu", **options):
    torch.manual_seed(0)
    return DenseNet(**job["model"] | options, block=block).to(device, memory_format=memory_format(device))


def outcomes(job, block, count, device, precision, dtype=torch.float32):
    """Outcomes of a block on ``count`` images, one for each seed."""
    model, (amp, _) = make_model(job, block, device, drop_rate=0.0).to(dtype), choose_precision(precision, device)
    return [outcome(model, *make_images(count, job, seed, dtype, device), amp) for seed in range(DRAWS)]


def make_step(job, block, device):
    """A Step, to be called without arguments."""
    model, (amp, _) = make_model(job, block, device), choose_precision(job["precision"], device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    step = (GraphedStep if job["graph"] else Step)(model, optimizer, amp, scaled=job["precision"] == "fp16")
    return functools.partial(step, *make_images(job["batch_size"], job, 0, device=device), job["batch_size"])


def seconds(function, device):
    """Of one call, on a GPU of one among STEPS."""
    times = 1 if device.type == "cpu" else STEPS
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / times


@contextlib.contextmanager
def attempt(answer, what, device):
    """Print the answer so far, then refuse ``what`` if it fails. Raises what has left a GPU unusable."""
    print(json.dumps(answer | {"at": what}), flush=True)
    try:
        yield
    except Exception as error:  # of any kind: compilers of kernels raise what they like
        answer["refused"][what] = in_words(error)
        answer["lasting"] &= isinstance(error, ArithmeticError)
        answer["seconds"].pop(what, None)
        synchronize(device)


def try_blocks(job):
    """Check and time the blocks of a job. Prints the answer as far as it is known, and returns all.

    "at": what is being tried, None in the end; "seconds": {block: [by turn]}; "refused": {what: reason};
    "lasting": False if another time may differ, as where memory ran out or steps could not be replayed.
    """
    device, count, exact, naive, steps = torch.device(job["device"]), job["batch_size"], None, None, {}
    set_up_device(device)
    torch.backends.cudnn.benchmark = True
    linear = "checkpoint" if "checkpoint" in job["blocks"] else "naive"  # in memory; it was compared with naive
    while not exact and count:
        answer = {"at": None, "seconds": {}, "refused": {}, "lasting": True}
        with attempt(answer, "reference", device):
            exact = outcomes(job, linear, count, device, "fp32", torch.float64)
        count //= 1 if exact else 2  # images may fit
    for block in job["blocks"] if exact else ():
        with attempt(answer, block, device):
            draws = list(map(errors, outcomes(job, block, count, device, job["precision"]), exact))
            plain = not naive and block != "fused"  # naive or, if that has no room, the other one in plain torch
            if not (is_rounding(draws, job["precision"]) if plain else naive and is_as_exact(draws, naive)):
                raise ArithmeticError(f"computes something else (relative errors {draws[-1]})")
            naive = naive or draws
            steps[block], answer["seconds"][block] = make_step(job, block, device), []
    for turn in range(1 + TURNS):
        for block in [name for name in reversed(steps) if name in answer["seconds"]]:  # naive needs most memory
            with attempt(answer, block, device):
                taken = seconds(steps[block], device)
                answer["seconds"][block] += [taken] if turn else []
            if reason := steps[block].func.refused:
                answer["refused"][f"{block} as a CUDA graph"], answer["lasting"] = reason, False
    return answer


def limit_memory():
    """Let this process run out of memory before the machine does, and be the one that Linux ends if that happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if sys.platform == "linux":
        import resource

        room, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
            room = min(room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        resource.setrlimit(resource.RLIMIT_DATA, (max(room, 2**28), -1))


if __name__ == "__main__":
    # Its input closes when the process that waits for the answer ends, even if that is killed.
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    limit_memory()
    print(json.dumps(try_blocks(json.loads(sys.argv[1]))), flush=True)
