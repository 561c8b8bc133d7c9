"""The recipe of a run: optimiser, learning rate, and what a step does. The defaults are the paper's (arXiv 1608.06993).

What is newer is off unless a flag asks for it; ``--recipe NAME`` stands for several flags.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.checkpoints import load_weights

RECIPES = {"modern": {"schedule": "cosine", "warmup": 5.0, "label_smoothing": 0.1, "cutout": 16, "ema": 0.999}}


def make_optimizer(args, groups):
    """The optimiser of a list of parameters, or of groups of them as torch's optimisers take them."""
    groups = list(groups)
    if args.decay == "weights":
        groups = without_decay(groups if isinstance(groups[0], dict) else [{"params": groups}])
    if args.opt == "sgd":
        momentum = {"momentum": args.momentum, "nesterov": args.nesterov}
        return torch.optim.SGD(groups, args.lr, weight_decay=args.weight_decay, **momentum)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[args.opt]
    return optimizer(groups, args.lr, weight_decay=args.weight_decay)


def without_decay(groups):
    """The same groups, each without its scales, shifts and biases, which get groups that do not decay."""
    parts = []
    for group in groups:
        for decays, change in ((True, {}), (False, {"weight_decay": 0.0})):
            params = [p for p in group["params"] if (p.ndim > 1) == decays]
            parts += [group | {"params": params} | change] if params else []
    return parts


def learning_rate(args, epoch, progress):
    """The learning rate of an epoch (from 1), at ``progress`` in [0, 1) through it."""
    done = epoch - 1 + progress
    peak = args.lr * min(1, 0.01 + 0.99 * done / args.warmup) if args.warmup else args.lr
    if args.milestones:
        return peak * args.gamma ** sum(epoch > milestone for milestone in args.milestones)
    if args.schedule == "step":  # with 300 epochs: epoch 150 is the first at a tenth, as in the paper's Lua code
        drops = (epoch >= 0.5 * args.epochs) + (epoch >= 0.75 * args.epochs)
        return peak / 10 ** (drops if epoch > 1 else 0)  # a run of one or two epochs has to learn in the first
    if args.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done / args.epochs))
    return peak


def cross_entropy(logits, labels):
    """Summed over the images."""
    return F.cross_entropy(logits, labels, reduction="sum")


def make_loss(smoothing=0.0, weights=None):
    """A loss as in Recipe: of smoothed labels (arXiv 1512.00567, section 7), classes weighted (classes,), images mixed.

    If images are mixed, each has the weight ``share`` (B,) and its partner the rest, in the loss, too (arXiv
    1710.09412, equation 2).
    """

    def loss(logits, labels, partners=None, share=None):
        def each(labels):
            return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)

        return (each(labels) if share is None else share * each(labels) + (1 - share) * each(partners)).sum()

    return loss


def balanced_weights(labels, num_classes):
    """(classes,) float32: classes weigh the same in all, and images 1 on average. 0 for a class without images."""
    counts = labels.cpu().bincount(minlength=num_classes)
    return (len(labels) / ((counts > 0).sum() * counts)).nan_to_num(posinf=0.0)


class Average:
    """An exponential moving average of the weights and running statistics of ``model``: a model, too.

    ``update`` is not for CUDA graphs: ``updates`` counts its calls on the host.
    """

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model), decay, 0
        self.own, self.followed = floating(self.model), floating(model)

    def update(self):
        """average ← d · average + (1 − d) · model; d grows to ``decay``, so that the first weights are forgotten."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.own, self.followed, None)
        self.updates += 1

    def state_dict(self):
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        load_weights(self.model, state["model"])
        self.updates = state["updates"]


def floating(model):
    """Weights and running statistics, without counts of batches."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


@dataclass(frozen=True)
class Recipe:
    """What a training step does. The defaults are the paper's.

    ``loss`` takes logits (B, classes) float32, labels (B,) and what mixup adds to a batch, and returns the summed loss.
    ``part``: images per forward and backward pass, if a batch has more. ``clip``: the largest norm of the gradient.
    ``average``: updated after each step.
    """

    loss: Callable = cross_entropy
    part: int | None = None
    clip: float | None = None
    average: Average | None = None


PAPER = Recipe()


def make_recipe(args, model, dataset, ranks):
    """The Recipe that the arguments of a run ask for."""
    loss, weights = cross_entropy, None
    if args.class_weights:
        weights = balanced_weights(dataset.train.labels, len(dataset.classes)).to(model.classifier.weight.device)
    if args.label_smoothing or args.mixup or args.class_weights:
        loss = make_loss(args.label_smoothing, weights)
    part = -(-args.batch_size // ranks) if args.accumulate > 1 else None
    return Recipe(loss, part, args.clip_grad or None, Average(model, args.ema) if args.ema else None)
