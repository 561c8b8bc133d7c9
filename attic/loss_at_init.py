"""Before any training: is the loss what guessing gives, are the images normalised, does a gradient reach every layer?

Example: python attic/loss_at_init.py
         python attic/loss_at_init.py --dataset cifar10 --image-size 32 --depth 40

The loss of a guess is ln(classes). If it is more, weights or images are too large, or the logits are not what the loss
expects. The tables show, for each layer of a VGG-style network and of a DenseNet-BC, the standard deviation of its
output and the norms of the gradient by its output and by its weight, the latter relative to the weight.
"""

import math
import sys

import checks
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.console import command

LOSS = 0.5  # above or below ln(classes): about what logits of unit variance add
SPREAD = 1e3  # between the largest and the smallest number of a column


def check_images(dataset, batches):
    """Print mean and standard deviation of the normalised training images and the classes; returns the failures."""
    pixels = torch.cat([images.transpose(0, 1).flatten(1) for images, *_ in batches.in_order()], 1)  # (C, pixels)
    mean, std, counts = pixels.mean(1), pixels.std(1), dataset.train.labels.bincount(minlength=len(dataset.classes))
    print(f"images per class: {counts.min()} to {counts.max()}, in {len(counts)} classes\n")
    checks.table(["training images, normalised: mean", "deviation"], zip(mean.tolist(), std.tolist(), strict=True))
    wrong = any(dataset.normalize[0]) and not (mean.abs().max() < 0.2 and (std - 1).abs().max() < 0.2)
    return ["the images are not normalised to mean 0 and standard deviation 1"] if wrong else []


def layer_rows(model, images, labels):
    """The loss, and (name, output's deviation, norms of two gradients) of each convolution and linear layer."""
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


def check_network(name, model, images, labels, classes):
    """Print a network's loss and layers; returns the failures."""
    loss, rows = layer_rows(model.train(), images, labels)
    print(f"{name}: loss {loss:.3f}, ln({classes}) = {math.log(classes):.3f}\n")
    header = ["layer", "deviation of output", "gradient by output", "by weight, relative"]
    checks.table(header, rows)
    failures = [] if abs(loss - math.log(classes)) <= LOSS else [f"{name}: loss {loss:.3f} is not what guessing gives"]
    for column, values in zip(header[1:], list(zip(*rows, strict=True))[1:], strict=True):
        if not all(0 < value < math.inf for value in values):
            failures.append(f"{name}, {column}: not a positive number in every layer")
        elif max(values) > SPREAD * min(values):
            failures.append(f"{name}, {column}: differs by more than {SPREAD:.0f} between layers")
    return failures


@command
def main(argv=None):
    parser = checks.make_parser(__doc__)
    checks.add_data_flags(parser)
    args = checks.parse(parser, argv)
    dataset, batches = checks.load(args)
    torch.manual_seed(args.seed)
    classes = len(dataset.classes)
    vgg, densenet = (model.to(args.device) for model in (checks.vgg(classes), checks.densenet(args, classes, "naive")))
    failures = check_images(dataset, batches)
    images, labels, *_ = next(batches.shuffled(args.seed))
    images = images.contiguous()  # (N, C, H, W) in memory too, as everything was in 2017
    with checks.bug_of_2017(args.with_bug):
        failures += check_network("VGG-style network", vgg, images, labels, classes)
        failures += check_network(f"DenseNet-BC-{args.depth}", densenet, images, labels, classes)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
