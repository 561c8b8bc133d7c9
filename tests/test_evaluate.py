"""What evaluate.py says, writes and draws of a checkpoint, and inference behind it."""

import csv
import io
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import status_of
from helpers import write_folder
from PIL import Image

import densenet
import evaluate
from common.checkpoints import read_checkpoint
from common.console import Mistake
from inference import network
from inputs import datasets
from inputs.image import Reader
from training.arguments import parse_args
from training.flags import model_options


def write_checkpoint(root, image_size=8, classes=("cat", "dog"), **changed):
    """run.pth: an untrained network for the images that ``write_folder`` writes to ``root``; returns its dict."""
    flags = f"--dataset folder --data {root} --image-size {image_size} --depth 10 --growth-rate 4 --batch-size 4 --save run"
    args, *_ = parse_args(flags.split())
    options, normalize = model_options(args, len(classes)), ((120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
    torch.manual_seed(0)
    checkpoint = {"config": {"arguments": vars(args) | changed, "model": options}, "model": densenet.DenseNet(**options).state_dict()}
    checkpoint |= {"normalize": normalize, "classes": list(classes)}
    torch.save(checkpoint, "run.pth")
    return checkpoint


@pytest.fixture
def root(tmp_path):
    """A folder of images, and run.pth for them."""
    write_checkpoint(write_folder(tmp_path / "images"))
    return tmp_path / "images"


def evaluated(capsys, *flags, status=0):
    """What evaluate.py prints on both streams."""
    capsys.readouterr()
    assert status_of(evaluate.main, [*map(str, flags), "--device", "cpu", "--precision", "fp32"]) == status
    return capsys.readouterr()


# Splits.


def test_the_images_that_a_run_held_out_are_found_again(tiny, capsys):
    assert tiny("--save", "run", "--valid-size", "60", "--seed", "3", "--precision", "fp32", "--augment", "--limit-test", "50") == 0
    errors = {}
    for split, kind in (("train", "training"), ("valid", "validation"), ("test", "test")):
        out = evaluated(capsys, "run/latest.pth", "--split", split, "--csv", f"{split}.csv").out
        errors[split] = float(re.match(rf"{kind} error (\S+) %", out)[1])
    for split in ("valid", "test"):
        assert errors[split] == pytest.approx(pd.read_csv(f"run/{split}.csv").error.iloc[-1], abs=0.01)
    digits = datasets.load("digits", None, Reader(8)).hold_out(60, 3)
    tables = {split: pd.read_csv(f"{split}.csv") for split in ("train", "valid", "test")}
    assert tables["valid"]["index"].tolist() == digits.valid.names[:50] and len(tables["train"]) == 200
    assert not set(tables["valid"]["index"]) & (set(tables["train"]["index"]) | set(tables["test"]["index"]))
    plain = network.classifier(read_checkpoint("run/latest.pth"))(digits.train.pixels[:200])  # neither shifted nor mirrored
    np.testing.assert_allclose(tables["train"].iloc[:, 5:], plain, rtol=1e-4, atol=1e-7)


def test_splits_that_are_not_the_run_s(root, capsys):
    def refused(words):
        err = evaluated(capsys, "run.pth", "--split", "valid", status=2).err
        assert words in err and err.count("\n") == 1

    checkpoint = write_checkpoint(root)
    refused("the run held out no images for validation: choose --split train or test")
    shutil.copytree(root / "train", root / "val")  # these need not be held out
    torch.save(checkpoint | {"layout": {"folders": {"train": "train", "valid": "val", "test": "test"}, "test_files": []}}, "run.pth")
    assert "of 6 images wrong" in evaluated(capsys, "run.pth", "--split", "valid").out
    shutil.rmtree(root / "val")
    dataset = datasets.load("folder", root, Reader(8))
    checkpoint = write_checkpoint(root, valid_size=2) | {"normalize": [*map(list, dataset.normalize)]}  # as of JSON
    torch.save(checkpoint | {"layout": dataset.manifest | {"fingerprints": {"train": "of others"}}}, "run.pth")
    refused(f"images in {root} (train) have changed since the training; say with --data where")
    torch.save(checkpoint, "run.pth")
    assert "of 2 images wrong" in evaluated(capsys, "run.pth", "--split", "valid").out
    shutil.copy(root / "train/dog/0.png", root / "train/dog/9.png")
    refused(f"images in {root} have changed since the training; say with --data where")
    (root / "train/dog").rename(root / "train/hound")
    (root / "test/dog").rename(root / "test/hound")
    refused("have other classes than those of the training; say with --data where")


# Files and folders.


@pytest.mark.parametrize(("image_size", "workers"), [(8, 0), (128, 1)])
def test_files_and_folders_are_read_as_in_evaluation(tmp_path, capsys, image_size, workers):
    """In memory and streamed, images of any size; the test images get the answers that they get as the test set."""
    root, generator = write_folder(tmp_path / "images"), np.random.default_rng(1)
    for path, size in zip((root / "test").rglob("*.png"), ((140, 200), (177, 131), (150, 150), (40, 30)), strict=True):
        Image.fromarray(generator.integers(256, size=(*size, 3), dtype=np.uint8)).save(path)
    checkpoint = write_checkpoint(root, image_size)
    evaluated(capsys, "run.pth", "--csv", "test.csv")
    first = root / "test/dog/1.png"
    evaluated(capsys, "run.pth", "--workers", workers, first, root / "test", "--csv", "files.csv", "--batch-size", 3)
    test, found = pd.read_csv("test.csv").set_index("path"), pd.read_csv("files.csv").set_index("path")
    below = [str(root / "test" / name) for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")]
    assert found.index.tolist() == [str(first), *below]
    np.testing.assert_allclose(found.iloc[1:].loc[test.index, ["cat", "dog"]], test[["cat", "dog"]], rtol=1e-4)
    np.testing.assert_allclose(found[["cat", "dog"]], network.classify(checkpoint, [first, *below]), rtol=1e-4)


def test_what_is_printed_of_files(root, capsys):
    write_checkpoint(root, classes=("cat", "dog", "cow"))
    image = root / "train/cat/0.png"
    for flags, count in (((), 3), (("--top", 2), 2), (("--top", 1), 1)):
        out = evaluated(capsys, "run.pth", *flags, image).out
        assert re.fullmatch(rf"{image}: (\w+ \d+\.\d %(, )?){{{count}}}\n", out), out
    for flags, count in (((), 0), (("--top", 1), 10)):
        *lines, last = evaluated(capsys, "run.pth", root, "--csv", "made/files.csv", *flags).out.splitlines()
        assert len(lines) == count and re.fullmatch(r"made/files.csv: predicted (\w+ \d+(, )?)+; 10 in all", last)
    assert list(Path("made").iterdir()) == [Path("made/files.csv")]


def test_files_that_cannot_be_read_are_named_and_skipped(root, capsys):
    (root / "test/cat/0.png").write_bytes(b"damaged")
    (root / "test/cat/notes.txt").write_text("no image")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(root / "test/dog/field.tif")
    out, err = evaluated(capsys, "run.pth", root / "test", "missing.png", "--csv", "files.csv", status=1)
    assert err.splitlines()[0] == "passed over 1 file: .txt 1"
    for line, words in zip(err.splitlines()[1:], ("cat/0.png is not a readable", "with --white", "missing.png is", "files skipped: 3 of 6"), strict=True):
        assert line.startswith(("skipped: ", "files skipped")) and words in line
    assert "files.csv: predicted " in out and "; 3 in all" in out and len(pd.read_csv("files.csv")) == 3
    assert evaluated(capsys, "run.pth", root / "test/dog", "--white", 1).out.count("\n") == 3
    assert evaluated(capsys, "run.pth", root / "test/cat/0.png", status=1).out == ""
    several = [str(root / "test/cat/0.png"), "missing.png"]
    for paths, words in (([], "not a list of image files"), (several, r"0.png is not a readable image.*; missing.png is not a readable image .No such file or directory.")):
        with pytest.raises(Mistake, match=words):
            network.classify(read_checkpoint("run.pth"), paths)


def test_a_batch_of_files_is_in_memory_at_once_and_each_is_read_once():
    read, sizes = [], []

    class Noting(Reader):
        def read(self, path):
            read.append(path)
            if path in "bcdi":
                raise Mistake(path)
            return np.zeros((8, 8, 3), np.uint8)

    def probabilities(pixels):
        sizes.append(len(pixels))
        return torch.full((len(pixels), 2), float(len(sizes)))

    answers = network.classify_each(probabilities, list("abcdefghi"), Noting(8), 3)
    assert next(answers).tolist() == [1, 1] and read == list("abc")
    rest = [str(answer) if isinstance(answer, Mistake) else int(answer[0]) for answer in answers]
    assert rest == ["b", "c", "d", 2, 2, 3, 3, "i"] and sizes == [1, 2, 2] and read == list("abcdefghi")


def test_csv_of_any_names(root, tmp_path, capsys):
    """Commas, quotes, line breaks, and bytes that are not UTF-8, as the file system has them."""
    classes = ('cat, "tame"', "cat\nwild", "猫", os.fsdecode(b"k\xf6ter"))
    write_checkpoint(root, classes=classes)
    path = tmp_path / os.fsdecode(b'a, "b" \xe4.png' if os.name == "posix" else b"a, b.png")
    (root / "test/cat/0.png").rename(path)
    evaluated(capsys, "run.pth", path, "--csv", "files.csv")
    text = Path("files.csv").read_bytes().decode("utf-8", sys.getfilesystemencodeerrors())
    header, (name, predicted, probability, *values) = csv.reader(io.StringIO(text))
    assert header == ["path", "class", "probability", *classes] and name == str(path)
    assert sum(map(float, values)) == pytest.approx(1, abs=1e-5) and classes[values.index(probability)] == predicted


# Pictures.


def answering(monkeypatch, answers):
    """Let the network predict class answers[i] of image i, the more surely the later it comes."""
    logits = torch.nn.functional.one_hot(torch.tensor(answers)) * (1 + 0.03 * torch.arange(len(answers))[:, None])

    def predictions(checkpoint, images, *_):
        yield logits[:3], images.labels[:3]
        yield logits[3 : len(images)], images.labels[3:]

    monkeypatch.setattr(evaluate, "predictions", predictions)


@pytest.mark.parametrize("image_size", [8, 128])
def test_rows_and_pictures_of_a_split(tmp_path, capsys, monkeypatch, figures, image_size):
    root = write_folder(tmp_path / "images", test=3)
    write_checkpoint(root, image_size)
    answering(monkeypatch, [0, 0, 1, 1, 1, 0])  # wrong: dog/0, cat/1, cat/2, dog/2
    monkeypatch.setattr(evaluate, "DRAWN", 3)
    evaluated(capsys, "run.pth", "--csv", "test.csv", "--mistakes", "made/mistakes.png", "--confusion", "confusion.svg")
    table = pd.read_csv("test.csv")
    assert table.columns.tolist() == ["path", "class", "probability", "true", "right", "cat", "dog"]
    assert table.path.tolist() == [str(root / f"test/{name}/{i}.png") for i in range(3) for name in ("cat", "dog")]
    assert table["class"].tolist() == ["cat", "cat", "dog", "dog", "dog", "cat"] and table.true.tolist() == ["cat", "dog"] * 3
    assert table.right.tolist() == [1, 0, 0, 1, 0, 0] and table.dog.tolist() == pytest.approx([0.27, 0.26, 0.74, 0.75, 0.75, 0.24], abs=0.01)
    drawn = [axes for axes in figures["mistakes.png"].axes if axes.images]
    assert [axes.get_title() for axes in drawn[:2]] == ["dog\n→ cat\n76.0 %", "cat\n→ dog\n75.4 %"]  # the surest come first
    for axes, name in zip(drawn, ("dog/2.png", "cat/2.png", "cat/1.png"), strict=True):
        assert axes.texts[0].get_text() == os.path.basename(name)
        assert np.array_equal(axes.images[0].get_array(), Reader(image_size).read(root / "test" / name))
    assert "4 of 6 images wrong" in figures["mistakes.png"].get_suptitle()
    matrix = figures["confusion.svg"].axes[0]
    assert [text.get_text() for text in matrix.texts] == ["1", "2", "2", "1"]
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["cat", "dog"]
    assert Image.open("made/mistakes.png").width > 500 and "<svg" in Path("confusion.svg").read_text()
    answering(monkeypatch, [0, 1] * 3)
    assert "no image is misclassified: none.png is not written" in evaluated(capsys, "run.pth", "--mistakes", "none.png").out


def test_top_5_of_many_classes(tmp_path, capsys):
    classes = [f"{i:02}" for i in range(20)]
    write_checkpoint(write_folder(tmp_path / "images", classes=classes), classes=classes)
    out = evaluated(capsys, "run.pth", "--csv", "test.csv").out
    table = pd.read_csv("test.csv", dtype={"true": str})
    five_best = table[classes].apply(lambda row: row.nlargest(5).index.tolist(), axis=1)
    wrong = [true not in five for true, five in zip(table.true, five_best, strict=True)]
    assert 0 < sum(wrong) < 40 and f"\ntop-5 error {100 * sum(wrong) / 40:.2f} %\n" in out


# Mistakes of users.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("run.pth images --split train", "--split is for images of the run's data set: leave out the paths"),
        ("run.pth images --mistakes a.png", "--mistakes is for images of the run's data set"),
        ("run.pth --top 3", "--top is for image files: name some"),
        ("run.pth --mistakes a.gif", "a.gif: a picture is written as png, pdf, svg"),
        ("run.pth --csv images", "images: is not a file that can be replaced"),
        ("run.pth images/none", "images/none holds no image: name a folder that has some"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_computed(root, capsys, monkeypatch, flags, words):
    (root / "none").mkdir()
    monkeypatch.setattr(network, "load_model", None)
    err = evaluated(capsys, *flags.split(), status=2).err
    assert err.startswith("evaluate.py: error: ") and words in err and err.count("\n") == 1
