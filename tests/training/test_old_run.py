"""Runs outlive releases: a run that an earlier commit wrote resumes, evaluates, publishes and plots.

old_run/ was stopped after the second of four epochs; config.json has its command and commit.
"""

import shutil

import pandas as pd
import pytest
from conftest import ROOT, status_of

import evaluate
import plot
import publish
import train
from training import arguments

RESUME = ["--save", "run", "--resume", "--no-plot", "--no-progress"]
# What the same commit wrote when it was not stopped, on an AMD EPYC. Other processors round differently.
LOSSES, ERRORS = [2.306427, 2.284611, 2.274012, 2.268864], [88, 88, 79, 77]


@pytest.fixture(autouse=True)
def old_run(tmp_path):
    shutil.copytree(ROOT / "tests/old_run", tmp_path / "run")


def test_it_goes_on_as_if_nothing_had_changed(capsys):
    assert train.main(RESUME) == 0
    log = pd.read_csv("run/test.csv")
    assert log.epoch.tolist() == [1, 2, 3, 4]
    assert log.loss.tolist() == pytest.approx(LOSSES, rel=1e-3)
    assert log.error.tolist() == pytest.approx(ERRORS, abs=3)  # of 100 images
    capsys.readouterr()
    for name in ("latest.pth", "best.pth"):
        assert evaluate.main([f"run/{name}", "--precision", "fp32"]) == 0
    assert f"test error {log.error.iloc[-1]:.2f} %" in capsys.readouterr().out
    assert publish.main(["run"]) == 0
    assert "`c50f1d9`" in capsys.readouterr().out
    assert plot.main(["run"]) == 0
    assert evaluate.main(["run/weights.pth"]) == 0


def test_it_evaluates_and_plots_without_being_resumed(capsys):
    for split, words in (("test", "test error 88.00 %"), ("valid", "validation error 90.00 %")):
        assert evaluate.main(["run/latest.pth", "--precision", "fp32", "--split", split]) == 0
        assert words in capsys.readouterr().out
    assert plot.main(["run"]) == 0 and publish.main(["run"]) == 2
    assert "run has finished 2 epochs, not all" in capsys.readouterr().err


def test_a_flag_that_it_did_not_know_is_off(capsys):
    args, *_ = arguments.parse_args(RESUME)
    assert (args.shift, args.milestones, args.patience, args.epochs, args.limit_train) == (4, None, 0, 4, 200)
    assert status_of(train.main, [*RESUME, "--shift", "3"]) == 2
    assert "the run in run was started with --shift 4, not 3" in capsys.readouterr().err
