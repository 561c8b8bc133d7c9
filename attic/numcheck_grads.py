"""Compare autograd's gradients with finite differences: cat after linear layers, cat after convolutions, dense blocks.

Example: python attic/numcheck_grads.py
         python attic/numcheck_grads.py --with-bug     (the linear check passes, the convolutions fail: as in 2017)

torch's gradcheck, in float64: every entry of the Jacobian, to one part in a thousand; then, to one in a million, the
derivative of the loss of a tiny DenseNet by each parameter, along a random direction. No ReLU passes its kink here.
"""

import sys
from functools import partial

import checks
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from common.console import command
from densenet import BLOCKS, DenseNet


def concatenate(layer, x, *weights):
    for weight in weights:
        x = torch.cat((x, layer(x, weight)), 1)
    return x


def dense_block(block, bottleneck, device):
    """Two layers of growth rate 2 on 3 channels, and the tensors to differentiate by: gradcheck moves them in place."""
    options = dict(block_config=(2,), growth_rate=2, init_channels=3, bottleneck=bottleneck, block=block)
    block = checks.randomize_norms(DenseNet(**options).double()).blocks[0].to(device)
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64).to(device).requires_grad_()
    return lambda x, *parameters: block(x), [x, *block.parameters()]


def cases(device):
    """(name, function, inputs) of every gradcheck."""

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()

    convolution = partial(F.conv2d, padding=1)
    yield "cat + linear", partial(concatenate, F.linear), [randn(2, 2), randn(3, 2), randn(4, 5)]
    inputs = [randn(2, 2, 3, 2), randn(3, 2, 3, 3), randn(2, 5, 3, 3)]
    yield "cat + convolution", partial(concatenate, convolution), inputs
    for block in BLOCKS:
        for bottleneck in (True, False):
            yield f"block {block}{'' if bottleneck else ', no bottleneck'}", *dense_block(block, bottleneck, device)


def jacobians(device):
    """Compare Jacobians entry by entry; returns the failures."""
    rows = []
    for name, function, inputs in cases(device):
        entries = sum(tensor.numel() for tensor in inputs) * function(*inputs).numel()
        right = gradcheck(function, inputs, nondet_tol=1e-9, raise_exception=False)  # sums on GPUs vary
        rows.append([name, f"{entries}", "equal" if right else "WRONG"])
    checks.table(["function", "entries", "autograd"], rows)
    return [f"{name} on {device}: autograd's Jacobian is wrong" for name, _, found in rows if found == "WRONG"]


def directional_derivatives(block, device):
    """Compare derivatives of the loss along a direction of each parameter; returns the failures."""
    images, labels = torch.randn(4, 3, 6, 6, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 1]).to(device)
    model = DenseNet(block_config=(2, 2), growth_rate=2, num_classes=3, block=block).double()
    model, wrong = checks.randomize_norms(model).to(device), []
    for name, parameter in model.named_parameters():

        def loss(moved):
            return F.cross_entropy(model(images), labels)

        options = dict(fast_mode=True, eps=1e-6, rtol=1e-6, atol=1e-9, nondet_tol=1e-9, raise_exception=False)
        wrong += [] if gradcheck(loss, parameter, **options) else [name]
    count = len(list(model.parameters()))
    print(f"block {block}: derivatives by {len(wrong)} of {count} parameters are wrong")
    return [f"block {block} on {device}: derivatives by {len(wrong)} of {count} parameters"] if wrong else []


@command
def main(argv=None):
    args = checks.parse(checks.make_parser(__doc__), argv)
    failures = []
    with checks.bug_of_2017(args.with_bug):
        for device in checks.devices(args):
            print(f"gradients on {device}, float64, against finite differences: every entry of the Jacobian\n")
            torch.manual_seed(args.seed)
            failures += jacobians(device)
            print("along a random direction of each parameter of a tiny DenseNet\n")
            for block in BLOCKS:
                torch.manual_seed(args.seed)
                failures += directional_derivatives(block, device)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
