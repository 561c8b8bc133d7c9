"""Say what a folder of images holds and what is damaged or duplicated; or measure a data set.

Example: python check_data.py DIR --workers 2                 (reads every image; status 1 if something is wrong)
         python check_data.py --dataset digits --stats        (mean and standard deviation of each channel)
"""

import hashlib
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from common.console import Mistake, Parser, amount, between, command, nonempty
from inputs.datasets import DATASETS, load
from inputs.decoding import in_workers
from inputs.folders import existing, list_images, passed_over, read_labels
from inputs.image import STREAM_FROM, Reader, add_reader_flags, opened, orientation, patient
from inputs.splits import channel_statistics


@patient
def inspect(reader, path):
    """("W×H", mode, what reading loses, digest of the pixels) of a file. Raises as Reader.read.

    If reading loses anything, the digest is that of the file: different pixels may look the same.
    """
    with opened(path) as image:
        scale, losses = reader.scale(image, path), reader.lost(image, path)
        image.load()
        seen = np.asarray(image, np.float64) if scale else reader.in_8_bits(image, scale)
        content = Path(path).read_bytes() if losses else f"{image.size} {orientation(image)}".encode() + seen.tobytes()
        return f"{image.width}×{image.height}", image.mode, losses, hashlib.blake2b(content).digest()


def check_folder(root, reader, labels=None):
    """Read every image below ``root``, or of a table of ``labels``, and print what was found.

    Returns 1 if some are unreadable or twice.
    """
    folders = [root / name for name in ("train", "val", "test") if (root / name).is_dir()] or [existing(root)]
    passed, found, problems = Counter(), {}, []  # found: path → (split, class, size, mode, losses, digest)
    splits = read_labels(root, labels) or {folder: list_images(folder, passed) for folder in folders}
    for split, classes in splits.items():
        files = [(path, name) for name, paths in classes.items() for path in paths]
        answers = in_workers(partial(inspect, reader), [path for path, _ in files], reader, "checking images")
        for (path, name), answer in zip(files, answers, strict=True):
            if isinstance(answer, Mistake):
                problems.append(answer)
            else:
                found[path] = split, name, *answer
        counts = ", ".join(f"{name} {len(paths)}" for name, paths in classes.items())
        print(f"{split}: {len(files):,} images in {len(classes)} classes: {counts}")
    print(*passed_over(passed), sep="\n", end="\n" if passed else "")
    for name, column in (("modes", 3), ("sizes", 2)):
        kinds = Counter(facts[column] for facts in found.values()).most_common()
        others = f", {len(kinds) - 10} others" if len(kinds) > 10 else ""
        print(f"{name}: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds[:10]) + others)
    for loss, count in Counter(loss for facts in found.values() for loss in facts[4]).items():
        print(f"{count:,} images: {loss}")
    for problem in problems:
        print(f"unreadable: {problem}")
    return 1 if print_twice(found, problems) or problems or not found else 0


def print_twice(found, problems):
    """Print which images are in two splits or classes, how many, and what to do. Returns how many."""
    first, twice = {}, Counter()  # first: digest → the first file with these pixels
    for path, (split, name, *_, digest) in found.items():
        other = first.setdefault(digest, path)
        for kind, differ in (("splits", found[other][0] != split), ("classes", found[other][1] != name)):
            if differ:
                print(f"in two {kind}: {other} = {path}")
                twice[kind] += 1
    counts = f"{twice['splits']} in more than one split, {twice['classes']} in more than one class"
    print(f"{len(found) + len(problems):,} images, {len(problems)} unreadable, {counts}")
    if problems:
        print("repair, convert or delete what cannot be read, or train with --skip-unreadable")
    if twice["splits"]:
        print("delete what is in two splits from the training images: a test of what was learnt by heart says little")
    if twice["classes"]:
        print("delete what is in two classes from the wrong one")
    return twice.total()


def parse_args(argv=None):
    parser = Parser(prog="check_data.py", description=__doc__)
    add = parser.add_argument
    add("data", nargs="?", type=nonempty, metavar="DIR", default="data",
        help="folder of images; of another --dataset, where it lives (default: %(default)s)")
    add("--dataset", choices=DATASETS, default="folder", help="(default: %(default)s)")
    add("--stats", action="store_true",
        help="measure mean and standard deviation of the training images (default: read every image of the folder)")
    add("--image-size", type=between(1, 100_000, int), default=32, metavar="N",
        help="--stats: resize images of folder and digits to N×N pixels (default: %(default)s)")
    add("--labels", metavar="FILE", help="a CSV file in the folder, as for train.py (default: classes are folders)")
    add_reader_flags(add)
    add("--test-size", type=amount, default=0, metavar="N",
        help="--stats of class folders alone: set N images, or a share of them, apart (default: 0.2)")
    return parser.parse_args(argv)


def print_statistics(args, reader):
    """Print the size of a data set, and mean and standard deviation of each channel of its training images."""
    if args.dataset == "folder" and reader.streams:
        raise Mistake(f"--stats needs images in memory: --image-size below {STREAM_FROM}")
    dataset = load(args.dataset, args.data, reader, args.test_size, labels=args.labels)
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print("\n".join([*dataset.notes, f"{args.dataset}: {counts} in {len(dataset.classes)} classes"]))
    for name, values in zip(("mean", "std"), channel_statistics(dataset.train.pixels), strict=True):
        print(f"{name:4}", *(f"{v:8.4f}" for v in values), " of 255   ", *(f"{v / 255:.8f}" for v in values))


@command
def main(argv=None):
    args = parse_args(argv)
    reader = Reader.of_run(vars(args), progress=sys.stderr.isatty())
    if args.dataset == "folder" and not args.stats:
        return check_folder(Path(args.data), reader, args.labels)
    return print_statistics(args, reader)


if __name__ == "__main__":
    sys.exit(main())
