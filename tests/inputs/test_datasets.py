"""Data sets by name: archives, splits and statistics."""

import pickle
import shutil
import tarfile
import urllib.error
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import NORMALIZE, random_images
from torchvision.datasets import utils

from common.console import Mistake
from inputs import datasets, splits
from inputs.image import Reader
from inputs.splits import Dataset


def test_statistics_equal_numpy_in_float64():
    images = random_images(100)
    mean, std = splits.channel_statistics(images.pixels)
    pixels = images.pixels.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "published"),  # fb.resnet.torch's, of 1
    [
        ("cifar10", ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))),
        ("cifar100", ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047))),
    ],
)
def test_constants_are_the_published_ones(name, published):
    np.testing.assert_allclose(splits.NORMALIZE[name], np.array(published) * 255, atol=0.06)


def test_a_fingerprint_is_of_pixels_and_labels():
    images = [random_images(8), random_images(8, classes=3), random_images(8, seed=1)]
    assert len({splits.fingerprint(part, None) for part in images}) == 3


def test_hold_out_is_stratified_and_follows_the_seed():
    images = random_images(200, size=8)
    images.pixels[:, 0, 0, 0] = torch.arange(200)
    dataset = Dataset(images, images, list("abcd"), NORMALIZE)
    held, same, other = (dataset.hold_out(40, seed) for seed in (1, 1, 2))
    assert [len(split) for split in held.limit(30, 7).splits.values()] == [30, 7, 7]
    assert held.valid.labels.bincount().tolist() == [10, 10, 10, 10]
    assert sorted(torch.cat((held.train.pixels, held.valid.pixels))[:, 0, 0, 0].tolist()) == list(range(200))
    assert torch.equal(held.valid.pixels, same.valid.pixels) and not torch.equal(held.valid.pixels, other.valid.pixels)
    for count in (200, 3):
        with pytest.raises(Mistake, match=f"valid-size {count}: cannot take the same fraction of each class"):
            dataset.hold_out(count, seed=1)


def test_digits_need_no_download_and_are_always_split_alike():
    dataset, small = datasets.load("digits", "nowhere"), datasets.load("digits", "nowhere", Reader(8))
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.pixels.shape[1:] == (32, 32, 3) and int(dataset.train.pixels.max()) == 255
    assert len(dataset.test.labels.unique()) == 10 and torch.equal(dataset.train.labels, small.train.labels)
    grey = datasets.load("digits", None, Reader(8, channels=1))
    assert torch.equal(grey.train.pixels, small.train.pixels[..., :1])
    assert grey.normalize == tuple(values[:1] for values in small.normalize)


def write_cifar(root, name, monkeypatch):
    """An archive in CIFAR's own format: pickled dicts of rows of 3072 bytes, red first; small, but all files there.

    Returns the rows and labels of the training images.
    """
    kind = getattr(torchvision.datasets, name.upper())
    key, count = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    rng, folder = np.random.default_rng(0), root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return md5(pickle.dumps(content)).hexdigest()

    for attribute in ("test_list", "train_list"):
        batches = [{"data": rng.integers(0, 256, (20, 3072), np.uint8), key: rng.integers(count, size=20).tolist()} for _ in getattr(kind, attribute)]
        entries = [[file, write(file, batch)] for (file, _), batch in zip(getattr(kind, attribute), batches, strict=True)]
        monkeypatch.setattr(kind, attribute, entries)
    digest = write(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(count)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": digest})
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        archive.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", md5((root / kind.filename).read_bytes()).hexdigest())
    shutil.rmtree(folder)  # the loader has to unpack the archive
    return [np.concatenate([batch[part] for batch in batches]) for part in ("data", key)]


@pytest.fixture
def network(monkeypatch):
    """What torchvision downloads, in order; 1,000 bytes are interrupted by Ctrl-C, and without any, it fails."""
    answers = []

    def retrieve(url, path):
        if not answers:
            raise urllib.error.URLError("no network")
        Path(path).write_bytes(answers[0])
        if len(answers.pop(0)) == 1000:
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **options: url)
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    return answers


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, network, name):
    rows, labels = write_cifar(tmp_path, name, monkeypatch)
    kind = getattr(torchvision.datasets, name.upper())
    archive = tmp_path / kind.filename
    dataset, packed = datasets.load(name, tmp_path), archive.read_bytes()
    assert torch.equal(dataset.train.pixels, torch.from_numpy(rows.reshape(-1, 3, 32, 32)).permute(0, 2, 3, 1))
    assert dataset.train.labels.tolist() == labels.tolist() and dataset.classes[3] == "class 3"
    assert dataset.normalize == splits.NORMALIZE[name]
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        theirs = kind(tmp_path, train=part == "train")
        assert torch.equal(images.pixels, torch.from_numpy(theirs.data)) and images.labels.tolist() == theirs.targets
    archive.unlink()  # the unpacked files are enough
    for file in (kind.train_list[-1][0], kind.test_list[0][0], kind.meta["filename"]):
        path = tmp_path / kind.base_folder / file
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(Mistake, match=f"^cannot download {name} [^\n]*; damaged: [^\n]*: put {archive.name} into "):
            datasets.load(name, tmp_path)
        path.write_bytes(content)
    (tmp_path / kind.base_folder / kind.train_list[0][0]).write_bytes(b"cut while it was unpacked")
    archive.write_bytes(packed)
    assert torch.equal(datasets.load(name, tmp_path).train.pixels, dataset.train.pixels)


def test_a_download_that_was_cut_short_is_named_and_repeated(tmp_path, monkeypatch, network, capsys):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    content = archive.read_bytes()
    archive.unlink()
    network.append(content[:1000])
    with pytest.raises(KeyboardInterrupt):
        datasets.load("cifar10", tmp_path)
    with pytest.raises(Mistake, match=r"^cannot download cifar10 \(.*no network.*\)"):
        datasets.load("cifar10", tmp_path)
    assert archive.read_bytes() == content[:1000]
    network.append(content)
    capsys.readouterr()
    assert len(datasets.load("cifar10", tmp_path).train) == 100
    assert capsys.readouterr().err == f"damaged, or cut short, and replaced: {archive}\n"


def write_svhn(root, monkeypatch):
    from scipy.io import savemat

    pixels, entries = {}, {}
    for split, count in (("train", 20), ("extra", 30), ("test", 10)):
        path = root / f"{split}_32x32.mat"
        pixels[split] = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(path, {"X": pixels[split], "y": np.arange(count)[:, None] % 10 + 1})
        entries[split] = ["http://unused", path.name, md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", entries)
    return pixels


def test_svhn_archives(tmp_path, monkeypatch):
    pixels = write_svhn(tmp_path, monkeypatch)
    dataset = datasets.load("svhn", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (50, 10)
    assert torch.equal(dataset.train.pixels[20], torch.from_numpy(pixels["extra"][..., 0]))
    assert dataset.train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    x, _ = next(dataset.test.batches(10, dataset.normalize).in_order())
    torch.testing.assert_close(x.permute(0, 2, 3, 1), dataset.test.pixels / 255)  # divided by 255 and no more
    (tmp_path / "extra_32x32.mat").unlink()
    assert torch.equal(datasets.load_test("svhn", tmp_path, Reader(), dataset.classes, None)[0].pixels, dataset.test.pixels)
