"""What the scripts of this folder share: flags, data, networks, the bug of 2017, tables and verdicts."""

import contextlib
import itertools
import sys
from pathlib import Path

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts run from anywhere

from common.console import Mistake, Parser, between
from common.hardware import choose_device, set_up_device
from densenet import DenseNet
from inputs import datasets
from inputs.image import Reader


def make_parser(doc):
    """A parser with the flags of every script; ``doc`` is the script's docstring."""
    parser = Parser(description=doc)
    add = parser.add_argument
    add("--seed", type=int, default=1, help="of weights and inputs (default: %(default)s)")
    add("--with-bug", action="store_true", help="emulate the bug of 2017: can this check see it?")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    return parser


def add_data_flags(parser):
    add, several = parser.add_argument, between(2, 10**9, int)  # images, as batch norm needs
    add("--dataset", choices=datasets.DATASETS, default="digits", help="(default: %(default)s)")
    add("--data", metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
    add("--image-size", type=int, default=16, metavar="N", help="pixels; digits and folder (default: %(default)s)")
    add("--batch-size", type=several, default=64, metavar="N", help="images (default: %(default)s)")
    add("--depth", type=int, default=22, metavar="L", help="of the DenseNet-BC: 6n + 4 (default: %(default)s)")


def parse(parser, argv):
    """Arguments, with ``device`` as a torch.device, set up. Raises Mistake if this machine lacks it."""
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    set_up_device(args.device)
    return args


def devices(args):
    """The CPU and, if it is chosen, the GPU: those that compute in float64."""
    return ("cpu", "cuda") if args.device.type == "cuda" else ("cpu",)


def load(args):
    """The data set and its training batches, not augmented. Raises Mistake if there is none."""
    dataset = datasets.load(args.dataset, args.data, Reader(args.image_size)).to(args.device)
    return dataset, dataset.train.batches(args.batch_size, dataset.normalize)


def densenet(args, classes, block):
    """The DenseNet-BC (k = 12) of the arguments. Raises Mistake if the depth is impossible."""
    try:
        return DenseNet(depth=args.depth, num_classes=classes, block=block)
    except ValueError as error:
        raise Mistake(f"--{error}") from error


def vgg(classes):
    """A small VGG-style network: 3×3 convolutions and max-pooling, nothing concatenated."""
    layers = []
    for channels, width in itertools.pairwise((3, 32, 64, 128)):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def randomize_norms(model):
    """Move batch norms away from the initial 1 and 0, where some mistakes cannot be seen."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    return model


class ReadAsOutput(torch.autograd.Function):
    """Identity that reads its gradient with the strides of the output, as PyTorch's cuDNN convolution did in 2017."""

    @staticmethod
    def forward(ctx, output):
        ctx.strides = output.stride()
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.as_strided(gradient.shape, ctx.strides, gradient.storage_offset())


@contextlib.contextmanager
def bug_of_2017(on=True):
    """In this context every convolution that autograd differentiates has the bug."""
    right = F.conv2d
    if on:
        F.conv2d = lambda *args, **options: ReadAsOutput.apply(right(*args, **options))
    try:
        yield
    finally:
        F.conv2d = right


def table(header, rows):
    """Print rows of strings and floats under a header."""
    print(pd.DataFrame(rows, columns=header).to_string(index=False, float_format="{:.2e}".format), end="\n\n")


def verdict(failures):
    """Print what failed, one line each, and the verdict; returns the exit status."""
    for failure in failures:
        print(f"FAILED: {failure}")
    print("verdict: failed" if failures else "verdict: passed")
    return 1 if failures else 0
