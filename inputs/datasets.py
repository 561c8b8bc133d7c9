"""Data sets by name: CIFAR-10 and -100, SVHN, digits, folders of images."""

import contextlib
import sys
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from common.console import Mistake
from inputs.batches import ImageTensors
from inputs.folders import groups_of, load_folder, load_test_folder
from inputs.image import Reader
from inputs.splits import NORMALIZE, Dataset, channel_statistics

DATASETS = ("cifar10", "cifar100", "svhn", "digits", "folder")
DEFAULT_READER = Reader()


def load(name, root, reader=DEFAULT_READER, test_size=0, manifest=None, groups=None, labels=None):
    """Load a data set by name; ``root`` holds the archives, or the folders of images.

    ``reader`` says how image files are read; "digits" takes its image_size (pixels) and channels, too. ``manifest`` is
    that of an earlier call with the same splits. ``test_size``, ``groups`` and ``labels``: see load_folder. Raises
    Mistake.
    """
    if name == "digits":
        return load_digits(reader)
    if name == "folder":
        return load_folder(Path(root), reader, test_size, manifest, groups, labels)
    if name == "svhn":
        train, extra, test = load_svhn(root, "train", "extra", "test")
        train = ImageTensors(torch.cat((train.pixels, extra.pixels)), torch.cat((train.labels, extra.labels)))
        return Dataset(train, test, [str(digit) for digit in range(10)], NORMALIZE[name])
    return load_cifar(name, root)


def load_run(arguments, root, reader, manifest=None):
    """Load the data set of a run, from its arguments, with images held out and limited."""
    test_size, groups = arguments["fold"] or arguments["test_size"], arguments["groups"]
    dataset = load(arguments["dataset"], root, reader, test_size, manifest, groups, arguments["labels"])
    if arguments["valid_size"]:
        groups = groups_of(dataset.train.names, root, groups)
        dataset = dataset.hold_out(arguments["valid_size"], arguments["seed"], groups)
    return dataset.limit(arguments["limit_train"], arguments["limit_test"])


def load_test(name, root, reader, classes, manifest):
    """The test images, and lines to print. Training images are not read, unless they are in the same archive.

    ``classes`` are the names of the run's classes, which a folder's must be.
    """
    if name == "folder":
        return load_test_folder(Path(root), reader, classes, manifest)
    if name == "svhn":
        return load_svhn(root, "test")[0], []
    return load(name, root, reader).test, []


def load_digits(reader):
    """scikit-learn's 1,797 scanned digits, 8×8 grey, enlarged; always the same 1,437 for training, 360 for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)  # (N, 1, 8, 8), was 0 … 16
    size = (reader.image_size, reader.image_size)
    pixels = torch.nn.functional.interpolate(grey, size, mode="bilinear", antialias=True).round().byte()
    images = ImageTensors(pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, reader.channels), torch.tensor(digits.target))
    parts = train_test_split(range(len(images)), test_size=360, random_state=0)
    train, test = (images.select(torch.tensor(part)) for part in parts)
    return Dataset(train, test, [str(digit) for digit in digits.target_names], channel_statistics(train.pixels))


def load_cifar(name, root):
    """CIFAR-10 or CIFAR-100."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    make = [partial(kind, root, train=part) for part in (True, False)]
    files = *kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])
    unpacked = [(f"{kind.base_folder}/{file}", md5) for file, md5 in files]
    train, test = download(name, root, [(kind.filename, kind.tgz_md5)], make, unpacked)
    splits = (  # torchvision's pixels are a transposed view
        ImageTensors(torch.from_numpy(split.data).contiguous(), torch.tensor(split.targets)) for split in (train, test)
    )
    return Dataset(*splits, train.classes, NORMALIZE[name])


def load_svhn(root, *splits):
    """The named splits of SVHN, as ImageTensors."""
    from torchvision.datasets import SVHN

    archives = [SVHN.split_list[split][1:] for split in splits]
    return [
        ImageTensors(torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous(), torch.from_numpy(part.labels).long())
        for part in download("svhn", root, archives, [partial(SVHN, root, split) for split in splits])
    ]


def download(name, root, archives, make, unpacked=()):
    """Call every function of ``make``, torchvision's data sets, which check MD5s; download what is missing or damaged.

    ``archives`` and ``unpacked``: (name below ``root``, MD5) of each file. Raises Mistake.
    """
    from torchvision.datasets.utils import check_integrity

    with contextlib.suppress(RuntimeError):  # the data set is not there, not unpacked, or damaged
        return [make_split() for make_split in make]
    paths = ((Path(root, file), md5) for file, md5 in (*archives, *unpacked))
    damaged = ", ".join(str(path) for path, md5 in paths if path.exists() and not check_integrity(path, md5))
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(root, ".download.lock")):  # others may need the same archives
            loaded = [make_split(download=True) for make_split in make]
    except (OSError, RuntimeError) as error:
        state = f"; damaged: {damaged}" if damaged else ""
        raise Mistake(
            f"cannot download {name} ({str(error).strip().splitlines()[-1]}{state}): "
            f"put {', '.join(archive for archive, _ in archives)} into {root}/ by hand, "
            "or try --dataset digits, which needs no download"
        ) from error
    if damaged:
        print(f"damaged, or cut short, and replaced: {damaged}", file=sys.stderr)
    return loaded
