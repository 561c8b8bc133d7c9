"""Image files: listed, decoded, cached as tensors or streamed from disk."""

import hashlib
import os
import signal
import sys
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from batches import IGNORE_INDEX, ImageTensors, batch_positions
from cli import Mistake, written_whole

STREAM_FROM = 128  # pixels: folders of images this large or larger are decoded anew in every epoch


@dataclass(frozen=True)
class ImageFiles:
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
        self.files, self.batch_size, self.share = files, batch_size, share
        self.num_images = len(files)
        self.plain = v2.Compose(whole + finish)
        self.augmented = v2.Compose(random + finish) if augment else self.plain

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def in_order(self):
        parts = [list(part) for part, _ in batch_positions(self.num_images, self.batch_size, self.share) if part]
        yield from self._load(DecodedFiles(self.files, self.plain, seed=0), parts)

    def shuffled(self, seed):
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed)).tolist()
        parts = list(batch_positions(len(order), self.batch_size, self.share))
        positions = [[order[i] for i in part or [0]] for part, _ in parts]
        batches = self._load(DecodedFiles(self.files, self.augmented, seed), positions)
        for (part, batch_length), (batch, labels) in zip(parts, batches, strict=True):
            yield batch, labels if part else torch.full_like(labels, IGNORE_INDEX), batch_length

    def _load(self, files, positions):
        device, workers = self.files.device, self.files.workers
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
        except Mistake as error:  # from a worker it comes with the worker's traceback before the message
            raise Mistake(str(error).strip().splitlines()[-1].removeprefix("cli.Mistake: ")) from error


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


def read_folder(folder, classes, image_size, workers=0, progress=False):
    """The images that ``list_images`` found in a folder: ImageTensors, or ImageFiles if they are to be streamed."""
    paths, labels = interleave(classes)
    if image_size >= STREAM_FROM:
        return ImageFiles(paths, labels, image_size, workers)
    cache = folder.with_name(f".{folder.name}-{image_size}.cache")
    return ImageTensors(decode_cached(cache, paths, image_size, progress), labels)


def list_images(folder):
    """{class: sorted image paths} of ``folder/<class>/*``; other files are passed over."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise Mistake(f"{folder} is missing: --dataset folder needs DIR/train/<class>/* and DIR/test/<class>/*")
    classes = {}
    for directory in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        names = sorted(name for name in os.listdir(directory) if name.lower().endswith(IMG_EXTENSIONS))
        classes[directory.name] = [directory / name for name in names]
        if not classes[directory.name]:
            raise Mistake(f"{directory} holds no image ({' '.join(IMG_EXTENSIONS)}): fill it or delete it")
    if not classes:
        raise Mistake(f"{folder} holds no class folder: --dataset folder needs {folder}/<class>/*")
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
        raise Mistake(
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
    try:
        with written_whole(cache, suffix=f".{os.getpid()}") as file:  # another run may decode the same folder
            torch.save({"key": key, "pixels": pixels}, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        print(f"{cache} cannot be written ({error}): the next run will decode the images again", file=sys.stderr)
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
        return ImageFiles(paths, labels, image_size)
    return ImageTensors(decode_all(paths, image_size), labels)


def decode(path):
    """A PIL image in RGB. Raises Mistake naming a file that is no readable image."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off at 255
                grey = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
            return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Mistake(f"{path} is not an image file: {error.strerror}") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise Mistake(f"{path} is not a readable image: replace or delete it ({type(error).__name__})") from error
