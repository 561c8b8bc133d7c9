"""Shared by several test files: data, runs and networks to test with."""

import copy
import functools
import json
import os
import subprocess
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from densenet import BLOCKS, DenseNet
from inputs.batches import ImageTensors
from training.step import GraphedStep

# batches

NORMALIZE = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def random_images(count=64, size=32, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return ImageTensors(pixels, torch.arange(count) % classes)


# files

def write_folder(root, train=3, test=2, classes=("cat", "dog"), size=(40, 20), mode="RGB"):
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", size, (60 * label, 10 * i, 200))
                image.convert(mode).save(root / split / name / f"{i}.png")
    return root


# distributed

def torchrun(ranks, script, *args, options=()):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *options, script, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process, status):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


# step

sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
no_amp = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)


class Replayed(GraphedStep):
    """With a stand-in for CUDA graphs: it knows only tensors, at the addresses of the capture, and fills them again."""

    def beside(self, function, *args):
        return function(*args)

    def capture(self, function):
        start, addresses = [tensor.clone() for tensor in self.state()], self.addresses()
        with torch.random.fork_rng([]):
            result = function()
        held = [(p, p.grad) for group in self.optimizer.param_groups for p in group["params"]]
        torch._foreach_copy_(self.state(), start)  # a capture computes nothing

        def replay():
            assert self.addresses() == addresses
            for parameter, gradient in held:
                parameter.grad = gradient
            found = function()
            for parameter, gradient in held:
                parameter.grad = gradient.copy_(parameter.grad)
            return result if result is None else result.copy_(found)

        return replay

    def addresses(self):
        return [tensor.data_ptr() for tensor in (*filter(torch.is_tensor, self.static), *self.state())]


# blocks

OTHERS = [name for name in BLOCKS if name != "naive"]


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = DenseNet(**{"depth": 16, "growth_rate": 6} | options).to(dtype)
    for module in model.modules():  # away from the initial 1 and 0, which hide some faults
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def with_block(model, block):
    model = copy.deepcopy(model)
    for module in [model, *model.blocks, *model.transitions]:
        module.block = block
    return model


def step(model, x, amp=False, seed=3):
    """Everything that a training step computes, by name."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        out = model(x)
    F.cross_entropy(out.float() if amp else out, torch.arange(len(x), device=x.device) % 10).backward()
    result = {"output": out.detach(), "input gradient": x.grad}
    result |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return result | dict(model.named_buffers())


def errors(result, exact):
    """Relative error against float64 of the output, of all gradients together and of all running statistics."""
    kinds = {}
    for name, reference in exact.items():
        kind = "gradients" if "gradient" in name else "output" if name == "output" else "statistics"
        difference, size = kinds.get(kind, (0, 0))
        value, reference = result[name].double().cpu(), reference.double().cpu()
        kinds[kind] = difference + (value - reference).square().sum(), size + reference.square().sum()
    return {kind: (difference / size).sqrt().item() for kind, (difference, size) in kinds.items()}


def assert_as_exact_as_naive(result, naive, exact):
    """The error against float64 is at most twice that of the naive block in the same precision."""
    allowed = errors(naive, exact)
    for kind, error in errors(result, exact).items():
        assert error <= 2 * allowed[kind] + 1e-6, kind


# reader

def photo(width, height, seed=0):
    """Random shapes at every scale."""
    rng, image = np.random.default_rng(seed), np.zeros((height, width, 3))
    for octave in range(3, 9):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        image += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / 2 ** (octave - 2)
    return Image.fromarray((255 * (image - image.min()) / np.ptp(image)).astype(np.uint8))


# logs

HEADER = "epoch,loss,error,lr,images_per_second,peak_memory_mib\n"


def write_ours(path, epochs=8, fine=False):
    path.mkdir(parents=True, exist_ok=True)
    log, test = HEADER, "epoch,loss,error\n"
    for epoch in range(1, epochs + 1):
        lr = 0.1 if epoch < epochs / 2 else 0.01
        if fine:
            log += f"{epoch - 0.5},{2.5 / epoch},50,{lr},,\n"
        log += f"{epoch},{2 / epoch},{40 / epoch},{lr},100,900\n"
        test += f"{epoch},{2.2 / epoch},{45 / epoch if epoch != epochs else 9.5}\n"
    (path / "train.csv").write_text(log)
    (path / "test.csv").write_text(test)
    return path


def write_bamos(path, epochs=4):
    path.mkdir()
    steps = [i / 10 for i in range(10 * epochs)]  # its epoch 1 goes from 0 to 0.9
    (path / "train.csv").write_text("".join(f"{e},{2 - e / 9},{90 - 9 * e}\n" for e in steps))
    (path / "test.csv").write_text("".join(f"{e},{1.5 / e},{60 / e}\n" for e in range(1, epochs + 1)))
    return path


def write_config(run, **arguments):
    """The config.json of a run, one of this repository's with other arguments."""
    config = json.loads((ROOT / "work/digits.bc16/config.json").read_text())
    config["arguments"] |= arguments
    (run / "config.json").write_text(json.dumps(config))
    return run


def write_seeds(folder, count=3, epochs=(5, 5, 5), **arguments):
    runs = []
    for seed in range(1, count + 1):
        run = write_config(write_ours(folder / f"sgd.{seed}", epochs=epochs[seed - 1]), seed=seed, **arguments)
        rows = "".join(f"{epoch},1,{10 * seed / epoch}\n" for epoch in range(1, epochs[seed - 1] + 1))
        (run / "test.csv").write_text("epoch,loss,error\n" + rows)
        runs.append(run)
    return runs
