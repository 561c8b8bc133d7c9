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
from tqdm import tqdm

import train
from common.console import command, positive
from common.hardware import choose_precision
from densenet import BLOCKS
from training.ending import NotFinite
from training.step import Step

LR = 0.1


def overfit(name, model, batch, args, amp):
    """The row of a network that sees one batch again and again, and the failures."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    step, batches = Step(model, optimizer, amp), itertools.repeat(batch, args.steps)
    try:
        log = train.train_epoch(step, batches, lambda i: LR, tqdm(disable=True))
    except NotFinite as error:
        return [name, *[f"not finite in step {error.step}", "", "", "", ""]], [f"{name}: the loss is not finite"]
    loss, error = log[:, 0] / log[:, 2], 100 * log[-1, 1] / log[-1, 2]
    shown = [f"{loss[i]:.3f}" for i in (0, args.steps // 4, args.steps // 2, -1)]
    failures = [] if error == 0 else [f"{name}: error {error:.1f} % after {args.steps} steps"]
    return [name, *shown, f"{error:.1f}"], failures


@command
def main(argv=None):
    parser = checks.make_parser(__doc__)
    checks.add_data_flags(parser)
    parser.add_argument("--steps", type=positive, default=80, metavar="N", help="on the one batch (default: 80)")
    args = checks.parse(parser, argv)
    amp, _ = choose_precision("fp32", args.device)
    dataset, batches = checks.load(args)
    classes = len(dataset.classes)
    images, *rest = next(batches.shuffled(args.seed))
    layout = torch.contiguous_format if args.with_bug else torch.channels_last  # as in 2017; as in train.py
    batch = images.to(memory_format=layout), *rest
    rows, failures = [], []
    with checks.bug_of_2017(args.with_bug):
        for block in (None, *BLOCKS):
            torch.manual_seed(args.seed)
            name = f"DenseNet-BC-{args.depth}, {block}" if block else "VGG-style network"
            model = checks.densenet(args, classes, block) if block else checks.vgg(classes)
            row, failed = overfit(name, model.to(args.device, memory_format=layout), batch, args, amp)
            rows.append(row)
            failures += failed
    print(f"one batch of {len(images)} images, {args.steps} steps: the loss on the way, and the error at the end\n")
    checks.table(["network", "first", "quarter", "half", "last", "error %"], rows)
    return checks.verdict(failures)


if __name__ == "__main__":
    sys.exit(main())
