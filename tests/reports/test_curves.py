"""What figures show of logs."""

import os
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pandas as pd
import pytest
from helpers import write_config, write_ours

from reports import curves, logs


def figure_of(runs, quantities=("loss", "error"), size=None, **view):
    """The figure of {label: run directory}."""
    return curves.make_figure({label: logs.read_log(run) for label, run in runs.items()}, quantities, curves.View(**view), size=size)


def title(figure):
    return figure.legends[0].get_title().get_text()


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_a_cosine_has_no_drops():
    for rates, drops in (([0.1, 0.07, 0.02, 0.001], []), ([0.1, 0.01, 0.01, 0.001], [1, 3])):
        assert curves.drops(logs.Log(Path(), {"train": pd.DataFrame({"epoch": [1, 2, 3, 4], "lr": rates})})) == drops


def test_smoothing_is_a_rolling_mean_over_epochs():
    table = pd.DataFrame({"epoch": [1, 2, 3, 4], "loss": [4.0, 2, 6, 8], "error": [4.0, 2, 6, 8]})
    assert curves.smooth(table, 2).loss.tolist() == [4, 3, 4, 7]
    assert curves.smooth(table, 1e6).loss.tolist() == [4, 3, 4, 5]
    assert curves.smooth(table, 0).loss.tolist() == table.loss.tolist()


def test_a_run_has_its_network_and_data_as_title(tmp_path):
    digits, birds = (write_config(write_ours(tmp_path / name)) for name in ("digits", "birds"))
    assert title(figure_of({"run": digits})).startswith("run: DenseNet-BC-16 (k = 12), digits\ntest error: final 9.50 %")
    assert title(figure_of({"a": digits, "b": birds})) == "DenseNet-BC-16 (k = 12), digits"
    write_config(birds, dataset="folder", data="data/birds")
    figure = figure_of({"a": digits, "b": birds}, quantities=("error",))
    assert title(figure) == ""
    assert " ".join(texts(figure.legends[1])[1].split()).startswith("b, DenseNet-BC-16 (k = 12), birds: test error: final 9.50 %")


def test_labels_are_what_differs_in_the_paths():
    for paths, labels in (
        ("work/sgd work/adam", "sgd adam"), ("w/a/1/run w/b/2/run", "a/1/run b/2/run"), ("a a/b", "a a/b"),
        ("x/./a/ x/y/../b", "a b"), ("x/run", "run"),
    ):  # fmt: skip
        assert curves.labels(paths.split()) == labels.split()


@pytest.mark.parametrize("size", [None, (5, 3), (20, 3)])
@pytest.mark.parametrize(("count", "quantities"), [(1, ("loss",)), (2, ("loss", "error")), (15, ("error",))])
def test_legends_tell_runs_apart_are_whole_and_cover_no_curve(tmp_path, size, count, quantities):
    run = write_ours(tmp_path / "run")
    (run / "valid.csv").write_text((run / "test.csv").read_text())
    figure = figure_of({f"r{i}": run for i in range(count)}, quantities, size)
    styles, *below = figure.legends
    assert texts(styles) == ["train", "valid", "test", "learning rate drops"]
    for runs in below:
        assert [text.partition(":")[0] for text in texts(runs)] == [f"r{i}" for i in range(count)]
        looks = {(line.get_color(), line.get_marker()) for line in runs.get_lines()}
        drawn = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_linestyle() == "-"}
        assert len(looks) == count and drawn == looks
    if count == 15 and size:  # has no room for them
        return
    curves.save(figure, tmp_path / "figure.png")
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


NAMES = ["_hidden", "$x$", "$\\frac", r"\$x\$", "a_b^{", "<&>--", "two\nlines", os.fsdecode(b"x\xff"), os.fsdecode(b"x\xfe")]


def test_no_name_is_markup(tmp_path):
    run = write_ours(tmp_path / "run")
    figure = figure_of(dict.fromkeys(NAMES, run))
    shown = texts(figure.legends[1])
    assert not any(map(matplotlib.cbook.is_math_text, shown))
    assert [text.replace(r"\$", "$").rpartition(": test error")[0] for text in shown] == [*NAMES[:-2], "x\\udcff", "x\\udcfe"]
    curves.save(figure, tmp_path / "figure.svg")
    assert "<!-- _hidden: test error" in (tmp_path / "figure.svg").read_text()
    ElementTree.parse(tmp_path / "figure.svg")
    curves.save(figure_of({"$\\frac": run}), tmp_path / "figure.png")  # in the title


def test_shows_what_is_asked_for(tmp_path):
    figure = figure_of({"run": write_ours(tmp_path / "run")}, only="test", xlim=(2, 5), ylim={"error": (0.5, 20)})
    loss, error = figure.axes
    [line] = [line for line in loss.lines if len(line.get_xdata()) > 2]
    assert [list(drop.get_xdata()) for drop in loss.lines if drop is not line] == [[3, 3]]
    assert list(line.get_xdata()) == [2, 3, 4, 5] and texts(figure.legends[0]) == ["test", "learning rate drops"]
    assert loss.get_xlim() == error.get_xlim() == (2, 5)
    assert error.get_ylim() == (0.5, 20) and loss.get_ylim()[1] < 1.2
    for first, scale in ((0.9, "linear"), (1.1, "log")):  # from a decade on
        (tmp_path / "test.csv").write_text(f"epoch,loss,error\n1,{first},50\n2,0.1,5\n")
        assert figure_of({"run": tmp_path}).axes[0].get_yscale() == scale


def band_of(tmp_path, errors, smooth=0, scale="linear"):
    """The panel of the errors of two seeds, and the (low, high) of their band at each epoch."""
    for seed, values in enumerate(errors):
        (tmp_path / f"sgd.{seed}").mkdir()
        rows = "".join(f"{epoch},1,{error}\n" for epoch, error in enumerate(values, start=1))
        (tmp_path / f"sgd.{seed}/test.csv").write_text("epoch,loss,error\n" + rows)
    mean = logs.mean_log([logs.read_log(tmp_path / f"sgd.{seed}") for seed in range(len(errors))])
    view = curves.View(smooth=smooth, scale={"loss": "linear", "error": scale})
    [axes] = curves.make_figure({"sgd": mean}, ("error",), view).axes
    ends = [[y for at, y in axes.collections[0].get_paths()[0].vertices if at == epoch] for epoch in range(1, len(errors[0]) + 1)]
    return axes, [(min(values), max(values)) for values in ends]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_band_stays_within_what_is_possible(tmp_path, scale):
    axes, ((_, high), (low, _)) = band_of(tmp_path, [(100, 0.1), (60, 8)], scale=scale)
    assert (low, high) == (0, 100)
    assert axes.get_ylim()[1] >= 100 and (axes.get_ylim()[0] <= 0 or scale == "log")


def test_the_band_of_smoothed_curves_is_their_deviation(tmp_path):
    """Two runs that go up and down in turns have the same mean over two epochs."""
    _, band = band_of(tmp_path, [(10, 30, 10, 30, 10), (30, 10, 30, 10, 30)], smooth=2)
    assert [round(high - low, 3) for low, high in band] == [28.284, 0, 0, 0, 0]
