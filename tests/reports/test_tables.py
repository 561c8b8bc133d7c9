"""Runs side by side: what differs between them, and what came out."""

import csv
import json

import pytest
from helpers import write_bamos, write_config, write_ours, write_seeds

import plot
from reports.tables import wilson


def table(capsys, *flags):
    """The rows that plot.py prints as CSV, {column: cell} each."""
    capsys.readouterr()
    assert plot.main([*map(str, flags), "--table", "csv"]) == 0
    return list(csv.DictReader(capsys.readouterr().out.splitlines()))


def test_a_table_has_what_differs_and_what_came_out(tmp_path, capsys):
    one = write_config(write_ours(tmp_path / "one"), decay="all", accumulate=1)
    two = write_config(write_ours(tmp_path / "two"), depth=22, seed=7, mixup=0.2, recipe="modern")
    (two / "valid.csv").write_text("epoch,loss,error\n1,2,30\n2,1,12.5\n3,1,13\n")
    (two / "test-ema.csv").write_text("epoch,loss,error\n1,2,30\n2,1,8.25\n")
    for run, images in ((one, {"train": 1000, "test": 300}), (two, {"train": 500, "valid": 10, "test": 40})):
        config = json.loads((run / "config.json").read_text()) | {"images": images}
        (run / "config.json").write_text(json.dumps(config))
    first, second = table(capsys, one, two)
    low, high = wilson(9.5, 300)
    assert first == {
        "run": "one", "depth": "16", "mixup": "–", "seed": "1", "epoch": "8 of 20", "test error (%)": "9.50",
        "95 % low": f"{low:.2f}", "95 % high": f"{high:.2f}", "averaged weights (%)": "–", "best valid (%)": "–",
        "time without evaluation": "0:01:20",  # 8 epochs of 1,000 images, 100 a second
    }  # fmt: skip
    low, high = wilson(9.5, 40)
    assert second == first | {
        "run": "two", "depth": "22", "mixup": "0.2", "seed": "7", "95 % low": f"{low:.2f}", "95 % high": f"{high:.2f}",
        "averaged weights (%)": "8.25", "best valid (%)": "12.50", "time without evaluation": "0:00:40",
    }  # fmt: skip


def test_a_table_of_runs_that_say_less(tmp_path, capsys):
    """Those of another repository, of an image folder by an earlier release, and a mean."""
    bamos = write_bamos(tmp_path / "bamos")
    ours = write_config(write_ours(tmp_path / "ours"), dataset="folder", data="photos")
    first, second = table(capsys, bamos, ours)
    unknown = dict.fromkeys(("95 % low", "95 % high"), "–")
    assert first.items() >= (unknown | {"run": "bamos", "dataset": "–", "epoch": "4", "test error (%)": "15.00"}).items()
    assert second.items() >= (unknown | {"run": "ours", "dataset": "folder", "data": "photos", "test error (%)": "9.50"}).items()
    assert "time without evaluation" not in first
    runs = write_seeds(tmp_path)
    *singles, mean = table(capsys, *runs, "--mean", *runs)
    assert mean["test error (%)"] == "4.00" and mean["sd"] == "2.00" and mean["95 % low"] == mean["seed"] == singles[0]["sd"] == "–"


def test_wilson_interval():
    """Newcombe 1998, table I: 81 of 263, 0 of 20."""
    assert wilson(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert wilson(0, 20) == pytest.approx((0, 16.11), abs=0.01)
