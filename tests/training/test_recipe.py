"""The recipe once more, in plain PyTorch and float64: train.py must end with the same parameters, statistics and logs.

It is written from the paper (arXiv 1608.06993), README.md and the formulas of the optimisers and of newer recipes, and
shares only the network with train.py. All random numbers of an epoch come from the seed --seed·1,000,003 + epoch.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from helpers import finished, torchrun
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from densenet import DenseNet

PAPER = dict(opt="sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, crop_fill="mean", drop_rate=0.0, bottleneck=True)
OFF = dict(label_smoothing=0, cutout=0, mixup=0, warmup=0, ema=0, decay="all", accumulate=1, clip_grad=0, class_weights=None, head_lr=0, flip="horizontal", shift=4, milestones=())
ADAM = dict(lr=0.001, schedule="constant")
RATES = {"sgd": dict(lr=0.1, schedule="step"), "adam": ADAM, "adamw": ADAM | dict(weight_decay=0.01), "rmsprop": dict(schedule="constant")}

# Batches of 5, 5 and 3 images. Where the input of a ReLU is nearly 0, rounding decides whether its gradient passes, and
# the runs part: few images have few such inputs, and with this seed none is within 5e-6 of 0 in any case below.
SMALL = dict(augment=True, epochs=2, batch_size=5, limit_train=13, seed=32)
# Parameters and statistics are about 1, and float32 rounds them to 6e-8. In these 4 to 16 steps that grows to at most
# 1.2e-6, with each of torch's instruction sets; the slightest fault, an ε of 1e-7, costs 4e-4. The log has 6 decimals.
TOLERANCE = 1e-5


def digits(fill):
    """Training images, normalised, with 4 pixels of border (1437, 1, 16, 16), their labels, what fills the border; nine for a test."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    train, test = train_test_split(range(1797), test_size=360, random_state=0)
    images = (images * (255 / 16)).round().view(-1, 1, 8, 8)
    mean, std = images[train].mean(), images[train].std(correction=0)
    value, x = 0.0 if fill == "mean" else float(-mean / std), (images - mean) / std
    return F.pad(x[train], (4, 4, 4, 4), value=value), labels[train], value, (x[test[:9]].expand(-1, 3, -1, -1), labels[test[:9]])


def batches_of(epoch, x, labels, value, o):
    """Images (B, 3, 8, 8), labels (B,) and targets (B, 10) of each update, shuffled, augmented, cut out and mixed."""
    n = o.limit_train
    random = torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=random)
    shifts = torch.randint(-o.shift, o.shift + 1, (n, 2), generator=random) * o.augment
    crops = [x[i, :, 4 + dy : 12 + dy, 4 + dx : 12 + dx] for i, (dy, dx) in zip(order, shifts.tolist(), strict=True)]
    for axis in {"horizontal": [2], "vertical": [1], "both": [2, 1], "none": []}[o.flip if o.augment else "none"]:
        mirrored = torch.randint(0, 2, (n,), generator=random)
        crops = [crop.flip(axis) if flip else crop for crop, flip in zip(crops, mirrored, strict=True)]
    crops = torch.stack(crops)
    y = labels[order]
    targets = F.one_hot(y, 10).double()
    if o.cutout:
        corners = torch.stack([torch.randint(8, (n,), generator=random) for _ in "yx"], 1) - o.cutout // 2
        for image, (top, left) in zip(crops, corners.tolist(), strict=True):
            image[:, max(0, top) : max(0, top + o.cutout), max(0, left) : max(0, left + o.cutout)] = value
    if o.mixup:
        partner = torch.randperm(n, generator=random)
        share = np.random.default_rng(int(torch.randint(2**62, (), generator=random))).beta(o.mixup, o.mixup, n)
        share = torch.tensor(np.maximum(share, 1 - share))
        crops = share.view(-1, 1, 1, 1) * crops + (1 - share).view(-1, 1, 1, 1) * crops[partner]
        targets = share[:, None] * targets + (1 - share)[:, None] * targets[partner]
    targets = (1 - o.label_smoothing) * targets + o.label_smoothing / 10
    if o.class_weights:
        counts = labels[:n].bincount(minlength=10)
        targets *= torch.tensor([n / (counts.count_nonzero().item() * c) if c else 0 for c in counts.tolist()])
    return list(zip(*(part.split(o.batch_size * o.accumulate) for part in (crops.expand(-1, 3, -1, -1), y, targets)), strict=True))


def learning_rate(o, epoch, part):
    """After the fraction ``part`` of an epoch."""
    peak = o.lr * min(1, 0.01 + 0.99 * (epoch - 1 + part) / o.warmup) if o.warmup else o.lr
    if o.milestones:
        return peak * o.gamma ** len([milestone for milestone in o.milestones if milestone < epoch])
    if o.schedule == "step":
        return peak * (1 if epoch == 1 else 0.01 if epoch >= 0.75 * o.epochs else 0.1 if epoch >= 0.5 * o.epochs else 1)
    return peak / 2 * (1 + math.cos(math.pi * (epoch - 1 + part) / o.epochs)) if o.schedule == "cosine" else peak


def update(w, state, t, lr, o):
    """Step t, from 1, of one parameter; ``state`` keeps its two moving averages, m and v."""
    decay = o.weight_decay if o.decay == "all" or w.ndim > 1 else 0
    g = w.grad + (0 if o.opt == "adamw" else decay * w)
    m, v = state.get(w, (0, 0))
    if o.opt == "sgd":
        m = o.momentum * m + g
        change = g + o.momentum * m if o.nesterov else m
    elif o.opt in ("adam", "adamw"):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        change = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + (decay * w if o.opt == "adamw" else 0)
    else:
        v = 0.99 * v + 0.01 * g**2
        change = g / (v.sqrt() + 1e-8)
    state[w] = m, v
    w -= lr * change


def recipe(options, ranks=1):
    """State of the network and of its average, and the rows (loss, error) of train.csv and test.csv's last, by ``ranks`` processes."""
    opt = options.get("opt", "sgd")
    o = SimpleNamespace(**PAPER | OFF | SMALL | RATES[opt] | options)
    torch.manual_seed(o.seed)
    model = DenseNet(depth=10, growth_rate=4, bottleneck=o.bottleneck, drop_rate=o.drop_rate, block="naive")
    model.to(torch.float64, memory_format=torch.channels_last)  # in which dropout masks are drawn
    weights, head = list(model.parameters()), {*model.classifier.parameters()} if o.head_lr else ()
    models = [copy.deepcopy(model, {id(w): w for w in weights}) for _ in range(ranks)]  # shared weights, own statistics
    averages = [copy.deepcopy(model) for _ in range(ranks)]
    *images_and_labels, value, (test_images, test_labels) = digits(o.crop_fill)
    state, rows, t = {}, [], 0
    for epoch in range(1, o.epochs + 1):
        masks = [torch.manual_seed(o.seed * 1_000_003 + epoch + 2_654_435_761 * rank).get_state() for rank in range(ranks)]
        batches = batches_of(epoch, *images_and_labels, value, o)
        loss_sum = wrong = 0
        for i, batch in enumerate(batches):
            model.zero_grad()
            for rank in range(ranks):
                torch.set_rng_state(masks[rank])
                counted = rank < len(batch[0])  # where none is left, the first image of the epoch keeps a rank in step
                share = [part[rank::ranks] for part in batch] if counted else [part[:1] for part in batches[0]]
                passes = math.ceil(len(share[0]) / math.ceil(o.batch_size / ranks))
                for x, y, target in zip(*(part.tensor_split(passes) for part in share), strict=True):
                    logits = models[rank](x.contiguous(memory_format=torch.channels_last))
                    (-counted * (target * logits.log_softmax(1)).sum() / len(batch[0])).backward()
                    loss_sum += counted * F.cross_entropy(logits, y, reduction="sum").item()
                    wrong += counted * (logits.argmax(1) != y).sum().item()
                masks[rank] = torch.get_rng_state()
            ema = min(o.ema, (1 + t) / (10 + t))
            t += 1
            with torch.no_grad():
                if o.clip_grad:
                    norm = sum(w.grad.square().sum() for w in weights).sqrt()
                    for w in weights:
                        w.grad *= min(1, o.clip_grad / norm)
                for w in weights:
                    factor = o.head_lr / o.lr if w in head else 1
                    update(w, state, t, factor * learning_rate(o, epoch, i / len(batches)), o)
                for average, followed in zip(averages, models, strict=True):
                    for a, b in zip(average.state_dict().values(), followed.state_dict().values(), strict=True):
                        a.copy_(ema * a + (1 - ema) * b)
        rows.append((loss_sum / o.limit_train, 100 * wrong / o.limit_train))
        for statistics in [*zip(*(m.buffers() for m in models), strict=True), *zip(*(m.buffers() for m in averages), strict=True)]:
            mean = sum(statistics) / ranks
            for statistic in statistics:
                statistic.copy_(mean)
    with torch.no_grad():
        logits = models[0].eval()(test_images.contiguous(memory_format=torch.channels_last))
    rows.append((F.cross_entropy(logits, test_labels).item(), 100 * (logits.argmax(1) != test_labels).double().mean().item()))
    return models[0].state_dict(), averages[0].state_dict(), rows


CONSTANT = dict(schedule="constant")
CASES = [
    {},
    dict(epochs=8, limit_train=8, lr=0.03),  # lr in epochs 1 to 3, lr/10 in 4 and 5, lr/100 from 6 on
    dict(epochs=4, limit_train=8, milestones=[1, 3], gamma=0.3),
    dict(schedule="cosine", head_lr=0.3),
    CONSTANT | dict(nesterov=False, momentum=0.5),
    CONSTANT | dict(momentum=0.0, nesterov=False),
    CONSTANT | dict(weight_decay=0.02),
    CONSTANT | dict(crop_fill="black"),
    CONSTANT | dict(augment=False),
    CONSTANT | dict(flip="both", shift=2),
    CONSTANT | dict(flip="vertical", crop_fill="black", cutout=3),
    CONSTANT | dict(flip="none", limit_train=10),  # whole batches
    CONSTANT | dict(drop_rate=0.2, block="naive"),
    CONSTANT | dict(bottleneck=False),
    dict(opt="adam", weight_decay=0.02, schedule="step"),
    # RMSprop's first step is 10·lr·sign(g): a small lr, since rounding decides the sign of the smallest gradients.
    dict(opt="rmsprop", lr=1e-4, weight_decay=0.1),
    CONSTANT | dict(mixup=1.0, cutout=3, label_smoothing=0.1, class_weights="balanced"),
    dict(warmup=1.5, schedule="cosine"),
    CONSTANT | dict(ema=0.2),
    CONSTANT | dict(decay="weights", weight_decay=0.02),
    dict(opt="adamw", decay="weights", weight_decay=0.1, head_lr=0.003),
    CONSTANT | dict(accumulate=2),
    CONSTANT | dict(clip_grad=0.5),
]


def flags(options):
    for key, value in (SMALL | options).items():
        flag = key.replace("_", "-")
        values = map(str, value if isinstance(value, list) else [value])
        yield from [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", *values]
    yield from "--precision fp32 --limit-test 9 --save run".split()


def assert_follows(state, average, rows):
    found = torch.load("run/latest.pth", weights_only=True)
    torch.testing.assert_close(found["model"], state, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
    if "ema" in found:
        averaged = {name: value for name, value in average.items() if value.is_floating_point()}
        found = {name: found["ema"]["model"][name] for name in averaged}
        torch.testing.assert_close(found, averaged, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=False)
    log = pd.concat([pd.read_csv("run/train.csv"), pd.read_csv("run/test.csv").tail(1)])
    assert log["loss"].tolist() == pytest.approx([loss for loss, _ in rows], abs=TOLERANCE)
    assert log["error"].tolist() == pytest.approx([error for _, error in rows], abs=1e-4)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_one_process(tiny, options):
    assert tiny(*flags(options)) == 0
    assert_follows(*recipe(options))


@pytest.mark.parametrize("limit_train", [13, 11])
def test_two_processes(limit_train):
    """Shares of 5 images in passes of 3 and 2, in the last update of 2 and 1, or 1 and 0; statistics are the mean of both processes'.

    Of the test images, one has five, the other four.
    """
    options = dict(milestones=[1], gamma=0.5, flip="both", shift=2, drop_rate=0.2, block="naive", weight_decay=0.02, limit_train=limit_train)
    options |= dict(label_smoothing=0.1, cutout=3, mixup=0.5, ema=0.2, accumulate=2, clip_grad=0.5, class_weights="balanced")
    finished(torchrun(2, str(ROOT / "train.py"), *TINY, *flags(options), "--no-plot"), 0)
    assert_follows(*recipe(options, ranks=2))
