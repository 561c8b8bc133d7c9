"""What figures show and how they are written."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from conftest import ROOT
from helpers import write_bamos, write_config, write_gpleiss, write_ours, write_seeds

import plot
from reports import curves, logs


def figure_of(runs, quantities=("loss", "error"), **view):
    """The figure of {label: run directory}."""
    return curves.make_figure({label: logs.read_log(run) for label, run in runs.items()}, quantities, curves.View(**view))


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def reading_order(legend):
    """The entries of a drawn legend, row by row, by where they stand."""
    legend.figure.draw_without_rendering()
    places = [(text.get_window_extent(), text.get_text()) for text in legend.get_texts()]
    return [text for box, text in sorted(places, key=lambda place: (-round(place[0].y0 / 5), place[0].x0))]


def test_a_cosine_has_no_drops():
    cosine = pd.DataFrame({"epoch": [1, 2, 3, 4], "lr": [0.1, 0.07, 0.02, 0.001]})
    assert curves.drops(logs.Log(Path(), {"train": cosine})) == []
    step = pd.DataFrame({"epoch": [1, 2, 3, 4], "lr": [0.1, 0.01, 0.01, 0.001]})
    assert curves.drops(logs.Log(Path(), {"train": step})) == [1, 3]


def test_smoothing_is_a_rolling_mean_over_epochs():
    table = pd.DataFrame({"epoch": [1, 2, 3, 4], "loss": [4.0, 2, 6, 8], "error": [4.0, 2, 6, 8]})
    assert curves.smooth(table, 2).loss.tolist() == [4, 3, 4, 7]
    assert curves.smooth(table, 1e-9).loss.tolist() == table.loss.tolist()
    assert curves.smooth(table, 1e6).loss.tolist() == [4, 3, 4, 5]
    assert curves.smooth(table, 0) is table
    assert curves.smooth(table[table.epoch > 2], 2).epoch.tolist() == [3, 4]


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_draws_three_figures_the_same_each_time(tmp_path, kind, capsys):
    run = write_ours(tmp_path / "run")
    command = [str(run), "--format", kind, "--smooth", "2", "--error-scale", "log", "--loss-scale", "linear"]
    assert plot.main(command) == 0
    figures = [run / f"{name}.{kind}" for name in ("loss", "error", "loss-error")]
    assert capsys.readouterr().out.split() == [str(path) for path in figures]
    before = [path.read_bytes() for path in figures]
    assert all(len(content) > 5000 for content in before)
    assert plot.main([*command, "--out", f"again.{kind}"]) == 0
    assert Path(f"again.{kind}").read_bytes() == before[-1]


def test_overlays_runs_of_all_kinds(tmp_path, monkeypatch):
    runs = [write_ours(tmp_path / "a", fine=True), write_bamos(tmp_path / "b"), write_gpleiss(tmp_path / "c")]
    monkeypatch.chdir(tmp_path)
    assert plot.main([*map(str, runs), "--out", "figures"]) == 0
    assert sorted(p.name for p in Path("figures").iterdir()) == ["error.png", "loss-error.png", "loss.png"]
    assert plot.main([*map(str, runs), "--out", "one/picture.svg", "--title", "three runs"]) == 0
    assert [p.name for p in Path("one").iterdir()] == ["picture.svg"]
    assert plot.main([*map(str, runs), "--out", "picture.jpg"]) == 2 and not Path("picture.jpg").exists()
    svg = Path("one/picture.svg").read_text()  # text is drawn as outlines
    for text in ("three runs", "a: test error: final 9.50 %", "c: valid error: final 33.00 %"):
        assert f"<!-- {text}" in svg


@pytest.mark.parametrize(("first", "scale"), [(0.9, "linear"), (1.1, "log")])
def test_the_loss_axis_is_logarithmic_from_a_decade_on(tmp_path, first, scale):
    (tmp_path / "test.csv").write_text(f"epoch,loss,error\n1,{first},50\n2,0.1,5\n")
    assert figure_of({"run": tmp_path}).axes[0].get_yscale() == scale


def test_a_run_has_its_network_and_data_as_title(tmp_path):
    digits, birds = (write_config(write_ours(tmp_path / name)) for name in ("digits", "birds"))
    assert figure_of({"run": digits}).get_suptitle().startswith("run: DenseNet-BC-16 (k = 12), digits\ntest error: final 9.50 %")
    assert figure_of({"a": digits, "b": birds}).get_suptitle() == "DenseNet-BC-16 (k = 12), digits"
    write_config(birds, dataset="folder", data="data/birds")
    figure = figure_of({"a": digits, "b": birds}, quantities=("error",))
    assert figure.get_suptitle() == ""
    assert " ".join(texts(figure.legends[0])[1].split()).startswith("b, DenseNet-BC-16 (k = 12), birds: test error: final 9.50 %")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["work/sgd", "work/adam"], ["sgd", "adam"]),
        (["A/run1", "B/run1"], ["A", "B"]),
        (["a/1/run", "b/2/run", "b/3/run"], ["a/1", "b/2", "b/3"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["a/run", "run"], ["a/run", "run"]),
        (["x/./a/", "x/y/../b"], ["a", "b"]),
        (["x/run"], ["run"]),
    ],
)
def test_labels_are_what_differs_in_the_paths(paths, expected):
    assert curves.labels(paths) == expected


def test_the_current_directory_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_ours(tmp_path / "run"))
    assert curves.labels(["."]) == ["run"]
    assert plot.main(["."]) == 0 and Path("loss.png").exists()


@pytest.mark.parametrize("count", [2, 3, 7, 8, 15])
def test_a_legend_tells_any_number_of_runs_apart(tmp_path, count):
    run = write_ours(tmp_path / "run")
    figure = figure_of({f"r{i}": run for i in range(count)})
    below, styles = figure.legends[0], figure.axes[-1].get_legend()
    assert [text.partition(":")[0] for text in reading_order(below)] == [f"r{i}" for i in range(count)]
    assert texts(styles) == ["train", "test", "learning rate drops"]
    looks = {(line.get_color(), line.get_marker()) for line in below.get_lines()}
    assert len(looks) == count
    drawn = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_linestyle() == "-"}
    assert drawn == looks


@pytest.mark.parametrize("entries", range(1, 10))
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_entries_of_a_legend_stand_in_reading_order(entries, columns):
    figure = plot.Figure(figsize=(8, 4))
    curves.add_legend(figure, [(str(i), curves.DROP_STYLE) for i in range(entries)], columns)
    assert reading_order(figure.legends[0]) == [str(i) for i in range(entries)]


NAMES = ["_hidden", "$x$", "$\\frac", "a_b^{", "<&>--", "two\nlines", os.fsdecode(b"x\xff"), os.fsdecode(b"x\xfe")]


def test_no_name_is_markup(tmp_path):
    run = write_ours(tmp_path / "run")
    figure = figure_of(dict.fromkeys(NAMES, run))
    shown = [text.rpartition(": test error")[0] for text in texts(figure.legends[0])]
    assert shown == [*NAMES[:-2], "x\\udcff", "x\\udcfe"]
    curves.save(figure, tmp_path / "figure.svg")
    ElementTree.parse(tmp_path / "figure.svg")
    curves.save(figure_of({"$\\frac": run}), tmp_path / "figure.png")  # in the title


def test_labels_can_be_chosen(tmp_path, capsys):
    a, b = (str(write_ours(tmp_path / name)) for name in "ab")
    assert plot.main([a, b, "--labels", "SGD", "Adam", "--out", "figure.svg"]) == 0
    svg = Path("figure.svg").read_text()
    assert "<!-- SGD: test error" in svg and "<!-- Adam: test error" in svg
    capsys.readouterr()
    for flags, words in (
        ([a, b, "--labels", "SGD"], "--labels SGD: 1 names for 2 runs and means"),
        ([a, b, "--labels", "SGD", "SGD"], "two runs would be labelled SGD"),
        ([a, a], "two runs would be labelled a"),
        ([a, "--only", "valid"], "has nothing to draw with this --only or --xlim"),
        ([a, "--xlim", "100", "200"], "has nothing to draw with this --only or --xlim"),
    ):
        assert plot.main(flags) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_shows_what_is_asked_for(tmp_path):
    run = write_ours(tmp_path / "run")
    figure = figure_of({"run": run}, only="test", xlim=(2, 5), ylim={"error": (0.5, 20)})
    loss, error = figure.axes
    [line] = [line for line in loss.lines if len(line.get_xdata()) > 2]
    assert list(line.get_xdata()) == [2, 3, 4, 5] and texts(figure.legends[0]) == ["test", "learning rate drops"]
    assert loss.get_xlim() == error.get_xlim() == (2, 5)
    assert error.get_ylim() == (0.5, 20) and loss.get_ylim()[1] < 1.2
    assert plot.main([str(run), "--figsize", "3", "2.5", "--out", "figure.png"]) == 0
    assert plot.matplotlib.image.imread("figure.png").shape[:2] == (375, 450)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--smooth nan", "argument --smooth: nan is not in 0 … 1e+06"),
        ("--smooth inf", "argument --smooth: inf is not in 0 … 1e+06"),
        ("--smooth -1", "argument --smooth: -1 is not in 0 … 1e+06"),
        ("--smooth x", "argument --smooth: invalid float value: 'x'"),
        ("--figsize 0 5", "argument --figsize: 0 is not in 2 … 50"),
        ("--xlim 5 2", "--xlim 5 2: needs two numbers, the lower one first"),
        ("--ylim 0 20 --error-scale log", "--ylim 0 20: needs two numbers above 0, the lower one first"),
        ("--loss-ylim 1 nan", "argument --loss-ylim: nan is not in"),
        ("--table --out runs.csv", "--out runs.csv: a table is printed; > FILE at the end of the command writes it"),
        ("--table latex", "argument --table: invalid choice: 'latex'"),
        ("--only everything", "argument --only: invalid choice"),
        ("--figsize 2 2", "no room for curves: choose a larger --figsize"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, words):
    run = write_ours(tmp_path / "run")
    try:
        status = plot.main([str(run), "--title", "a long title " * 50, *flags.split()])
    except SystemExit as error:  # how argparse ends
        status = error.code
    err = capsys.readouterr().err
    assert status == 2 and words in err and err.count("\n") == 1
    assert sorted(path.name for path in run.iterdir()) == ["test.csv", "train.csv"]


def test_needs_no_torch_and_no_backend():
    """A notebook passes on the name of its own backend, which may not be installed here."""
    program = "import sys, plot; sys.exit(plot.main(sys.argv[1:]) or 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, str(ROOT / "work/digits.bc16")]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(ROOT)}
    for flags in (["--out", "figure.png"], ["--table"]):
        assert subprocess.run([*command, *flags], env=env).returncode == 0
    assert Path("figure.png").exists()


def test_two_drawings_of_one_run_do_not_meet(tmp_path, monkeypatch):
    """While one process writes its figure, another one does."""
    run, real = write_ours(tmp_path / "run"), os.fsync
    command = [str(run), "--out", str(tmp_path / "figure.svg")]

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", real)
        subprocess.run([sys.executable, ROOT / "plot.py", *command], check=True)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert plot.main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "figure.svg"}


def test_a_drawing_that_is_killed_leaves_nothing(tmp_path):
    """SIGKILL, as the end of a training gives it, while the figure is being drawn."""
    run = write_ours(tmp_path / "run")
    program = "import sys, time, plot; curves.make_figure = lambda *_: Slow(); "
    program += "Slow = type('Slow', (), {'savefig': lambda self, file, **_: (file.write(b'half'), print('now', flush=True), time.sleep(60))}); "
    with subprocess.Popen([sys.executable, "-c", program + "plot.main(sys.argv[1:])", str(run)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.kill()
    assert sorted(path.name for path in run.iterdir()) == ["test.csv", "train.csv"]


def test_draws_means_beside_runs(tmp_path, capsys):
    one, seeds = str(write_config(write_ours(tmp_path / "adam"))), list(map(str, write_seeds(tmp_path)))
    assert plot.main([one, "--mean", *seeds, "--out", str(tmp_path), "--format", "svg"]) == 0
    svg = (tmp_path / "error.svg").read_text()
    assert svg.count("FillBetweenPolyCollection") == 1 and "<!-- sgd: test error, mean of 3: final" in svg
    assert plot.main([]) == 2
    assert "name a run directory" in capsys.readouterr().err
    write_config(Path(seeds[2]), depth=40)
    assert plot.main(["--mean", *seeds, "--out", "mean.svg"]) == 2
    err = capsys.readouterr().err
    assert "they differ in depth (16, 40): leave some out, or add --unlike" in err and err.count("\n") == 1
    assert plot.main(["--mean", *seeds, "--out", "mean.svg", "--unlike"]) == 0


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_band_stays_within_what_is_possible(tmp_path, scale):
    for seed, errors in ((1, (100, 0.1)), (2, (60, 8))):
        (tmp_path / f"sgd.{seed}").mkdir()
        rows = "".join(f"{epoch},{error / 40},{error}\n" for epoch, error in enumerate(errors, start=1))
        (tmp_path / f"sgd.{seed}/test.csv").write_text("epoch,loss,error\n" + rows)
    mean = logs.mean_log([logs.read_log(tmp_path / f"sgd.{seed}") for seed in (1, 2)])
    view = curves.View(scale={"loss": "linear", "error": scale})
    loss, error = curves.make_figure({"sgd": mean}, ("loss", "error"), view).axes
    low, high = error.collections[0].get_datalim(error.transData).intervaly
    assert (low, high) == (0, 100)
    assert loss.collections[0].get_datalim(loss.transData).y0 == 0
    for axes in (loss, error):
        low, high = axes.collections[0].get_datalim(axes.transData).intervaly
        assert axes.get_ylim()[1] >= high and (axes.get_ylim()[0] <= low or axes.get_yscale() == "log")
