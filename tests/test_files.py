"""Image files: listed, decoded, cached and streamed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_batches import NORMALIZE, random_images

import data
import files
from cli import Mistake


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_evaluate_every_image_once(ranks, tmp_path):
    streamed = data.load("folder", write_folder(tmp_path, size=(140, 130)), image_size=128).train
    for images in (random_images(17), streamed):
        shares = [images.batches(4, NORMALIZE, share=(rank, ranks)) for rank in range(ranks)]
        labels = torch.cat([y for batches in shares for _, y in batches.in_order()])
        assert torch.equal(labels.sort()[0], images.labels.sort()[0])


def write_folder(root, train=3, test=2, classes=("cat", "dog"), size=(40, 20), mode="RGB"):
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", size, (60 * label, 10 * i, 200))
                image.convert(mode).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_folder_of_any_size_and_mode(tmp_path, mode):
    dataset = data.load("folder", write_folder(tmp_path, mode=mode), image_size=16, progress=False)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.train.pixels.shape == (6, 16, 16, 3)
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0, 1]  # classes alternate, so that --limit-train is fair
    if mode == "RGB":
        assert dataset.train.pixels[1, 5, 5].tolist() == [60, 0, 200]
        mean, std = data.measure(dataset.train.pixels)
        assert std[2] == 0  # all images have the same blue, which is then only shifted
        assert dataset.normalize == (mean, (*std[:2], 1.0))


def test_sixteen_bits_a_pixel_are_scaled_not_cut_off(tmp_path):
    Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert files.decode_all([tmp_path / "grey.png"], 4).unique().tolist() == [round(30000 / 257)]


def test_folder_cache_is_used_and_notices_changes(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path)
    first = data.load("folder", tmp_path, 16, progress=False).train.pixels
    with monkeypatch.context() as patch:
        patch.setattr(files, "decode", lambda path: pytest.fail("decoded again"))
        assert torch.equal(data.load("folder", tmp_path, 16, progress=False).train.pixels, first)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "train" / "cat" / "0.png")
    assert data.load("folder", tmp_path, 16, progress=False).train.pixels[0, 0, 0].tolist() == [1, 2, 3]

    cache = tmp_path / ".train-16.cache"
    cache.write_bytes(cache.read_bytes()[:100])
    assert len(data.load("folder", tmp_path, 16, progress=False).train) == 6
    assert "decoding the images again" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == [".test-16.cache", ".train-16.cache", "test", "train"]


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(Mistake, match="train is missing"):
        data.load("folder", tmp_path / "nowhere")
    root = write_folder(tmp_path / "a")
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(Mistake, match="in one alone: dog, wolf"):
        data.load("folder", root)
    root = write_folder(tmp_path / "b")
    (root / "train" / "eel").mkdir()
    with pytest.raises(Mistake, match=r"eel holds no image"):
        data.load("folder", root)
    with pytest.raises(Mistake, match="found one class, cat"):
        data.load("folder", write_folder(tmp_path / "c", classes=("cat",)))
    root = write_folder(tmp_path / "d")
    (root / "train" / "dog" / "1.png").write_bytes((root / "train" / "dog" / "0.png").read_bytes()[:60])
    with pytest.raises(Mistake, match=r"dog/1.png is not a readable image"):
        data.load("folder", root, progress=False)


def test_an_image_with_far_too_many_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Mistake, match=r"cat/0.png is not a readable image.*DecompressionBombError"):
        data.load("folder", write_folder(tmp_path), progress=False)


def test_a_read_only_folder_is_decoded_without_a_cache(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path)

    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert len(data.load("folder", root, progress=False).train) == 6
    assert capsys.readouterr().err.count("cannot be written ([Errno 30] Read-only file system)") == 2


@pytest.mark.parametrize("size", [32, 128])
def test_test_images_load_without_the_training_images(tmp_path, size):
    whole = data.load("folder", write_folder(tmp_path), image_size=size)
    shutil.rmtree(tmp_path / "train")
    images, classes = data.load_test("folder", tmp_path, size)
    assert classes == whole.classes and torch.equal(images.labels, whole.test.labels)
    assert size == 128 or torch.equal(images.pixels, whole.test.pixels)


def test_folder_too_large_for_memory_says_how_much_it_needs(tmp_path, monkeypatch):
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(Mistake, match=r"10 images of 100×100 pixels need 0.0 GB of memory, of which 0.0 GB"):
        data.load("folder", write_folder(tmp_path), image_size=100)


def test_large_images_are_streamed_behind_the_same_interface(tmp_path):
    root = write_folder(tmp_path, size=(300, 200))
    dataset = data.load("folder", root, image_size=128)
    batches = dataset.train.batches(4, dataset.normalize, "mean")
    assert len(batches) == 2
    first = list(batches.shuffled(1))
    assert [x.shape for x, *_ in first] == [(4, 3, 128, 128), (2, 3, 128, 128)]
    # The same images and augmentation whatever the batch size and the number of workers, others for another seed.
    other = data.load("folder", root, image_size=128, workers=2).train.batches(6, dataset.normalize, "mean")
    [(x, y, _)] = other.shuffled(1)
    assert torch.equal(x, torch.cat([x for x, *_ in first])) and torch.equal(y, torch.cat([y for _, y, _ in first]))
    assert not torch.equal(x, next(other.shuffled(2))[0])
    largest = (2**32 - 1) * 1_000_003 + 300  # what train.py makes of the largest --seed
    assert len(list(batches.shuffled(largest))) == 2
    assert sorted(torch.cat([y for _, y, _ in first]).tolist()) == [0, 0, 0, 1, 1, 1]
    labels = torch.cat([y for _, y in dataset.limit(train=3).train.batches(4, dataset.normalize).in_order()])
    assert labels.tolist() == [0, 1, 0]
    held = dataset.hold_out(2, seed=1)
    assert (len(held.train), len(held.valid)) == (4, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_streamed_image_is_named_in_one_line(tmp_path, workers):
    root = write_folder(tmp_path, size=(130, 130))
    (root / "train" / "dog" / "1.png").write_bytes(b"no image")
    dataset = data.load("folder", root, image_size=128, workers=workers)
    with pytest.raises(Mistake, match=r"^[^\n]*dog/1.png is not a readable image[^\n]*$"):
        list(dataset.train.batches(4, dataset.normalize).in_order())
