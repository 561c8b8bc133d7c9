"""Data sets by name, as uint8 tensors or files: their splits, their classes, their mean and standard deviation.

Example: python data.py --dataset digits --stats     (per-channel mean and standard deviation)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batches import ImageTensors
from cli import Mistake, Parser, command, positive
from files import STREAM_FROM, ImageFiles, check_memory, list_images, read_folder

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

    ``train`` and ``test`` are ImageTensors, or ImageFiles where images are streamed from disk.
    """

    train: ImageTensors | ImageFiles
    test: ImageTensors | ImageFiles
    classes: list
    normalize: tuple
    valid: ImageTensors | ImageFiles | None = None

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
        from sklearn.model_selection import train_test_split

        labels = self.train.labels.cpu().numpy()
        if count >= len(labels):
            raise Mistake(f"--valid-size {count}: the training set has {len(labels)} images; hold out fewer")
        if min(count, len(labels) - count) < len(self.classes):
            raise Mistake(f"--valid-size {count}: each part needs at least one image of {len(self.classes)} classes")
        try:
            parts = train_test_split(range(len(labels)), test_size=count, stratify=labels, random_state=seed)
        except ValueError as error:
            raise Mistake(f"--valid-size {count}: cannot hold out the same share of each class ({error})") from error
        train, valid = (self.train.select(torch.tensor(sorted(part))) for part in parts)
        return replace(self, train=train, valid=valid)

    def limit(self, train=None, test=None):
        """The first ``train`` training and the first ``test`` test (and validation) images."""
        valid = self.valid and self.valid.select(slice(test))
        return replace(self, train=self.train.select(slice(train)), test=self.test.select(slice(test)), valid=valid)


def load(name, root, image_size=32, workers=0, progress=True):
    """Load a data set by name; ``root`` holds the archives, or the folders ``train`` and ``test``.

    ``image_size`` (pixels) counts for "digits" and "folder". Raises Mistake.
    """
    if name == "digits":
        dataset = load_digits(image_size)
    elif name == "folder":
        dataset = load_folder(Path(root), image_size, workers, progress)
    else:
        dataset = load_torchvision(name, root)
    count = len(dataset.classes)
    for split in (dataset.train, dataset.test):
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < count:
            raise Mistake(f"{name} in {root}: labels must lie in 0 … {count - 1}; the files are damaged, delete them")
    return dataset


def load_test(name, root, image_size=32):
    """The test images and the names of the classes, without the training images where those are apart. As ``load``."""
    if name == "folder":
        classes = list_images(Path(root, "test"))
        return read_folder(Path(root, "test"), classes, image_size), list(classes)
    if name == "svhn":
        [test] = load_svhn(root, "test")
        return test, SVHN_CLASSES
    dataset = load(name, root, image_size)
    return dataset.test, dataset.classes


def load_digits(image_size):
    """scikit-learn's 1,797 scanned digits, 8×8 grey, enlarged; always the same 1,437 for training, 360 for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)  # (N, 1, 8, 8), was 0 … 16
    size = (image_size, image_size)
    pixels = torch.nn.functional.interpolate(grey, size, mode="bilinear", antialias=True).round().byte()
    images = ImageTensors(pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, 3), torch.tensor(digits.target))
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


def load_folder(root, image_size, workers, progress):
    """``root/train/<class>/*`` and ``root/test/<class>/*``: images of any size and mode, resized to a square."""
    classes, splits = None, {}
    for split in ("train", "test"):
        splits[split] = list_images(root / split)
        names = list(splits[split])
        if classes is not None and names != classes:
            odd = ", ".join(sorted(set(names) ^ set(classes))[:5])
            raise Mistake(f"{root}: train and test need the same class folders; these are in one alone: {odd}")
        classes = names
    if len(classes) < 2:
        raise Mistake(f"{root}/train: found one class, {classes[0]}; a classifier needs at least two class folders")

    if image_size < STREAM_FROM:
        check_memory(sum(len(paths) for split in splits.values() for paths in split.values()), image_size)
    train, test = (read_folder(root / split, splits[split], image_size, workers, progress) for split in splits)
    if image_size >= STREAM_FROM:
        return Dataset(train, test, classes, NORMALIZE["imagenet"])
    mean, std = measure(train.pixels)
    return Dataset(train, test, classes, (mean, tuple(value or 1.0 for value in std)))  # 0: the channel never varies


def measure(pixels):
    """Per-channel (mean, std), of 255, of (N, H, W, 3) uint8: exact, from 256-bin histograms in float64."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(3):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in pixels[..., channel].split(4096):  # bincount makes an int64 copy: keep it small
            counts += torch.bincount(part.flatten(), minlength=256)
        weights = counts / counts.sum()
        mean = (weights * values).sum()
        means.append(mean.item())
        stds.append((weights * (values - mean) ** 2).sum().sqrt().item())
    return tuple(means), tuple(stds)


@command
def main(argv=None):
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="data set (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=32, metavar="N",
        help="folder and digits: resize images to N×N pixels (default: %(default)s)")
    parser.add_argument("--stats", action="store_true", help="measure mean and standard deviation, training images")
    args = parser.parse_args(argv)
    dataset = load(args.dataset, args.data, args.image_size, progress=sys.stderr.isatty())
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print(f"{args.dataset}: {counts} in {len(dataset.classes)} classes")
    if args.stats and isinstance(dataset.train, ImageFiles):
        raise Mistake(f"--stats needs images in memory: --image-size below {STREAM_FROM}")
    if args.stats:
        for name, values in zip(("mean", "std"), measure(dataset.train.pixels), strict=True):
            print(f"{name:4}", *(f"{v:8.4f}" for v in values), " of 255   ", *(f"{v / 255:.8f}" for v in values))


if __name__ == "__main__":
    sys.exit(main())
