"""Image files by the thousand, decoded by worker processes and cached as tensors."""

import hashlib
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import PIL
import torch
from filelock import FileLock
from tqdm import tqdm

from common.checkpoints import load_file
from common.console import SIGNALS, Mistake, forget_workers
from common.files import written_whole
from inputs.image import Unreadable, patient


def unreadable(problems):
    """The Mistake about files that cannot be read: how many, the first ten, what to do."""
    problems = list(problems)
    shown = "; ".join(problems[:10]) + ("; …" if len(problems) > 10 else "")
    count = f"{len(problems)} images cannot be read: " if len(problems) > 1 else ""
    return Mistake(f"{count}{shown}: repair, convert or delete them, or start again with --skip-unreadable")


def read_cached(cache, paths, reader):
    """``read_all``, without pixels if images are streamed; from the file ``cache`` if that is up to date.

    It is if the files have the contents (if images are streamed: size and times) that they had when it was written, and
    are decoded in the same way.
    """
    key = cache_key(paths, cache.parent, reader)
    try:
        cached = load_file(cache)
        if cached["key"] == key:
            again = {i: attempt(reader.read, paths[i]) for i in cached["unreadable"]}
            if all(isinstance(found, Unreadable) for found in again.values()):
                return cached["pixels"], {i: str(found) for i, found in again.items()}
    except (Mistake, KeyError, TypeError) as error:  # the images are still there
        if cache.exists():
            print(f"{cache} cannot be read ({type(error).__name__}): decoding the images again", file=sys.stderr)
    pixels, problems = read_all(paths, reader, keep=not reader.streams)
    try:
        with FileLock(cache.with_name(".cache.lock")), written_whole(cache) as file:  # other runs may write it
            torch.save({"key": key, "pixels": pixels, "unreadable": list(problems)}, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        reason = f"[Errno {error.errno}] {error.strerror}" if isinstance(error, OSError) else error
        print(f"{cache} cannot be written ({reason}): the next run will decode the images again", file=sys.stderr)
    return pixels, problems


def cache_key(paths, root, reader):
    """A hash of the files' names and contents, the reader, our modules that decode, and Pillow's version."""
    key = hashlib.sha256(Path(__file__).read_bytes() + Path(__file__).with_name("image.py").read_bytes())
    key.update(f"{PIL.__version__} {replace(reader, skip_unreadable=False, workers=0, progress=False)}".encode())
    with ThreadPoolExecutor(8) as threads:
        for path, state in zip(paths, threads.map(partial(state_of, reader=reader), paths), strict=True):
            key.update(os.fsencode(os.path.relpath(path, root)) + b"\0" + state)
    return key.hexdigest()


@patient
def state_of(path, reader):
    """A digest of a file's bytes; if images are streamed, its size and times, since reading would take minutes."""
    if reader.streams:
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
    return hashlib.blake2b(Path(path).read_bytes()).digest()


def read_all(paths, reader, keep=True):
    """(N, S, S, C) uint8 of image files, black for unreadable ones; {position: why} of those. Raises Mistake.

    Without ``keep``, files are checked only: there are no pixels.
    """
    pixels = torch.zeros(len(paths) if keep else 0, *(reader.image_size,) * 2, reader.channels, dtype=torch.uint8)
    problems, label = {}, "decoding images" if keep else "checking images"
    for i, found in enumerate(in_workers(reader.read, paths, reader, label)):
        if isinstance(found, Unreadable):
            problems[i] = str(found)
        elif isinstance(found, Mistake):
            raise found
        elif keep:
            pixels[i] = torch.from_numpy(found)
    return pixels, problems


def in_workers(function, paths, reader, label):
    """Yield function(path), or the Mistake that it raises, for each path, in order, with a progress bar.

    The reader's workers call it. Raises an error of the system.
    """
    loader = make_loader(paths, reader.workers, collate_fn=partial(attempt, function))
    for found in tqdm(loader, desc=label, unit="img", disable=not reader.progress, leave=False):
        if isinstance(found, OSError):
            forget_workers()  # which may still be waiting to try again
            raise found
        yield found


def attempt(function, *args):
    """Return a function's result, or its Mistake or OSError: torch would show a worker's traceback."""
    try:
        return function(*args)
    except (Mistake, OSError) as error:
        return error


def make_loader(dataset, workers, **options):
    """A DataLoader that yields the items of a data set one by one."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=set_up_worker,
        generator=torch.Generator(),  # not torch's default: weights and dropout must not depend on what was decoded
        **options,
    )


def set_up_worker(worker):
    # Ctrl-C, a closed terminal or a scheduler's warning reach all processes; the parent then ends its workers.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    # A tensor would go to the parent through /dev/shm, which has 64 MB in a container; an array goes through a pipe.
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))
