"""The bug of February 2017: wrong gradients of a convolution whose output goes into cat, with cuDNN. Is it there today?

Example: python attic/cudnn_cat.py
         python attic/cudnn_cat.py --with-bug     (what the bug would look like)

What it was: the gradient that cat hands back to one of its inputs is a slice of a wider tensor, with gaps between the
images. PyTorch described it to cuDNN by the strides of the convolution's output, which has no gaps, so that every image
of the batch but the first was read from the wrong place (https://github.com/pytorch/pytorch/pull/708).

The check computes y = conv(x, w1), z = conv(cat(x, y), w2), a dense layer and its reader, and compares with a sum that
needs no cat: z = conv(x, w2[:, :c]) + conv(y, w2[:, c:]). On the CPU this is exact to rounding, in float64; on a GPU it
is repeated with cuDNN on and off, in float64 and float32, against the CPU.
"""

import sys

import checks
import torch
import torch.nn.functional as F

from common.console import command

CHANNELS, GROWTH = 6, 4
QUANTITIES = ("output", "gradient of x", "gradient of w1", "gradient of w2")


def with_cat(x, w1, w2, seen):
    y = F.conv2d(x, w1, padding=1)
    y.register_hook(seen.append)
    return F.conv2d(torch.cat((x, y), 1), w2, padding=1)


def without_cat(x, w1, w2, seen):
    y = F.conv2d(x, w1, padding=1)
    of_x, of_y = w2.split((CHANNELS, GROWTH), dim=1)
    return F.conv2d(x, of_x, padding=1) + F.conv2d(y, of_y, padding=1)


def make_tensors(batch, seed):
    """x, w1, w2 and the gradient of z, float64 on the CPU."""
    torch.manual_seed(seed)
    shapes = (batch, CHANNELS, 8, 8), (GROWTH, CHANNELS, 3, 3), (5, CHANNELS + GROWTH, 3, 3), (batch, 5, 8, 8)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def compute(function, tensors, device="cpu", dtype=torch.float64):
    """The output and the gradients of x, w1 and w2; and the gradients that cat handed to the first convolution."""
    *inputs, gradient = (t.to(device, dtype, copy=True) for t in tensors)
    seen = []
    output = function(*(t.requires_grad_() for t in inputs), seen)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)], seen


def difference(results, expected):
    return [checks.relative([a], [b]) for a, b in zip(results, expected, strict=True)]


def check_cpu(args):
    """cat against the split sum, as it is and with the bug emulated; returns the failures."""
    columns, failures = {}, []
    for batch in (4, 1):
        tensors = make_tensors(batch, args.seed)
        expected, _ = compute(without_cat, tensors)
        with checks.bug_of_2017(args.with_bug):
            result, (gradient, *_) = compute(with_cat, tensors)
        with checks.bug_of_2017():
            broken, _ = compute(with_cat, tensors)
        columns[f"batch {batch}"] = difference(result, expected)
        columns[f"batch {batch}, bug emulated"] = difference(broken, expected)
        if batch > 1:
            dense = "no gaps" if gradient.is_contiguous() else "gaps between the images"
            print(f"cat hands to the convolution a gradient of shape {tuple(gradient.shape)}, ", end="")
            print(f"strides {gradient.stride()}: {dense}\n")
    print("relative difference between cat and the sum without cat, CPU, float64\n")
    checks.table(["", *columns], [[name, *row] for name, *row in zip(QUANTITIES, *columns.values(), strict=True)])
    failures += [f"cat and convolution on cpu, {name}" for name in ("batch 4", "batch 1") if max(columns[name]) > 1e-12]
    if columns["batch 4, bug emulated"][2] < 0.1:
        failures.append("the emulated bug went unnoticed: this check proves nothing")
    return failures


def check_cuda(args):
    """The same on the GPU, cuDNN on and off, each against the CPU; returns the failures."""
    tensors, rows, failures = make_tensors(4, args.seed), [], []
    expected, _ = compute(without_cat, tensors)
    for enabled in (True, False):
        for dtype in (torch.float64, torch.float32):
            name = f"cuDNN {'on' if enabled else 'off'}, {str(dtype).removeprefix('torch.')}"
            with torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
                allowed = difference(compute(without_cat, tensors, "cuda", dtype)[0], expected)
                with checks.bug_of_2017(args.with_bug):
                    errors = difference(compute(with_cat, tensors, "cuda", dtype)[0], expected)
            rows.append([name, *errors])
            rounding = 1e-6 if dtype == torch.float32 else 1e-12
            if not all(e <= 2 * a + rounding for e, a in zip(errors, allowed, strict=True)):
                failures.append(f"cat and convolution on cuda, {name}")
    print(f"relative difference to the CPU, {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}\n")
    checks.table(["", *QUANTITIES], rows)
    return failures


def parse_args(argv=None):
    return checks.make_parser("cudnn_cat.py", __doc__).parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    failures = check_cpu(args)
    if checks.cuda():
        failures += check_cuda(args)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
