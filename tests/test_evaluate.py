"""What evaluate.py says of a checkpoint, and the module inference that it is made of."""

import re

import pandas as pd
import pytest
import torch
from test_files import write_folder

import evaluate
import inference
from cli import Mistake


def test_the_logged_error_is_that_of_the_saved_weights(tiny, capsys):
    assert tiny("--save", "run") == 0
    logged = pd.read_csv("run/test.csv").error.iloc[-1]
    capsys.readouterr()
    assert evaluate.main(["run/latest.pth"]) == 0
    out = capsys.readouterr().out
    assert f"test error {logged:.2f} % (95 % interval" in out and f"{round(logged)} of 100 images wrong" in out


def test_wilson_interval():
    """Newcombe 1998, table I: 81 of 263, 0 of 20."""
    assert inference.wilson(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert inference.wilson(0, 20) == pytest.approx((0, 16.11), abs=0.01)


def test_a_class_without_test_images_has_no_error(capsys):
    evaluate.print_test_error(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:5] == ["cat    25.00  dog 1", "dog        –  "]


def test_evaluate_classifies_files_and_names_mistakes(tiny, capsys, tmp_path):
    assert tiny("--save", "run", "--epochs", "1") == 0
    image = write_folder(tmp_path / "images") / "train" / "cat" / "0.png"
    capsys.readouterr()
    assert evaluate.main(["run/latest.pth", str(image)]) == 0
    assert re.match(rf"{image}: \d \d+\.\d %, ", capsys.readouterr().out)
    for paths in ([], str(image)):
        with pytest.raises(Mistake, match="is not a list of image files"):
            inference.classify(torch.load("run/latest.pth", weights_only=True), paths)
    for arguments, words in ((["run"], "run is not a checkpoint file"), (["run/latest.pth", "x.png"], "x.png is not an image")):
        assert evaluate.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("evaluate.py: error: ") and words in err and err.count("\n") == 1
