"""Folders of images: listed, divided into splits, and found again by the run that trained on them."""

import functools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_folder
from PIL import Image

import evaluate
import publish
import train
from common.console import Mistake
from inference.network import load_split
from inputs import datasets, folders, splits
from inputs.image import Reader

SHORT = "--device cpu --depth 10 --growth-rate 4 --no-plot --no-progress --save run".split()
load = functools.partial(datasets.load, "folder")


def trained(root, *flags):
    """Train for an epoch on a folder; returns the checkpoint."""
    assert train.main(["--dataset", "folder", "--data", str(root), *SHORT, "--image-size", "8", "--epochs", "1", *flags]) == 0
    return torch.load("run/latest.pth", weights_only=True)


def resumed(epochs):
    assert train.main(["--resume", "--save", "run", "--epochs", str(epochs), "--no-plot", "--no-progress"]) == 0
    return torch.load("run/latest.pth", weights_only=True)


# Which files there are.


def listed(folder):
    passed = Counter()
    return folders.list_images(folder, passed), passed


def touch(folder, *names):
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_class_folders_are_searched_to_any_depth_and_nothing_is_passed_over_in_silence(tmp_path):
    wanted = "cat/2.PNG", "cat/a/3.webp", "cat/a/b/1.jfif", "dog/1.gif"
    touch(tmp_path, *wanted, "cat/.hidden.png", "cat/._2.png", ".trash/1.png", "cat/.a/1.png", ".DS_Store")
    touch(tmp_path, "cat/photo.heic", "cat/notes.txt", "dog/more.heic", "dog/README", "dog/data.h5", "labels.csv")
    touch(tmp_path, "__MACOSX/cat/1.png", "__MACOSX/2.png", "cat/$RECYCLE.BIN/1.png", "dog/@eaDir/1.png", "lost+found/1.png")
    (tmp_path / "none/#recycle").mkdir(parents=True)
    classes, passed = listed(tmp_path)
    wanted = [str(tmp_path / name) for name in wanted]
    assert classes == {"cat": wanted[:3], "dog": wanted[3:], "none": []}
    systems = {"__MACOSX": 1, "$RECYCLE.BIN": 1, "@eaDir": 1, "lost+found": 1, "#recycle": 1}
    assert passed == {".heic": 2, ".txt": 1, "no suffix": 1, ".h5": 1, ".csv": 1} | systems
    touch(write_folder(tmp_path / "images"), "train/cat/photo.heic", "test/cat/photo.heic", "train/cat/notes.txt")
    assert load(tmp_path / "images").notes == ["passed over 3 files: .heic 2, .txt 1"]


def test_links_to_images_and_folders_are_followed(tmp_path):
    cat = tmp_path / "images/cat"
    touch(tmp_path, "elsewhere/1.png", "elsewhere/deep/2.png", "images/cat/0.png")
    (tmp_path / "images/dog").symlink_to(tmp_path / "elsewhere")
    links = {"deep": "../../elsewhere/deep", "9.png": tmp_path / "elsewhere/1.png"}
    for name, target in (links | {"broken.png": "nowhere", "itself.png": "itself.png", "broken": "nowhere"}).items():
        (cat / name).symlink_to(target)
    classes, passed = listed(tmp_path / "images")
    expected = {"cat": ["0.png", "9.png", "deep/2.png"], "dog": ["1.png", "deep/2.png"]}
    assert classes == {name: [str(tmp_path / "images" / name / path) for path in paths] for name, paths in expected.items()}
    assert passed == {"broken link or pipe": 3}


@pytest.mark.parametrize("links", [{"again": "../cat"}, {"again": "../../elsewhere", "../../elsewhere/again": "../test"}, {"../eel": ".."}])
def test_loops_of_links_are_named(tmp_path, links):
    root = write_folder(tmp_path)
    (root / "elsewhere").mkdir()
    for name, target in links.items():
        (root / "test/cat" / name).symlink_to(target)
    for find in (lambda: listed(root / "test"), lambda: folders.find_images([root / "test"], Counter())):
        with pytest.raises(Mistake, match="is a link to a folder that it is in"):
            find()


@pytest.mark.parametrize("image_size", [16, 128])
def test_names_that_are_not_utf_8(tmp_path, image_size):
    root = write_folder(tmp_path)
    for split in ("train", "test"):
        folder = (root / split / "dog").rename(root / split / os.fsdecode(b"k\xf6ter"))
        (folder / "0.png").rename(folder / os.fsdecode(b"\xe4.png"))
    dataset = load(root, Reader(image_size, skip_unreadable=True))
    assert len(dataset.test.pixels) == 4 and os.fsencode(dataset.classes[1]) == b"k\xf6ter"
    assert splits.changed(dataset.manifest, load(root, Reader(image_size))) == []


# What is made of them.


def test_images_of_a_folder(tmp_path):
    dataset = load(write_folder(tmp_path), Reader(16))
    assert dataset.classes == ["cat", "dog"] and dataset.train.pixels.shape == (6, 16, 16, 3)
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0, 1]  # classes alternate, so that --limit-train is fair
    assert dataset.train.pixels[1, 5, 5].tolist() == [60, 0, 200]
    mean, std = splits.channel_statistics(dataset.train.pixels)
    assert std[2] == 0  # all images have the same blue, which is then only shifted
    assert dataset.normalize == (mean, (*std[:2], 1.0))


def renamed(folder, suffix):
    return [path.rename(path.with_suffix(suffix)) for path in folder.rglob("*.png")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "elsewhere"), "train is missing: .* or class folders alone"),
        (lambda root: [(root / a).rename(root / b) for a, b in (("train", "Training"), ("test", "t"))], "train is missing: .* alone"),
        (lambda root: (root / "test/dog").rename(root / "test/wolf"), "/test has classes that the training images have not: wolf"),
        (lambda root: (root / "train/eel").mkdir(), "eel holds no image that can be read: fill it or delete it"),
        (lambda root: renamed(root / "train/cat", ".dcm"), "cat holds no image that can be read .passed over 3 files: .dcm 3.: convert or rename them, fill it or delete it"),
        (lambda root: shutil.rmtree(root / "train/dog"), "needs at least two classes, and .*train has cat"),
        (lambda root: renamed(root / "test", ".x"), "no test image in a class folder can be read"),
    ],
)
def test_folder_mistakes_are_named(tmp_path, change, message):
    root = write_folder(tmp_path)
    manifest = load(root).manifest
    change(root)
    with pytest.raises(Mistake, match=message):
        load(root)
    if "/test has" in message or "no test" in message:
        with pytest.raises(Mistake, match=message):
            datasets.load_test("folder", root, Reader(), ["cat", "dog"], manifest)


def test_a_folder_of_images_without_its_flag_and_one_too_large_for_memory(tmp_path, capsys, monkeypatch):
    root = write_folder(tmp_path / "images")
    assert train.main(["--data", str(root), "--save", "run"]) == 2
    assert "for image folders, add --dataset folder" in capsys.readouterr().err
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(Mistake, match=r"10 images of 100×100 pixels need 0.0 GB of memory, of which 0.0 GB"):
        load(root, Reader(100))


@pytest.mark.parametrize("image_size", [16, 128])
def test_what_is_lost_of_the_training_images_is_said(tmp_path, image_size):
    root = write_folder(tmp_path, train=5, mode="RGBA")
    for path in (root / "train/cat").iterdir():
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()
    for path in (root / "train/dog").iterdir():
        Image.fromarray(np.full((40, 40), 4095, np.uint16)).save(path)
    band, dark = load(root, Reader(image_size)).notes
    assert band.startswith("5 of 10 training images that were looked at: a fourth band that is taken as transparency")
    assert dark.startswith("5 of 10 training images that were looked at: only the darkest eighth of 0 … 65535: say with --white")
    assert load(root, Reader(image_size, white=4095.0, alpha=False)).notes == []


# Splits.


def test_test_images_load_without_the_training_images_and_from_the_cache(tmp_path, monkeypatch):
    whole = load(write_folder(tmp_path))
    shutil.rmtree(tmp_path / "train")
    monkeypatch.setattr(Reader, "read", lambda *args: pytest.fail("decoded again"))
    images, notes = datasets.load_test("folder", tmp_path, Reader(), whole.classes, whole.manifest)
    assert notes == [] and torch.equal(images.labels, whole.test.labels) and images.names == whole.test.names
    assert torch.equal(images.pixels, whole.test.pixels)


def test_val_is_for_validation_or_where_there_is_no_test_for_testing(tmp_path):
    root = write_folder(tmp_path, test=2)
    shutil.copytree(root / "test", root / "val")
    (root / "val/cat/1.png").unlink()
    dataset = load(root)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (6, 3, 4) and dataset.notes == []
    with pytest.raises(Mistake, match="--valid-size 2: the data set has validation images"):
        dataset.hold_out(2, seed=1)
    with pytest.raises(Mistake, match="/test has test images: leave out --test-size or --fold"):
        load(root, test_size=2)
    shutil.rmtree(root / "test")
    assert [len(split) for split in load(root, test_size=2).splits.values()] == [4, 3, 2]
    dataset = load(root)
    assert dataset.valid is None and len(dataset.test) == 3
    assert dataset.notes == [f"{root / 'val'} is the test split, since there is no {root / 'test'}"]
    assert torch.equal(datasets.load_test("folder", root, Reader(), dataset.classes, dataset.manifest)[0].pixels, dataset.test.pixels)


def test_a_class_without_test_images_is_named(tmp_path):
    root = write_folder(tmp_path, classes=("cat", "dog", "eel"))
    shutil.rmtree(root / "test/dog")
    dataset = load(root)
    assert dataset.notes == ["no test image of 1 of the classes: dog"] and dataset.test.labels.tolist() == [0, 2, 0, 2]
    assert datasets.load_test("folder", root, Reader(), dataset.classes, dataset.manifest)[1] == dataset.notes


def flat_folder(root):
    return write_folder(root / "x", train=10).joinpath("train").rename(root / "flat")


@pytest.mark.parametrize(("image_size", "test_size"), [(16, 4), (128, 0), (16, 0.2)])
def test_class_folders_alone_are_divided_the_same_way_for_every_seed(tmp_path, image_size, test_size, monkeypatch):
    root, reader = flat_folder(tmp_path), Reader(image_size)
    dataset = load(root, reader, test_size)
    manifest = dataset.manifest
    fifth = f"{root} has class folders alone: a fifth of each is set apart for testing (see --test-size)"
    assert dataset.notes == ([] if test_size else [fifth]) and (len(dataset.train), len(dataset.test)) == (16, 4)
    assert dataset.test.labels.bincount().tolist() == [2, 2]
    assert [Path(path).relative_to(root).as_posix() for path in dataset.test.names] == manifest["test_files"]
    (root / "dog/00.png").write_bytes(b"damaged, but not among the test images")
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", lambda *args: pytest.fail("decoded again"))
        test, _ = datasets.load_test("folder", root, reader, dataset.classes, manifest)
    Image.new("RGB", (40, 20)).save(root / "dog/00.png")  # would change the draw: goes to the training images
    again = load(root, reader, test_size, manifest)
    assert len(again.train) == 17 and again.manifest["test_files"] == manifest["test_files"]
    assert not set(again.test.names) & set(again.train.names) and splits.changed(manifest, again) == ["train"]
    for images in (again.test, test):
        assert images.names == dataset.test.names and torch.equal(images.labels, dataset.test.labels)
        assert torch.equal(images.pixels, dataset.test.pixels)
    Image.new("RGB", (40, 20)).save(root / manifest["test_files"][0])
    assert splits.changed(manifest, load(root, reader, manifest=manifest)) == ["train", "test"][: 1 + (image_size == 16)]
    (root / manifest["test_files"][0]).unlink()
    for find in (lambda: load(root, reader, 0, manifest), lambda: datasets.load_test("folder", root, reader, dataset.classes, manifest)):
        with pytest.raises(Mistake, match=r"1 of the run's 4 test images are missing, such as .*/flat/\w+/\d.png"):
            find()
    with pytest.raises(Mistake, match="--test-size 1: cannot take the same fraction of each class: every part needs an image of every class"):
        load(root, reader, test_size=1)


def labelled(root, table):
    """Twelve images in odd places, and a table of them, in any order; "NA" is a label like others."""
    for i in range(12):
        (root / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (99 * (i % 2), 9 * i, 0)).save(root / f"{i % 3}/{i}.png")
    (root / "labels.csv").write_text(table, encoding="utf-8")
    return root


def table_of(splits=("",) * 12):
    lines = [f"./{i % 3}/{i}.png,{('NA', 'ä ö')[i % 2]}{split and ','}{split}\n" for i, split in enumerate(splits)]
    return "\ufeffpath,label" + ",split" * any(splits) + "\n" + "".join(reversed(lines))


@pytest.mark.parametrize("image_size", [16, 128])
@pytest.mark.parametrize(("table", "sizes"), [
    (table_of(), {"train": 9, "test": 3}),
    (table_of(["train"] * 6 + ["valid"] * 4 + ["test"] * 2), {"train": 6, "valid": 4, "test": 2}),
])  # fmt: skip
def test_a_table_names_labels_and_splits(tmp_path, table, sizes, image_size):
    root, reader = labelled(tmp_path, table), Reader(image_size)
    dataset = load(root, reader, labels="labels.csv")
    assert {name: len(split) for name, split in dataset.splits.items()} == sizes and dataset.classes == ["NA", "ä ö"]
    assert bool(dataset.notes) is (sizes["test"] == 3)
    for split in dataset.splits.values():
        assert [int(Path(name).stem) % 2 for name in split.names] == split.labels.tolist()
    assert load(root, reader, 0, dataset.manifest, labels="labels.csv").manifest == dataset.manifest
    for name in dataset.train.names:
        Path(name).unlink()
    test, _ = datasets.load_test("folder", root, reader, dataset.classes, dataset.manifest)
    assert test.names == dataset.test.names and torch.equal(test.labels, dataset.test.labels)


def test_a_run_keeps_its_table(tmp_path, capsys):
    root = labelled(tmp_path / "images", table_of())
    trained(root, "--labels", "labels.csv", "--valid-size", "3", "--groups", r"(\d+).png")
    test_files = resumed(2)["manifest"]["test_files"]
    assert len(test_files) == 2 and publish.main(["run"]) == 0
    assert evaluate.main(["run/weights.pth", "--split", "valid"]) == evaluate.main(["run/weights.pth"]) == 0
    (root / "labels.csv").write_text(table_of().replace("NA", "new"))
    capsys.readouterr()
    assert train.main(["--resume", "--save", "run", "--epochs", "3"]) == 2
    assert "was trained on other images or classes" in capsys.readouterr().err


@pytest.mark.parametrize(("table", "words"), [
    ("path;label\n", "has no column label nor path: it needs path, label and optionally split"),
    ("", "labels.csv cannot be read"),
    ("path,label\n", "at least two classes, and .* has none"),
    ("path,label\n0/0.png,cat\n0/9.png,", "line 3: 0/9.png has no label"),
    ("path,label\n0/0.png\n", "line 2: 0/0.png has no label"),
    ("path,label\n0/0.png,a\n0/../0/0.png,a\n", "line 3: 0/0.png is in an earlier line, too"),
    ("path,label,split\n0/0.png,a,val\n", "line 2: 0/0.png has a split that is not train, valid or test"),
    ("path,label\n\n0/1.png,a\n", "line 3: 0/1.png is missing"),
    ("path,label\n0/0.png,a, b\n", "labels.csv cannot be read"),
    ("path,label,split\n0/0.png,a,train\n0/3.png,b,train\n0/6.png,c,test", "has classes that the training images have not: c"),
])  # fmt: skip
def test_mistakes_in_a_table_are_named(tmp_path, table, words):
    with pytest.raises(Mistake, match=words):
        load(labelled(tmp_path, table), Reader(8), labels="labels.csv")


def grouped_folder(root):
    """Nine patients with one to three images each, of two classes."""
    for number in range(9):
        for i in range(1 + number % 3):
            path = root / ("cat", "dog")[number % 2] / f"p{number}_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (60 * (number % 2), 20 * number, 9 * i)).save(path)
    return root


def patients(images):
    return {Path(name).name.split("_")[0] for name in images.names}


@pytest.mark.parametrize("groups", [None, r"/(p\d)_"])
def test_folds_are_equal_parts_of_all_images_and_divide_no_group(tmp_path, groups):
    root, tested = grouped_folder(tmp_path), []
    for i in (1, 2, 3):
        dataset = load(root, Reader(8), f"{i}/3", groups=groups)
        assert 5 <= len(dataset.test) <= 7 and dataset.test.labels.unique().tolist() == [0, 1]
        assert not set(dataset.test.names) & set(dataset.train.names)
        assert not groups or not patients(dataset.test) & patients(dataset.train)
        assert load(root, Reader(8), f"{i}/3", dataset.manifest, groups).manifest == dataset.manifest
        tested += dataset.test.names
    assert len(tested) == len(set(tested)) == 18
    with pytest.raises(Mistake, match="--fold 1/19: cannot take the same fraction of each class"):
        load(root, Reader(8), "1/19", groups=groups)


@pytest.mark.parametrize(("test_size", "valid_size"), [("0.3", "0.3"), ("5", "4")])
def test_groups_are_kept_together_by_a_run_and_its_evaluation(tmp_path, test_size, valid_size):
    root = grouped_folder(tmp_path / "images")
    checkpoint = trained(root, "--test-size", test_size, "--valid-size", valid_size, "--groups", r"(p\d)_\d.png$")
    parts = [load_split(checkpoint, split)[0] for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == 18 and sum(len(patients(part)) for part in parts) == 9
    assert 3 <= len(parts[1]) <= 5 and 4 <= len(parts[2]) <= 7
    assert resumed(2)["config"]["arguments"]["groups"] == r"(p\d)_\d.png$"


@pytest.mark.parametrize(("count", "held_out"), [(1, 4), (4, 4), (10, 10), (0.05, 4), (0.2, 20), (0.9, 90), (1000, None)])
def test_with_groups_as_many_images_are_held_out_as_they_allow(count, held_out):
    """Groups of 50, 10, 10, 10, 10, 6 and 4 images of one class."""
    groups = [0] * 50 + [1 + i // 10 for i in range(40)] + [9] * 6 + [10] * 4
    if held_out is None:
        with pytest.raises(Mistake, match="cannot take the same fraction"):
            splits.stratified(torch.zeros(100), count, 0, "--valid-size", groups)
        return
    kept, apart = splits.stratified(torch.zeros(100), count, 0, "--valid-size", groups)
    assert (len(kept) + len(apart), len(apart)) == (100, held_out) and not {groups[i] for i in kept} & {groups[i] for i in apart}


@pytest.mark.parametrize(("pattern", "words"), [
    ("(p[0-7])_", r"--groups \(p\[0-7\]\)_ does not match train/cat/p8_0.png: every image needs a group"),
    ("p.", "no such group: write a regular expression with a group"),
    ("(p", "missing \\)"),
    (r"_(\d)", "0 is in training and test images: move all images of a group into one split"),
])  # fmt: skip
def test_groups_that_are_none_or_divided_are_refused(tmp_path, pattern, words):
    root = grouped_folder(tmp_path / "train")
    shutil.copytree(root, tmp_path / "test")
    with pytest.raises(Mistake, match=words):
        load(tmp_path, Reader(8), groups=pattern)
    assert len(load(tmp_path, Reader(8), groups="(.*)").train) == 18


@pytest.mark.parametrize("test_size", [["--test-size", "4"], []])
def test_a_run_keeps_its_test_images(tmp_path, capsys, test_size):
    root = flat_folder(tmp_path)
    checkpoint = trained(root, *test_size, "--seed", "3")
    kept, logged = checkpoint["manifest"]["test_files"], Path("run/test.csv").read_text().split(",")[-1].strip()
    assert len(kept) == 4
    Image.new("RGB", (40, 20)).save(root / "cat/00.png")  # would change the draw
    capsys.readouterr()
    assert evaluate.main(["run/latest.pth"]) == 0 and publish.main(["run"]) == 0 and evaluate.main(["run/weights.pth"]) == 0
    assert capsys.readouterr().out.count(f"test error {float(logged):.2f} %") == 2
    (root / "cat/00.png").unlink()
    assert resumed(2)["manifest"]["test_files"] == kept
    before, _ = load_split(checkpoint)
    shutil.copytree(root / "cat", root / "ant")  # a class more
    images, notes = load_split(checkpoint)
    assert torch.equal(images.labels, before.labels) and torch.equal(images.pixels, before.pixels) and notes == []


@pytest.mark.parametrize("older", [False, True])
def test_a_run_keeps_its_splits(tmp_path, capsys, older):
    """A val folder that appears later is not looked at, nor by a run of a release that did not know of it."""
    root = write_folder(tmp_path / "images")
    checkpoint = trained(root, "--valid-size", "0.3")
    if older:
        del checkpoint["manifest"], checkpoint["digest"]
        torch.save(checkpoint, "run/latest.pth")
    shutil.copytree(root / "test", root / "val")
    for epochs, told in ((2, older), (3, False)):
        capsys.readouterr()
        resumed(epochs)
        out = capsys.readouterr().out
        assert "4 training, 2 validation, 4 test images" in out and ("an earlier release" in out) is told


def test_scale_and_channels_are_kept_by_a_run(tmp_path):
    root = write_folder(tmp_path / "images")
    for shade, name in enumerate(("cat", "dog")):
        for path in root.rglob(f"{name}/*.png"):
            Image.fromarray(np.full((40, 40), 1000 + 3000 * shade, np.uint16)).save(path)
    checkpoint = trained(root, "--white", "4095", "--black=-1000", "--channels", "1")
    assert checkpoint["config"]["arguments"]["white"] == 4095 and checkpoint["model"]["stem.conv.weight"].shape[1] == 1
    assert checkpoint["normalize"][0] == pytest.approx((255 * 3500 / 5095,), abs=0.5)
    assert evaluate.main(["run/latest.pth"]) == evaluate.main(["run/latest.pth", str(root / "test/cat/0.png")]) == 0


def test_set_apart_images_leave_training_however_the_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path / "images", train=6) / "train")
    for root in (".", str(Path.cwd()), "../train"):
        found = load(root, Reader(8), test_size=4)
        assert (len(found.train), len(found.test)) == (8, 4)
