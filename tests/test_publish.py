"""What publish.py makes of a run, and that the published runs are what work/README.md says of them."""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

import evaluate
import publish
import train
from data import DataError
from workdir import read_checkpoint

ROOT = Path(__file__).parent.parent
ROWS = re.findall(r"^\| \[[^\n]*\|$", (ROOT / "work/README.md").read_text(), re.MULTILINE)
RUNS = [ROOT / "work" / re.match(r"\| \[.*?\]\((.*?)\)", row)[1] for row in ROWS]
CPU = torch.device("cpu")


def test_publish_keeps_the_network_and_its_numbers(tiny, capsys):
    assert tiny("--save", "run") == 0
    capsys.readouterr()
    assert publish.main(["run"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    test = pd.read_csv("run/test.csv").error
    low, high = (100 * bound for bound in evaluate.wilson(test.iloc[-1] / 100, 100))
    assert cells["final error (%)"] == f"{test.iloc[-1]:.2f} ({low:.2f} … {high:.2f})"
    assert cells["best on test"] == f"{test.min():.2f} (epoch {test.idxmin() + 1})"
    assert cells["command"].startswith("`python ") and cells["hardware"].endswith(", fp32")
    assert re.fullmatch(r"0:00:\d\d", cells["wall time"])
    weights, latest = (read_checkpoint(Path("run", name)) for name in ("weights.pth", "latest.pth"))
    assert all(torch.equal(weights["model"][name], latest["model"][name]) for name in latest["model"])
    assert weights["sample"] == {"images": 100, "wrong": round(test.iloc[-1])}
    assert evaluate.main(["run/weights.pth"]) == 0
    assert f"test error {test.iloc[-1]:.2f} %" in capsys.readouterr().out
    Path("run/latest.pth").unlink()
    assert publish.main(["run"]) == 0 and row in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--resume", "--save", "run"])


def test_publish_refuses_what_is_not_the_run_s_result(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "2") == 0
    checkpoint = read_checkpoint("run/latest.pth")

    def refused(words, **changed):
        torch.save(checkpoint | changed, "run/latest.pth")
        capsys.readouterr()
        assert publish.main(["run"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("publish.py: error: run") and words in err and err.count("\n") == 1
        assert not Path("run/weights.pth").exists()

    refused("run has finished 1 of 2 epochs", epoch=1)
    others = {name: -value if name == "classifier.weight" else value for name, value in checkpoint["model"].items()}
    refused("was logged", model=others)
    assert publish.main(["nowhere"]) == 2
    assert "nowhere/latest.pth is not a checkpoint file" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "row"), list(zip(RUNS, ROWS, strict=True)), ids=lambda value: getattr(value, "name", ""))
def test_rows_of_published_runs_agree_with_their_logs(run, row):
    assert publish.markdown([publish.table_row(run)]).splitlines()[-1] == row
    weights, train_log, test = read_checkpoint(run / "weights.pth"), *(pd.read_csv(run / f"{s}.csv") for s in ("train", "test"))
    epochs = weights["config"]["arguments"]["epochs"]
    assert weights["epoch"] == epochs and train_log.epoch.tolist() == test.epoch.tolist() == list(range(1, epochs + 1))
    assert weights["seconds"] > (weights["config"]["images"]["train"] / train_log.images_per_second).sum()


def load_test_images(weights):
    """The test images of a published run; the test is skipped where they are not here."""
    folder = ROOT / weights["config"]["arguments"]["data"]
    try:
        return evaluate.load_test_images(weights, folder)
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_published_weights_make_the_mistakes_that_were_counted(run):
    weights = read_checkpoint(run / "weights.pth")
    images = load_test_images(weights).select(slice(weights["sample"]["images"]))
    wrong = int(publish.mistakes(weights, images, CPU).sum())
    assert abs(wrong - weights["sample"]["wrong"]) <= 1  # other hardware may decide a close case otherwise


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_published_weights_have_the_error_of_their_log(run):
    weights = read_checkpoint(run / "weights.pth")
    wrong = publish.mistakes(weights, load_test_images(weights), CPU)
    logged = pd.read_csv(run / "test.csv").error.iloc[-1]
    assert 100 * wrong.float().mean().item() == pytest.approx(logged, abs=0.05)


def test_published_runs_are_committed_without_what_can_be_made_again():
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "work"], capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a clone")
    committed = set(files.stdout.split())
    for run in RUNS:
        inside = {name for name in committed if name.startswith(f"{run.relative_to(ROOT).as_posix()}/")}
        names = {Path(name).name for name in inside}
        assert names == {"config.json", "train.csv", "test.csv", "loss-error.png", "weights.pth"}, run
