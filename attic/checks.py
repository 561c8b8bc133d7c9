"""What the scripts of this folder share: the way to the repository's modules, a bug to be found, tables and verdicts.

Example: python attic/numcheck_grads.py --with-bug
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts run from anywhere


def make_parser(name, doc):
    """A parser with the flags of every script; ``name`` is the script's, ``doc`` its docstring."""
    from common.console import Parser

    parser = Parser(prog=name, description=doc)
    parser.add_argument("--seed", type=int, default=1, help="of weights and inputs (default: %(default)s)")
    parser.add_argument("--with-bug", action="store_true", help="emulate the bug of 2017: can this check see it?")
    return parser


def add_device_flag(parser):
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")


def device_of(args):
    """The torch.device of the arguments, set up. Raises Mistake where this machine lacks it."""
    from common.hardware import choose_device, set_up_device

    device = choose_device(args.device)
    set_up_device(device)
    return device


def add_data_flags(parser):
    from inputs.datasets import DATASETS

    add_device_flag(parser)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="digits needs no download (default: %(default)s)")
    add("--data", metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
    add("--image-size", type=int, default=16, metavar="N", help="pixels; digits and folder (default: %(default)s)")
    add("--batch-size", type=int, default=64, metavar="N", help="images (default: %(default)s)")
    add("--depth", type=int, default=22, metavar="L", help="of the DenseNet-BC: 6n + 4 (default: %(default)s)")


def load(args, device):
    """The data set and its training batches, not augmented. Raises Mistake where there is none."""
    from common.console import Mistake
    from inputs import datasets
    from inputs.image import Reader

    if args.batch_size < 2:
        raise Mistake(f"--batch-size {args.batch_size}: batch norm needs at least 2 images")
    reader = Reader(args.image_size, progress=sys.stderr.isatty())
    dataset = datasets.load(args.dataset, args.data, reader).to(device)
    return dataset, dataset.train.batches(args.batch_size, dataset.normalize)


def cuda():
    """["cuda"] where there is a GPU; else [], after a line that says so."""
    if torch.cuda.is_available():
        return ["cuda"]
    print("no CUDA GPU here: what needs one is skipped")
    return []


class ReadAsOutput(torch.autograd.Function):
    """Identity whose gradient is read with the strides of the output, whatever its own are.

    So did PyTorch's cuDNN convolution until February 2017. The gradient that cat hands back to one of its inputs is a
    slice of a wider tensor; read as if it were dense, every image but the first comes from the wrong place.
    """

    @staticmethod
    def forward(ctx, output):
        ctx.strides = output.stride()
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.as_strided(gradient.shape, ctx.strides, gradient.storage_offset())


@contextlib.contextmanager
def bug_of_2017(on=True):
    """Within this context every convolution that autograd differentiates has the bug."""
    right = F.conv2d
    if on:
        F.conv2d = lambda *args, **options: ReadAsOutput.apply(right(*args, **options))
    try:
        yield
    finally:
        F.conv2d = right


def randomize_norms(model):
    """Move batch norms away from the initial 1 and 0, where some mistakes cannot be seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def vgg(classes):
    """A small VGG-style network: 3×3 convolutions and max-pooling, nothing concatenated."""
    layers, channels = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def densenet(args, classes, block):
    """The DenseNet-BC (k = 12) of the arguments. Raises Mistake where the depth is impossible."""
    from common.console import Mistake
    from densenet import DenseNet

    try:
        return DenseNet(depth=args.depth, num_classes=classes, block=block)
    except ValueError as error:
        raise Mistake(f"--{error}") from error


def relative(value, reference):
    """|value − reference| / |reference|, over all tensors of two lists, in float64."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(value, reference, strict=True)]
    difference = sum((a - b).square().sum() for a, b in pairs)
    size = sum(b.square().sum() for _, b in pairs)
    return (difference / size).sqrt().item() if size > 0 else difference.sqrt().item()


def norm(tensors):
    return sum(t.double().square().sum() for t in tensors).sqrt().item()


def table(header, rows):
    """Print rows of strings and floats under a header: the first column to the left, the others to the right."""
    rows = [[cell if isinstance(cell, str) else f"{cell:.2e}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    print()


def verdict(failures):
    """Print what failed, one line each, and the verdict; returns the exit status."""
    for failure in failures:
        print(f"FAILED: {failure}")
    print("verdict: failed" if failures else "verdict: passed")
    return 1 if failures else 0
