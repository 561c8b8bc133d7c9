"""Compare every hidden state, gradient and running statistic of a DenseNet with torchvision's, from equal weights.

Example: python attic/compare_grads.py               (DenseNet-121)
         python attic/compare_grads.py --small       (two blocks of two and three layers)
         python attic/compare_grads.py --with-bug --small

One training step on random images, in float64 and float32. A row is a layer: the norm of torchvision's tensors in
float64, and relative differences. In float32, the error against torchvision's float64 is at most twice torchvision's.
"""

import copy
import re
import sys
from functools import partial

import checks
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision

from common.console import command
from densenet import BLOCKS, TO_TORCHVISION, DenseNet, rename

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

    def record(key, module, inputs, output):
        found[key] = output.detach().clone()  # torchvision's ReLU works in place

    for name, module in model.named_modules():
        # Not the network itself, nor its last ReLU, which torchvision lacks; with hooks a block would run as naive.
        hidden = getattr(model, "block", "naive") != "naive" and re.match(r"blocks\.\d+\.", name)
        if name not in ("", "relu") and not hidden:
            module.register_forward_hook(partial(record, ("hidden state", name_of(name))))
    images = images.clone().requires_grad_()
    F.cross_entropy(model(images), labels).backward()
    found["gradient", "images"] = images.grad
    found |= {("gradient", name_of(name)): parameter.grad for name, parameter in model.named_parameters()}
    return found | {("statistics", name_of(name)): value for name, value in model.named_buffers()}


def our_name(name):
    return rename(rename(name + ".", MODULES), TO_TORCHVISION).removesuffix(".")


def row_of(name):
    """The name of the row that a module, parameter or buffer belongs to."""
    name = re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name).removeprefix("features.")
    return re.sub(r"^(denseblock\d+\.denselayer\d+|transition\d+)\..*", r"\1", name)


def compare(steps):
    """Print norms and relative differences by layer, and of all tensors of a kind; returns the failures."""
    rows = []
    for kind, name in [key for key in steps[1] if key in steps[0]]:
        ours, theirs, ours_float, theirs_float = (step[kind, name].double().cpu() for step in steps)
        pairs = {"norm": (theirs, 0), "float64": (ours, theirs), "float32": (ours_float, theirs_float),
                 "error": (ours_float, theirs), "their error": (theirs_float, theirs)}  # fmt: skip
        squares = {column: (a - b).square().sum().item() for column, (a, b) in pairs.items()}
        rows.append({"layer": row_of(name), "kind": kind} | squares)

    def norms(by):
        sums = pd.DataFrame(rows).groupby(by, sort=False).sum(numeric_only=True) ** 0.5
        return sums.div(sums["norm"], axis=0).assign(norm=sums["norm"])

    layers, kinds = norms(["layer", "kind"]), norms("kind")
    print(layers[["norm", "float64", "float32"]].to_string(float_format="{:.2e}".format), end="\n\n")
    print(kinds.to_string(float_format="{:.2e}".format), end="\n\n")
    wrong, coarse = layers[~(layers.float64 <= TOLERANCE)], kinds[~(kinds.error <= 2 * kinds["their error"] + 1e-6)]
    failures = [f"{kind} of {name}: differs by {x:.1e} in float64" for (name, kind), x in wrong["float64"].items()]
    return failures + [f"{kind} in float32: error {x:.1e}, twice torchvision's" for kind, x in coarse.error.items()]


@command
def main(argv=None):
    parser = checks.make_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a small network in place of DenseNet-121")
    parser.add_argument("--block", choices=BLOCKS, default="naive", help="of our network (default: %(default)s)")
    args = checks.parse(parser, argv)
    ours, theirs = (model.to(args.device) for model in make_pair(args))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(args.device)
    labels = torch.tensor([3, 5, 0, 3]).to(args.device)
    steps = []
    for dtype in (torch.float64, torch.float32):
        with checks.bug_of_2017(args.with_bug):
            steps.append(training_step(ours.to(dtype), images.to(dtype), labels, our_name))
        steps.append(training_step(theirs.to(dtype), images.to(dtype), labels, str))
    missing = [f"{kind} of {name}: torchvision has none" for kind, name in steps[0] if (kind, name) not in steps[1]]
    print("one training step, this repository and torchvision: norms and relative differences\n")
    return checks.verdict(missing + compare(steps))


if __name__ == "__main__":
    sys.exit(main())
