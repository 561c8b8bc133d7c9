"""Print the test error of a trained network and its scores for each class, or classify image files.

Example: python evaluate.py work/digits.bc16/weights.pth --mistakes mistakes.png
         python evaluate.py work/cifar10-jpeg.bc40/weights.pth cat.jpg photos --csv photos.csv
"""

import argparse
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common.console import Mistake, Parser, command, natural, nonempty, one_line, positive, positive_number, workers
from common.hardware import PRECISIONS, choose_device, choose_precision, set_up_device
from inference.export import read_network
from inference.network import averaged, classifier, classify_each, load_split, predictions, reader_of
from inputs.folders import find_images, passed_over
from inputs.splits import KINDS
from reports import scores
from reports.logs import title_of
from training.arguments import parse_again

DRAWN = 32  # misclassified images, at most


def parse_args(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=nonempty, help="latest.pth, best.pth or weights.pth of a run, or an exported file")
    add("paths", nargs="*", type=nonempty, metavar="PATH",
        help="image files to classify, and folders, searched at any depth (default: the test set)")
    add("--split", choices=KINDS,
        help="images of the run's data set to evaluate: training (not augmented), validation or test (default: test)")
    add("--ema", action="store_true", help="evaluate the averaged weights of a run with --ema (default: the last ones)")
    add("--data", type=nonempty, metavar="DIR",
        help="directory of the data set, which is downloaded if it is missing (default: as in training)")
    add("--csv", type=Path, metavar="FILE", help="write a row per image: its class, and the probability of each class")
    add("--top", type=natural, metavar="N", help="classes to print for each file (default: 5; with --csv none)")
    add("--mistakes", type=Path, metavar="FILE.png", help=f"draw the {DRAWN} most confidently misclassified images")
    add("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    add("--white", type=positive_number, metavar="X",
        help="the value of white in files of more than 8 bits (default: as in training)")
    add("--workers", type=workers, default=0, metavar="N",
        help="processes that decode image files (default: %(default)s)")
    add("--batch-size", type=positive, metavar="N", help="images (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="(default: %(default)s)")
    add("--progress", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty(),
        help="progress bars (default: on in a terminal)")
    args = parser.parse_intermixed_args(argv)
    check_args(args)
    return args


def check_args(args):
    """Raises Mistake if a flag has no meaning. Makes the folders of files to write."""
    for name in ("split", "mistakes", "confusion") if args.paths else ("top", "white"):
        if getattr(args, name) is not None:
            meant = "images of the run's data set: leave out the paths" if args.paths else "image files: name some"
            raise Mistake(f"--{name} is for {meant}")
    for path in filter(None, (args.mistakes, args.confusion)):
        from reports.curves import FORMATS  # imports matplotlib

        if path.suffix[1:].lower() not in FORMATS:
            raise Mistake(f"{path}: a picture is written as {', '.join(FORMATS)}")
    for path in filter(None, (args.csv, args.mistakes, args.confusion)):
        path.parent.mkdir(parents=True, exist_ok=True)


def classify_files(args, checkpoint, device, amp):
    """Print the most probable classes of each file, or write its row. Returns 1 if files can't be read."""
    passed, counts, classes = Counter(), Counter(), checkpoint["classes"]
    paths = find_images(args.paths, passed)
    for line in passed_over(passed):
        print(one_line(line), file=sys.stderr)
    white = {"white": args.white} if args.white else {}
    reader = reader_of(checkpoint, workers=args.workers, progress=args.progress, **white)
    batch_size = args.batch_size or checkpoint["config"]["arguments"]["batch_size"]
    answers = classify_each(classifier(checkpoint, device, amp), paths, reader, batch_size)
    top = args.top if args.top is not None else 0 if args.csv else 5
    with scores.csv_table(args.csv, "path", classes) as write:
        for path, answer in zip(paths, answers, strict=True):
            if isinstance(answer, Mistake):
                tqdm.write(one_line(f"skipped: {answer}"), sys.stderr)
                continue
            predicted = int(answer.argmax())
            counts[classes[predicted]] += 1
            if write:
                write(path, predicted, answer)
            if top:
                tqdm.write(one_line(f"{path}: {scores.most_probable(answer, classes, top)}"))
    if args.csv:
        most = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(10)) or "no image"
        print(one_line(f"{args.csv}: predicted {most}; {counts.total():,} in all"))
    if skipped := len(paths) - counts.total():
        print(f"files skipped: {skipped:,} of {len(paths):,}", file=sys.stderr)
    return 1 if skipped else 0


def evaluate_split(args, checkpoint, device, amp):
    """Print error and scores on a split of the run's data set; write and draw what the flags say."""
    classes, split = checkpoint["classes"], args.split or "test"
    reader = reader_of(checkpoint, workers=args.workers, progress=args.progress)
    images, lines = load_split(checkpoint, split, args.data, reader)
    for line in lines:
        print(one_line(line))
    names, answers = iter(images.names), []
    column = "path" if isinstance(images.names[0], str) else "index"
    bar = tqdm(total=len(images), desc="classifying images", unit="img", leave=False, disable=not args.progress)
    with bar, scores.csv_table(args.csv, column, classes, labelled=True) as write:
        for logits, labels in predictions(checkpoint, images, device, amp, args.batch_size):
            probabilities, predicted, labels = logits.softmax(1).cpu(), logits.argmax(1).cpu(), labels.cpu()
            rank = (probabilities > probabilities.gather(1, labels[:, None])).sum(1)
            answers.append((labels, predicted, probabilities.amax(1), rank))
            rows = zip(islice(names, len(labels)), predicted.tolist(), probabilities, labels.tolist(), strict=True)
            for row in rows if write else ():
                write(*row)
            bar.update(len(labels))
    labels, predicted, confidence, ranks = map(torch.cat, zip(*answers, strict=True))
    matrix = scores.confusion_matrix(labels, predicted, len(classes))
    title = f"{title_of(checkpoint['config'])}\n{scores.headline(matrix, KINDS[split])}"
    if args.confusion:
        scores.draw_confusion(args.confusion, matrix, classes, title)
    wrong = (labels != predicted).nonzero()[:, 0]
    if args.mistakes and len(wrong):
        worst = wrong[confidence[wrong].argsort(descending=True, stable=True)[:DRAWN]]
        captions = [(classes[labels[i]], classes[predicted[i]], float(confidence[i])) for i in worst]
        scores.draw_mistakes(args.mistakes, images.select(worst), captions, title)
    scores.print_scores(matrix, classes, KINDS[split])
    if len(classes) >= 20:
        print(f"top-5 error {100 * (ranks >= 5).double().mean():.2f} %")
    if args.mistakes and not len(wrong):
        print(f"no image is misclassified: {args.mistakes} is not written")


@command
def main(argv=None):
    args = parse_args(argv)
    checkpoint = read_network(args.checkpoint)
    parse_again(checkpoint, args.checkpoint)
    if args.ema:
        checkpoint = averaged(checkpoint)
    device = choose_device(args.device)
    set_up_device(device)
    amp, _ = choose_precision(args.precision, device)
    return (classify_files if args.paths else evaluate_split)(args, checkpoint, device, amp)


if __name__ == "__main__":
    sys.exit(main())
