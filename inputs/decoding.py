"""Image files by the thousand, decoded by worker processes and cached as tensors."""

import hashlib
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import torch
from filelock import FileLock
from tqdm import tqdm

from common.checkpoints import load_file
from common.console import Mistake
from common.files import written_whole
from inputs.image import Unreadable


def leave_signals_to_parent(worker):
    """Ctrl-C reaches every process of a terminal; the parent then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    for i, found in enumerate(in_workers(problem_of, paths, reader, "checking images")):
        if isinstance(found, Unreadable):
            problems[i] = str(found)
        elif found:
            raise found
    save_cache(cache, {"key": key, "unreadable": list(problems)})
    return problems


def load_cache(cache, key, paths, reader):
    """What ``save_cache`` wrote under this key, or None; with "problems", {position: why}, of the unreadable files.

    Those are read again: their folder may have moved, or the disk may have failed when they were read.
    """
    try:
        cached = load_file(cache)
        if cached["key"] != key:
            return None
        found = {i: read_or_problem(paths[i], reader) for i in cached["unreadable"]}
        if not all(isinstance(problem, Unreadable) for problem in found.values()):
            return None
        return cached | {"problems": {i: str(problem) for i, problem in found.items()}}
    except (Mistake, KeyError, TypeError, IndexError) as error:  # the images are still there
        if cache.exists():
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
    key = hashlib.sha256(Path(__file__).read_bytes() + Path(__file__).with_name("image.py").read_bytes())
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


def problem_of(path, reader):
    """The Mistake that says why a file cannot be decoded, or None."""
    found = read_or_problem(path, reader)
    return found if isinstance(found, Mistake) else None


def read_or_problem(path, reader):
    """(S, S, C) uint8 as in evaluation, or the Mistake that says why there are none."""
    try:
        return reader.read(path)
    except Mistake as error:
        return error


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
