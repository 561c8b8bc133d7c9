"""Compare autograd's gradients with finite differences: cat after linear layers, cat after convolutions, DenseNets.

Example: python attic/numcheck_grads.py
         python attic/numcheck_grads.py --with-bug     (the linear check passes, the convolutions fail: as in 2017)

In float64: of cat, every entry of the Jacobian, by torch's gradcheck, to one part in a thousand; of tiny DenseNets, the
derivative of the loss by each parameter along a random direction, to one in a million. No ReLU passes its kink here.
"""

import itertools
import math
import sys
from functools import partial

import checks
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from common.console import command
from densenet import BLOCKS, DenseNet

EPSILON = 1e-6  # of the differences, and of their relative error


def concatenate(layer, x, *weights):
    for weight in weights:
        x = torch.cat((x, layer(x, weight)), 1)
    return x


def jacobians(device):
    """Compare the Jacobians of cat entry by entry; returns the failures."""
    failures, convolution = [], partial(F.conv2d, padding=1)
    for name, layer, shapes in (
        ("cat + linear", F.linear, [(2, 2), (3, 2), (4, 5)]),
        ("cat + convolution", convolution, [(2, 2, 3, 2), (3, 2, 3, 3), (2, 5, 3, 3)]),
    ):
        inputs = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]
        entries = sum(tensor.numel() for tensor in inputs) * concatenate(layer, *inputs).numel()
        right = gradcheck(partial(concatenate, layer), inputs, nondet_tol=1e-9, raise_exception=False)
        print(f"{name}: {entries} entries of the Jacobian are {'right' if right else 'WRONG'}")
        failures += [] if right else [f"{name} on {device}: autograd's Jacobian is wrong"]
    return failures


def directional_derivatives(block, bottleneck, device):
    """Compare derivatives of the loss of a tiny DenseNet along a direction of each parameter; returns the failures."""
    images, labels = torch.randn(4, 3, 6, 6, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 1]).to(device)
    options = dict(block_config=(2, 2), growth_rate=2, num_classes=3, bottleneck=bottleneck, block=block)
    model = checks.randomize_norms(DenseNet(**options).double()).to(device)

    parameters, wrong = list(model.parameters()), 0

    def loss():
        return F.cross_entropy(model(images), labels)

    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        direction, values = torch.randn_like(parameter), []
        for step in (EPSILON, -2 * EPSILON):
            parameter.data += step * direction
            values.append(loss().item())
        parameter.data += EPSILON * direction
        difference, derivative = (values[0] - values[1]) / (2 * EPSILON), (gradient * direction).sum().item()
        wrong += not math.isclose(derivative, difference, rel_tol=EPSILON, abs_tol=1e-9)
    name = f"block {block}{'' if bottleneck else ', no bottlenecks'}"
    print(f"{name}: derivatives by {wrong} of {len(parameters)} parameters are wrong")
    return [f"{name} on {device}: derivatives by {wrong} of {len(parameters)} parameters"] if wrong else []


@command
def main(argv=None):
    args = checks.parse(checks.make_parser(__doc__), argv, float64=True)
    print(f"gradients on {args.device}, float64, against finite differences\n")
    with checks.bug_of_2017(args.with_bug):
        failures = jacobians(args.device)
        for block, bottleneck in itertools.product(BLOCKS, (True, False)):
            torch.manual_seed(args.seed)
            failures += directional_derivatives(block, bottleneck, args.device)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
