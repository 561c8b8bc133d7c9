"""Data sets by name, their splits and statistics."""

import pickle
import shutil
import tarfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import NORMALIZE, random_images, write_folder
from PIL import Image

import check_data
import train
from common.console import Mistake
from inputs import datasets, splits
from inputs.image import Reader
from inputs.splits import Dataset


def test_measure_equals_numpy_in_float64():
    images = random_images(100)
    mean, std = splits.measure(images.pixels)
    pixels = images.pixels.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-12)


def test_constants_are_the_published_ones():
    """CIFAR-10: fb.resnet.torch; the seeds measured the same to 0.1. CIFAR-100: fb.resnet.torch."""
    mean, std = splits.NORMALIZE["cifar10"]
    np.testing.assert_allclose(mean, np.array([0.49139968, 0.48215827, 0.44653124]) * 255, atol=0.06)
    np.testing.assert_allclose(std, np.array([0.24703233, 0.24348505, 0.26158768]) * 255, atol=0.06)
    mean, std = splits.NORMALIZE["cifar100"]
    np.testing.assert_allclose(mean, np.array([0.50707516, 0.48654887, 0.44091784]) * 255, atol=0.06)
    np.testing.assert_allclose(std, np.array([0.26733429, 0.25643846, 0.27615047]) * 255, atol=0.06)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_constants_are_those_of_the_data(name):
    if not list(Path(ROOT / "data").glob(f"{name[:5]}-{name[5:]}-*")):
        pytest.skip(f"{name} is not in data/")
    np.testing.assert_allclose(splits.measure(datasets.load(name, ROOT / "data").train.pixels), splits.NORMALIZE[name], atol=0.06)


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
    with pytest.raises(Mistake, match="valid-size 200"):
        dataset.hold_out(200, seed=1)
    with pytest.raises(Mistake, match="at least one image of 4 classes"):
        dataset.hold_out(3, seed=1)
    images.labels[images.labels == 3] = 2
    images.labels[0] = 3
    with pytest.raises(Mistake, match="valid-size 40: cannot hold out the same share of each class"):
        dataset.hold_out(40, seed=1)


def test_digits_need_no_download_and_are_always_split_alike():
    dataset = datasets.load("digits", "nowhere")
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.pixels.shape[1:] == (32, 32, 3)
    assert int(dataset.train.pixels.max()) == 255
    assert len(dataset.test.labels.unique()) == 10
    assert dataset.train.labels[:8].tolist() == datasets.load("digits", "nowhere", Reader(8)).train.labels[:8].tolist()


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
    dataset = datasets.load(name, tmp_path)
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
    with pytest.raises(Mistake, match=r"cifar-10-python.tar.gz is incomplete or damaged .* delete it"):
        datasets.load("cifar10", tmp_path)
    assert archive.stat().st_size == 1000


def test_a_stopped_download_is_repeated(tmp_path, monkeypatch):
    from torchvision import datasets
    from torchvision.datasets import utils

    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    content = archive.read_bytes()
    archive.unlink()
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **options: url)

    def stopped(url, path):
        Path(path).write_bytes(content[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_urlretrieve", stopped)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("cifar10", tmp_path)
    assert not archive.exists()
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, path: Path(path).write_bytes(content))
    assert len(datasets.load("cifar10", tmp_path).train) == 100
    assert archive.read_bytes() == content and [path.name for path in (tmp_path / ".download").iterdir()] == ["lock"]


def test_labels_out_of_range_are_refused(tmp_path, monkeypatch):
    from torchvision import datasets

    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, label=10)
    with pytest.raises(Mistake, match="labels must lie in 0 … 9"):
        datasets.load("cifar10", tmp_path)


def test_without_network_or_archive_the_error_says_what_to_do(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(utils, "_urlretrieve", refuse)
    with pytest.raises(Mistake, match=r"put cifar-10-python.tar.gz into .* by hand, or try --dataset digits"):
        datasets.load("cifar10", tmp_path)


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
    dataset = datasets.load("svhn", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (50, 10)
    assert torch.equal(dataset.train.pixels[20], torch.from_numpy(pixels["extra"][..., 0]))
    assert dataset.train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    x, _ = next(dataset.test.batches(10, dataset.normalize).in_order())
    torch.testing.assert_close(x.permute(0, 2, 3, 1), dataset.test.pixels / 255)  # divided by 255 and no more
    (tmp_path / "extra_32x32.mat").unlink()
    assert torch.equal(datasets.load_test("svhn", tmp_path, Reader(), dataset.classes)[0].pixels, dataset.test.pixels)


@pytest.mark.parametrize(("name", "flags"), [("cifar10", ""), ("cifar100", ""), ("svhn", "--valid-size 20")])
def test_training_on_each_archive(tmp_path, monkeypatch, name, flags):
    from torchvision import datasets

    if name == "svhn":
        write_svhn(tmp_path, monkeypatch)
    else:
        write_cifar(tmp_path, getattr(datasets, name.upper()), monkeypatch)
    command = f"--dataset {name} --data {tmp_path} --save {tmp_path}/run --depth 10 --growth-rate 4 --epochs 1 {flags}"
    assert train.main([*command.split(), "--no-plot", "--no-progress"]) == 0
    checkpoint = torch.load(tmp_path / "run/latest.pth", weights_only=True)
    assert len(checkpoint["classes"]) == (100 if name == "cifar100" else 10)
    assert checkpoint["normalize"] == splits.NORMALIZE[name]


BAMOS = "--batchSz 64 --nEpochs 1 --no-cuda --save DIR --seed 1 --opt adam"


GPLEISS = "--efficient True --data DIR --save RUN --depth 10 --growth_rate 12 --n_epochs 1 --batch_size 64 --valid_size 20 --seed 1"


@pytest.mark.parametrize("command", [f"{BAMOS} --depth 10", GPLEISS])
def test_old_command_lines_run(tmp_path, monkeypatch, command):
    from torchvision import datasets

    monkeypatch.chdir(tmp_path)
    root = tmp_path / ("DIR" if "--data" in command else "data")
    root.mkdir()
    write_cifar(root, datasets.CIFAR10, monkeypatch)
    assert train.main([*command.replace("--save DIR", "--save RUN").split(), "--no-plot", "--no-progress"]) == 0
    saved = torch.load("RUN/latest.pth", weights_only=True)["config"]
    assert (saved["block"] == "checkpoint") == ("efficient" in command)


def test_stats_command(capsys):
    assert check_data.main(["--dataset", "digits", "--stats"]) == 0
    out = capsys.readouterr().out
    assert "1,437 training and 360 test images in 10 classes" in out
    assert "mean  77.9174" in out
    assert check_data.main(["--dataset", "folder", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("data.py: error: nowhere/train is missing")


def test_digits_in_grey():
    colour, grey = datasets.load("digits", None, Reader(8)), datasets.load("digits", None, Reader(8, channels=1))
    assert grey.train.pixels.shape == (1437, 8, 8, 1) and torch.equal(grey.train.pixels[..., 0], colour.train.pixels[..., 0])
    assert grey.normalize == (colour.normalize[0][:1], colour.normalize[1][:1])
    x, _, _ = next(grey.train.batches(16, grey.normalize, "mean").shuffled(1))
    assert x.shape == (16, 1, 8, 8)


def test_val_is_for_validation_or_where_there_is_no_test_for_testing(tmp_path):
    root = write_folder(tmp_path, test=2)
    shutil.copytree(root / "test", root / "val")
    (root / "val/cat/1.png").unlink()
    dataset = datasets.load("folder", root)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (6, 3, 4) and dataset.notes == []
    with pytest.raises(Mistake, match="--valid-size 2: the data set has validation images"):
        dataset.hold_out(2, seed=1)
    shutil.rmtree(root / "test")
    dataset = datasets.load("folder", root)
    assert dataset.valid is None and len(dataset.test) == 3
    assert dataset.notes == [f"{root / 'val'} is the test split, since there is no {root / 'test'}"]
    assert torch.equal(datasets.load_test("folder", root, Reader(), dataset.classes, dataset.layout)[0].pixels, dataset.test.pixels)


def test_a_class_without_test_images_is_named(tmp_path):
    root = write_folder(tmp_path, classes=("cat", "dog", "eel"))
    shutil.rmtree(root / "test/dog")
    dataset = datasets.load("folder", root)
    assert dataset.notes == ["no test image of 1 of the classes: dog"] and dataset.test.labels.tolist() == [0, 2, 0, 2]
    assert datasets.load_test("folder", root, Reader(), dataset.classes)[1] == dataset.notes


def flat_folder(root, images=10):
    return write_folder(root / "x", train=images).joinpath("train").rename(root / "flat")


@pytest.mark.parametrize("image_size", [16, 128])
def test_class_folders_alone_are_divided_the_same_way_for_every_seed(tmp_path, image_size):
    root = flat_folder(tmp_path)
    with pytest.raises(Mistake, match=r"flat/train is missing: .* or class folders alone and --test-size N"):
        datasets.load("folder", root)
    dataset = datasets.load("folder", root, Reader(image_size), test_size=4)
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert dataset.test.labels.bincount().tolist() == [2, 2] and len(dataset.layout["test_files"]) == 4
    Image.new("RGB", (40, 20)).save(root / "cat/new.png")  # goes to the training images of a run that knows its test images
    again = datasets.load("folder", root, Reader(image_size), layout=dataset.layout)
    assert len(again.train) == 17 and again.layout["test_files"] == dataset.layout["test_files"]
    prints = [found.layout["fingerprints"] for found in (dataset, again)]
    assert prints[0]["test"] == prints[1]["test"] and prints[0]["train"] != prints[1]["train"]
    test, _ = datasets.load_test("folder", root, Reader(image_size), dataset.classes, dataset.layout)
    for images in (again.test, test):
        if image_size == 16:
            assert torch.equal(images.pixels, dataset.test.pixels)
        else:
            assert images.paths == dataset.test.paths
            assert {Path(path).relative_to(root).as_posix() for path in images.paths} == set(dataset.layout["test_files"])
            assert not set(images.paths) & set(again.train.paths)
    (root / dataset.layout["test_files"][0]).unlink()
    with pytest.raises(Mistake, match=r"1 of the run's 4 test images are missing, such as \w+/\d.png"):
        datasets.load("folder", root, Reader(image_size), layout=dataset.layout)
    with pytest.raises(Mistake, match="--test-size 1: each part needs at least one image of 2 classes"):
        datasets.load("folder", root, Reader(image_size), test_size=1)


def test_a_run_keeps_its_test_images(tmp_path, capsys):
    import evaluate
    import publish

    root = flat_folder(tmp_path)
    flags = f"--device cpu --dataset folder --data {root} --test-size 4 --image-size 8 --depth 10 --growth-rate 4"
    assert train.main([*flags.split(), "--epochs", "1", "--seed", "3", "--no-plot", "--no-progress", "--save", "run"]) == 0
    logged = Path("run/test.csv").read_text().split(",")[-1].strip()
    kept = torch.load("run/latest.pth", weights_only=True)["layout"]["test_files"]
    assert len(kept) == 4
    Image.new("RGB", (40, 20)).save(root / "cat/00.png")  # would change the draw
    capsys.readouterr()
    assert evaluate.main(["run/latest.pth"]) == 0 and publish.main(["run"]) == 0 and evaluate.main(["run/weights.pth"]) == 0
    assert capsys.readouterr().out.count(f"test error {float(logged):.2f} %") == 2
    (root / "cat/00.png").unlink()
    assert train.main(["--resume", "--save", "run", "--epochs", "2", "--no-plot", "--no-progress"]) == 0
    assert torch.load("run/latest.pth", weights_only=True)["layout"]["test_files"] == kept


@pytest.mark.parametrize("image_size", [16, 128])
def test_training_images_that_are_nearly_black_are_noticed(tmp_path, image_size):
    root = write_folder(tmp_path)
    for path in root.rglob("*.png"):
        Image.fromarray(np.full((40, 40), 4095, np.uint16)).save(path)
        array = np.zeros((140, 140), np.uint16)
        array[:, 70:] = 4095
        Image.fromarray(array).save(path)
    [note] = datasets.load("folder", root, Reader(image_size)).notes
    assert note.startswith("the training images use only 0 … 16 of 0 … 255") and "--white" in note
    assert datasets.load("folder", root, Reader(image_size, white=4095.0)).notes == []


def test_white_and_channels_are_kept_by_a_run(tmp_path):
    import evaluate

    root = write_folder(tmp_path / "images")
    for shade, name in enumerate(("cat", "dog")):
        for path in root.rglob(f"{name}/*.png"):
            Image.fromarray(np.full((40, 40), 1000 + 3000 * shade, np.uint16)).save(path)
    flags = f"--device cpu --dataset folder --data {root} --image-size 8 --depth 10 --growth-rate 4 --white 4095 --channels 1"
    assert train.main([*flags.split(), "--epochs", "1", "--no-plot", "--no-progress", "--save", "run"]) == 0
    checkpoint = torch.load("run/latest.pth", weights_only=True)
    assert checkpoint["config"]["arguments"]["white"] == 4095 and checkpoint["model"]["stem.conv.weight"].shape[1] == 1
    assert checkpoint["normalize"][0] == pytest.approx((255 * 2500 / 4095,), abs=0.5)
    assert evaluate.main(["run/latest.pth"]) == 0
    assert evaluate.main(["run/latest.pth", str(root / "test/cat/0.png")]) == 0


def test_a_split_without_any_image_is_named(tmp_path):
    root = write_folder(tmp_path)
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    for load in (lambda: datasets.load("folder", root), lambda: datasets.load_test("folder", root, Reader(), ["cat", "dog"])):
        with pytest.raises(Mistake, match="test holds no image in a class folder that can be read"):
            load()


NETWORK = "--device cpu --depth 10 --growth-rate 4 --image-size 8 --no-plot --no-progress --save run".split()


@pytest.mark.parametrize("older", [False, True])
def test_a_run_keeps_its_splits(tmp_path, capsys, older):
    """A val folder that appears later is not looked at, nor by a run of a release that did not know of it."""
    root = write_folder(tmp_path / "images")
    assert train.main(["--dataset", "folder", "--data", str(root), *NETWORK, "--epochs", "1", "--valid-size", "2"]) == 0
    if older:
        checkpoint = torch.load("run/latest.pth", weights_only=True)
        del checkpoint["layout"]
        torch.save(checkpoint, "run/latest.pth")
    shutil.copytree(root / "test", root / "val")
    capsys.readouterr()
    assert train.main(["--resume", "--save", "run", "--epochs", "2", "--no-plot", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "4 training, 2 validation, 4 test images" in out and ("an earlier release" in out) is older
    assert train.main(["--resume", "--save", "run", "--epochs", "3", "--no-plot", "--no-progress"]) == 0
    assert "an earlier release" not in capsys.readouterr().out


def test_a_run_that_was_tested_on_val_stays_so(tmp_path):
    import inference

    root = write_folder(tmp_path / "images")
    (root / "test").rename(root / "val")
    assert train.main(["--dataset", "folder", "--data", str(root), *NETWORK, "--epochs", "1"]) == 0
    shutil.copytree(root / "train", root / "test")
    assert train.main(["--resume", "--save", "run", "--epochs", "2", "--no-plot", "--no-progress"]) == 0
    images, _ = inference.load_split(torch.load("run/latest.pth", weights_only=True))
    assert len(images) == 4


def test_labels_are_those_of_the_run_when_a_class_is_added(tmp_path):
    import inference

    root = flat_folder(tmp_path)
    assert train.main(["--dataset", "folder", "--data", str(root), *NETWORK, "--epochs", "1", "--test-size", "4"]) == 0
    checkpoint = torch.load("run/latest.pth", weights_only=True)
    before, _ = inference.load_split(checkpoint)
    shutil.copytree(root / "cat", root / "ant")
    (root / "dog/new.png").write_bytes(b"damaged, but not among the test images")
    images, notes = inference.load_split(checkpoint)
    assert torch.equal(images.labels, before.labels) and torch.equal(images.pixels, before.pixels) and notes == []


def test_damage_in_all_splits_is_reported_together(tmp_path):
    root = write_folder(tmp_path)
    for name in ("train/cat/1.png", "test/dog/0.png"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(Mistake, match=r"^2 images cannot be read: .*train/cat/1.png.*test/dog/0.png"):
        datasets.load("folder", root)


@pytest.mark.parametrize("options", [{}, {"skip_unreadable": True}])
@pytest.mark.parametrize("image_size", [32, 128])
def test_a_folder_of_pointers_in_place_of_images(tmp_path, image_size, options):
    root = write_folder(tmp_path)
    for path in root.rglob("*.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(Mistake, match=r"images cannot be read|holds no image in a class folder that can be read"):
        dataset = datasets.load("folder", root, Reader(image_size, **options))
        list(dataset.train.batches(4, dataset.normalize).in_order())


def test_streamed_images_without_a_scale_are_not_skipped_as_unreadable(tmp_path):
    root = write_folder(tmp_path)
    Image.fromarray(np.ones((130, 130), np.float32)).save(root / "train/cat/field.tif")
    with pytest.raises(Mistake, match=r"field.tif has floating-point values"):
        datasets.load("folder", root, Reader(128, skip_unreadable=True))


def test_images_are_not_taken_for_cifar(tmp_path, capsys):
    root = write_folder(tmp_path)
    assert train.main(["--data", str(root), "--save", "run"]) == 2
    assert "for image folders, add --dataset folder" in capsys.readouterr().err
