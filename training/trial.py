"""Check each dense block against float64 and time it: what --block auto does. bench/ uses the same functions.

On a CPU, this file runs as a process of its own.

A job is a dict: model (arguments of DenseNet), batch_size, image_size, precision, device, graph (True if steps are
replayed as CUDA graphs) and blocks, naive first.
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

import torch
import torch.nn.functional as F

from common.hardware import choose_precision, set_up_device, synchronize
from densenet import DenseNet
from inputs.batches import memory_format
from training.step import GraphedStep, Step, in_words

SEEDS = 3  # of random images to check with: by chance, rounding may carry a value across a ReLU's kink
ROUNDS = 5  # timed, after one that is not
STEPS = 20  # per round on a GPU, where a single one is too short to time


def make_images(count, job, seed, dtype=torch.float32, device="cpu"):
    """Random images and labels of the job's shape, the same for every device and dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, job["model"].get("in_channels", 3), job["image_size"], job["image_size"]
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(job["model"].get("num_classes", 10), (count,), generator=generator)
    return images.to(device, dtype, memory_format=memory_format(device)), labels.to(device)


def outcome(model, images, labels, amp, rename=str):
    """What a training step computes, in float64 on the CPU: output, all gradients, all running statistics.

    ``rename`` maps the parameter names of another implementation to those here.
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


def errors(computed, exact):
    """Relative error of each result of ``outcome``, by name."""
    return {name: ((computed[name] - value).norm() / value.norm()).item() for name, value in exact.items()}


def is_as_exact(ours, naive):
    """True if errors, a dict for each seed, are at most twice those of naive: their median; ten times that, any."""
    for name in ours[0]:
        values, allowed = [each[name] for each in ours], 2 * max(each[name] for each in naive) + 1e-6
        if not (all(value <= 10 * allowed for value in values) and statistics.median(values) <= allowed):  # NaN fails
            return False
    return True


def is_rounding(naive, precision):
    """True if errors, a dict for each seed, can be rounding of plain torch: TF32 makes the output's 500 times larger.

    Beyond 1, a comparison would say nothing.
    """
    most = 1e-4 if precision == "fp32" else 1
    return all(each["output"] < most and max(each.values()) < 1 for each in naive)


def make_model(job, block, device="cpu", **options):
    torch.manual_seed(0)
    return DenseNet(**job["model"] | options, block=block).to(device, memory_format=memory_format(device))


def outcomes(job, block, count, device, precision, dtype=torch.float32):
    """Outcomes of a block on ``count`` images, one for each seed."""
    model, (amp, _) = make_model(job, block, device, drop_rate=0.0).to(dtype), choose_precision(precision, device)
    return [outcome(model, *make_images(count, job, seed, dtype, device), amp) for seed in range(SEEDS)]


def make_step(job, block, device):
    """A Step on random images, to call without arguments."""
    model, (amp, _) = make_model(job, block, device), choose_precision(job["precision"], device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    step = (GraphedStep if job["graph"] else Step)(model, optimizer, amp, scaled=job["precision"] == "fp16")
    return functools.partial(step, *make_images(job["batch_size"], job, 0, device=device), job["batch_size"])


def seconds(function, device):
    """Seconds of one call; on a GPU, the mean of STEPS calls."""
    times = 1 if device.type == "cpu" else STEPS
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / times


@contextlib.contextmanager
def attempt(answer, what, device):
    """Print the answer so far, then refuse ``what`` if it fails. Raises an error that has left a GPU unusable."""
    print(json.dumps(answer | {"at": what}), flush=True)
    try:
        yield
    except Exception as error:  # of any type: compilers of kernels raise what they like
        answer["refused"][what] = in_words(error)
        answer["lasting"] &= isinstance(error, ArithmeticError)
        answer["seconds"].pop(what, None)
        synchronize(device)


def try_blocks(job):
    """Check and time the blocks of a job. Returns the answer, and prints it before each attempt.

    Its entries are "at": the attempt, None at the end; "seconds": {block: [of each round]}; "refused": {block: reason};
    "lasting": False if another attempt may have another result, as after running out of memory.
    """
    device, count, exact, naive, steps = torch.device(job["device"]), job["batch_size"], None, None, {}
    set_up_device(device)
    torch.backends.cudnn.benchmark = True
    smallest = "checkpoint" if "checkpoint" in job["blocks"] else "naive"  # in memory
    while not exact and count:
        answer = {"at": None, "seconds": {}, "refused": {}, "lasting": True}
        with attempt(answer, "reference", device):
            exact = outcomes(job, smallest, count, device, "fp32", torch.float64)
        count //= 1 if exact else 2
    for block in job["blocks"] if exact else ():
        with attempt(answer, block, device):
            ours = list(map(errors, outcomes(job, block, count, device, job["precision"]), exact))
            plain = not naive and block != "fused"  # naive or, if that needs too much memory, checkpoint
            if not (is_rounding(ours, job["precision"]) if plain else naive and is_as_exact(ours, naive)):
                raise ArithmeticError(f"computes something else (relative errors {ours[-1]})")
            naive = naive or ours
            steps[block], answer["seconds"][block] = make_step(job, block, device), []
    for i in range(1 + ROUNDS):
        for block in [name for name in reversed(steps) if name in answer["seconds"]]:  # naive needs most memory
            with attempt(answer, block, device):
                measured = seconds(steps[block], device)
                answer["seconds"][block] += [measured] if i else []
            if reason := steps[block].func.refused:
                answer["refused"][f"{block} as a CUDA graph"], answer["lasting"] = reason, False
    return answer


if __name__ == "__main__":
    # The input closes when the process that waits for the answer ends, even if it is killed.
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    with contextlib.suppress(OSError):  # Linux: if memory runs out, this process ends first
        Path("/proc/self/oom_score_adj").write_text("1000")
    print(json.dumps(try_blocks(json.loads(sys.argv[1]))), flush=True)
