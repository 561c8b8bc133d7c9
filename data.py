"""Data sets as uint8 tensors on the training device, augmented in whole batches.

Example: python data.py --dataset digits --stats     (per-channel mean and standard deviation)
"""

import contextlib
import hashlib
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from cli import Parser, positive

DATASETS = ("cifar10", "cifar100", "svhn", "digits", "folder")
PAD = 4  # pixels by which the augmentation shifts an image at most (section 4.2 of the paper)
NO_LABEL = -100  # F.cross_entropy passes over it
STREAM_FROM = 128  # pixels: folders of images this large or larger are decoded anew in every epoch

# Mean and standard deviation of each channel, of 255. CIFAR-10: fb.resnet.torch, which the paper's code builds on.
NORMALIZE = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "svhn": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),  # the paper divides SVHN by 255 and does no more
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
SVHN_CLASSES = [str(digit) for digit in range(10)]


class DataError(Exception):
    """A data set that cannot be used. The message is one line: what, where, what to do."""


@dataclass(frozen=True)
class Images:
    """Pixels (N, H, W, 3) uint8 and labels (N,) int64, on any device."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def select(self, index):
        """The images at ``index``, a slice or a tensor of positions."""
        return Images(self.pixels[index], self.labels[index])

    def to(self, device):
        return Images(self.pixels.to(device), self.labels.to(device))

    def batches(self, batch_size, normalize, crop_fill=None, share=(0, 1)):
        return Batches(self, batch_size, normalize, crop_fill, share)


@dataclass(frozen=True)
class Dataset:
    """Training and test images, names of the classes, and per-channel (mean, std) of 255.

    ``train`` and ``test`` are Images, or Files where images are streamed from disk.
    """

    train: "Images | Files"
    test: "Images | Files"
    classes: list
    normalize: tuple
    valid: "Images | Files | None" = None

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
            raise DataError(f"--valid-size {count}: the training set has {len(labels)} images; hold out fewer")
        if min(count, len(labels) - count) < len(self.classes):
            raise DataError(f"--valid-size {count}: each part needs at least one image of {len(self.classes)} classes")
        try:
            parts = train_test_split(range(len(labels)), test_size=count, stratify=labels, random_state=seed)
        except ValueError as error:
            raise DataError(f"--valid-size {count}: cannot hold out the same share of each class ({error})") from error
        train, valid = (self.train.select(torch.tensor(sorted(part))) for part in parts)
        return replace(self, train=train, valid=valid)

    def limit(self, train=None, test=None):
        """The first ``train`` training and the first ``test`` test (and validation) images."""
        valid = self.valid and self.valid.select(slice(test))
        return replace(self, train=self.train.select(slice(train)), test=self.test.select(slice(test)), valid=valid)


class Batches:
    """Batches of a split that lives on the device: no worker processes and no Python loop over images.

    ``crop_fill`` turns augmentation on and says what a shifted image shows beyond its border: "mean" (zero after
    normalisation, as in the paper's Lua code) or "black" (zero before it, as bamos and gpleiss do). ``share``, (rank,
    ranks), gives a rank every ranks-th image of each batch, so that all together see the batches of a single process.
    """

    def __init__(self, images, batch_size, normalize, crop_fill=None, share=(0, 1)):
        mean, std = torch.tensor(normalize, device=images.pixels.device)  # (3,) each
        self.images, self.batch_size, self.crop_fill, self.share = images, batch_size, crop_fill, share
        self.scale, self.shift = 1 / std, -mean / std

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def in_order(self):
        """Yield every image once, in order and unaugmented: ((B, 3, H, W) float32 channels last, (B,) int64)."""
        for part, _ in shares(len(self.images), self.batch_size, self.share):
            if part:
                batch = self.images.select(slice(part.start, part.stop, part.step))
                yield self.normalized(batch.pixels), batch.labels

    def shuffled(self, seed):
        """Yield every image once, shuffled and, with ``crop_fill``, augmented. ``seed`` alone decides both.

        With each batch comes the number of images that all ranks together have in it. A rank whose share is empty gets
        an image with NO_LABEL, since it has to take part in the step.
        """
        # All draws of an epoch are made at once and on the CPU, so that they do not depend on device or batch size.
        generator = torch.Generator().manual_seed(seed)
        count, device = len(self.images), self.images.labels.device
        order = torch.randperm(count, generator=generator).to(device)
        offsets = torch.randint(-PAD, PAD + 1, (count, 2), generator=generator).to(device)  # rows, columns
        flips = torch.randint(0, 2, (count,), generator=generator).bool().to(device)
        for part, images in shares(count, self.batch_size, self.share):
            i = slice(part.start, part.stop, part.step) if part else slice(1)
            if self.crop_fill:
                batch = self.crop_and_flip(order[i], offsets[i], flips[i])
            else:
                batch = self.normalized(self.images.pixels[order[i]])
            labels = self.images.labels[order[i]]
            yield batch, labels if part else torch.full_like(labels, NO_LABEL), images

    def normalized(self, pixels):
        """(B, H, W, 3) uint8 → (B, 3, H, W) float32, channels last."""
        return torch.addcmul(self.shift, pixels, self.scale).permute(0, 3, 1, 2)

    def crop_and_flip(self, index, offsets, flips):
        """The images at ``index``, shifted by ``offsets`` (B, 2), then mirrored where ``flips`` (B,) says.

        Shuffling, cropping and flipping are one gather of pixels: image i shows at (row, column) its source pixel
        (row + offset, ±column + offset), or the fill where that lies outside.
        """
        pixels = self.images.pixels
        _, height, width, _ = pixels.shape
        columns = torch.arange(width, device=pixels.device)
        rows = torch.arange(height, device=pixels.device) + offsets[:, :1]  # (B, H)
        columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (B, W)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        source = (index[:, None] * height + rows.clamp(0, height - 1))[:, :, None] * width
        source = source + columns.clamp(0, width - 1)[:, None, :]  # (B, H, W), into pixels.view(-1, 3)
        batch = pixels.view(-1, 3)[source]
        if self.crop_fill == "black":
            return self.normalized(batch * inside[..., None])
        return self.normalized(batch) * inside[:, None]


def shares(count, batch_size, share):
    """For each batch of ``count`` images: the range of positions that a rank has in it, and the length of the batch."""
    rank, ranks = share
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        yield range(start + rank, stop, ranks), stop - start


@dataclass(frozen=True)
class Files:
    """Image files and labels (N,) int64, decoded at ``image_size`` pixels when a batch asks for them."""

    paths: list
    labels: torch.Tensor
    image_size: int
    workers: int = 0
    device: str | torch.device = "cpu"

    def __len__(self):
        return len(self.paths)

    def select(self, index):
        positions = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return replace(self, paths=[self.paths[i] for i in positions], labels=self.labels[index])

    def to(self, device):
        return replace(self, device=device)

    def batches(self, batch_size, normalize, crop_fill=None, share=(0, 1)):
        return StreamedBatches(self, batch_size, normalize, bool(crop_fill), share)


class StreamedBatches:
    """Batches decoded from files by a DataLoader; the same interface as Batches.

    Augmentation and evaluation follow ImageNet practice: RandomResizedCrop and a flip; resize to 8/7 and centre crop.
    """

    def __init__(self, files, batch_size, normalize, augment, share=(0, 1)):
        from torchvision.transforms import v2

        size = files.image_size
        mean, std = ([value / 255 for value in values] for values in normalize)
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        whole = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
        random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.images, self.batch_size, self.share = files, batch_size, share
        self.plain = v2.Compose(whole + finish)
        self.augmented = v2.Compose(random + finish) if augment else self.plain

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def in_order(self):
        parts = [list(part) for part, _ in shares(len(self.images), self.batch_size, self.share) if part]
        yield from self._load(DecodedFiles(self.images, self.plain, seed=0), parts)

    def shuffled(self, seed):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = list(shares(len(order), self.batch_size, self.share))
        positions = [[order[i] for i in part or [0]] for part, _ in parts]
        batches = self._load(DecodedFiles(self.images, self.augmented, seed), positions)
        for (part, images), (batch, labels) in zip(parts, batches, strict=True):
            yield batch, labels if part else torch.full_like(labels, NO_LABEL), images

    def _load(self, files, positions):
        device, workers = self.images.device, self.images.workers
        loader = torch.utils.data.DataLoader(
            files,
            batch_sampler=positions,
            num_workers=workers,
            pin_memory="cuda" in str(device),
            worker_init_fn=leave_signals_to_parent,
        )
        try:
            for images, labels in loader:
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                yield images, labels.to(device, non_blocking=True)
        except DataError as error:  # from a worker it comes with the worker's traceback before the message
            raise DataError(str(error).strip().splitlines()[-1].removeprefix("data.DataError: ")) from error


class DecodedFiles(torch.utils.data.Dataset):
    """Decoded and transformed images. What is random for image i depends on (seed, i) alone, not on workers."""

    def __init__(self, files, transform, seed):
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU, too, where the masks of dropout are drawn.
            torch.default_generator.manual_seed((self.seed * 1_000_003 + i) % 2**63)
            return self.transform(decode(self.files.paths[i])), self.files.labels[i]


def leave_signals_to_parent(worker):
    """Ctrl-C reaches every process of a terminal; the parent then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load(name, root, image_size=32, workers=0, progress=True):
    """Load a data set by name; ``root`` holds the archives, or the folders ``train`` and ``test``.

    ``image_size`` (pixels) counts for "digits" and "folder". Raises DataError.
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
            raise DataError(f"{name} in {root}: labels must lie in 0 … {count - 1}; the files are damaged, delete them")
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
    images = Images(pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, 3), torch.tensor(digits.target))
    train, test = train_test_split(range(len(images)), test_size=360, random_state=0)
    train, test = images.select(torch.tensor(train)), images.select(torch.tensor(test))
    return Dataset(train, test, [str(digit) for digit in digits.target_names], measure(train.pixels))


def load_torchvision(name, root):
    """CIFAR-10, CIFAR-100 and SVHN (train + extra), downloaded and checked by torchvision."""
    from torchvision import datasets

    if name == "svhn":
        train, extra, test = load_svhn(root, "train", "extra", "test")
        train = Images(torch.cat((train.pixels, extra.pixels)), torch.cat((train.labels, extra.labels)))
        return Dataset(train, test, SVHN_CLASSES, NORMALIZE[name])

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    make = [lambda part=part: kind(root, train=part, download=True) for part in (True, False)]
    train, test = download(name, root, [(kind.filename, kind.tgz_md5)], make)
    # torchvision's pixels are a transposed view
    splits = (Images(torch.from_numpy(split.data).contiguous(), torch.tensor(split.targets)) for split in (train, test))
    return Dataset(*splits, train.classes, NORMALIZE[name])


def load_svhn(root, *splits):
    """The named splits of SVHN, as Images."""
    from torchvision.datasets import SVHN

    archives = [SVHN.split_list[split][1:] for split in splits]  # (file name, md5) each
    make = [lambda split=split: SVHN(root, split, download=True) for split in splits]
    return [
        Images(torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous(), torch.from_numpy(part.labels).long())
        for part in download("svhn", root, archives, make)
    ]


def download(name, root, archives, make):
    """Call every function of ``make``; they fetch what is missing. ``archives``: (file name, md5) pairs."""
    from torchvision.datasets.utils import check_integrity

    for filename, md5 in archives:
        path = Path(root, filename)
        if path.exists() and not check_integrity(path, md5):  # torchvision would download over it
            raise DataError(f"{path} is incomplete or damaged (md5 is not {md5}): delete it, then run again")
    try:
        return [make_split() for make_split in make]
    except (OSError, RuntimeError, EOFError) as error:
        names = ", ".join(filename for filename, _ in archives)
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
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
            raise DataError(f"{root}: train and test need the same class folders; these are in one alone: {odd}")
        classes = names
    if len(classes) < 2:
        raise DataError(f"{root}/train: found one class, {classes[0]}; a classifier needs at least two class folders")

    if image_size < STREAM_FROM:
        check_memory(sum(len(paths) for split in splits.values() for paths in split.values()), image_size)
    train, test = (read_folder(root / split, splits[split], image_size, workers, progress) for split in splits)
    if image_size >= STREAM_FROM:
        return Dataset(train, test, classes, NORMALIZE["imagenet"])
    mean, std = measure(train.pixels)
    return Dataset(train, test, classes, (mean, tuple(value or 1.0 for value in std)))  # 0: the channel never varies


def read_folder(folder, classes, image_size, workers=0, progress=False):
    """The images that ``list_images`` found in a folder: Images, or Files if they are to be streamed."""
    paths, labels = interleave(classes)
    if image_size >= STREAM_FROM:
        return Files(paths, labels, image_size, workers)
    cache = folder.with_name(f".{folder.name}-{image_size}.cache")
    return Images(decode_cached(cache, paths, image_size, progress), labels)


def list_images(folder):
    """{class: sorted image paths} of ``folder/<class>/*``; other files are passed over."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise DataError(f"{folder} is missing: --dataset folder needs DIR/train/<class>/* and DIR/test/<class>/*")
    classes = {}
    for directory in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        names = sorted(name for name in os.listdir(directory) if name.lower().endswith(IMG_EXTENSIONS))
        classes[directory.name] = [directory / name for name in names]
        if not classes[directory.name]:
            raise DataError(f"{directory} holds no image ({' '.join(IMG_EXTENSIONS)}): fill it or delete it")
    if not classes:
        raise DataError(f"{folder} holds no class folder: --dataset folder needs {folder}/<class>/*")
    return classes


def interleave(classes):
    """First images of all classes, then second ones, …: the first N images are then a fair sample of the classes."""
    entries = sorted(
        (position, label, path)
        for label, paths in enumerate(classes.values())
        for position, path in enumerate(paths)
    )
    return [path for _, _, path in entries], torch.tensor([label for _, label, _ in entries])


def check_memory(count, image_size):
    needed, available = count * image_size**2 * 3 / 1e9, psutil.virtual_memory().available / 1e9
    if needed > available:
        raise DataError(
            f"{count:,} images of {image_size}×{image_size} pixels need {needed:.1f} GB of memory, of which "
            f"{available:.1f} GB are available: choose a smaller --image-size, or one of {STREAM_FROM} or more, "
            "which streams from disk"
        )


def decode_cached(cache, paths, image_size, progress):
    """``decode_all``, read from the file ``cache`` if that was made from the same files, and else written there."""
    key = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        key.update(f"{path.relative_to(cache.parent)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    key = key.hexdigest()
    try:
        cached = torch.load(cache, weights_only=True)
        if cached["key"] == key:
            return cached["pixels"]
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file makes torch.load raise nearly anything; the images are still there
        print(f"{cache} cannot be read ({type(error).__name__}): decoding the images again", file=sys.stderr)
    pixels = decode_all(paths, image_size, progress)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        torch.save({"key": key, "pixels": pixels}, temporary)
        os.replace(temporary, cache)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        print(f"{cache} cannot be written ({error}): the next run will decode the images again", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses to delete even what is not there
            temporary.unlink(missing_ok=True)
    return pixels


def decode_all(paths, image_size, progress=False):
    """(N, S, S, 3) uint8 of image files."""
    pixels = torch.empty(len(paths), image_size, image_size, 3, dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc="decoding images", unit="img", disable=not progress)):
        image = decode(path).resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels[i] = torch.from_numpy(np.array(image))
    return pixels


def unlabelled(paths, image_size):
    """Image files to classify, read the way ``load`` reads a folder's."""
    labels = torch.zeros(len(paths), dtype=torch.int64)
    if image_size >= STREAM_FROM:
        return Files(paths, labels, image_size)
    return Images(decode_all(paths, image_size), labels)


def decode(path):
    """A PIL image in RGB. Raises DataError naming a file that is no readable image."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off at 255
                grey = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
            return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{path} is not an image file: {error.strerror}") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not a readable image: replace or delete it ({type(error).__name__})") from error


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


def main(argv=None):
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="data set (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", default="data", help="where data sets live (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=32, metavar="N",
        help="folder and digits: resize images to N×N pixels (default: %(default)s)")
    parser.add_argument("--stats", action="store_true", help="measure mean and standard deviation, training images")
    args = parser.parse_args(argv)
    try:
        dataset = load(args.dataset, args.data, args.image_size, progress=sys.stderr.isatty())
    except DataError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
    print(f"{args.dataset}: {counts} in {len(dataset.classes)} classes")
    if args.stats and isinstance(dataset.train, Files):
        print(f"data.py: error: --stats needs images in memory: --image-size below {STREAM_FROM}", file=sys.stderr)
        return 2
    if args.stats:
        for name, values in zip(("mean", "std"), measure(dataset.train.pixels), strict=True):
            print(f"{name:4}", *(f"{v:8.4f}" for v in values), " of 255   ", *(f"{v / 255:.8f}" for v in values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
