"""What speed.py measures: our blocks, torchvision's, timm's and two known repositories' networks, each in a process.

A job is a dict: candidate, depth, batch_size, precision, graph, kernels (two constants of theirs, or None), device and
task: "check", "profile" or "steps". Its process prints its answer or, for the last one, one for each word it is told.
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
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from common.console import Mistake, command
from common.hardware import choose_device, choose_precision, peak_memory_mib, set_up_device
from densenet import BLOCKS, FROM_TORCHVISION, DenseNet, rename
from inputs.batches import memory_format
from training import trial
from training.step import GraphedStep, Step

CHECKED_IMAGES = 4
DRAWS = 5  # of images to check with
IMAGES = {"model": {}, "image_size": 32}  # such as trial.make_images makes


def bamos(ours):
    """bamos/densenet.pytorch concatenates after every layer: our naive block, in contiguous memory and fp32."""
    return ours


def gpleiss(ours):
    """gpleiss/efficient_densenet_pytorch: up to the first convolution, a layer runs under reentrant checkpointing.

    Its batch norms update their running statistics twice in a step.
    """
    ours.blocks = nn.ModuleList(ReentrantBlock(block.layers) for block in ours.blocks)
    return ours


class ReentrantBlock(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        outputs = [x]
        for layer in self.layers:

            def recomputed(*outputs, layer=layer):
                return layer.up_to_conv1(torch.cat(outputs, 1))

            bottleneck = checkpoint(recomputed, *outputs, use_reentrant=True) if self.training else recomputed(*outputs)
            outputs.append(layer.after_conv1(bottleneck))
        return torch.cat(outputs, 1)


def torchvision(ours, memory_efficient=False):
    from torchvision.models import DenseNet as Theirs

    channels = ours.stem.conv.out_channels
    return with_our_weights(functools.partial(Theirs, num_init_features=channels), ours, memory_efficient)


def timm(ours, memory_efficient=False):
    from timm.models.densenet import DenseNet as Theirs

    return with_our_weights(Theirs, ours, memory_efficient)


def with_our_weights(make, ours, memory_efficient):
    """Their network with the stem for small images and our weights."""
    layers = tuple(len(block.layers) for block in ours.blocks)
    growth_rate, classes = ours.blocks[0].layers[0].conv2.out_channels, ours.classifier.out_features
    theirs = make(growth_rate, layers, num_classes=classes, memory_efficient=memory_efficient)
    theirs.features.conv0 = nn.Conv2d(3, ours.stem.conv.out_channels, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        if hasattr(theirs.features, name):
            setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict(ours.torchvision_state_dict())
    return theirs


CHANNELS_LAST = "-channels-last"  # of a name: in our memory format instead of torch's default
COMPILED = "-compiled"  # the same, and compiled for this shape by the fastest kernels that torch finds
FP32_ONLY = ("bamos", "gpleiss")  # without mixed precision, as they are
MODELS = {"bamos": bamos, "gpleiss": gpleiss}
for library in (torchvision, timm):
    if importlib.util.find_spec(library.__name__):
        MODELS |= {library.__name__ + kind: library for kind in ("", CHANNELS_LAST, COMPILED)}
        MODELS[f"{library.__name__}-efficient"] = functools.partial(library, memory_efficient=True)
NAMES = (*BLOCKS, *MODELS)


def make_model(name, depth, device="cpu"):
    """A candidate's network, in training mode, with the weights that all share, and its users' memory format."""
    torch.manual_seed(0)
    model = DenseNet(depth=depth, block=name if name in BLOCKS else "naive")
    if name in MODELS:
        model = MODELS[name](model)
    ours = name in BLOCKS or name.endswith((CHANNELS_LAST, COMPILED))
    layout = memory_format(device) if ours else torch.contiguous_format
    return model.to(device, memory_format=layout), layout


def compile_candidate(model, name):
    if name.endswith(COMPILED):  # in place: a wrapper would rename the parameters
        model.forward = torch.compile(model.forward, mode="max-autotune-no-cudagraphs", dynamic=False)


# The tasks.


def check(job, device):
    """Relative errors of a training step's results: in float64 on one draw of images, else on several.

    Running statistics are compared for our blocks alone: gpleiss updates its own twice.
    """
    exact_amp, _ = choose_precision("fp32", device)
    amp, _ = choose_precision(job["precision"], device)
    reference = make_model("naive", job["depth"])[0].double()
    model, layout = make_model(job["candidate"], job["depth"], device)
    kinds = ("output", "gradients", "statistics") if job["candidate"] in BLOCKS else ("output", "gradients")

    def errors(reference, model, dtype, amp, seed):
        exact = trial.outcome(reference, *trial.make_images(CHECKED_IMAGES, IMAGES, seed, torch.float64), exact_amp)
        images, labels = trial.make_images(CHECKED_IMAGES, IMAGES, seed, dtype, next(model.parameters()).device)
        images = images.to(memory_format=layout)
        found = trial.outcome(model, images, labels, amp, lambda name: rename(name, FROM_TORCHVISION))
        return trial.errors(found, {kind: exact[kind] for kind in kinds})

    double = copy.deepcopy(model).to("cpu" if device.type == "mps" else device).double()  # which MPS has not
    compile_candidate(model, job["candidate"])  # which a copy would share
    in_double = errors(copy.deepcopy(reference), double, torch.float64, exact_amp, 0)
    draws = [errors(reference, model, torch.float32, amp, seed) for seed in range(DRAWS)]
    return {"float64": in_double, "draws": draws}


def step_functions(job, device):
    """Two functions, a training step and an inference, each on one batch that is on the device already."""
    amp, _ = choose_precision(job["precision"], device)
    model, layout = make_model(job["candidate"], job["depth"], device)
    compile_candidate(model, job["candidate"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = trial.make_images(job["batch_size"], IMAGES, 1, device=device)
    images = images.to(memory_format=layout)
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
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor lives on, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), amp():
        out = forward()
    del out
    return sum(size for size, _ in kept.values())


def profile(job, device):
    """torch's table of what takes most of a training step, on a GPU of all kernels; our loops are in SharedBuffer."""
    train, _ = step_functions(job, device)
    trial.seconds(train, device)  # until a CUDA graph is replayed
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        train()
    time, rows = ("self_device_time_total", 60) if device.type == "cuda" else ("self_cpu_time_total", 10)
    return f"{job['candidate']}, {job['precision']}\n{profiler.key_averages().table(sort_by=time, row_limit=rows)}"


@command
def serve(job):
    """A candidate's process: answers each word on its standard input, "train" or "infer", with seconds and MiB.

    On a GPU a word means several steps, of which one alone would be too short to time; the seconds are those of one.
    """
    device = choose_device(job["device"])
    if job["kernels"]:
        from fused import kernels

        kernels.PROGRAMS, kernels.IMAGES = job["kernels"]
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda" or job["candidate"] not in MODELS:  # on a CPU, the allocator as train.py sets it up
        set_up_device(device)
    if job["task"] in ("check", "profile"):
        print(json.dumps({"check": check, "profile": profile}[job["task"]](job, device)))
        return
    train, infer = step_functions(job, device)
    print(json.dumps(job), flush=True)
    for word in sys.stdin:
        if device.type == "cuda" and not job["graph"]:  # which allocates only when it is captured
            torch.cuda.reset_peak_memory_stats(device)
        spent = trial.seconds({"train": train, "infer": infer}[word.strip()], device)
        print(json.dumps([spent, peak_memory_mib(device)]), flush=True)


if __name__ == "__main__":
    sys.exit(serve(json.loads(sys.argv[1])))
