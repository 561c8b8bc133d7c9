"""What publish.py makes of a run, and that the published runs are what work/README.md says of them."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT

import evaluate
import publish
from common.checkpoints import read_checkpoint
from common.hardware import choose_precision
from inference.network import load_split
from reports import tables

ROWS = re.findall(r"^\| \[[^\n]*\|$", (ROOT / "work/README.md").read_text(), re.MULTILINE)
RUNS = [ROOT / "work" / re.match(r"\| \[.*?\]\((.*?)\)", row)[1] for row in ROWS]
NAMES = [run.relative_to(ROOT / "work").as_posix() for run in RUNS]
CPU = torch.device("cpu")


def published(directory, capsys, status=0):
    """The cells of the run's row by their column, or what publish.py says against it."""
    capsys.readouterr()
    assert publish.main([str(directory)]) == status
    out, err = capsys.readouterr()
    if status:
        assert err.startswith("publish.py: error: ") and err.count("\n") == 1
        return err
    *_, title, header, _, row = out.splitlines()
    assert title == "table of the runs, in Markdown:"
    return dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))


def test_publish_keeps_the_network_and_its_numbers(tiny, capsys, monkeypatch):
    monkeypatch.setattr(publish, "SAMPLE", 40)
    assert tiny("--save", "run") == 0
    cells = published("run", capsys)
    test = pd.read_csv("run/test.csv").error
    low, high = tables.wilson(test.iloc[-1], 100)
    assert cells["final test error (%), 95 % interval"] == f"{test.iloc[-1]:.2f} ({low:.2f} … {high:.2f})"
    assert cells["best on test (%), not a result"] == f"{test.min():.2f} (epoch {test.idxmin() + 1})"
    assert cells["hardware"].endswith(f", {choose_precision('auto', CPU)[1]}")
    assert re.fullmatch(r"0:00:\d\d", cells["wall time"])
    weights, latest = (read_checkpoint(Path("run", name)) for name in ("weights.pth", "latest.pth"))
    assert set(weights) == {*publish.KEPT, "test"} and weights["averaged"] is False
    assert all(torch.equal(weights["model"][name], latest["model"][name]) for name in latest["model"])
    assert evaluate.main(["run/weights.pth", "--csv", "test.csv"]) == 0
    assert f"test error {test.iloc[-1]:.2f} %" in capsys.readouterr().out
    wrong = 40 - pd.read_csv("test.csv").right[:40].sum()
    assert weights["test"] == {"images": 100, "error": test.iloc[-1], "sample": 40, "wrong_in_sample": wrong}
    Path("run/latest.pth").rename("run/elsewhere.pth")
    assert published("run", capsys) == cells
    shutil.copy("run/weights.pth", "run/latest.pth")
    assert tiny("--resume", "--save", "run", args=[]) == 2
    assert "holds weights only" in capsys.readouterr().err


def test_a_row_tells_of_every_process_and_of_changed_sources(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "2") == 0 and publish.main(["run"]) == 0
    weights = read_checkpoint("run/weights.pth")
    config = weights["config"] | {"commit": "0123456789" * 4 + "-dirty", "device": "slow"}
    config["resumed"] = [config | {"commit": None, "device": "fast", "command": "again", "precision": "bf16"}]
    torch.save(weights | {"config": config}, "run/weights.pth")
    Path("run/latest.pth").unlink()
    cells = published("run", capsys)
    assert cells["hardware"] == "slow, then fast, bf16"
    assert cells["commit"] == "`0123456-dirty`, then `unknown`" and cells["command"].endswith(", then `again`")


def test_publish_refuses_what_is_not_the_run_s_result(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "2") == 0
    checkpoint = read_checkpoint("run/latest.pth")

    def refused(words, **changed):
        torch.save({name: value for name, value in (checkpoint | changed).items() if value is not None}, "run/latest.pth")
        assert words in published("run", capsys, status=2)
        assert not Path("run/weights.pth").exists()

    metrics = checkpoint["metrics"]
    refused("run has finished 1 epoch, not all", epoch=1, metrics={name: rows[:1] for name, rows in metrics.items()})
    refused("run/latest.pth has no seconds", seconds=None)
    others = [row | {"error": 100.0} for row in metrics["test"]]
    refused("but its log says 100.0 %", metrics=metrics | {"test": others})
    assert "nowhere/weights.pth is not a checkpoint file" in published("nowhere", capsys, status=2)
    torch.save(checkpoint, "run/latest.pth")
    assert publish.main(["run", "nowhere"]) == 2 and not Path("run/weights.pth").exists()
    Path("run/test.csv").write_text("epoch,loss,error\n1,1.0,0.6\n2,1.0,0.5\n")
    assert "the logs are not those of weights.pth" in published("run", capsys, status=2)


def test_averaged_weights_are_published_instead(tiny, capsys):
    assert tiny("--save", "run", "--ema", "0.8", "--epochs", "2") == 0
    latest, logs = read_checkpoint("run/latest.pth"), [pd.read_csv(f"run/{name}.csv").error for name in ("test", "test-ema")]
    capsys.readouterr()
    assert publish.main(["run", "--ema"]) == 0
    assert f"), averaged | {logs[1].min():.2f} (epoch " in capsys.readouterr().out.splitlines()[-1]
    weights = read_checkpoint("run/weights.pth")
    assert all(torch.equal(weights["model"][name], value) for name, value in latest["ema"]["model"].items())
    assert "ema" not in weights and weights["test"]["error"] == logs[1].iloc[-1]
    for flags in (["run/latest.pth", "--ema"], ["run/weights.pth"]):
        assert evaluate.main(flags) == 0
        assert capsys.readouterr().out.startswith(f"test error {logs[1].iloc[-1]:.2f} %")
    published("run", capsys)  # the last ones again
    assert not read_checkpoint("run/weights.pth")["averaged"]
    assert tiny("--save", "other", "--epochs", "1") == 0
    for main, flags in ((publish.main, ["other", "--ema"]), (evaluate.main, ["other/latest.pth", "--ema"])):
        capsys.readouterr()
        assert main(flags) == 2
        assert "the checkpoint has no averaged weights, which train.py --ema makes" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "row"), list(zip(RUNS, ROWS, strict=True)), ids=NAMES)
def test_rows_of_published_runs_agree_with_their_logs(run, row):
    assert tables.formatted(publish.COLUMNS, [publish.table_row(run)], "markdown").splitlines()[-1] == row
    epochs = list(range(1, read_checkpoint(run / "weights.pth")["epoch"] + 1))
    assert pd.read_csv(run / "train.csv").epoch.tolist() == pd.read_csv(run / "test.csv").epoch.tolist() == epochs


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_published_weights_misclassify_what_was_counted(run, whole):
    """Among the first test images, or all; other hardware may decide close cases otherwise."""
    weights = read_checkpoint(run / "weights.pth")
    arguments, test = weights["config"]["arguments"], weights["test"]
    if arguments["dataset"] != "digits" and not (ROOT / arguments["data"]).exists():
        pytest.skip(f"{arguments['data']} is not here")
    images, _ = load_split(weights, directory=ROOT / arguments["data"])
    wrong = publish.misclassified(weights, images if whole else images.select(slice(test["sample"])), CPU)
    expected = test["error"] * test["images"] / 100 if whole else test["wrong_in_sample"]
    assert abs(int(wrong.sum()) - expected) <= 1 + len(wrong) / 5000
