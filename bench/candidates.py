"""What speed.py measures: our blocks, torchvision's and timm's networks and bamos/densenet.pytorch, each in a process.

A job is a dict: candidate, depth, batch_size, precision, graph, kernels (two constants of fused/kernels.py, or None),
device and task: "check", "profile" or "steps". Its process prints the answer; for "steps", one for each word it reads.
"""

import contextlib
import copy
import functools
import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from common.console import Mistake, command
from common.hardware import choose_device, choose_precision, peak_memory_mib, set_up_device
from densenet import BLOCKS, FROM_TORCHVISION, DenseNet, rename
from inputs.batches import memory_format
from training import trial
from training.step import GraphedStep, Step

CHECKED_IMAGES = 4
TRIALS = 5  # random batches to check with
IMAGES = {"model": {}, "image_size": 32}  # for trial.make_images


def theirs(ours, library, memory_efficient=False):
    """torchvision's or timm's network with the stem for small images and our weights."""
    growth_rate, channels = ours.blocks[0].layers[0].conv2.out_channels, ours.stem.conv.out_channels
    options = {"num_classes": ours.classifier.out_features, "memory_efficient": memory_efficient}
    if library == "torchvision":  # timm takes 2k
        options["num_init_features"] = channels
    make = importlib.import_module(f"{library}.models.densenet").DenseNet
    model = make(growth_rate, tuple(len(block.layers) for block in ours.blocks), **options)
    model.features.conv0 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        if hasattr(model.features, name):
            setattr(model.features, name, nn.Identity())
    model.load_state_dict(ours.torchvision_state_dict())
    return model


# Suffixes of names.
CHANNELS_LAST = "-channels-last"  # in our memory format instead of torch's default
COMPILED = "-compiled"  # the same, and compiled for this shape with the fastest kernels that torch finds
# bamos/densenet.pytorch concatenates after every layer: our naive block, in contiguous memory and fp32.
MODELS = {"bamos": lambda ours: ours}
for library in ("torchvision", "timm"):
    if importlib.util.find_spec(library):
        make = functools.partial(theirs, library=library)
        MODELS |= {library + suffix: make for suffix in ("", CHANNELS_LAST, COMPILED)}
        MODELS[f"{library}-efficient"] = functools.partial(make, memory_efficient=True)
NAMES = (*BLOCKS, *MODELS)


def make_model(name, depth, device="cpu"):
    """A candidate's network in training mode, with the same weights as the others, and its memory format."""
    torch.manual_seed(0)
    model = DenseNet(depth=depth, block=name if name in BLOCKS else "naive")
    if name in MODELS:
        model = MODELS[name](model)
    ours = name in BLOCKS or name.endswith((CHANNELS_LAST, COMPILED))
    order = memory_format(device) if ours else torch.contiguous_format
    return model.to(device, memory_format=order), order


def compile_candidate(model, name):
    if name.endswith(COMPILED):  # in place: a wrapper would rename the parameters
        model.forward = torch.compile(model.forward, mode="max-autotune-no-cudagraphs", dynamic=False)


# The tasks.


def check(job, device):
    """Relative errors of a training step's results: in float64 on one batch of random images, else on several.

    Running statistics are compared for our blocks alone: torchvision's recomputation updates them twice.
    """
    exact_amp, _ = choose_precision("fp32", device)
    amp, _ = choose_precision(job["precision"], device)
    reference = make_model("naive", job["depth"])[0].double()
    model, order = make_model(job["candidate"], job["depth"], device)
    results = ("output", "gradients", "statistics") if job["candidate"] in BLOCKS else ("output", "gradients")

    def errors(reference, model, dtype, amp, seed):
        exact = trial.outcome(reference, *trial.make_images(CHECKED_IMAGES, IMAGES, seed, torch.float64), exact_amp)
        images, labels = trial.make_images(CHECKED_IMAGES, IMAGES, seed, dtype, next(model.parameters()).device)
        images = images.to(memory_format=order)
        outcome = trial.outcome(model, images, labels, amp, lambda name: rename(name, FROM_TORCHVISION))
        return trial.errors(outcome, {name: exact[name] for name in results})

    double = copy.deepcopy(model).to("cpu" if device.type == "mps" else device).double()  # MPS has no float64
    compile_candidate(model, job["candidate"])  # after the copy, which would share it
    in_double = errors(copy.deepcopy(reference), double, torch.float64, exact_amp, 0)
    trials = [errors(reference, model, torch.float32, amp, seed) for seed in range(TRIALS)]
    return {"float64": in_double, "trials": trials}


def step_functions(job, device):
    """Two functions, a training step and an inference, each on one batch that is already on the device."""
    amp, _ = choose_precision(job["precision"], device)
    model, order = make_model(job["candidate"], job["depth"], device)
    compile_candidate(model, job["candidate"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = trial.make_images(job["batch_size"], IMAGES, 1, device=device)
    images = images.to(memory_format=order)
    job["saved_mib"] = round(saved_bytes(lambda: model(images), model, amp) / 2**20, 1)
    step = (GraphedStep if job["graph"] else Step)(model, optimizer, amp, scaled=job["precision"] == "fp16")

    def train():
        model.train()
        step(images, labels, len(labels))
        if step.refused:
            raise Mistake(f"{job['candidate']} cannot be timed as a CUDA graph: {step.refused}")

    @torch.no_grad()
    def infer():
        model.eval()
        with amp():
            model(images)

    return train, infer


def saved_bytes(forward, model, amp=contextlib.nullcontext):
    """Bytes that autograd keeps between forward and backward pass, each storage once, parameters not counted."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # which lives on, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), amp():
        out = forward()
    del out
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def profile(job, device):
    """torch's table of the operations, on a GPU the kernels, that take most of a training step.

    Our loops are in SharedBuffer.
    """
    train, _ = step_functions(job, device)
    trial.seconds(train, device)  # until a CUDA graph is replayed
    with torch.profiler.profile() as profiler:
        train()
    time, rows = ("self_device_time_total", 60) if device.type == "cuda" else ("self_cpu_time_total", 10)
    return f"{job['candidate']}, {job['precision']}\n{profiler.key_averages().table(sort_by=time, row_limit=rows)}"


@command
def serve(job):
    """A candidate's process: answer each word on standard input, "train" or "infer", with seconds of a step and MiB."""
    device = choose_device(job["device"])
    if job["kernels"]:
        from fused import kernels

        kernels.PROGRAMS, kernels.IMAGES = job["kernels"]
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda" or job["candidate"] in BLOCKS:  # on a CPU, the allocator as train.py sets it up
        set_up_device(device)
    if job["task"] in ("check", "profile"):
        print(json.dumps({"check": check, "profile": profile}[job["task"]](job, device)))
        return
    train, infer = step_functions(job, device)
    print(json.dumps(job), flush=True)
    for word in sys.stdin:
        if device.type == "cuda" and not job["graph"]:  # a graph allocates only when it is captured
            torch.cuda.reset_peak_memory_stats(device)
        spent = trial.seconds({"train": train, "infer": infer}[word.strip()], device)
        print(json.dumps([spent, peak_memory_mib(device)]), flush=True)


if __name__ == "__main__":
    sys.exit(serve(json.loads(sys.argv[1])))
