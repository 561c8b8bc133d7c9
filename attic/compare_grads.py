"""Compare hidden states, gradients and running statistics of a DenseNet with torchvision's, from equal weights.

Example: python attic/compare_grads.py               (DenseNet-121)
         python attic/compare_grads.py --small       (two blocks of two and three layers)
         python attic/compare_grads.py --with-bug --small

One training step on random images, in float64. A row is a layer: the norm of torchvision's tensors, and the relative
difference.
"""

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

TOLERANCE = 1e-9  # of relative differences


def make_pair(args):
    """This repository's network and torchvision's, with the same weights, in float64."""
    growth_rate, block_config, channels = (8, (2, 3), 16) if args.small else (32, (6, 12, 24, 16), 64)
    theirs = torchvision.models.DenseNet(growth_rate, block_config, channels, num_classes=10).double()
    checks.randomize_norms(theirs)
    options = dict(block_config=block_config, growth_rate=growth_rate, init_channels=channels, stem="imagenet")
    ours = DenseNet(**options, block=args.block).double()
    ours.load_torchvision(theirs.state_dict())
    return ours.to(args.device), theirs.to(args.device)


def name_of(name):
    """torchvision's name of a module, parameter or buffer of either network."""
    return rename(f"{name}.", TO_TORCHVISION).removesuffix(".")


def training_step(model, images, labels, watched):
    """{(kind, torchvision's name): tensor} of all gradients and statistics, and of the outputs of watched modules."""
    results = {}

    def record(key, module, inputs, output):
        results[key] = output.detach().clone()  # torchvision's ReLU works in place

    for name, module in model.named_modules():
        if name_of(name) in watched:
            module.register_forward_hook(partial(record, ("hidden state", name_of(name))))
    images = images.clone().requires_grad_()
    F.cross_entropy(model(images), labels).backward()
    results["gradient", "images"] = images.grad
    results |= {("gradient", name_of(name)): parameter.grad for name, parameter in model.named_parameters()}
    return results | {("statistics", name_of(name)): value for name, value in model.named_buffers()}


def row_of(name):
    """The name of the row that a module, parameter or buffer belongs to."""
    name = re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name).removeprefix("features.")
    return re.sub(r"^(denseblock\d+\.denselayer\d+|transition\d+)\..*", r"\1", name)


def compare(ours, theirs):
    """Print norms and relative differences by layer; returns the failures."""
    rows = []
    for (kind, name), value in ours.items():
        exact = theirs[kind, name].double()
        rows.append([row_of(name), kind, exact.square().sum().item(), (value - exact).square().sum().item()])
    columns = ["layer", "kind", "norm", "difference"]
    layers = pd.DataFrame(rows, columns=columns).groupby(columns[:2], sort=False).sum() ** 0.5
    layers["difference"] /= layers["norm"]
    print("one training step, this repository and torchvision: norms and relative differences\n")
    print(layers.to_string(float_format="{:.2e}".format), end="\n\n")
    wrong = layers.difference[~(layers.difference <= TOLERANCE)]  # NaN, too
    return [f"{kind} of {name}: differs by {difference:.1e}" for (name, kind), difference in wrong.items()]


@command
def main(argv=None):
    parser = checks.make_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a small network in place of DenseNet-121")
    parser.add_argument("--block", choices=BLOCKS, default="naive", help="of our network (default: %(default)s)")
    args = checks.parse(parser, argv, float64=True)
    ours, theirs = make_pair(args)
    watched = {name for name, _ in theirs.named_modules()} - {""}
    if args.block != "naive":  # with hooks, a block would run as naive
        watched = {name for name in watched if "denselayer" not in name}
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(args.device)
    labels = torch.tensor([3, 5, 0, 3]).to(args.device)
    with checks.bug_of_2017(args.with_bug):
        our_step = training_step(ours, images, labels, watched)
    return checks.verdict(compare(our_step, training_step(theirs, images, labels, watched)))


if __name__ == "__main__":
    sys.exit(main())
