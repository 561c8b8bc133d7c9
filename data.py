"""Data sets by name, as uint8 tensors or files: their splits, their classes, their mean and standard deviation.

Example: python data.py --dataset digits --stats     (per-channel mean and standard deviation)
         python data.py --data DIR --check --workers 2   (read every image of a folder: what is there, what is damaged)
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from batches import ImageTensors
from cli import Mistake, Parser, command, natural, positive, positive_number
from files import ImageFiles, check_memory, inspect, read_folder
from folders import check_classes, existing, find_splits, list_images
from reader import STREAM_FROM, Reader

DATASETS = ("cifar10", "cifar100", "svhn", "digits", "folder")

# Mean and standard deviation of each channel, of 255. CIFAR-10: fb.resnet.torch, which the paper's code builds on.
NORMALIZE = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "svhn": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),  # the paper divides SVHN by 255 and does no more
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
SVHN_CLASSES = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Dataset:
    """Training and test images, names of the classes, and per-channel (mean, std) of 255.

    ``train``, ``test`` and ``valid`` are ImageTensors, or ImageFiles where images are streamed from disk. ``notes`` are
    lines that a user should read; ``test_files`` names the test images where they were set apart from the others.
    """

    train: ImageTensors | ImageFiles
    test: ImageTensors | ImageFiles
    classes: list
    normalize: tuple
    valid: ImageTensors | ImageFiles | None = None
    notes: list = field(default_factory=list)
    test_files: list = field(default_factory=list)

    @property
    def splits(self):
        """The splits by name: "train", "valid" where images are held out, "test"."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def to(self, device):
        valid = self.valid and self.valid.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), valid=valid)

    def hold_out(self, count, seed):
        """Move ``count`` training images, the same share of each class, to ``valid``. Drawn by ``seed`` alone."""
        if self.valid is not None:
            raise Mistake(f"--valid-size {count}: the data set has validation images: leave it out")
        parts = stratified(self.train.labels, count, seed, flag="--valid-size")
        train, valid = (self.train.select(torch.tensor(part)) for part in parts)
        return replace(self, train=train, valid=valid)

    def limit(self, train=None, test=None):
        """The first ``train`` training and the first ``test`` test (and validation) images."""
        valid = self.valid and self.valid.select(slice(test))
        return replace(self, train=self.train.select(slice(train)), test=self.test.select(slice(test)), valid=valid)


def stratified(labels, count, seed, flag):
    """Positions of all images but ``count``, and of those, the same share of each class. Raises Mistake."""
    from sklearn.model_selection import train_test_split

    labels, classes = labels.cpu().numpy(), len(labels.unique())
    if count >= len(labels):
        raise Mistake(f"{flag} {count}: the training set has {len(labels)} images; hold out fewer")
    if min(count, len(labels) - count) < classes:
        raise Mistake(f"{flag} {count}: each part needs at least one image of {classes} classes")
    try:
        parts = train_test_split(range(len(labels)), test_size=count, stratify=labels, random_state=seed)
    except ValueError as error:
        raise Mistake(f"{flag} {count}: cannot hold out the same share of each class ({error})") from error
    return [sorted(part) for part in parts]


DEFAULT_READER = Reader()


def load(name, root, reader=DEFAULT_READER, test_size=0, test_files=()):
    """Load a data set by name; ``root`` holds the archives, or the folders of images.

    ``reader`` says how image files are read; its image_size (pixels) and channels count for "digits", too. Where a
    folder has no test images, ``test_size`` of its images are set apart, or those of ``test_files``, which an earlier
    call has set apart. Raises Mistake.
    """
    if name == "digits":
        dataset = load_digits(reader)
    elif name == "folder":
        dataset = load_folder(Path(root), reader, test_size, test_files)
    else:
        dataset = load_torchvision(name, root)
    count = len(dataset.classes)
    for split in (dataset.train, dataset.test):
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < count:
            raise Mistake(f"{name} in {root}: labels must lie in 0 … {count - 1}; the files are damaged, delete them")
    return dataset


def load_test(name, root, reader, classes, test_files=()):
    """The test images alone, where they are apart from the training images, and lines to print. As ``load``."""
    if name == "folder":
        return load_test_folder(Path(root), reader, classes, test_files)
    if name == "svhn":
        [test] = load_svhn(root, "test")
        return test, []
    return load(name, root, reader).test, []


def load_digits(reader):
    """scikit-learn's 1,797 scanned digits, 8×8 grey, enlarged; always the same 1,437 for training, 360 for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)  # (N, 1, 8, 8), was 0 … 16
    size = (reader.image_size, reader.image_size)
    pixels = torch.nn.functional.interpolate(grey, size, mode="bilinear", antialias=True).round().byte()
    images = ImageTensors(pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, reader.channels), torch.tensor(digits.target))
    train, test = train_test_split(range(len(images)), test_size=360, random_state=0)
    train, test = images.select(torch.tensor(train)), images.select(torch.tensor(test))
    return Dataset(train, test, [str(digit) for digit in digits.target_names], measure(train.pixels))


def load_torchvision(name, root):
    """CIFAR-10, CIFAR-100 and SVHN (train + extra), downloaded and checked by torchvision."""
    from torchvision import datasets

    if name == "svhn":
        train, extra, test = load_svhn(root, "train", "extra", "test")
        train = ImageTensors(torch.cat((train.pixels, extra.pixels)), torch.cat((train.labels, extra.labels)))
        return Dataset(train, test, SVHN_CLASSES, NORMALIZE[name])

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    make = [lambda part=part: kind(root, train=part, download=True) for part in (True, False)]
    train, test = download(name, root, [(kind.filename, kind.tgz_md5)], make)
    splits = (  # torchvision's pixels are a transposed view
        ImageTensors(torch.from_numpy(split.data).contiguous(), torch.tensor(split.targets)) for split in (train, test)
    )
    return Dataset(*splits, train.classes, NORMALIZE[name])


def load_svhn(root, *splits):
    """The named splits of SVHN, as ImageTensors."""
    from torchvision.datasets import SVHN

    archives = [SVHN.split_list[split][1:] for split in splits]  # (file name, md5) each
    make = [lambda split=split: SVHN(root, split, download=True) for split in splits]
    return [
        ImageTensors(torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous(), torch.from_numpy(part.labels).long())
        for part in download("svhn", root, archives, make)
    ]


def download(name, root, archives, make):
    """Call every function of ``make``; they fetch what is missing. ``archives``: (file name, md5) pairs."""
    from torchvision.datasets.utils import check_integrity

    for filename, md5 in archives:
        path = Path(root, filename)
        if path.exists() and not check_integrity(path, md5):  # torchvision would download over it
            raise Mistake(f"{path} is incomplete or damaged (md5 is not {md5}): delete it, then run again")
    try:
        return [make_split() for make_split in make]
    except (OSError, RuntimeError, EOFError) as error:
        names = ", ".join(filename for filename, _ in archives)
        reason = str(error).strip().splitlines()[-1]
        raise Mistake(
            f"cannot download {name} ({reason}): put {names} into {root}/ by hand, "
            "or try --dataset digits, which needs no download"
        ) from error


def load_folder(root, reader, test_size=0, test_files=()):
    """Class folders of images, in the splits that ``find_splits`` finds; images of any format, size and mode."""
    splits, notes = find_splits(root, set_apart=bool(test_size or test_files))
    passed, listed = Counter(), {}
    for split, folder in splits.items():
        listed[split] = list_images(folder, passed)
        check_classes(folder, listed[split], splits["train"], list(listed["train"]))
    if passed:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in passed.most_common())
        notes.append(f"passed over {sum(passed.values())} files: {kinds}")
    classes = list(listed["train"])
    if not reader.streams:
        check_memory(sum(len(paths) for found in listed.values() for paths in found.values()), reader)
    read = {}
    for split, found in listed.items():
        by_class = {name: found.get(name, []) for name in classes}
        read[split], paths = read_folder(root, splits[split], by_class, reader, notes)
        check_not_empty(splits[split], paths)
        if split == "train" and (test_size or test_files):
            test_files = test_files or draw_test(read["train"], paths, root, test_size)
            read["train"], read["test"] = divide(read["train"], paths, root, test_files)
    notes += [line for split, images in read.items() for line in absent_classes(split, images, classes)]
    notes += check_range(read["train"])
    normalize = imagenet_normalize(reader.channels) if reader.streams else measure(read["train"].pixels)
    mean, std = normalize
    return Dataset(
        **read,
        classes=classes,
        normalize=(mean, tuple(value or 1.0 for value in std)),  # 0: the channel never varies
        notes=notes,
        test_files=list(test_files),
    )


def load_test_folder(root, reader, classes, test_files=()):
    """The test images of a folder, and lines to print; the training images need not be there."""
    if test_files:
        dataset = load_folder(root, reader, test_files=test_files)
        return dataset.test, dataset.notes
    folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    passed, notes = Counter(), []
    found = list_images(existing(folder), passed)
    check_classes(folder, found, "the training", classes)
    images, paths = read_folder(root, folder, {name: found.get(name, []) for name in classes}, reader, notes)
    check_not_empty(folder, paths)
    return images, notes + absent_classes("test", images, classes)


def check_not_empty(folder, paths):
    if not paths:
        raise Mistake(f"{folder} holds no image that can be read: fill it or delete it")


def draw_test(images, paths, root, count):
    """Names of ``count`` files to test on, the same share of each class; always the same ones, whatever the seed."""
    chosen = stratified(images.labels, count, seed=0, flag="--test-size")[1]
    return [Path(paths[i]).relative_to(root).as_posix() for i in chosen]


def divide(images, paths, root, test_files):
    """Training and test images, from all images and the names of the files to test on."""
    position = {Path(path).relative_to(root).as_posix(): i for i, path in enumerate(paths)}
    missing = [name for name in test_files if name not in position]
    if missing:
        count = f"{len(missing)} of the run's {len(test_files)}"
        raise Mistake(f"{root}: {count} test images are missing, such as {missing[0]}")
    test = sorted(position[name] for name in test_files)
    train = sorted(set(range(len(paths))) - set(test))
    return images.select(torch.tensor(train)), images.select(torch.tensor(test))


def absent_classes(split, images, classes):
    """A line to print where a split has no image of some classes."""
    counts = images.labels.bincount(minlength=len(classes)).tolist()
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    return [f"no {split} image of {len(absent)} of the classes: {', '.join(absent[:10])}"] if absent else []


def check_range(images):
    """A line to print where training images use less than an eighth of their range: their white may be elsewhere."""
    if isinstance(images, ImageFiles):
        images = images.sample(64)
    if not len(images) or int(images.pixels.max()) - int(images.pixels.min()) >= 32:
        return []
    used = f"{int(images.pixels.min())} … {int(images.pixels.max())} of 0 … 255"
    return [f"the training images use only {used}: if their files have over 8 bits, say with --white what is white"]


def imagenet_normalize(channels):
    """ImageNet's mean and standard deviation; of grey images, the averages over red, green and blue."""
    values = NORMALIZE["imagenet"]
    return values if channels == 3 else tuple((round(sum(value) / 3, 3),) for value in values)


def measure(pixels):
    """Per-channel (mean, std), of 255, of (N, H, W, C) uint8: exact, from 256-bin histograms in float64."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(pixels.shape[-1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in pixels[..., channel].split(4096):  # bincount makes an int64 copy: keep it small
            counts += torch.bincount(part.flatten(), minlength=256)
        weights = counts / counts.sum()
        mean = (weights * values).sum()
        means.append(mean.item())
        stds.append((weights * (values - mean) ** 2).sum().sqrt().item())
    return tuple(means), tuple(stds)


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
    problems = [inspection.problem for inspection in everything.values() if inspection.problem]
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
    return 1 if problems or twice else 0


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
    parser = Parser(prog="data.py", description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="data set (default: cifar10; with --check folder)")
    add("--data", metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
    add("--image-size", type=positive, default=32, metavar="N",
        help="folder and digits: resize images to N×N pixels (default: %(default)s)")
    add("--channels", type=int, choices=(1, 3), default=3, help="1: folder and digits in grey (default: %(default)s)")
    add("--white", type=positive_number, metavar="X",
        help="the value that is white in images of more than 8 bits (default: 65535)")
    add("--stats", action="store_true", help="measure mean and standard deviation, training images")
    add("--check", action="store_true", help="read every image of a folder, and say what is there and what is damaged")
    add("--workers", type=natural, default=0, metavar="N", help="processes that read images (default: %(default)s)")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or ("folder" if args.check else "cifar10")
    if args.check and args.dataset != "folder":
        raise Mistake(f"--check reads folders of images, not {args.dataset}")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    reader = Reader.of_run(vars(args), progress=sys.stderr.isatty())
    if args.check:
        return check_folder(Path(args.data), reader)
    if args.stats and args.dataset == "folder" and reader.streams:
        raise Mistake(f"--stats needs images in memory: --image-size below {STREAM_FROM}")
    dataset = load(args.dataset, args.data, reader)
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print("\n".join([*dataset.notes, f"{args.dataset}: {counts} in {len(dataset.classes)} classes"]))
    if args.stats:
        for name, values in zip(("mean", "std"), measure(dataset.train.pixels), strict=True):
            print(f"{name:4}", *(f"{v:8.4f}" for v in values), " of 255   ", *(f"{v / 255:.8f}" for v in values))


if __name__ == "__main__":
    sys.exit(main())
