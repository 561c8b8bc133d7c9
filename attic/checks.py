"""What the scripts of this folder share: arguments, data, the bug of 2017, tables and verdicts."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts run from anywhere

from common.console import Parser, between
from common.hardware import choose_device, set_up_device
from inputs import datasets
from inputs.image import Reader


def make_parser(doc, data=False):
    """A parser with the flags of every script and, with ``data``, those of scripts that train on images."""
    parser = Parser(description=doc)
    add, images = parser.add_argument, between(2, 10**9, int)  # batch norm needs several
    add("--seed", type=int, default=1, help="of weights and inputs (default: %(default)s)")
    add("--with-bug", action="store_true", help="emulate the bug of 2017: can this check see it?")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    if data:
        add("--dataset", choices=datasets.DATASETS, default="digits", help="(default: %(default)s)")
        add("--data", metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
        add("--image-size", type=int, default=16, metavar="N", help="pixels; digits and folder (default: %(default)s)")
        add("--batch-size", type=images, default=64, metavar="N", help="images (default: %(default)s)")
        add("--depth", type=int, choices=range(10, 251, 6), default=22, metavar="L", help="(default: %(default)s)")
    return parser


def parse(parser, argv, float64=False):
    """Arguments, with ``device`` as a torch.device, set up. Raises Mistake if this machine lacks it."""
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    args.device = torch.device("cpu") if float64 and device.type == "mps" else device  # MPS has no float64
    set_up_device(args.device)
    torch.manual_seed(args.seed)
    return args


def load(args):
    """The data set and its training batches, not augmented. Raises Mistake if there is none."""
    dataset = datasets.load(args.dataset, args.data, Reader(args.image_size)).to(args.device)
    return dataset, dataset.train.batches(args.batch_size, dataset.normalize)


def randomize_norms(model):
    """Move batch norms away from the initial 1 and 0, where some faults cannot be seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
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


def bug_of_2017(on=True):
    """A context in which every convolution that autograd differentiates has the bug."""
    right = F.conv2d
    wrong = mock.patch.object(F, "conv2d", lambda *args, **options: ReadAsOutput.apply(right(*args, **options)))
    return wrong if on else contextlib.nullcontext()


def table(header, rows):
    """Print rows of strings and floats under a header."""
    print(pd.DataFrame(rows, columns=header).to_string(index=False, float_format="{:.2e}".format), end="\n\n")


def verdict(failures):
    """Print what failed, one line each, and the verdict; returns the exit status."""
    for failure in failures:
        print(f"FAILED: {failure}")
    print("verdict: failed" if failures else "verdict: passed")
    return 1 if failures else 0
