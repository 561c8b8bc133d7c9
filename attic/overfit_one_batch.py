"""Learn one batch by heart, through the training code of train.py: the error must reach zero.

Example: python attic/overfit_one_batch.py
         python attic/overfit_one_batch.py --with-bug     (what the author of bamos/densenet.pytorch would have seen)

The images are not augmented, so that each step sees the same ones. First goes a VGG-style network, which shows that
data and training code can do it; it also has to learn the whole data set a little. Then DenseNet-BC with each dense
block. What fails only for DenseNet is in the network or in what it runs on.
"""

import functools
import itertools
import sys

import checks
import torch
from tqdm import tqdm

import train
from common.console import Mistake, command
from common.hardware import choose_precision
from densenet import BLOCKS
from training.step import Step, evaluate

EPOCHS = 3  # of the VGG-style network on all training images
ERROR = 10.0  # percent on the test images that it must get below; the author's VGG had about that on CIFAR-10


def fit(model, batches, lr, amp):
    """Train on an iterator of batches through train.train_epoch; returns its (steps, 3) log: loss, wrong, images."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    with tqdm(disable=True) as bar:
        return train.train_epoch(Step(model, optimizer, amp), batches, lambda i: lr, bar)


def overfit(name, model, batch, amp, args):
    """The row of a network that sees one batch again and again, and the failure or None."""
    try:
        log = fit(model, itertools.repeat(batch, args.steps), args.lr, amp)
    except train.NotFinite as error:
        return [name, *[f"not finite in step {error.step}", "", "", "", ""]], f"{name}: the loss is not finite"
    loss, error = log[:, 0] / log[:, 2], 100 * log[:, 1] / log[:, 2]
    shown = [f"{loss[i].item():.3f}" for i in (0, args.steps // 4, args.steps // 2, -1)]
    row = [name, *shown, f"{error[-1].item():.1f}"]
    return row, None if error[-1] == 0 else f"{name}: error {error[-1].item():.1f} % after {args.steps} steps"


def learn_all(model, dataset, batches, amp, args):
    """Train a VGG-style network on all images for EPOCHS and print its test error; returns the failures."""
    for epoch in range(EPOCHS):
        last = epoch == EPOCHS - 1
        fit(model, batches.shuffled(args.seed + epoch), args.lr / 10 if last else args.lr, amp)
    test = dataset.test.batches(args.batch_size, dataset.normalize)
    _, error = evaluate(model, test, amp)
    images = f"all {len(dataset.train):,} training images"
    print(f"VGG-style network, {EPOCHS} epochs on {images}: test error {error:.1f} %, at most {ERROR:.0f}\n")
    return [] if error <= ERROR else [f"the training code does not train: test error {error:.1f} %"]


def parse_args(argv=None):
    parser = checks.make_parser("overfit_one_batch.py", __doc__)
    checks.add_data_flags(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="on the one batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, metavar="X", help="learning rate (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise Mistake(f"--steps {args.steps}: needs at least 1")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device = checks.device_of(args)
    amp, _ = choose_precision(args.precision, device)
    dataset, batches = checks.load(args, device)
    classes = len(dataset.classes)
    images, *rest = next(batches.shuffled(args.seed))
    layout = torch.contiguous_format if args.with_bug else torch.channels_last  # as in 2017; as in train.py
    batch = images.to(memory_format=layout), *rest
    rows, failures = [], []
    with checks.bug_of_2017(args.with_bug):
        torch.manual_seed(args.seed)
        if args.dataset == "digits":  # the limit of the error is for digits
            failures += learn_all(checks.vgg(classes).to(device), dataset, batches, amp, args)
        networks = {"VGG-style network": functools.partial(checks.vgg, classes)}
        for block in BLOCKS:
            networks[f"DenseNet-BC-{args.depth}, {block}"] = functools.partial(
                checks.densenet, args, classes, block
            )
        for name, make in networks.items():
            torch.manual_seed(args.seed)
            row, failure = overfit(name, make().to(device, memory_format=layout), batch, amp, args)
            rows.append(row)
            failures += [failure] if failure else []
    print(f"one batch of {len(images)} images, {args.steps} steps: the loss on the way, and the error at the end\n")
    checks.table(["network", "first", "quarter", "half", "last", "error %"], rows)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
