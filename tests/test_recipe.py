"""The recipe once more, in plain PyTorch and float64: train.py must end with the same parameters, statistics and logs.

It is written from the paper (arXiv 1608.06993), README.md and the formulas of the optimisers, and shares nothing with
train.py but the network. Every draw of an epoch comes from the seed --seed·1,000,003 + epoch.
"""

import copy
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from densenet import DenseNet

PAPER = dict(opt="sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, crop_fill="mean", drop_rate=0.0, bottleneck=True)
RATES = {"sgd": dict(lr=0.1, schedule="step"), "adam": dict(lr=0.001, schedule="constant"), "rmsprop": dict(schedule="constant")}

# Batches of 5, 5 and 3 images. Where the input of a ReLU is nearly 0, rounding decides whether its gradient passes, and
# the runs part: few images have few such inputs, and with this seed none is within 5e-6 of 0 in any case below.
SMALL = dict(augment=True, epochs=2, batch_size=5, limit_train=13, seed=32)
# Parameters and statistics are about 1, and float32 rounds them to 6e-8. In these 4 to 16 steps that grows to at most
# 1.2e-6, with each of torch's instruction sets; the slightest fault, an ε of 1e-7, costs 4e-4. The log has 6 decimals.
TOLERANCE = 1e-5


def digits(fill):
    """All training images, normalised, with 4 pixels of border (1437, 1, 16, 16), and their labels."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    train, _ = train_test_split(range(1797), test_size=360, random_state=0)
    x = (images[train] * (255 / 16)).round().view(-1, 1, 8, 8)
    mean, std = x.mean(), x.std(correction=0)
    return F.pad((x - mean) / std, (4, 4, 4, 4), value=0.0 if fill == "mean" else float(-mean / std)), labels[train]


def batches_of(epoch, x, labels, o):
    """Batches of images (B, 3, 8, 8) and labels, shuffled and augmented."""
    n = o.limit_train
    random = torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=random)
    shifts, mirrored = torch.randint(-4, 5, (n, 2), generator=random), torch.randint(0, 2, (n,), generator=random)
    if not o.augment:
        shifts, mirrored = torch.zeros_like(shifts), torch.zeros_like(mirrored)
    crops = [x[i, :, 4 + dy : 12 + dy, 4 + dx : 12 + dx] for i, (dy, dx) in zip(order, shifts.tolist(), strict=True)]
    crops = torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirrored, strict=True)])
    return list(zip(crops.expand(-1, 3, -1, -1).split(o.batch_size), labels[order].split(o.batch_size), strict=True))


def learning_rate(o, epoch, part):
    """``part`` is the share of the epoch that is over."""
    if o.schedule == "step":
        return o.lr * (0.01 if epoch >= 0.75 * o.epochs else 0.1 if epoch >= 0.5 * o.epochs else 1)
    return o.lr / 2 * (1 + math.cos(math.pi * (epoch - 1 + part) / o.epochs)) if o.schedule == "cosine" else o.lr


def update(w, state, t, lr, o):
    """Step t, from 1, of one parameter; ``state`` keeps its two moving averages, m and v."""
    g = w.grad + o.weight_decay * w
    m, v = state.get(w, (0, 0))
    if o.opt == "sgd":
        m = o.momentum * m + g
        change = g + o.momentum * m if o.nesterov else m
    elif o.opt == "adam":
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        change = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    else:
        v = 0.99 * v + 0.01 * g**2
        change = g / (v.sqrt() + 1e-8)
    state[w] = m, v
    w -= lr * change


def recipe(options, ranks=1):
    """The network's state and the rows (loss, error) of train.csv after ``options``, as ``ranks`` processes get there."""
    o = SimpleNamespace(**PAPER | SMALL | RATES[options.get("opt", "sgd")] | options)
    torch.manual_seed(o.seed)
    model = DenseNet(depth=10, growth_rate=4, bottleneck=o.bottleneck, drop_rate=o.drop_rate, block="naive")
    model.to(torch.float64, memory_format=torch.channels_last)  # in which dropout masks are drawn
    weights = list(model.parameters())
    models = [copy.deepcopy(model, {id(w): w for w in weights}) for _ in range(ranks)]  # shared weights, own statistics
    images, labels = digits(o.crop_fill)
    state, rows, t = {}, [], 0
    for epoch in range(1, o.epochs + 1):
        masks = [torch.manual_seed(o.seed * 1_000_003 + epoch + 2_654_435_761 * rank).get_state() for rank in range(ranks)]
        batches = batches_of(epoch, images, labels, o)
        loss_sum = wrong = 0
        for i, (x, y) in enumerate(batches):
            model.zero_grad()
            for rank in range(ranks):
                torch.set_rng_state(masks[rank])
                logits = models[rank](x[rank::ranks].contiguous(memory_format=torch.channels_last))
                masks[rank] = torch.get_rng_state()
                loss = F.cross_entropy(logits, y[rank::ranks], reduction="sum")
                (loss / len(y)).backward()
                loss_sum += loss.item()
                wrong += (logits.argmax(1) != y[rank::ranks]).sum().item()
            t += 1
            with torch.no_grad():
                for w in weights:
                    update(w, state, t, learning_rate(o, epoch, i / len(batches)), o)
        rows.append((loss_sum / o.limit_train, 100 * wrong / o.limit_train))
        for statistics in zip(*(model.buffers() for model in models), strict=True):
            mean = sum(statistics) / ranks
            for statistic in statistics:
                statistic.copy_(mean)
    return models[0].state_dict(), rows


CONSTANT = dict(schedule="constant")
CASES = [
    {},
    dict(epochs=8, limit_train=8, lr=0.03),  # lr in epochs 1 to 3, lr/10 in 4 and 5, lr/100 from 6 on
    dict(schedule="cosine"),
    CONSTANT,
    CONSTANT | dict(nesterov=False),
    CONSTANT | dict(momentum=0.5),
    CONSTANT | dict(momentum=0.0, nesterov=False),
    CONSTANT | dict(weight_decay=0.02),
    CONSTANT | dict(weight_decay=0.02, nesterov=False),
    CONSTANT | dict(crop_fill="black"),
    CONSTANT | dict(augment=False),
    CONSTANT | dict(limit_train=10),  # whole batches
    CONSTANT | dict(seed=16),
    CONSTANT | dict(drop_rate=0.2, block="naive"),
    CONSTANT | dict(bottleneck=False),
    dict(opt="adam"),
    dict(opt="adam", weight_decay=0.02, schedule="step"),
    dict(opt="adam", lr=0.01, schedule="cosine"),
    # RMSprop's first step is 10·lr·sign(g): a small lr, since rounding decides the sign of the smallest gradients.
    dict(opt="rmsprop", lr=1e-4),
    dict(opt="rmsprop", lr=1e-4, weight_decay=0.1),
    dict(opt="rmsprop", lr=1e-4, schedule="cosine"),
]


def name(options):
    return " ".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def flags(options):
    for key, value in (SMALL | options).items():
        flag = key.replace("_", "-")
        yield from [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    yield from "--precision fp32 --limit-test 10 --save run".split()


def assert_follows(state, rows):
    found = torch.load("run/latest.pth", weights_only=True)["model"]
    torch.testing.assert_close(found, state, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
    log = pd.read_csv("run/train.csv")
    assert log["loss"].tolist() == pytest.approx([loss for loss, _ in rows], abs=TOLERANCE)
    assert log["error"].tolist() == pytest.approx([error for _, error in rows], abs=1e-4)


@pytest.mark.parametrize("options", CASES, ids=name)
def test_one_process(tiny, options):
    assert tiny(*flags(options)) == 0
    assert_follows(*recipe(options))


def test_two_processes():
    """Shares of 3 and 2 images, in the last batch of 2 and 1; the running statistics are the mean of both processes'."""
    options = CONSTANT | dict(drop_rate=0.2, block="naive", weight_decay=0.02)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "train.py", *TINY, *flags(options), "--no-plot"]
    process = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert_follows(*recipe(options, ranks=2))
