"""plot.py as a command: files, labels, means, mistakes. What figures show: tests/reports/test_curves.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, status_of
from helpers import write_bamos, write_config, write_ours, write_seeds
from PIL import Image

import plot


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_draws_three_figures_the_same_each_time(tmp_path, kind, capsys):
    run = write_ours(tmp_path / "run")
    command = [str(run), "--format", kind, "--smooth", "2", "--error-scale", "log", "--loss-scale", "linear"]
    assert plot.main(command) == 0
    figures = [run / f"{name}.{kind}" for name in ("loss", "error", "loss-error")]
    assert capsys.readouterr().out.split() == [str(path) for path in figures]
    assert all(path.stat().st_size > 5000 for path in figures)
    assert plot.main([*command, "--out", f"again.{kind}"]) == 0
    assert Path(f"again.{kind}").read_bytes() == figures[-1].read_bytes()
    assert plot.main([*command, "--figsize", "3", "2.5"]) == 0
    assert kind != "png" or Image.open(figures[0]).size == (450, 375)


def test_overlays_runs_of_all_kinds(tmp_path):
    runs = [write_ours(tmp_path / "a", fine=True), write_bamos(tmp_path / "b"), write_ours(tmp_path / "c")]
    assert plot.main([*map(str, runs), "--out", "figures"]) == 0
    assert sorted(p.name for p in Path("figures").iterdir()) == ["error.png", "loss-error.png", "loss.png"]
    assert plot.main([*map(str, runs), "--out", "one/picture.svg", "--title", "three runs", "--labels", "SGD", "b", "c"]) == 0
    assert [p.name for p in Path("one").iterdir()] == ["picture.svg"]
    svg = Path("one/picture.svg").read_text()  # text is drawn as outlines
    assert all(f"<!-- {text} -->" in svg for text in ("three runs", "SGD", "b", "c")) and "final" not in svg


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--smooth nan", "argument --smooth: nan is not in 0 … 1e+06"),
        ("--figsize 0 5", "argument --figsize: 0 is not in 2 … 50"),
        ("--loss-ylim 1 nan", "argument --loss-ylim: nan is not in"),
        ("--table --out runs.csv", "--out runs.csv: a table is printed; > FILE at the end of the command writes it"),
        ("--figsize 2 2", "no room for curves: choose a larger --figsize"),
        ("{run} --labels SGD", "--labels SGD: 1 name for 2 runs and means"),
        ("{run} --labels SGD SGD", "two runs would be labelled SGD"),
        ("{run}", "two runs would be labelled run"),
        ("--only valid", "has nothing to draw with this --only or --xlim"),
        ("--xlim 100 200", "has nothing to draw with this --only or --xlim"),
        ("--out picture.jpg", "--out picture.jpg: a figure is written as png, pdf, svg, not as jpg"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, words):
    run = write_ours(tmp_path / "run")
    assert status_of(plot.main, ["--title", "a long title " * 50, str(run), *flags.format(run=run).split()]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert sorted(path.name for path in run.iterdir()) == ["test.csv", "train.csv"]


def test_needs_no_torch_and_no_backend():
    """A notebook passes on the name of its own backend, which may not be installed here."""
    program = "import sys, plot; sys.exit(plot.main(sys.argv[1:]) or 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, str(ROOT / "work/digits.bc16")]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(ROOT)}
    for flags in (["--out", "figure.png"], ["--table"]):
        assert subprocess.run([*command, *flags], env=env).returncode == 0
    assert Path("figure.png").exists()


def test_draws_means_beside_runs(tmp_path, capsys):
    one, seeds = str(write_config(write_ours(tmp_path / "adam"))), list(map(str, write_seeds(tmp_path)))
    assert plot.main([one, "--mean", *seeds, "--out", str(tmp_path), "--format", "svg"]) == 0
    svg = (tmp_path / "error.svg").read_text()
    assert svg.count("FillBetweenPolyCollection") == 1 and "<!-- sgd: test error, mean of 3: final" in svg
    write_config(Path(seeds[2]), depth=40)
    capsys.readouterr()
    assert plot.main(["--mean", *seeds, "--out", "mean.svg"]) == 2
    err = capsys.readouterr().err
    assert "they differ in depth (16, 40): leave some out, or add --unlike" in err and err.count("\n") == 1
    assert plot.main(["--mean", *seeds, "--out", "mean.svg", "--unlike"]) == 0
