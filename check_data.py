"""Say what a folder of images holds, and what is damaged or twice; or measure a data set.

Example: python check_data.py DIR --workers 2                 (reads every image; status 1 if something is wrong)
         python check_data.py --dataset digits --stats        (mean and standard deviation of each channel)
"""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.console import Mistake, Parser, between, command, natural, nonempty, positive_number, workers
from inputs.datasets import DATASETS, load
from inputs.decoding import in_workers
from inputs.folders import existing, list_images
from inputs.image import STREAM_FROM, Reader, in_8_bits, opened, orientation
from inputs.splits import measure


@dataclass(frozen=True)
class Inspection:
    """What a file holds: (width, height), mode, digest of the pixels that are seen; or why it cannot be read."""

    size: tuple | None = None
    mode: str | None = None
    digest: bytes | None = None
    problem: Mistake | None = None


def inspect(paths, reader):
    """An Inspection of each file, which is decoded whole."""
    return in_workers(inspect_file, paths, reader, "checking images")


def inspect_file(path, reader):
    try:
        with opened(path) as image:
            image.load()
            seen = in_8_bits(image, reader.channels, reader.white, path)
            content = hashlib.blake2b(f"{seen.size} {orientation(image)}".encode() + seen.tobytes())
            return Inspection(image.size, image.mode, content.digest())
    except Mistake as error:
        return Inspection(problem=error)


def check_folder(root, reader):
    """Read every image below ``root`` and print what was found. Returns 1 if some are unreadable or in two splits."""
    splits = [root / name for name in ("train", "val", "test") if (root / name).is_dir()] or [existing(root)]
    passed, found = Counter(), {}
    for folder in splits:
        classes = list_images(folder, passed)
        paths = [path for paths in classes.values() for path in paths]
        found[folder] = dict(zip(paths, inspect(paths, reader), strict=True))
        counts = ", ".join(f"{name} {len(paths)}" for name, paths in classes.items())
        print(f"{folder}: {len(paths):,} images in {len(classes)} classes: {counts}")
    for suffix, count in passed.most_common():
        print(f"passed over: {count} files, {suffix}")
    everything = {path: inspection for part in found.values() for path, inspection in part.items()}
    problems = [str(inspection.problem) for inspection in everything.values() if inspection.problem]
    for name in ("mode", "size"):
        kinds = Counter(getattr(x, name) for x in everything.values() if not x.problem).most_common()
        shown = ", ".join(f"{'×'.join(map(str, k)) if name == 'size' else k} {count:,}" for k, count in kinds[:10])
        print(f"{name}s: {shown}" + f", {len(kinds) - 10} others" * (len(kinds) > 10))
    for problem in problems:
        print(f"unreadable: {problem}")
    twice = duplicates(found)
    for path, others in twice:
        print(f"in two splits: {path} = {others[0]}")
    print(f"{len(everything):,} images, {len(problems)} unreadable, {len(twice)} in more than one split")
    if problems:
        print("replace or delete what is damaged, or train with --skip-unreadable")
    return 1 if problems or twice or not everything else 0


def duplicates(found):
    """(path, paths of other splits whose images have the same pixels) of {split: {path: Inspection}}."""
    splits = {}  # digest → {split: paths}
    for split, inspections in found.items():
        for path, inspection in inspections.items():
            if inspection.digest:
                splits.setdefault(inspection.digest, {}).setdefault(split, []).append(path)
    parts = [list(by_split.values()) for by_split in splits.values() if len(by_split) > 1]
    return [(path, rest[0]) for first, *rest in parts for path in first]


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
    add("--channels", type=int, choices=(1, 3), default=3, help="1: folder and digits in grey (default: %(default)s)")
    add("--white", type=positive_number, metavar="X",
        help="the value that is white in images of more than 8 bits (default: 65535)")
    add("--test-size", type=natural, default=0, metavar="N",
        help="--stats of class folders alone: set N images apart (default: %(default)s)")
    add("--skip-unreadable", action="store_true",
        help="--stats: go on without images that cannot be read (default: off)")
    add("--workers", type=workers, default=0, metavar="N", help="processes that read images (default: %(default)s)")
    return parser.parse_args(argv)


def print_statistics(args, reader):
    """Print the size of a data set, and mean and standard deviation of each channel of its training images."""
    if args.dataset == "folder" and reader.streams:
        raise Mistake(f"--stats needs images in memory: --image-size below {STREAM_FROM}")
    dataset = load(args.dataset, args.data, reader, args.test_size)
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print("\n".join([*dataset.notes, f"{args.dataset}: {counts} in {len(dataset.classes)} classes"]))
    for name, values in zip(("mean", "std"), measure(dataset.train.pixels), strict=True):
        print(f"{name:4}", *(f"{v:8.4f}" for v in values), " of 255   ", *(f"{v / 255:.8f}" for v in values))


@command
def main(argv=None):
    args = parse_args(argv)
    reader = Reader.of_run(vars(args), progress=sys.stderr.isatty())
    if args.dataset == "folder" and not args.stats:
        return check_folder(Path(args.data), reader)
    return print_statistics(args, reader)


if __name__ == "__main__":
    sys.exit(main())
