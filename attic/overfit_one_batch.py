"""Learn one batch by heart, through the training code of train.py: the error must reach zero.

Example: python attic/overfit_one_batch.py
         python attic/overfit_one_batch.py --with-bug     (what the author of bamos/densenet.pytorch would have seen)

The images are not augmented: each step sees the same ones. A VGG-style network shows that data and training code can do
it, then DenseNet-BC with each dense block. What fails only for DenseNet is in the network or in what it runs on.
"""

import itertools
import sys

import checks
import torch
import torch.nn as nn
from tqdm import tqdm

import train
from common.console import command, positive
from common.hardware import choose_precision
from densenet import BLOCKS, DenseNet
from training.ending import NotFinite
from training.step import Step

LR = 0.1


def vgg(classes):
    """A small VGG-style network: 3×3 convolutions and max-pooling, nothing concatenated."""
    layers = []
    for channels, width in itertools.pairwise((3, 32, 64, 128)):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def overfit(model, batch, steps, amp):
    """The loss of each step, and the error of the last one in percent. Raises NotFinite."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    batches = itertools.repeat(batch, steps)
    log = train.train_epoch(Step(model, optimizer, amp), batches, lambda i: LR, tqdm(disable=True))
    return log[:, 0] / log[:, 2], 100 * log[-1, 1] / log[-1, 2]


@command
def main(argv=None):
    parser = checks.make_parser(__doc__, data=True)
    parser.add_argument("--steps", type=positive, default=80, metavar="N", help="on the one batch (default: 80)")
    args = checks.parse(parser, argv)
    amp, _ = choose_precision("fp32", args.device)
    dataset, batches = checks.load(args)
    images, *rest = next(batches.shuffled(args.seed))
    order = torch.contiguous_format if args.with_bug else torch.channels_last  # as in 2017; as in train.py
    batch = images.to(memory_format=order), *rest
    rows, failures = [], []
    for block in (None, *BLOCKS):
        torch.manual_seed(args.seed)
        name = f"DenseNet-BC-{args.depth}, {block}" if block else "VGG-style network"
        classes = len(dataset.classes)
        model = DenseNet(depth=args.depth, num_classes=classes, block=block) if block else vgg(classes)
        try:
            with checks.bug_of_2017(args.with_bug):
                loss, error = overfit(model.to(args.device, memory_format=order), batch, args.steps, amp)
        except NotFinite as stopped:
            rows.append([name, f"not finite in step {stopped.step}", "", "", "", ""])
            failures.append(f"{name}: the loss is not finite")
            continue
        rows.append([name, *(f"{loss[i]:.3f}" for i in (0, args.steps // 4, args.steps // 2, -1)), f"{error:.1f}"])
        if error > 0:
            failures.append(f"{name}: error {error:.1f} % after {args.steps} steps")
    print(f"one batch of {len(images)} images, {args.steps} steps: the loss on the way, and the error at the end\n")
    checks.table(["network", "first", "quarter", "half", "last", "error %"], rows)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
