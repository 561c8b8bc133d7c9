"""Data sets by name: CIFAR-10 and -100, SVHN, digits, folders of images."""

import contextlib
import os
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from common.console import Mistake
from inputs.batches import ImageTensors
from inputs.folders import load_folder, load_test_folder
from inputs.image import Reader
from inputs.splits import NORMALIZE, Dataset, check_memory, measure

DATASETS = ("cifar10", "cifar100", "svhn", "digits", "folder")
SVHN_CLASSES = [str(digit) for digit in range(10)]
DEFAULT_READER = Reader()


def load(name, root, reader=DEFAULT_READER, test_size=0, manifest=None):
    """Load a data set by name; ``root`` holds the archives, or the folders of images.

    ``reader`` says how image files are read; its image_size (pixels) and channels count for "digits", too. Where a
    folder has no test images, ``test_size`` of its images are set apart. ``manifest`` is that of an earlier call, whose
    splits are to be found again. Raises Mistake.
    """
    if name == "digits":
        dataset = load_digits(reader)
    elif name == "folder":
        dataset = load_folder(Path(root), reader, test_size, manifest)
    else:
        dataset = load_torchvision(name, root)
    count = len(dataset.classes)
    for split in (dataset.train, dataset.test):
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < count:
            raise Mistake(f"{name} in {root}: labels must lie in 0 … {count - 1}; the files are damaged, delete them")
    return dataset


def load_run(arguments, root, reader, manifest=None):
    """``load`` as the arguments of a run say, images held out and limits included."""
    dataset = load(arguments["dataset"], root, reader, arguments.get("test_size", 0), manifest)
    if arguments["valid_size"]:
        dataset = dataset.hold_out(arguments["valid_size"], arguments["seed"])
    return dataset.limit(arguments["limit_train"], arguments["limit_test"])


def load_test(name, root, reader, classes, manifest):
    """The test images alone, where they are apart from the training images, and lines to print. As ``load``.

    ``classes`` are the names of the run's classes, which a folder's must be.
    """
    if name == "folder":
        return load_test_folder(Path(root), reader, classes, manifest)
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
