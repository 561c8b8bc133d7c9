"""What check_data.py says of folders and data sets."""

import shutil

import numpy as np
import pytest
from helpers import write_folder
from PIL import Image

import check_data


def test_statistics(capsys, tmp_path):
    assert check_data.main(["--dataset", "digits", "--stats"]) == 0
    out = capsys.readouterr().out
    assert "1,437 training and 360 test images in 10 classes" in out
    assert "mean  77.9174" in out
    root = write_folder(tmp_path, test=6).joinpath("test")
    assert check_data.main([str(root), "--stats", "--test-size", "4"]) == 0
    assert "folder: 8 training and 4 test images in 2 classes" in capsys.readouterr().out
    assert check_data.main(["nowhere", "--stats"]) == 2
    assert capsys.readouterr().err.startswith("check_data.py: error: nowhere/train is missing")
    assert check_data.main([str(root), "--stats", "--image-size", "128"]) == 2
    assert "--stats needs images in memory: --image-size below 128" in capsys.readouterr().err


def test_every_image_is_read(tmp_path, capsys):
    root = write_folder(tmp_path)
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", (40, 20), (9, 9, ord(path.stem) + 9 * ord(path.parent.name[0]) - 850)).save(path)
    assert check_data.main([str(root)]) == 0
    for name in ("cat/0.png", "cat/1.png", "dog/2.png"):
        (root / "train" / name).write_bytes(b"no image")
    (root / "train/cat/notes.txt").write_text("x")
    Image.new("L", (9, 7)).save(root / "train/dog/grey.png")
    shutil.copy(root / "test/dog/1.png", root / "train/dog/copy.png")
    capsys.readouterr()
    for workers in ("0", "2"):
        assert check_data.main([str(root), "--workers", workers]) == 1
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"{root / 'train'}: 8 images in 2 classes: cat 3, dog 5"
        assert out[1] == f"{root / 'test'}: 4 images in 2 classes: cat 2, dog 2"
        assert "passed over 1 file: .txt 1" in out and "modes: RGB 8, L 1" in out and "sizes: 40×20 8, 9×7 1" in out
        assert sum(line.startswith("unreadable: ") for line in out) == 3
        assert f"in two splits: {root / 'train/dog/copy.png'} = {root / 'test/dog/1.png'}" in out
        assert out[-3] == "12 images, 3 unreadable, 1 in more than one split, 0 in more than one class"
        assert "--skip-unreadable" in out[-2] and out[-1].startswith("delete what is in two splits from the training images")


def test_copies_are_found_by_what_is_seen(tmp_path, capsys):
    """The same pixels in another format; not the same pixels turned."""
    root, exif = write_folder(tmp_path, train=2, test=1), Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "train/cat/0.png").save(root / "test/cat/0.png", exif=exif)
    Image.open(root / "train/dog/0.png").save(root / "test/dog/0.tif")
    (root / "test/dog/0.png").unlink()
    assert check_data.main([str(root)]) == 1 and "1 in more than one split, 0 in" in capsys.readouterr().out
    shutil.copy(root / "train/dog/1.png", root / "train/cat/one.png")
    (root / "test/dog/0.tif").unlink()
    assert check_data.main([str(root)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-3] == f"in two classes: {root}/train/cat/one.png = {root}/train/dog/1.png"
    assert out[-2].endswith("0 in more than one split, 1 in more than one class") and "delete" in out[-1]


@pytest.mark.parametrize(
    ("make", "flags", "told"),
    [
        (lambda i: Image.fromarray(np.full((20, 20), 60000 + i, np.uint16)), [], "sizes: 20×20 6"),
        (lambda i: Image.fromarray(np.full((20, 20), -i - 1, np.int32)), ["--white", "40"], "6 images: values below 0 or above 40"),
        (lambda i: Image.new("RGBA", (20, 20), (i, 0, 0, 0)), [], "6 images: a fourth band that is taken as transparency"),
    ],
)
def test_images_that_differ_in_what_is_lost_are_not_copies(tmp_path, capsys, make, flags, told):
    root = write_folder(tmp_path, train=2, test=1)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        make(i).save(path.with_suffix(".tif"))
        path.unlink()
    assert check_data.main([str(root), *flags]) == 0
    assert told in capsys.readouterr().out
