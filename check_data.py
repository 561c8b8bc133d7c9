"""Say what a folder of images holds, and what is damaged or twice; or measure a data set.

Example: python check_data.py DIR --workers 2                 (reads every image; status 1 if something is wrong)
         python check_data.py --dataset digits --stats        (mean and standard deviation of each channel)
"""

import hashlib
import sys
from collections import Counter
from pathlib import Path

from common.console import Mistake, Parser, between, command, natural, nonempty
from inputs.datasets import DATASETS, load
from inputs.decoding import in_workers
from inputs.folders import existing, list_images, passed_over
from inputs.image import STREAM_FROM, Reader, add_reader_flags, in_8_bits, opened, orientation
from inputs.splits import channel_statistics


def inspect(path, reader):
    """("W×H", mode, digest of the pixels that are seen) of a file; or the Mistake that says why it cannot be read."""
    try:
        with opened(path) as image:
            image.load()
            seen = in_8_bits(image, reader.channels, reader.white, path)
            content = hashlib.blake2b(f"{seen.size} {orientation(image)}".encode() + seen.tobytes())
            return f"{image.width}×{image.height}", image.mode, content.digest()
    except Mistake as error:
        return error


def check_folder(root, reader):
    """Read every image below ``root`` and print what was found. Returns 1 if some are unreadable or in two splits."""
    splits = [root / name for name in ("train", "val", "test") if (root / name).is_dir()] or [existing(root)]
    passed, found, problems = Counter(), {}, []  # found: path → (split, size, mode, digest)
    for split in splits:
        classes = list_images(split, passed)
        paths = [path for paths in classes.values() for path in paths]
        for path, answer in zip(paths, in_workers(inspect, paths, reader, "checking images"), strict=True):
            if isinstance(answer, Mistake):
                problems.append(answer)
            else:
                found[path] = split, *answer
        counts = ", ".join(f"{name} {len(paths)}" for name, paths in classes.items())
        print(f"{split}: {len(paths):,} images in {len(classes)} classes: {counts}")
    print(*passed_over(passed), sep="\n", end="\n" if passed else "")
    _, sizes, modes, _ = zip(*found.values(), strict=True) if found else [()] * 4
    for name, values in (("modes", modes), ("sizes", sizes)):
        kinds = Counter(values).most_common()
        others = f", {len(kinds) - 10} others" if len(kinds) > 10 else ""
        print(f"{name}: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds[:10]) + others)
    for problem in problems:
        print(f"unreadable: {problem}")
    first, twice = {}, 0  # first: digest → the first file with these pixels, and its split
    for path, (split, _, _, digest) in found.items():
        other, other_split = first.setdefault(digest, (path, split))
        if other_split != split:
            print(f"in two splits: {other} = {path}")
            twice += 1
    print(f"{len(found) + len(problems):,} images, {len(problems)} unreadable, {twice} in more than one split")
    if problems:
        print("replace or delete what is damaged, or train with --skip-unreadable")
    return 1 if problems or twice or not found else 0


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
    add_reader_flags(add)
    add("--test-size", type=natural, default=0, metavar="N",
        help="--stats of class folders alone: set N images apart (default: %(default)s)")
    return parser.parse_args(argv)


def print_statistics(args, reader):
    """Print the size of a data set, and mean and standard deviation of each channel of its training images."""
    if args.dataset == "folder" and reader.streams:
        raise Mistake(f"--stats needs images in memory: --image-size below {STREAM_FROM}")
    dataset = load(args.dataset, args.data, reader, args.test_size)
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print("\n".join([*dataset.notes, f"{args.dataset}: {counts} in {len(dataset.classes)} classes"]))
    for name, values in zip(("mean", "std"), channel_statistics(dataset.train.pixels), strict=True):
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
