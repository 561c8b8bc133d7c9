"""Before any training: is the loss what guessing gives, are the images normalised, does a gradient reach every layer?

Example: python attic/loss_at_init.py
         python attic/loss_at_init.py --dataset cifar10 --image-size 32 --depth 40

The loss of a guess is ln(classes). If it is more, weights or images are too large, or the logits are not what the loss
expects. The table shows, for each layer of a DenseNet-BC, the standard deviation of its output and the norms of the
gradient by its output and by its weight, the latter relative to the weight.
"""

import math
import sys

import checks
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.console import command
from densenet import DenseNet

LOSS = 0.5  # above or below ln(classes): about what logits of unit variance add
SPREAD = 1e3  # between the largest and the smallest number of a column
HEADER = ("layer", "deviation of output", "gradient by output", "by weight, relative")


def check_images(dataset, batches):
    """Print mean and standard deviation of the normalised training images and the classes; returns the failures."""
    pixels = torch.cat([images.transpose(0, 1).flatten(1) for images, *_ in batches.in_order()], 1)  # (C, pixels)
    mean, std, counts = pixels.mean(1), pixels.std(1), dataset.train.labels.bincount(minlength=len(dataset.classes))
    print(f"images per class: {counts.min()} to {counts.max()}, in {len(counts)} classes\n")
    checks.table(["training images, normalised: mean", "deviation"], zip(mean.tolist(), std.tolist(), strict=True))
    wrong = any(dataset.normalize[0]) and not (mean.abs().max() < 0.2 and (std - 1).abs().max() < 0.2)
    return ["the images are not normalised to mean 0 and standard deviation 1"] if wrong else []


def check_layers(model, images, labels):
    """The loss of a batch, and a row of HEADER for each convolution and linear layer."""
    layers = {module: name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    outputs, rows = {}, []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs[module] = output

    for module in layers:
        module.register_forward_hook(keep)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for module, output in outputs.items():
        by_output, by_weight = (0.0 if t.grad is None else t.grad.norm().item() for t in (output, module.weight))
        rows.append([layers[module], output.std().item(), by_output, by_weight / module.weight.norm().item()])
    return loss.item(), rows


@command
def main(argv=None):
    args = checks.parse(checks.make_parser(__doc__, data=True), argv)
    dataset, batches = checks.load(args)
    failures, guess = check_images(dataset, batches), math.log(len(dataset.classes))
    images, labels, *_ = next(batches.shuffled(args.seed))
    images = images.contiguous()  # (N, C, H, W) in memory too, as everything was in 2017
    torch.manual_seed(args.seed)
    model = DenseNet(depth=args.depth, num_classes=len(dataset.classes)).to(args.device)
    with checks.bug_of_2017(args.with_bug):
        loss, rows = check_layers(model, images, labels)
    print(f"DenseNet-BC-{args.depth}: loss {loss:.3f}, ln({len(dataset.classes)}) = {guess:.3f}\n")
    checks.table(HEADER, rows)
    if not abs(loss - guess) <= LOSS:
        failures.append(f"loss {loss:.3f} is not what guessing gives")
    for column, values in list(zip(HEADER, zip(*rows, strict=True), strict=True))[1:]:
        if not all(0 < value < math.inf for value in values):
            failures.append(f"{column}: not a positive number in every layer")
        elif max(values) > SPREAD * min(values):
            failures.append(f"{column}: differs by more than {SPREAD:.0f} between layers")
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
