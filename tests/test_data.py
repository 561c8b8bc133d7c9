import pickle
import shutil
import tarfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import data
from data import DataError, Dataset, Images

NORMALIZE = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def random_images(count=64, size=32, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes)


@pytest.mark.parametrize("fill", ["mean", "black"])
def test_crop_and_flip_equal_torchvision_for_every_shift(fill):
    images = random_images(1)
    batches = images.batches(64, NORMALIZE, fill)
    mean, std = ([value / 255 for value in values] for values in NORMALIZE)
    image = images.pixels[0].permute(2, 0, 1)
    for top in range(9):
        for left in range(9):
            for flip in (False, True):
                ours = batches.crop_and_flip(torch.tensor([0]), torch.tensor([[top - 4, left - 4]]), torch.tensor([flip]))
                expected = tv.to_dtype(image, torch.float32, scale=True)
                if fill == "black":  # pad, then normalise
                    expected = tv.normalize(tv.crop(tv.pad(expected, 4), top, left, 32, 32), mean, std)
                else:  # normalise, then pad
                    expected = tv.crop(tv.pad(tv.normalize(expected, mean, std), 4), top, left, 32, 32)
                expected = tv.horizontal_flip(expected) if flip else expected
                torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-5)


def test_augmentation_is_distributed_as_torchvision_does_it():
    """All 162 outcomes of RandomCrop(10, padding=4) and RandomHorizontalFlip, each as often as torchvision draws it."""
    count, size = 40_000, 10
    one = random_images(1, size)
    many = Images(one.pixels.repeat(count, 1, 1, 1), one.labels.repeat(count))
    ours = torch.cat([x for x, *_ in many.batches(1000, ((0.0,) * 3, (1.0,) * 3), "black").shuffled(3)])
    transform = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = torch.stack([transform(one.pixels[0].permute(2, 0, 1)) for _ in range(count // 4)]).float()
    outcomes, ours_drawn = ours.flatten(1).unique(dim=0, return_counts=True)
    their_outcomes, theirs_drawn = theirs.flatten(1).unique(dim=0, return_counts=True)
    assert len(outcomes) == 162
    assert torch.equal(outcomes, their_outcomes)
    for drawn in (ours_drawn.double(), theirs_drawn.double()):
        expected = drawn.sum() / 162
        chi_squared = ((drawn - expected) ** 2 / expected).sum()
        assert chi_squared < 161 + 4 * (2 * 161) ** 0.5  # 4 standard deviations above the mean


def test_every_image_once_in_an_order_that_the_seed_decides():
    images = random_images(50)
    images.pixels[:, 0, 0, 0] = torch.arange(50)
    batches = images.batches(16, ((0.0,) * 3, (1.0,) * 3))

    def order(seed):
        return torch.cat([x[:, 0, 0, 0] for x, *_ in batches.shuffled(seed)])

    assert sorted(order(1).tolist()) == list(range(50))
    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert [len(y) for _, y, _ in batches.shuffled(1)] == [16, 16, 16, 2]
    assert len(batches) == 4
    assert torch.equal(torch.cat([y for _, y in batches.in_order()]), images.labels)
    x, y, _ = next(iter(batches.shuffled(5)))
    assert torch.equal(y, images.labels[x[:, 0, 0, 0].long()])


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_ranks_make_the_batches_of_one_process(ranks):
    images = random_images(17)  # in batches of 8: 8, 8 and 1, which is fewer than the ranks
    whole = list(images.batches(8, NORMALIZE, "mean").shuffled(4))
    parts = [list(images.batches(8, NORMALIZE, "mean", (rank, ranks)).shuffled(4)) for rank in range(ranks)]
    for step, (x, labels, count) in enumerate(whole):
        assert count == len(x)
        for rank in range(ranks):
            part_x, part_labels, part_count = parts[rank][step]
            assert part_count == count
            if rank < count:
                assert torch.equal(part_x, x[rank::ranks]) and torch.equal(part_labels, labels[rank::ranks])
            else:
                assert part_labels.tolist() == [data.NO_LABEL]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_evaluate_every_image_once(ranks, tmp_path):
    streamed = data.load("folder", write_folder(tmp_path, size=(140, 130)), image_size=128).train
    for images in (random_images(17), streamed):
        shares = [images.batches(4, NORMALIZE, share=(rank, ranks)) for rank in range(ranks)]
        labels = torch.cat([y for batches in shares for _, y in batches.in_order()])
        assert torch.equal(labels.sort()[0], images.labels.sort()[0])


def test_augmentation_does_not_depend_on_the_batch_size():
    images = random_images(50)
    small, large = (torch.cat([x for x, *_ in images.batches(n, NORMALIZE, "mean").shuffled(9)]) for n in (7, 50))
    assert torch.equal(small, large)


def test_normalized_batches_are_channels_last_floats():
    images = random_images(8)
    x, _ = next(images.batches(8, NORMALIZE).in_order())
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values) for values in NORMALIZE)
    torch.testing.assert_close(x.permute(0, 2, 3, 1), (images.pixels - mean) / std)


def test_measure_equals_numpy_in_float64():
    images = random_images(100)
    mean, std = data.measure(images.pixels)
    pixels = images.pixels.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-12)


def test_constants_are_the_published_ones():
    """CIFAR-10: fb.resnet.torch; the seeds measured the same to 0.1. CIFAR-100: fb.resnet.torch."""
    mean, std = data.NORMALIZE["cifar10"]
    np.testing.assert_allclose(mean, np.array([0.49139968, 0.48215827, 0.44653124]) * 255, atol=0.06)
    np.testing.assert_allclose(std, np.array([0.24703233, 0.24348505, 0.26158768]) * 255, atol=0.06)
    mean, std = data.NORMALIZE["cifar100"]
    np.testing.assert_allclose(mean, np.array([0.50707516, 0.48654887, 0.44091784]) * 255, atol=0.06)
    np.testing.assert_allclose(std, np.array([0.26733429, 0.25643846, 0.27615047]) * 255, atol=0.06)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_constants_are_those_of_the_data(name):
    if not list(Path("data").glob(f"{name[:5]}-{name[5:]}-*")):
        pytest.skip(f"{name} is not in data/")
    np.testing.assert_allclose(data.measure(data.load(name, "data").train.pixels), data.NORMALIZE[name], atol=0.06)


def test_hold_out_is_stratified_and_follows_the_seed():
    images = random_images(200, size=8)
    images.pixels[:, 0, 0, 0] = torch.arange(200)
    dataset = Dataset(images, images, list("abcd"), NORMALIZE)
    held = dataset.hold_out(40, seed=1)
    assert (len(held.train), len(held.valid)) == (160, 40)
    assert held.valid.labels.bincount().tolist() == [10, 10, 10, 10]
    ids = torch.cat((held.train.pixels, held.valid.pixels))[:, 0, 0, 0]
    assert sorted(ids.tolist()) == list(range(200))
    assert torch.equal(held.valid.pixels, dataset.hold_out(40, seed=1).valid.pixels)
    assert not torch.equal(held.valid.pixels, dataset.hold_out(40, seed=2).valid.pixels)
    with pytest.raises(DataError, match="valid-size 200"):
        dataset.hold_out(200, seed=1)
    with pytest.raises(DataError, match="at least one image of 4 classes"):
        dataset.hold_out(3, seed=1)
    images.labels[images.labels == 3] = 2
    images.labels[0] = 3
    with pytest.raises(DataError, match="valid-size 40: cannot hold out the same share of each class"):
        dataset.hold_out(40, seed=1)


def test_digits_need_no_download_and_are_always_split_alike():
    dataset = data.load("digits", "nowhere")
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.pixels.shape[1:] == (32, 32, 3)
    assert int(dataset.train.pixels.max()) == 255
    assert len(dataset.test.labels.unique()) == 10
    assert dataset.train.labels[:8].tolist() == data.load("digits", "nowhere", 8).train.labels[:8].tolist()


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
    assert data.decode_all([tmp_path / "grey.png"], 4).unique().tolist() == [round(30000 / 257)]


def test_folder_cache_is_used_and_notices_changes(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path)
    first = data.load("folder", tmp_path, 16, progress=False).train.pixels
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", lambda path: pytest.fail("decoded again"))
        assert torch.equal(data.load("folder", tmp_path, 16, progress=False).train.pixels, first)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "train" / "cat" / "0.png")
    assert data.load("folder", tmp_path, 16, progress=False).train.pixels[0, 0, 0].tolist() == [1, 2, 3]

    cache = tmp_path / ".train-16.cache"
    cache.write_bytes(cache.read_bytes()[:100])
    assert len(data.load("folder", tmp_path, 16, progress=False).train) == 6
    assert "decoding the images again" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == [".test-16.cache", ".train-16.cache", "test", "train"]


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(DataError, match="train is missing"):
        data.load("folder", tmp_path / "nowhere")
    root = write_folder(tmp_path / "a")
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(DataError, match="in one alone: dog, wolf"):
        data.load("folder", root)
    root = write_folder(tmp_path / "b")
    (root / "train" / "eel").mkdir()
    with pytest.raises(DataError, match=r"eel holds no image"):
        data.load("folder", root)
    with pytest.raises(DataError, match="found one class, cat"):
        data.load("folder", write_folder(tmp_path / "c", classes=("cat",)))
    root = write_folder(tmp_path / "d")
    (root / "train" / "dog" / "1.png").write_bytes((root / "train" / "dog" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog/1.png is not a readable image"):
        data.load("folder", root, progress=False)


def test_an_image_with_far_too_many_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"cat/0.png is not a readable image.*DecompressionBombError"):
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
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(DataError, match=r"10 images of 100×100 pixels need 0.0 GB of memory, of which 0.0 GB"):
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
    with pytest.raises(DataError, match=r"^[^\n]*dog/1.png is not a readable image[^\n]*$"):
        list(dataset.train.batches(4, dataset.normalize).in_order())


def md5sum(path):
    return md5(path.read_bytes()).hexdigest()


def write_cifar(root, kind, monkeypatch, label=None):
    """An archive in CIFAR's own format: pickled dicts of rows of 3072 bytes, red first; small, but all files there."""
    rng, folder = np.random.default_rng(0), root / kind.base_folder
    folder.mkdir(parents=True)
    key, fine = ("labels", False) if kind.base_folder == "cifar-10-batches-py" else ("fine_labels", True)
    count = 100 if fine else 10
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, attribute):
            labels = [label if label is not None else i % count for i in range(20)]
            batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), key: labels}
            (folder / name).write_bytes(pickle.dumps(batch))
            entries.append([name, md5sum(folder / name)])
        monkeypatch.setattr(kind, attribute, entries)
    names = [f"class {i}" for i in range(count)]
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5sum(meta)})
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        archive.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", md5sum(root / kind.filename))
    first = pickle.loads((folder / kind.train_list[0][0]).read_bytes())["data"][0]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()  # the loader has to unpack the archive
    return first


@pytest.mark.parametrize(("name", "images"), [("cifar10", 100), ("cifar100", 20)])
def test_cifar_archives(tmp_path, monkeypatch, name, images):
    from torchvision import datasets

    first = write_cifar(tmp_path, getattr(datasets, name.upper()), monkeypatch)
    dataset = data.load(name, tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (images, 20)
    assert dataset.classes[3] == "class 3" and len(dataset.classes) == int(name[5:])
    assert torch.equal(dataset.train.pixels[0], torch.from_numpy(first.reshape(3, 32, 32)).permute(1, 2, 0))
    x, *_ = next(dataset.train.batches(16, dataset.normalize, "mean").shuffled(1))
    assert x.shape == (16, 3, 32, 32)


def test_damaged_archive_is_named_and_kept(tmp_path, monkeypatch):
    from torchvision import datasets

    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz is incomplete or damaged .* delete it"):
        data.load("cifar10", tmp_path)
    assert archive.stat().st_size == 1000


def test_labels_out_of_range_are_refused(tmp_path, monkeypatch):
    from torchvision import datasets

    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, label=10)
    with pytest.raises(DataError, match="labels must lie in 0 … 9"):
        data.load("cifar10", tmp_path)


def test_without_network_or_archive_the_error_says_what_to_do(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(utils, "_urlretrieve", refuse)
    with pytest.raises(DataError, match=r"put cifar-10-python.tar.gz into .* by hand, or try --dataset digits"):
        data.load("cifar10", tmp_path)


def write_svhn(root, monkeypatch):
    """Three MATLAB files; images (32, 32, 3, N), labels 1 … 10 with 10 for the digit 0."""
    from scipy.io import savemat
    from torchvision import datasets

    entries, pixels = {}, {}
    for split, count in (("train", 20), ("extra", 30), ("test", 10)):
        path = root / f"{split}_32x32.mat"
        pixels[split] = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(path, {"X": pixels[split], "y": np.arange(count)[:, None] % 10 + 1})
        entries[split] = ["http://unused", path.name, md5sum(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)
    return pixels


def test_svhn_archives(tmp_path, monkeypatch):
    pixels = write_svhn(tmp_path, monkeypatch)
    dataset = data.load("svhn", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (50, 10)
    assert torch.equal(dataset.train.pixels[20], torch.from_numpy(pixels["extra"][..., 0]))
    assert dataset.train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    x, _ = next(dataset.test.batches(10, dataset.normalize).in_order())
    torch.testing.assert_close(x.permute(0, 2, 3, 1), dataset.test.pixels / 255)  # divided by 255 and no more
    (tmp_path / "extra_32x32.mat").unlink()
    assert torch.equal(data.load_test("svhn", tmp_path)[0].pixels, dataset.test.pixels)


@pytest.mark.parametrize(("name", "flags"), [("cifar10", ""), ("cifar100", ""), ("svhn", "--valid-size 20")])
def test_training_on_each_archive(tmp_path, monkeypatch, name, flags):
    from torchvision import datasets

    import train

    if name == "svhn":
        write_svhn(tmp_path, monkeypatch)
    else:
        write_cifar(tmp_path, getattr(datasets, name.upper()), monkeypatch)
    command = f"--dataset {name} --data {tmp_path} --save {tmp_path}/run --depth 10 --growth-rate 4 --epochs 1 {flags}"
    assert train.main([*command.split(), "--no-plot", "--no-progress"]) == 0
    checkpoint = torch.load(tmp_path / "run/latest.pth", weights_only=True)
    assert len(checkpoint["classes"]) == (100 if name == "cifar100" else 10)
    assert checkpoint["normalize"] == data.NORMALIZE[name]


BAMOS = "--batchSz 64 --nEpochs 1 --no-cuda --save DIR --seed 1 --opt adam"
GPLEISS = "--efficient True --data DIR --save RUN --depth 10 --growth_rate 12 --n_epochs 1 --batch_size 64 --valid_size 20 --seed 1"


@pytest.mark.parametrize("command", [f"{BAMOS} --depth 10", GPLEISS])
def test_old_command_lines_run(tmp_path, monkeypatch, command):
    from torchvision import datasets

    import train

    monkeypatch.chdir(tmp_path)
    root = tmp_path / ("DIR" if "--data" in command else "data")
    root.mkdir()
    write_cifar(root, datasets.CIFAR10, monkeypatch)
    assert train.main([*command.replace("--save DIR", "--save RUN").split(), "--no-plot", "--no-progress"]) == 0
    saved = torch.load("RUN/latest.pth", weights_only=True)["config"]
    assert (saved["block"] == "checkpoint") == ("efficient" in command)


def test_stats_command(capsys):
    assert data.main(["--dataset", "digits", "--stats"]) == 0
    out = capsys.readouterr().out
    assert "1,437 training and 360 test images in 10 classes" in out
    assert "mean  77.9174" in out
    assert data.main(["--dataset", "folder", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("data.py: error: nowhere/train is missing")
