"""Image files by the thousand: decoded, cached, unreadable ones reported."""

import errno
import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import NORMALIZE, photo, write_folder
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from common.console import Mistake
from inputs import datasets, decoding
from inputs.image import Reader


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, as a list."""
    paths, real = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda reader, path, *args: paths.append(path) or real(reader, path, *args))
    return paths


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has one of them alone")
def test_workers_leave_the_signals_of_terminals_and_schedulers_to_their_parent():
    numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    workers = decoding.make_loader(numbers, 1, collate_fn=lambda number: os.kill(os.getpid(), number) or os.getpid())
    assert os.getpid() not in list(workers)


def test_the_cache_notices_every_change(tmp_path, monkeypatch, decoded):
    root = write_folder(tmp_path)
    path = root / "train/cat/0.png"
    Image.new("RGB", (40, 20)).save(path, "BMP")  # whose size does not depend on its pixels
    first = datasets.load("folder", root, Reader(16)).train.pixels
    names = [".cache.lock", ".test-16.cache", ".train-16.cache", "test", "train"]
    assert sorted(path.name for path in root.iterdir()) == names and len(decoded) == 10
    old = path.stat()
    Image.new("RGB", (40, 20), "red").save(path, "BMP")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size
    changed = datasets.load("folder", root, Reader(16)).train.pixels
    assert not torch.equal(changed, first)
    os.utime(path)  # other times, the same bytes

    for reader, count in ((Reader(16), 0), (Reader(16, white=9.0), 10), (Reader(16, channels=1), 10), (Reader(16), 6 + 4)):
        decoded.clear()
        pixels = datasets.load("folder", root, reader).train.pixels
        assert len(decoded) == count  # the caches of colour and grey images are two, those of two whites one
    assert torch.equal(pixels, changed)
    monkeypatch.setattr(decoding.PIL, "__version__", "0")  # a decoder that changed
    decoded.clear()
    datasets.load("folder", root, Reader(16))
    assert len(decoded) == 10


@pytest.mark.parametrize("harm", [lambda c: c[:100], lambda c: c[:2000] + bytes(50) + c[2050:], lambda c: b""])
def test_a_damaged_cache_is_not_trusted(tmp_path, capsys, harm):
    root = write_folder(tmp_path)
    pixels, cache = datasets.load("folder", root, Reader(16)).train.pixels, root / ".train-16.cache"
    cache.write_bytes(harm(cache.read_bytes()))
    assert torch.equal(datasets.load("folder", root, Reader(16)).train.pixels, pixels)
    assert "decoding the images again" in capsys.readouterr().err
    torch.save({"key": "0" * 64, "pixels": torch.zeros_like(pixels)}, cache)  # of an earlier release
    assert torch.equal(datasets.load("folder", root, Reader(16)).train.pixels, pixels)


def test_a_read_only_folder_is_decoded_without_a_cache(tmp_path, monkeypatch, capsys):
    for owner, name in ((torch, "save"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, Mock(side_effect=OSError(30, "Read-only file system")))
    assert len(datasets.load("folder", write_folder(tmp_path)).train) == 6
    assert capsys.readouterr().err.count("cannot be written ([Errno 30] Read-only file system)") == 2


def damage(root):
    """Three unreadable training images."""
    for name in ("cat/0.png", "cat/1.png", "dog/2.png"):
        (root / "train" / name).write_bytes(b"no image")
    return root


@pytest.mark.parametrize("image_size", [32, 128])
@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_images_are_reported_together(tmp_path, image_size, workers, decoded):
    root = damage(write_folder(tmp_path, size=(140, 130)))
    with pytest.raises(Mistake, match=r"^3 images cannot be read: [^\n]*cat/0.png[^\n]*dog/2.png[^\n]*--skip-unreadable$"):
        dataset = datasets.load("folder", root, Reader(image_size, workers=workers))
        list(dataset.train.batches(4, dataset.normalize, "mean").shuffled(1))
    dataset = datasets.load("folder", root, Reader(image_size, workers=workers, skip_unreadable=True))
    assert dataset.notes == ["skipped 3 unreadable training images: cat 2, dog 1"]
    assert dataset.train.labels.tolist() == [1, 1, 0]
    assert len(list(dataset.train.batches(4, dataset.normalize, "mean").shuffled(1))) == 1
    decoded.clear()
    again = datasets.load("folder", root, Reader(image_size, skip_unreadable=True))
    assert again.notes == dataset.notes and torch.equal(again.train.labels, dataset.train.labels)
    assert len(decoded) == 3  # from the cache, but for why
    Image.new("RGB", (9, 9)).save(root / "train/cat/0.png")
    again = datasets.load("folder", root, Reader(image_size, skip_unreadable=True))
    assert again.notes[0] == "skipped 2 unreadable training images: cat 1, dog 1"


def test_damage_in_all_splits_is_reported_together_and_ten_files_are_named(tmp_path):
    root = write_folder(tmp_path, train=7)
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(Mistake, match=r"^18 images cannot be read: ([^;]*; ){10}…: "):
        datasets.load("folder", root)
    for image_size in (32, 128):
        with pytest.raises(Mistake, match="no training image in a class folder can be read"):
            datasets.load("folder", root, Reader(image_size, skip_unreadable=True))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("place", [(Image, "open"), (JpegImageFile, "load"), (os, "scandir")], ids=lambda place: place[1])
@pytest.mark.parametrize("image_size", [32, 128])
def test_an_error_of_the_system_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, place, number, image_size):
    """Three fail before what has "dog" in its name is read, or all do."""
    root, left, pauses, real = write_folder(tmp_path), [3], [], getattr(*place)

    def fails(thing, *args, **options):
        if "dog" in str(getattr(thing, "filename", thing)) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(thing, *args, **options)

    for path in root.rglob("*.png"):
        photo(300, 200).save(path, "JPEG")
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(*place, fails)
    dataset = datasets.load("folder", root, Reader(image_size))
    batches = dataset.train.batches(6, NORMALIZE, "mean")
    [(first, *_)], [(again, *_)] = batches.shuffled(1), batches.shuffled(1)
    assert torch.equal(first, again) and pauses == [1] * 3
    (root / ".train-32.cache").unlink(missing_ok=True)
    left[0] = 1000
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        datasets.load("folder", root, Reader(image_size, skip_unreadable=True))
    assert place[0] is os or caught.value.filename.endswith("dog/0.png")
