"""Data sets by name, as uint8 tensors or files: their splits, their classes, their mean and standard deviation.

Example: python data.py --dataset digits --stats     (per-channel mean and standard deviation)
         python data.py --data DIR --check --workers 2   (read every image of a folder: what is there, what is damaged)
"""

import contextlib
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is no traceback; main has its own way

import psutil
import torch
from filelock import FileLock

from batches import ImageTensors
from cli import Mistake, Parser, between, command, natural, nonempty, positive_number, workers
from files import ImageFiles, check_folder, fingerprint, read_split, unreadable, without
from folders import check_classes, existing, find_splits, folders_of, interleave, list_images
from reader import STREAM_FROM, Reader

DATASETS = ("cifar10", "cifar100", "svhn", "digits", "folder")

# Mean and standard deviation of each channel, of 255. CIFAR-10: fb.resnet.torch, which the paper's code builds on.
NORMALIZE = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "svhn": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),  # the paper divides SVHN by 255 and does no more
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
# Of runs that are older than the others: what else a folder holds was not looked at.
FIRST_LAYOUT = {"folders": {"train": "train", "test": "test"}, "test_files": []}
KINDS = {"train": "training", "valid": "validation", "test": "test"}  # what the images of a split are called
SVHN_CLASSES = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Dataset:
    """Training and test images, names of the classes, and per-channel (mean, std) of 255.

    ``train``, ``test`` and ``valid`` are ImageTensors, or ImageFiles where images are streamed from disk. ``notes`` are
    lines that a user should read. With ``layout``, a later call finds the same splits: it says which folders they are,
    which files were set apart for testing, and what the images were, so that it is noticed when they have changed.
    ``measured`` is what ``normalize`` was before ``normalized_as``.
    """

    train: ImageTensors | ImageFiles
    test: ImageTensors | ImageFiles
    classes: list
    normalize: tuple
    valid: ImageTensors | ImageFiles | None = None
    notes: list = field(default_factory=list)
    layout: dict | None = None
    measured: tuple | None = None

    @property
    def splits(self):
        """The splits by name: "train", "valid" where images are held out, "test"."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def to(self, device):
        valid = self.valid and self.valid.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), valid=valid)

    def normalized_as(self, normalize):
        """Normalised by other values, those of the weights that training starts from, if they have as many channels."""
        if not normalize or len(normalize[0]) != len(self.normalize[0]):
            return self
        return replace(self, normalize=tuple(map(tuple, normalize)), measured=self.normalize)

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


def load(name, root, reader=DEFAULT_READER, test_size=0, layout=None):
    """Load a data set by name; ``root`` holds the archives, or the folders of images.

    ``reader`` says how image files are read; its image_size (pixels) and channels count for "digits", too. Where a
    folder has no test images, ``test_size`` of its images are set apart. ``layout`` is that of an earlier call, whose
    splits are to be found again. Raises Mistake.
    """
    if name == "digits":
        dataset = load_digits(reader)
    elif name == "folder":
        dataset = load_folder(Path(root), reader, test_size, layout)
    else:
        dataset = load_torchvision(name, root)
    count = len(dataset.classes)
    for split in (dataset.train, dataset.test):
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < count:
            raise Mistake(f"{name} in {root}: labels must lie in 0 … {count - 1}; the files are damaged, delete them")
    return dataset


def load_run(arguments, root, reader, layout=None):
    """``load`` as the arguments of a run say, images held out and limits included."""
    dataset = load(arguments["dataset"], root, reader, arguments.get("test_size", 0), layout)
    if arguments["valid_size"]:
        dataset = dataset.hold_out(arguments["valid_size"], arguments["seed"])
    return dataset.limit(arguments["limit_train"], arguments["limit_test"])


def changed(layout, dataset):
    """The splits whose images are not those that the layout of a run was made of."""
    before = (layout or {}).get("fingerprints", {})
    return [split for split, digest in before.items() if digest != dataset.layout["fingerprints"].get(split)]


def load_test(name, root, reader, classes, layout=FIRST_LAYOUT):
    """The test images alone, where they are apart from the training images, and lines to print. As ``load``.

    ``classes`` are the names of the run's classes, which a folder's must be.
    """
    if name == "folder":
        return load_test_folder(Path(root), reader, classes, layout)
    if name == "svhn":
        [test] = load_svhn(root, "test")
        return test, []
    return load(name, root, reader).test, []


def load_digits(reader):
    """scikit-learn's 1,797 scanned digits, 8×8 grey, enlarged; always the same 1,437 for training, 360 for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_memory(1797, reader, 8 + reader.channels)  # float32 before and after rounding, then uint8
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
    make = [partial(kind, root, train=part) for part in (True, False)]
    train, test = download(name, root, [(kind.url, kind.filename, kind.tgz_md5)], make)
    splits = (  # torchvision's pixels are a transposed view
        ImageTensors(torch.from_numpy(split.data).contiguous(), torch.tensor(split.targets)) for split in (train, test)
    )
    return Dataset(*splits, train.classes, NORMALIZE[name])


def load_svhn(root, *splits):
    """The named splits of SVHN, as ImageTensors."""
    from torchvision.datasets import SVHN

    archives = [SVHN.split_list[split] for split in splits]
    make = [partial(SVHN, root, split) for split in splits]
    return [
        ImageTensors(torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous(), torch.from_numpy(part.labels).long())
        for part in download("svhn", root, archives, make)
    ]


def download(name, root, archives, make):
    """Call every function of ``make``, having fetched what is missing. ``archives``: (URL, file name, md5) each."""
    from torchvision.datasets.utils import check_integrity

    for _, filename, md5 in archives:
        path = Path(root, filename)
        if path.exists() and not check_integrity(path, md5):  # torchvision would download over it
            raise Mistake(f"{path} is incomplete or damaged (md5 is not {md5}): delete it, then run again")
    try:
        with contextlib.suppress(RuntimeError):  # which says that the data set is not there, or not unpacked
            return [make_split() for make_split in make]
        fetch(root, archives)
        return [make_split(download=True) for make_split in make]
    except (OSError, RuntimeError, EOFError) as error:
        names = ", ".join(filename for _, filename, _ in archives)
        reason = str(error).strip().splitlines()[-1]
        raise Mistake(
            f"cannot download {name} ({reason}): put {names} into {root}/ by hand, "
            "or try --dataset digits, which needs no download"
        ) from error


def fetch(root, archives):
    """Download what is missing; where that is stopped, an archive has not got its name yet."""
    from torchvision.datasets.utils import download_url

    unfinished = Path(root, ".download")
    unfinished.mkdir(parents=True, exist_ok=True)
    with FileLock(unfinished / "lock"):  # others may need the same archives
        for url, filename, md5 in archives:
            if not Path(root, filename).exists():
                download_url(url, unfinished, filename, md5)
                with open(unfinished / filename, "rb+") as file:  # a power cut is to leave the old state or the new
                    os.fsync(file.fileno())
                os.replace(unfinished / filename, Path(root, filename))


def load_folder(root, reader, test_size=0, layout=None):
    """Class folders of images, in the splits that ``find_splits`` finds; images of any format, size and mode."""
    folders, notes = find_splits(root, bool(test_size)) if layout is None else (folders_of(root, layout), [])
    passed, listed = Counter(), {}
    for split, folder in folders.items():
        listed[split] = list_images(folder, passed)
        check_classes(folder, listed[split], folders["train"], list(listed["train"]))
    notes += passed_over(passed)
    classes = list(listed["train"])
    if not reader.streams:
        count = sum(len(paths) for found in listed.values() for paths in found.values())
        check_memory(count, reader, reader.channels, f", or one of {STREAM_FROM} or more, which streams from disk")
    images = read_splits(root, folders, listed, reader, notes)
    test_files = layout["test_files"] if layout else []
    if test_size and not layout:
        test_files = draw_test(images["train"], root, test_size)
    if test_files:
        images["train"], images["test"] = divide(images["train"], root, test_files)
    notes += [line for split in images for line in absent_classes(split, images[split], classes)]
    notes += check_range(images["train"])
    mean, std = imagenet_normalize(reader.channels) if reader.streams else measure(images["train"].pixels)
    normalize = mean, tuple(value or 1.0 for value in std)  # 0: the channel never varies
    names = {split: folder.relative_to(root).as_posix() for split, folder in folders.items()}
    prints = {split: fingerprint(found, root) for split, found in images.items()}
    layout = {"folders": names, "test_files": list(test_files), "fingerprints": prints}
    return Dataset(**images, classes=classes, normalize=normalize, notes=notes, layout=layout)


def check_memory(count, reader, bytes_per_pixel, instead=""):
    """Raises Mistake where so many images do not fit; ``instead`` is what may help beside a smaller size."""
    size, available = reader.image_size, psutil.virtual_memory().available / 1e9
    needed = count * size**2 * bytes_per_pixel / 1e9
    if needed > available:
        raise Mistake(
            f"{count:,} images of {size}×{size} pixels need {needed:.1f} GB of memory, of which "
            f"{available:.1f} GB are available: choose a smaller --image-size{instead}"
        )


def read_splits(root, folders, listed, reader, notes):
    """{split: images} of the files listed by class, without those that are to be skipped."""
    images, problems, classes = {}, {}, list(listed["train"])
    for split, found in listed.items():
        paths, labels = interleave([found.get(name, []) for name in classes])
        images[split], problems[split] = read_split(root, folders[split], paths, labels, reader)
    damaged = [problem for found in problems.values() for problem in found.values()]
    if damaged and not reader.skip_unreadable:
        raise unreadable(damaged)
    for split, found in problems.items():
        if found:
            skipped = Counter(classes[images[split].labels[i]] for i in found)
            by_class = ", ".join(f"{name} {skipped[name]}" for name in classes if skipped[name])
            notes.append(f"{folders[split]}: skipped {len(found)} unreadable images: {by_class}")
        images[split] = without(images[split], found)
        if not len(images[split]):
            raise Mistake(f"{folders[split]} holds no image in a class folder that can be read: fill it or delete it")
    return images


def load_test_folder(root, reader, classes, layout):
    """The test images of a folder, in the order of training, and lines to print. Needs no training images."""
    if layout["test_files"]:
        return load_test_files(root, reader, classes, layout)
    folder, passed = existing(root / layout["folders"]["test"]), Counter()
    found = list_images(folder, passed)
    check_classes(folder, found, "the training", classes)
    by_class, notes = {name: found.get(name, []) for name in classes}, passed_over(passed)
    images = read_splits(root, {"train": folder}, {"train": by_class}, reader, notes)["train"]
    return images, notes + absent_classes("test", images, classes)


def load_test_files(root, reader, classes, layout):
    """The images that were set apart for testing, by the names that the run has kept."""
    train, names = layout["folders"]["train"], layout["test_files"]
    paths = [str(root / name) for name in names]
    check_found(root, names, {name for name in names if (root / name).exists()})
    labels = torch.tensor([classes.index(Path(name).relative_to(train).parts[0]) for name in names])
    images, problems = read_split(root, root / "set-apart", paths, labels, reader)
    if problems and not reader.skip_unreadable:
        raise unreadable(problems.values())
    return without(images, problems), []


def check_found(root, names, found):
    missing = [name for name in names if name not in found]
    if missing:
        count = f"{len(missing)} of the run's {len(names)}"
        raise Mistake(f"{root}: {count} test images are missing, such as {missing[0]}")


def passed_over(passed):
    """A line to print about files that are no images, from a Counter of their suffixes."""
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in passed.most_common())
    return [f"passed over {sum(passed.values())} files: {kinds}"] if passed else []


def draw_test(images, root, count):
    """Names of ``count`` files to test on, the same share of each class; always the same ones, whatever the seed."""
    chosen = stratified(images.labels, count, seed=0, flag="--test-size")[1]
    return [Path(images.names[i]).relative_to(root).as_posix() for i in chosen]


def divide(images, root, test_files):
    """Training and test images, from all images and the names of the files to test on."""
    position = {Path(path).relative_to(root).as_posix(): i for i, path in enumerate(images.names)}
    check_found(root, test_files, position)
    test = [position[name] for name in test_files]
    train = sorted(set(range(len(images))) - set(test))
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


def parse_args(argv=None):
    parser = Parser(prog="data.py", description=__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="data set (default: cifar10; with --check folder)")
    add("--data", type=nonempty, metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
    add("--image-size", type=between(1, 100_000, int), default=32, metavar="N",
        help="folder and digits: resize images to N×N pixels (default: %(default)s)")
    add("--channels", type=int, choices=(1, 3), default=3, help="1: folder and digits in grey (default: %(default)s)")
    add("--white", type=positive_number, metavar="X",
        help="the value that is white in images of more than 8 bits (default: 65535)")
    add("--test-size", type=natural, default=0, metavar="N",
        help="class folders alone: set N images apart (default: %(default)s)")
    add("--skip-unreadable", action="store_true", help="go on without images that cannot be read (default: off)")
    add("--stats", action="store_true", help="measure mean and standard deviation, training images")
    add("--check", action="store_true", help="read every image of a folder, and say what is there and what is damaged")
    add("--workers", type=workers, default=0, metavar="N", help="processes that read images (default: %(default)s)")
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
    dataset = load(args.dataset, args.data, reader, args.test_size)
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print("\n".join([*dataset.notes, f"{args.dataset}: {counts} in {len(dataset.classes)} classes"]))
    if args.stats:
        for name, values in zip(("mean", "std"), measure(dataset.train.pixels), strict=True):
            print(f"{name:4}", *(f"{v:8.4f}" for v in values), " of 255   ", *(f"{v / 255:.8f}" for v in values))


if __name__ == "__main__":
    sys.exit(main())
