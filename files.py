"""Image files by the thousand: read and cached as tensors, streamed from disk, or inspected."""

import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock
from tqdm import tqdm

from batches import IGNORE_INDEX, ImageTensors, batch_positions, chosen, draw_newer, mix, normalizer, outside
from cli import Mistake, check_records, readable, written_whole
from folders import existing, list_images
from reader import Reader, Unreadable, in_8_bits, opened, orientation, random_box


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
        return replace(self, paths=chosen(self.paths, index), labels=self.labels[index])

    @property
    def names(self):
        return self.paths

    @property
    def pixels(self):
        """(N, S, S, C) uint8, as in evaluation, decoded anew."""
        return read_all(self.paths, self.reader)[0]

    def to(self, device):
        return replace(self, device=device)

    def sample(self, count):
        """ImageTensors of about so many images, small, evenly spaced, without those that cannot be read."""
        paths = self.paths[:: max(1, len(self) // count)]
        pixels, problems = read_all(paths, replace(self.reader, image_size=32, progress=False))
        return without(ImageTensors(pixels, torch.zeros(len(paths), dtype=torch.int64)), problems)

    def batches(self, batch_size, normalize, crop_fill=None, share=(0, 1), **newer):
        return StreamedBatches(self, batch_size, normalize, bool(crop_fill), share, **newer)


class StreamedBatches:
    """Batches decoded from files by a DataLoader, whose workers live on; the same interface as Batches.

    Augmentation and evaluation follow ImageNet practice: RandomResizedCrop and a flip; resize to 8/7 and centre crop.
    With mixup, every image is decoded twice: once more as a partner.
    """

    def __init__(self, files, batch_size, normalize, augment, share=(0, 1), cutout=0, mixup=0.0):
        self.files, self.batch_size, self.augment, self.share = files, batch_size, augment, share
        self.cutout, self.mixup = cutout, mixup
        self.normalized = normalizer(normalize, files.device)
        self.num_images = len(files)
        self.plan = []  # positions and seed of each batch of a pass
        self.loader = torch.utils.data.DataLoader(
            DecodedFiles(Paths(files.paths), files.labels, files.reader),
            batch_size=None,
            sampler=self.plan,
            num_workers=files.reader.workers,
            persistent_workers=files.reader.workers > 0,
            pin_memory="cuda" in str(files.device),
            worker_init_fn=leave_signals_to_parent,
            collate_fn=unchanged,
            generator=torch.Generator(),  # not torch's own: dropout must not depend on when the workers were started
        )
        if augment:  # before there are workers, which would each take seconds to import it
            import torchvision.transforms  # noqa: F401

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def in_order(self):
        parts = [part for part, _ in batch_positions(self.num_images, self.batch_size, self.share) if part]
        yield from self._load([(list(part), None) for part in parts])

    def shuffled(self, seed):
        generator, size = torch.Generator().manual_seed(seed), (self.files.reader.image_size,) * 2
        order = torch.randperm(self.num_images, generator=generator)
        draws = draw_newer(self.num_images, size, self.cutout, self.mixup, generator)
        parts = list(batch_positions(len(order), self.batch_size, self.share))
        shown = [torch.tensor(part or [0]) for part, _ in parts]
        if self.mixup:
            shown = [torch.cat((i, draws["partners"][i])) for i in shown]
        batches = self._load([(order[i].tolist(), seed if self.augment else None) for i in shown])
        for (part, batch_length), i, (images, labels) in zip(parts, shown, batches, strict=True):
            drawn = {name: values[i].to(images.device) for name, values in draws.items()}
            if self.cutout:
                images = images * outside(drawn["centres"], self.cutout, size)[:, None]
            labels = labels if part else torch.full_like(labels, IGNORE_INDEX)
            yield mix(images, labels, batch_length, drawn.get("shares"))

    def _load(self, plan):
        self.plan[:], device = plan, self.files.device
        for pixels, labels in self.loader:
            if isinstance(labels, Mistake):
                raise self._all_unreadable(labels) if isinstance(labels, Unreadable) else labels
            yield self.normalized(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    def _all_unreadable(self, first):
        """The Mistake about all files that cannot be read, of which one has been met."""
        found = [inspection.problem for inspection in inspect(self.files.paths, self.files.reader)]
        return unreadable([str(problem) for problem in found if isinstance(problem, Unreadable)] or [str(first)])


class Paths(Sequence):
    """Paths as one array of bytes: a million objects would be copied to every worker, one by one."""

    def __init__(self, paths):
        names = [os.fsencode(path) for path in paths]
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return os.fsdecode(self.names[self.ends[i] : self.ends[i + 1]].tobytes())


class DecodedFiles(torch.utils.data.Dataset):
    """Item (positions, seed): pixels (B, S, S, C) uint8 and labels (B,) of those files, or None and a Mistake.

    With a seed, images are augmented: what is random for image i depends on (seed, i) alone, not on workers.
    """

    def __init__(self, paths, labels, reader):
        self.paths, self.labels, self.reader = paths, labels, reader

    def __getitem__(self, batch):
        positions, seed = batch
        try:
            pixels = [self.read(i, seed) for i in positions]
        except Mistake as error:  # raised here, it would reach the parent with this process's traceback in its message
            return None, error
        return torch.from_numpy(np.stack(pixels)), self.labels[positions]

    def read(self, i, seed):
        reader, path = self.reader, self.paths[i]
        if seed is None:
            return reader.read(path)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU, too, where the masks of dropout are drawn.
            torch.default_generator.manual_seed((seed * 1_000_003 + i) % 2**63)
            pixels = reader.read(path, random_box)
            return pixels[:, ::-1] if torch.rand(1) < 0.5 else pixels


def leave_signals_to_parent(worker):
    """Ctrl-C reaches every process of a terminal; the parent then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# From files to pixels.


def read_split(root, folder, paths, labels, reader):
    """The images of some files, ImageTensors or, to be streamed, ImageFiles; and {position: why} of unreadable ones.

    ``folder`` is the one of ``root`` that they are in, or ``root`` itself, where pixels are cached. Of streamed images,
    only --skip-unreadable finds out beforehand which are unreadable. Raises Mistake.
    """
    name = "all" if folder == root else folder.name
    if not reader.streams:
        cache = root / f".{name}-{reader.image_size}{'-grey' * (reader.channels == 1)}.cache"
        pixels, problems = read_cached(cache, paths, reader)
        return ImageTensors(pixels, labels, paths), problems
    problems = find_unreadable(root / f".{name}-unreadable.cache", paths, reader) if reader.skip_unreadable else {}
    return ImageFiles(paths, labels, reader), problems


def without(images, problems):
    """Images without those at the positions of ``problems``."""
    kept = [i for i in range(len(images)) if i not in problems]
    return images.select(torch.tensor(kept, dtype=torch.int64)) if problems else images


def unreadable(problems):
    """The Mistake about files that cannot be read: how many, the first ten, what to do."""
    problems = list(problems)
    shown = "; ".join(problems[:10]) + ("; …" if len(problems) > 10 else "")
    count = f"{len(problems)} images cannot be read: " if len(problems) > 1 else ""
    return Mistake(f"{count}{shown}: replace or delete what is damaged, or start again with --skip-unreadable")


def read_cached(cache, paths, reader):
    """``read_all``, from the file ``cache`` if it holds the same contents, read in the same way; else written there."""
    key = cache_key(paths, cache.parent, reader, contents)
    cached = load_cache(cache, key, paths, reader)
    if cached:
        return cached["pixels"], cached["problems"]
    pixels, problems = read_all(paths, reader)
    save_cache(cache, {"key": key, "pixels": pixels, "unreadable": list(problems)})
    return pixels, problems


def find_unreadable(cache, paths, reader):
    """{position: why} of the files that cannot be read; from the file ``cache`` if none has been written to since."""
    key = cache_key(paths, cache.parent, reader, times)
    cached = load_cache(cache, key, paths, reader)
    if cached:
        return cached["problems"]
    problems = {}
    for i, inspection in enumerate(inspect(paths, reader)):
        if isinstance(inspection.problem, Unreadable):
            problems[i] = str(inspection.problem)
        elif inspection.problem:
            raise inspection.problem
    save_cache(cache, {"key": key, "unreadable": list(problems)})
    return problems


def load_cache(cache, key, paths, reader):
    """What ``save_cache`` wrote under this key, or None; with "problems", {position: why}, of the unreadable files.

    Those are read again: their folder may have moved, or the disk may have failed when they were read.
    """
    try:
        with open(readable(cache), "rb") as file:
            check_records(file)
            cached = torch.load(file, weights_only=True)
        if cached["key"] != key:
            return None
        found = {i: read_or_problem(paths[i], reader) for i in cached["unreadable"]}
        if not all(isinstance(problem, Unreadable) for problem in found.values()):
            return None
        return cached | {"problems": {i: str(problem) for i, problem in found.items()}}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything; the images are still there
        print(f"{cache} cannot be read ({type(error).__name__}): decoding the images again", file=sys.stderr)
        return None


def save_cache(cache, content):
    try:
        with FileLock(cache.with_name(".cache.lock")), written_whole(cache) as file:  # others may decode this folder
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        reason = f"[Errno {error.errno}] {error.strerror}" if isinstance(error, OSError) else error
        print(f"{cache} cannot be written ({reason}): the next run will decode the images again", file=sys.stderr)


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


def fingerprint(images, root):
    """A digest of labels and pixels; of images that are streamed, of names: reading them would take minutes."""
    key = hashlib.sha256(images.labels.numpy())
    if isinstance(images, ImageFiles):
        key.update(os.fsencode("\0".join(os.path.relpath(path, root) for path in images.paths)))
    else:
        key.update(images.pixels.numpy())
    return key.hexdigest()


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
    """(S, S, C) uint8 as in evaluation, or the Mistake that says why there are none."""
    try:
        return reader.read(path)
    except Mistake as error:
        return error


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
