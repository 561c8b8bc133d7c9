"""Image files by the thousand: read and cached as tensors, streamed from disk, or inspected."""

import hashlib
import os
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
import psutil
import torch
from tqdm import tqdm

from batches import IGNORE_INDEX, ImageTensors, batch_positions, normalizer
from cli import Mistake, written_whole
from folders import interleave
from reader import STREAM_FROM, Reader, Unreadable, centre, opened, random_box, white_of


@dataclass(frozen=True)
class ImageFiles:
    """Image files and labels (N,) int64, decoded when a batch asks for them."""

    paths: list
    labels: torch.Tensor
    reader: Reader
    device: str | torch.device = "cpu"

    def __len__(self):
        return len(self.paths)

    def select(self, index):
        positions = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return replace(self, paths=[self.paths[i] for i in positions], labels=self.labels[index])

    def to(self, device):
        return replace(self, device=device)

    def sample(self, count):
        """ImageTensors of about so many images, small, evenly spaced, without those that cannot be read."""
        paths = self.paths[:: max(1, len(self) // count)]
        pixels, problems = read_all(paths, replace(self.reader, image_size=32, progress=False))
        kept = torch.tensor([i for i in range(len(paths)) if i not in problems])
        return ImageTensors(pixels, torch.zeros(len(paths), dtype=torch.int64)).select(kept)

    def batches(self, batch_size, normalize, crop_fill=None, share=(0, 1)):
        return StreamedBatches(self, batch_size, normalize, bool(crop_fill), share)


class StreamedBatches:
    """Batches decoded from files by a DataLoader; the same interface as Batches.

    Augmentation and evaluation follow ImageNet practice: RandomResizedCrop and a flip; resize to 8/7 and centre crop.
    """

    def __init__(self, files, batch_size, normalize, augment, share=(0, 1)):
        self.files, self.batch_size, self.augment, self.share = files, batch_size, augment, share
        self.normalized = normalizer(normalize, files.device)
        self.num_images = len(files)

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def in_order(self):
        parts = [list(part) for part, _ in batch_positions(self.num_images, self.batch_size, self.share) if part]
        yield from self._load(DecodedFiles(self.files), parts)

    def shuffled(self, seed):
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed)).tolist()
        parts = list(batch_positions(len(order), self.batch_size, self.share))
        positions = [[order[i] for i in part or [0]] for part, _ in parts]
        batches = self._load(DecodedFiles(self.files, seed if self.augment else None), positions)
        for (part, batch_length), (batch, labels) in zip(parts, batches, strict=True):
            yield batch, labels if part else torch.full_like(labels, IGNORE_INDEX), batch_length

    def _load(self, files, positions):
        device, reader = self.files.device, self.files.reader
        loader = torch.utils.data.DataLoader(
            files,
            batch_sampler=positions,
            num_workers=reader.workers,
            pin_memory="cuda" in str(device),
            worker_init_fn=leave_signals_to_parent,
            collate_fn=collate,
        )
        for pixels, labels in loader:
            if isinstance(labels, Mistake):
                raise self._all_unreadable(labels) if isinstance(labels, Unreadable) else labels
            yield self.normalized(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    def _all_unreadable(self, first):
        """The Mistake about all files that cannot be read, of which one has been met."""
        problems = [x.problem for x in inspect(self.files.paths, self.files.reader) if x.problem]
        return unreadable(problems or [str(first)])


class DecodedFiles(torch.utils.data.Dataset):
    """(S, S, C) uint8 and label of each file; a Mistake in place of the label where it cannot be read.

    With a seed, images are augmented: what is random for image i depends on (seed, i) alone, not on workers.
    """

    def __init__(self, files, seed=None):
        self.files, self.seed = files, seed

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        reader, path, label = self.files.reader, self.files.paths[i], self.files.labels[i]
        try:
            if self.seed is None:
                return reader.read(path, centre(reader.image_size)), label
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the GPU, too, where the masks of dropout are drawn.
                torch.default_generator.manual_seed((self.seed * 1_000_003 + i) % 2**63)
                pixels = reader.read(path, random_box)
                return (pixels[:, ::-1] if torch.rand(1) < 0.5 else pixels), label
        except Mistake as error:  # raised here, it would reach the parent with this process's traceback in its message
            return None, error


def collate(items):
    """Pixels and labels of a batch, or the first Mistake in place of its labels."""
    mistakes = [label for _, label in items if isinstance(label, Mistake)]
    if mistakes:
        return None, mistakes[0]
    pixels, labels = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.stack(labels)


def leave_signals_to_parent(worker):
    """Ctrl-C reaches every process of a terminal; the parent then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# From folders to splits.


def read_folder(root, folder, classes, reader, notes):
    """The images of ``classes``, {class: paths}: ImageTensors, or ImageFiles if they are to be streamed; their paths.

    ``folder`` is one of ``root``, where pixels are cached, or ``root`` itself. What is skipped because it is unreadable
    is told in ``notes``, a list of lines. Raises Mistake.
    """
    paths, labels = interleave(classes)
    name = "all" if folder == root else folder.name
    if not reader.streams:
        cache = root / f".{name}-{reader.image_size}{'-grey' * (reader.channels == 1)}.cache"
        pixels, problems = read_cached(cache, paths, reader)
        split = ImageTensors(pixels, labels)
    else:
        split, problems = ImageFiles(paths, labels, reader), {}
        if reader.skip_unreadable:
            problems = find_unreadable(root / f".{name}-unreadable.cache", paths, reader)
    if not problems:
        return split, paths
    if not reader.skip_unreadable:
        raise unreadable(problems.values())
    names, skipped = list(classes), Counter(int(labels[i]) for i in problems)
    by_class = ", ".join(f"{names[label]} {count}" for label, count in sorted(skipped.items()))
    notes.append(f"{folder}: skipped {len(problems)} unreadable images: {by_class}")
    kept = [i for i in range(len(paths)) if i not in problems]
    return split.select(torch.tensor(kept, dtype=torch.int64)), [paths[i] for i in kept]


def unreadable(problems):
    """The Mistake about files that cannot be read: how many, the first ten, what to do."""
    problems = list(problems)
    shown = "; ".join(problems[:10]) + ("; …" if len(problems) > 10 else "")
    count = f"{len(problems)} images cannot be read: " if len(problems) > 1 else ""
    return Mistake(f"{count}{shown}: replace or delete what is damaged, or train with --skip-unreadable")


def check_memory(count, reader):
    size, available = reader.image_size, psutil.virtual_memory().available / 1e9
    needed = count * size**2 * reader.channels / 1e9
    if needed > available:
        raise Mistake(
            f"{count:,} images of {size}×{size} pixels need {needed:.1f} GB of memory, of which "
            f"{available:.1f} GB are available: choose a smaller --image-size, or one of {STREAM_FROM} or more, "
            "which streams from disk"
        )


# From files to pixels.


def read_cached(cache, paths, reader):
    """``read_all``, from the file ``cache`` if it holds the same contents, read in the same way; else written there."""
    key = cache_key(paths, cache.parent, reader, contents)
    cached = load_cache(cache, key)
    if cached and cached["digest"] == digest(cached["pixels"]):
        return cached["pixels"], problems_of(paths, cached["unreadable"], reader)
    pixels, problems = read_all(paths, reader)
    save_cache(cache, {"key": key, "digest": digest(pixels), "pixels": pixels, "unreadable": list(problems)})
    return pixels, problems


def find_unreadable(cache, paths, reader):
    """{position: why} of the files that cannot be read; from the file ``cache`` if none has been written to since."""
    key = cache_key(paths, cache.parent, reader, times)
    cached = load_cache(cache, key)
    if cached:
        return problems_of(paths, cached["unreadable"], reader)
    problems = {i: inspection.problem for i, inspection in enumerate(inspect(paths, reader)) if inspection.problem}
    save_cache(cache, {"key": key, "unreadable": list(problems)})
    return problems


def problems_of(paths, positions, reader):
    """{position: why} of files that are known to be unreadable; the folder may have moved since."""
    return {i: str(read_or_problem(paths[i], reader)) for i in positions}


def load_cache(cache, key):
    """What ``save_cache`` wrote under this key, or None."""
    try:
        cached = torch.load(cache, weights_only=True)
        return cached if cached["key"] == key else None
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything; the images are still there
        print(f"{cache} cannot be read ({type(error).__name__}): decoding the images again", file=sys.stderr)
        return None


def save_cache(cache, content):
    try:
        with written_whole(cache, suffix=f".{os.getpid()}") as file:  # another run may decode the same folder
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        print(f"{cache} cannot be written ({error}): the next run will decode the images again", file=sys.stderr)


def cache_key(paths, root, reader, state):
    """A hash of the files' names and states, and of what decodes them: our modules and Pillow."""
    key = hashlib.sha256(Path(__file__).read_bytes() + Path(__file__).with_name("reader.py").read_bytes())
    key.update(f"{PIL.__version__} {reader.image_size} {reader.channels} {reader.white}".encode())
    with ThreadPoolExecutor(8) as threads:
        for path, of_file in zip(paths, threads.map(state, paths), strict=True):
            key.update(os.fsencode(os.path.relpath(path, root)) + b"\0" + of_file)
    return key.hexdigest()


def contents(path):
    """A digest of a file's bytes: its times and its size can be those of other bytes."""
    try:
        return hashlib.blake2b(Path(path).read_bytes()).digest()
    except OSError:
        return b"unreadable"


def times(path):
    """Size and times of a file: enough where its bytes would take minutes to read."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()


def digest(pixels):
    return hashlib.sha256(pixels.numpy()).hexdigest()


def read_all(paths, reader):
    """(N, S, S, C) uint8 of image files, black where one is unreadable; {position: why} of those. Raises Mistake."""
    pixels, problems = torch.zeros(len(paths), *(reader.image_size,) * 2, reader.channels, dtype=torch.uint8), {}
    for i, found in enumerate(in_workers(read_or_problem, paths, reader, "decoding images")):
        if isinstance(found, Unreadable):
            problems[i] = str(found)
        elif isinstance(found, Mistake):
            raise found
        else:
            pixels[i] = torch.from_numpy(found)
    return pixels, problems


def read_or_problem(path, reader):
    try:
        return reader.read(path)
    except Mistake as error:
        return error


@dataclass(frozen=True)
class Inspection:
    """What a file holds: (width, height), mode, digest of its pixels; or why it is unreadable."""

    size: tuple | None = None
    mode: str | None = None
    digest: bytes | None = None
    problem: str | None = None


def inspect(paths, reader):
    """An Inspection of each file, which is decoded whole."""
    return in_workers(inspect_file, paths, reader, "checking images")


def inspect_file(path, reader):
    try:
        with opened(path) as image:
            image.load()
            white_of(image, reader.white, path)
            content = hashlib.blake2b(f"{image.size} {image.mode}".encode() + image.tobytes())
            return Inspection(image.size, image.mode, content.digest())
    except Mistake as error:
        return Inspection(problem=str(error))


class Mapped(torch.utils.data.Dataset):
    """function(path, reader) for each path, as a data set, so that a DataLoader's workers compute it."""

    def __init__(self, function, paths, reader):
        self.function, self.paths, self.reader = function, paths, reader

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.function(self.paths[i], self.reader)


def in_workers(function, paths, reader, label):
    """Yield function(path, reader) for each path, in order, from the reader's workers, with a progress bar."""
    mapped = Mapped(function, paths, reader)
    loader = torch.utils.data.DataLoader(
        mapped,
        batch_size=None,
        num_workers=reader.workers,
        worker_init_fn=leave_signals_to_parent,
        collate_fn=unchanged,
        generator=torch.Generator(),  # not torch's own: weights must not depend on whether images are cached
    )
    return tqdm(loader, desc=label, unit="img", disable=not reader.progress, leave=False)


def unchanged(item):
    return item


def unlabelled(paths, reader):
    """Image files to classify, read the way a folder's are. Raises Mistake."""
    labels = torch.zeros(len(paths), dtype=torch.int64)
    if reader.streams:
        return ImageFiles(paths, labels, reader)
    pixels, problems = read_all(paths, reader)
    if problems:
        raise unreadable(problems.values())
    return ImageTensors(pixels, labels)
