"""The bug of February 2017: wrong gradients of a convolution whose output goes into cat, with cuDNN. Is it there today?

Example: python attic/cudnn_cat.py
         python attic/cudnn_cat.py --with-bug     (what the bug would look like)

The gradient that cat hands back is a slice of a wider tensor, with gaps between the images. It was read as if it had
none, every image but the first from the wrong place (https://github.com/pytorch/pytorch/pull/708).

Compares y = conv(x, w1), z = conv(cat(x, y), w2) with a sum without cat: z = conv(x, w2[:, :c]) + conv(y, w2[:, c:]),
on the CPU in float64; on a GPU with cuDNN on and off, in float64 and float32.
"""

import itertools
import sys

import checks
import torch
import torch.nn.functional as F

from common.console import command

CHANNELS, GROWTH = 6, 4


def with_cat(x, y, w2):
    return F.conv2d(torch.cat((x, y), 1), w2, padding=1)


def without_cat(x, y, w2):
    of_x, of_y = w2.split((CHANNELS, GROWTH), dim=1)
    return F.conv2d(x, of_x, padding=1) + F.conv2d(y, of_y, padding=1)


def errors(function, batch, seed, device="cpu", dtype=torch.float64):
    """Relative errors of the output and of the gradients of x, w1 and w2 against the sum without cat on the CPU."""
    torch.manual_seed(seed)
    shapes = (batch, CHANNELS, 8, 8), (GROWTH, CHANNELS, 3, 3), (5, CHANNELS + GROWTH, 3, 3), (batch, 5, 8, 8)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]  # x, w1, w2, gradient of z

    def compute(function, device, dtype):
        *inputs, gradient = (t.to(device, dtype, copy=True) for t in tensors)
        x, w1, w2 = (t.requires_grad_() for t in inputs)
        output = function(x, F.conv2d(x, w1, padding=1), w2)
        return [t.detach().double().cpu() for t in (output, *torch.autograd.grad(output, inputs, gradient))]

    exact = compute(without_cat, "cpu", torch.float64)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(compute(function, device, dtype), exact, strict=True)]


@command
def main(argv=None):
    args = checks.parse(checks.make_parser(__doc__), argv, float64=True)
    cases = [("cpu", torch.float64, True, batch) for batch in (4, 1)]
    if args.device.type == "cuda":
        cases += itertools.product([args.device], (torch.float64, torch.float32), (True, False), [4])
    rows, failures = [], []
    for device, dtype, enabled, batch in cases:
        name = f"{device}, {str(dtype).removeprefix('torch.')}, batch {batch}"
        name += "" if device == "cpu" else f", cuDNN {'on' if enabled else 'off'}"
        with torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
            allowed = errors(without_cat, batch, args.seed, device, dtype)
            with checks.bug_of_2017(args.with_bug):
                rows.append([name, *errors(with_cat, batch, args.seed, device, dtype)])
        rounding = 1e-6 if dtype == torch.float32 else 1e-12
        if not all(error <= 2 * limit + rounding for error, limit in zip(rows[-1][1:], allowed, strict=True)):
            failures.append(f"cat and convolution: {name}")
    with checks.bug_of_2017():
        rows.append(["cpu, float64, batch 4, bug emulated", *errors(with_cat, 4, args.seed)])
    if rows[-1][3] < 0.1:
        failures.append("the emulated bug went unnoticed: this check proves nothing")
    print("relative difference between cat and the sum without cat on the CPU in float64\n")
    checks.table(["", "output", "gradient of x", "gradient of w1", "gradient of w2"], rows)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
