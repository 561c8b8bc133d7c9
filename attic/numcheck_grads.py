"""Compare autograd's gradients with finite differences: cat after linear layers, cat after convolutions, dense blocks.

Example: python attic/numcheck_grads.py
         python attic/numcheck_grads.py --with-bug     (the linear check passes, the convolutions fail: as in 2017)

Everything is in float64, on the CPU and, where there is one, on the GPU. The first table is torch's own gradcheck:
every entry of the Jacobian, to one part in a thousand. The second is stricter: for each parameter w of a tiny DenseNet
and a random direction v it compares the derivative of the loss along v from autograd with (L(w + hv) − L(w − hv)) / 2h.
A step that carries a ReLU over its kink would spoil a row; the seed and the small h see to it that none does.
"""

import sys

import checks
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from common.console import command
from densenet import BLOCKS, DenseNet

STEP = 1e-6  # h
TOLERANCE = 1e-6  # of the relative difference; rounding contributes about 1e-16 / (h · derivative)
FLOOR = 1e-3  # derivatives smaller than this are compared absolutely


def cat_linear(x, *weights):
    for weight in weights:
        x = torch.cat((x, F.linear(x, weight)), 1)
    return x


def cat_convolution(x, *weights):
    for weight in weights:
        x = torch.cat((x, F.conv2d(x, weight, padding=1)), 1)
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

    yield "cat + linear", cat_linear, [randn(2, 2), randn(3, 2), randn(4, 5)]
    yield "cat + convolution", cat_convolution, [randn(2, 2, 3, 2), randn(3, 2, 3, 3), randn(2, 5, 3, 3)]
    for block in BLOCKS:
        for bottleneck in (True, False):
            yield f"block {block}{'' if bottleneck else ', no bottleneck'}", *dense_block(block, bottleneck, device)


def jacobian_row(name, function, inputs, device):
    """A row of the first table, and the failure or None."""
    entries = sum(tensor.numel() for tensor in inputs) * function(*inputs).numel()
    try:
        # Some kernels on GPUs sum in an order that varies.
        gradcheck(function, inputs, nondet_tol=1e-9)
    except RuntimeError as error:  # GradcheckError is one
        reason = str(error).strip().splitlines()[0].rstrip(",: ")
        return [name, f"{entries}", "WRONG"], f"{name} on {device}: {reason}"
    return [name, f"{entries}", "equal"], None


def directional_derivatives(model, images, labels):
    """(name, from finite differences, from autograd) for each parameter, along a random direction."""
    generator = torch.Generator().manual_seed(0)

    def loss():
        return F.cross_entropy(model(images), labels)

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator).to(parameter.device)
        sides = []
        with torch.no_grad():
            for sign in (1, -2):  # w + hv, then w − hv
                parameter += sign * STEP * direction
                sides.append(loss().item())
            parameter += STEP * direction
        yield name, (sides[0] - sides[1]) / (2 * STEP), (gradient * direction).sum().item()


def tiny_net(block, device, seed):
    torch.manual_seed(seed)
    model = DenseNet(block_config=(2, 2), growth_rate=2, num_classes=3, block=block).double()
    return checks.randomize_norms(model).to(device)


def difference_table(device, seed):
    """Print the second table; returns the failures."""
    torch.manual_seed(seed)
    images, labels = torch.randn(4, 3, 6, 6, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 1]).to(device)
    derivatives = {b: list(directional_derivatives(tiny_net(b, device, seed), images, labels)) for b in BLOCKS}
    rows, wrong = [], {block: [] for block in BLOCKS}
    for results in zip(*derivatives.values(), strict=True):
        name, numerical, _ = results[0]
        errors = [abs(n - autograd) / max(abs(n), FLOOR) for _, n, autograd in results]
        rows.append([name, f"{numerical:.6f}", *errors])
        for block, error in zip(BLOCKS, errors, strict=True):
            wrong[block] += [] if error <= TOLERANCE else [name]
    checks.table(["parameter of a tiny DenseNet", "finite difference", *BLOCKS], rows)
    return [
        f"block {block} on {device}: derivatives by {len(names)} of {len(rows)} parameters, {names[0]} first"
        for block, names in wrong.items()
        if names
    ]


def parse_args(argv=None):
    return checks.make_parser("numcheck_grads.py", __doc__).parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # for tensors this small, threads take longer to meet than to compute
    failures = []
    with checks.bug_of_2017(args.with_bug):
        for device in ["cpu", *checks.cuda()]:
            print(f"\ngradients on {device}, float64: every entry of the Jacobian against finite differences\n")
            torch.manual_seed(args.seed)
            rows = []
            for case in cases(device):
                row, failure = jacobian_row(*case, device)
                rows.append(row)
                failures += [failure] if failure else []
            checks.table(["function", "entries", "autograd"], rows)
            print(f"and along a random direction of each parameter: relative difference, at most {TOLERANCE:.0e}\n")
            failures += difference_table(device, args.seed)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
