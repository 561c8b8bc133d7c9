"""Compare every hidden state, gradient and running statistic of a DenseNet with torchvision's, from equal weights.

Example: python attic/compare_grads.py               (DenseNet-121)
         python attic/compare_grads.py --small       (two blocks of two and three layers)
         python attic/compare_grads.py --with-bug --small

One training step on random images, in float64 and float32. A row is a layer; --modules makes a row of each of its
modules. |…| is the norm of torchvision's tensors in float64; the columns after it are relative differences between this
repository and torchvision. A float32 result may differ by rounding: its error against torchvision's float64 is to be at
most twice that of torchvision's own float32.
"""

import copy
import re
import sys

import checks
import torch
import torch.nn.functional as F
import torchvision

from common.console import command
from densenet import BLOCKS, TO_TORCHVISION, DenseNet, rename

KINDS = ("hidden state", "gradient", "statistics")
TOLERANCE = 1e-9  # of relative differences in float64
# Modules that a state_dict does not know: dense blocks, ReLU and pooling of the stem, and the stem, which ends with it.
MODULES = (
    (r"^blocks\.(\d+)\.$", r"features.denseblock<\1+1>."),
    (r"^stem\.(relu|pool)\.", r"features.\g<1>0."),
    (r"^stem\.$", r"features.pool0."),
)


def make_pair(args):
    """This repository's network and torchvision's, with the same weights, in float64."""
    torch.manual_seed(args.seed)
    growth_rate, block_config, channels = (8, (2, 3), 16) if args.small else (32, (6, 12, 24, 16), 64)
    theirs = torchvision.models.DenseNet(growth_rate, block_config, channels, num_classes=10).double()
    checks.randomize_norms(theirs)
    options = dict(block_config=block_config, growth_rate=growth_rate, init_channels=channels, stem="imagenet")
    ours = DenseNet(**options, block=args.block).double()
    ours.load_torchvision(theirs.state_dict())
    return ours, theirs


def training_step(model, images, labels, name_of):
    """{(kind, torchvision's name): tensor} of everything that a training step computes."""
    model, found = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        key = "hidden state", name_of(name)

        def record(module, inputs, output, key=key):
            found[key] = output.detach().clone()  # torchvision's ReLU works in place

        if is_compared(name, getattr(model, "block", "naive")):
            module.register_forward_hook(record)
    images = images.clone().requires_grad_()
    F.cross_entropy(model(images), labels).backward()
    found["gradient", "images"] = images.grad
    found |= {("gradient", name_of(name)): parameter.grad for name, parameter in model.named_parameters()}
    return found | {("statistics", name_of(name)): value for name, value in model.named_buffers()}


def is_compared(name, block):
    """Whether to hook into a module: not within a block that would run as naive then, nor into what torchvision lacks.

    That is a module for its last ReLU.
    """
    return name not in ("", "relu") and (block == "naive" or not re.match(r"blocks\.\d+\.", name))


def our_name(name):
    return rename(rename(name + ".", MODULES), TO_TORCHVISION).removesuffix(".")


def row_of(name, modules):
    """The name of the row that a module, parameter or buffer belongs to."""
    name = re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name)
    name = name.removeprefix("features.")
    return name if modules else re.sub(r"^(denseblock\d+\.denselayer\d+|transition\d+)\..*", r"\1", name)


def comparison(steps, keys):
    """Norm, difference in float64 and in float32, of the tensors with these keys."""
    if not keys:
        return ["–"] * 3
    ours, theirs, ours_float, theirs_float = ([step[key] for key in keys] for step in steps)
    return [checks.norm(theirs), checks.relative(ours, theirs), checks.relative(ours_float, theirs_float)]


def print_layers(steps, common, modules):
    """The table, layer by layer in forward order; returns the failures."""
    rows, failures = {row_of(name, modules): {} for _, name in common}, []
    for kind, name in common:
        rows[row_of(name, modules)].setdefault(kind, []).append((kind, name))
    cells = {name: [comparison(steps, keys.get(kind)) for kind in KINDS] for name, keys in rows.items()}
    header = ["layer", *(part for kind in KINDS for part in (f"|{kind}|", "float64", "float32"))]
    checks.table(header, [[name, *(cell for part in parts for cell in part)] for name, parts in cells.items()])
    for name, parts in cells.items():
        for kind, (_, difference, _) in zip(KINDS, parts, strict=True):
            if difference != "–" and not difference <= TOLERANCE:
                failures.append(f"{kind} of {name}: relative difference {difference:.1e} in float64")
    return failures


def print_summary(steps, common):
    """All tensors of a kind together, and rounding errors against float64; returns the failures."""
    rows, failures = [], []
    for kind in KINDS:
        keys = [key for key in common if key[0] == kind]
        ours, theirs, ours_float, theirs_float = ([step[key] for key in keys] for step in steps)
        error, allowed = checks.relative(ours_float, theirs), 2 * checks.relative(theirs_float, theirs) + 1e-6
        rows.append([f"{kind}: {len(keys)} tensors", checks.relative(ours, theirs), error, allowed])
        if not error <= allowed:
            failures.append(f"{kind} in float32: error {error:.1e}, more than twice torchvision's")
    checks.table(["all layers", "float64", "error in float32", "allowed"], rows)
    return failures


def parse_args(argv=None):
    parser = checks.make_parser("compare_grads.py", __doc__)
    parser.add_argument("--small", action="store_true", help="a small network in place of DenseNet-121")
    parser.add_argument("--modules", action="store_true", help="a row for each batch norm and convolution")
    parser.add_argument("--block", choices=BLOCKS, default="naive", help="of our network (default: %(default)s)")
    checks.add_device_flag(parser)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    device = checks.device_of(args)
    ours, theirs = (model.to(device) for model in make_pair(args))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(device)
    labels = torch.tensor([3, 5, 0, 3]).to(device)
    steps = []
    for dtype in (torch.float64, torch.float32):
        with checks.bug_of_2017(args.with_bug):
            steps.append(training_step(ours.to(dtype), images.to(dtype), labels, our_name))
        steps.append(training_step(theirs.to(dtype), images.to(dtype), labels, str))
    # Of ours, those within blocks other than naive are not looked at.
    missing = [f"{kind} of {name}" for kind, name in steps[0] if (kind, name) not in steps[1]]
    common = [key for key in steps[1] if key in steps[0]]
    print("one training step, this repository and torchvision: norms and relative differences\n")
    failures = print_layers(steps, common, args.modules) + print_summary(steps, common)
    return checks.verdict([f"{name}: torchvision has none" for name in missing] + failures)


if __name__ == "__main__":
    sys.exit(main())
