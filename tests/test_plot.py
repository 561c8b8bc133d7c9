import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import plot

HEADER = "epoch,loss,error,lr,images_per_second,peak_memory_mib\n"


def write_ours(path, epochs=8, fine=False):
    path.mkdir(parents=True, exist_ok=True)
    log, test = HEADER, "epoch,loss,error\n"
    for epoch in range(1, epochs + 1):
        lr = 0.1 if epoch < epochs / 2 else 0.01
        if fine:
            log += f"{epoch - 0.5},{2.5 / epoch},50,{lr},,\n"
        log += f"{epoch},{2 / epoch},{40 / epoch},{lr},100,900\n"
        test += f"{epoch},{2.2 / epoch},{45 / epoch if epoch != epochs else 9.5}\n"
    (path / "train.csv").write_text(log)
    (path / "test.csv").write_text(test)
    return path


def write_bamos(path, epochs=4):
    path.mkdir()
    steps = [i / 10 for i in range(10 * epochs)]  # its epoch 1 goes from 0 to 0.9
    (path / "train.csv").write_text("".join(f"{e},{2 - e / 9},{90 - 9 * e}\n" for e in steps))
    (path / "test.csv").write_text("".join(f"{e},{1.5 / e},{60 / e}\n" for e in range(1, epochs + 1)))
    return path


def write_gpleiss(path):
    path.mkdir()
    (path / "results.csv").write_text(
        "epoch,train_loss,train_error,valid_loss,valid_error,test_error\n"
        "001,1.500000,0.500000,1.40000,0.45000,\n"
        "002,1.000000,0.300000,1.10000,0.33000,\n"
        ",,,,,0.34000\n"
    )
    return path


def test_reads_the_logs_of_train(tmp_path):
    log = plot.read_log(write_ours(tmp_path / "run", fine=True))
    assert log.tables["train"].epoch.tolist() == list(range(1, 9))
    assert len(log.fine) == 8
    assert plot.drops(log.tables["train"]) == [3]  # epoch 4 is the first at a tenth; it begins at 3
    assert plot.summary(log) == "test error: final 9.50 % (epoch 8), best on test 6.43 % (epoch 7)"


def test_reads_the_logs_of_bamos(tmp_path):
    log = plot.read_log(write_bamos(tmp_path / "seed"))
    assert len(log.fine) == 40
    assert log.tables["train"].epoch.tolist() == [1, 2, 3, 4]
    assert log.tables["train"].error[0] == pytest.approx(90 - 9 * 0.45)  # the mean of the steps 0 … 0.9
    assert plot.summary(log) == "test error: final 15.00 % (epoch 4), best on test 15.00 % (epoch 4)"


def test_reads_the_logs_of_gpleiss(tmp_path):
    log = plot.read_log(write_gpleiss(tmp_path / "seed"))
    assert log.tables["train"].error.tolist() == [50, 30]
    assert log.tables["valid"].error.tolist() == [45, 33]
    assert plot.summary(log) == "valid error: final 33.00 % (epoch 2), best 33.00 % (epoch 2); test 34.00 %"


def test_a_cosine_has_no_drops():
    cosine = pd.DataFrame({"epoch": [1, 2, 3, 4], "lr": [0.1, 0.07, 0.02, 0.001]})
    assert plot.drops(cosine) == []
    step = pd.DataFrame({"epoch": [1, 2, 3, 4], "lr": [0.1, 0.01, 0.01, 0.001]})
    assert plot.drops(step) == [1, 3]


def test_smoothing_is_a_rolling_mean_over_epochs():
    table = pd.DataFrame({"epoch": [1, 2, 3, 4], "loss": [4.0, 2, 6, 8], "error": [4.0, 2, 6, 8]})
    assert plot.smooth(table, 2).loss.tolist() == [4, 3, 4, 7]
    assert plot.smooth(table, 0) is table


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_draws_three_figures_the_same_each_time(tmp_path, kind, capsys):
    run = write_ours(tmp_path / "run")
    assert plot.main([str(run), "--format", kind, "--smooth", "2", "--error-scale", "log", "--loss-scale", "linear"]) == 0
    figures = [run / f"{name}.{kind}" for name in ("loss", "error", "loss-error")]
    assert capsys.readouterr().out.split() == [str(path) for path in figures]
    before = [path.read_bytes() for path in figures]
    assert all(len(content) > 5000 for content in before)
    assert plot.main([str(run), "--format", kind, "--smooth", "2", "--error-scale", "log", "--loss-scale", "linear"]) == 0
    assert [path.read_bytes() for path in figures] == before


def test_overlays_runs_of_all_kinds(tmp_path, monkeypatch):
    runs = [write_ours(tmp_path / "a", fine=True), write_bamos(tmp_path / "b"), write_gpleiss(tmp_path / "c")]
    monkeypatch.chdir(tmp_path)
    assert plot.main([*map(str, runs), "--out", "figures"]) == 0
    assert sorted(p.name for p in Path("figures").iterdir()) == ["error.png", "loss-error.png", "loss.png"]
    assert plot.main([*map(str, runs), "--out", "one/picture.svg", "--title", "three runs"]) == 0
    assert [p.name for p in Path("one").iterdir()] == ["picture.svg"]
    assert plot.main([*map(str, runs), "--out", "picture.jpg"]) == 2 and not Path("picture.jpg").exists()
    assert "<!-- three runs -->" in Path("one/picture.svg").read_text()  # text is drawn as outlines
    figure = plot.make_figure([plot.read_log(run) for run in runs], ("loss", "error"), {"loss": "log", "error": "log"}, 0)
    title = figure.get_suptitle()
    assert "a: test error: final 9.50 %" in title and "c: valid error: final 33.00 %" in title


@pytest.mark.parametrize(("first", "scale"), [(0.9, "linear"), (1.1, "log")])
def test_the_loss_axis_is_logarithmic_from_a_decade_on(tmp_path, first, scale):
    (tmp_path / "test.csv").write_text(f"epoch,loss,error\n1,{first},50\n2,0.1,5\n")
    figure = plot.make_figure([plot.read_log(tmp_path)], ("loss",), {"loss": "auto"}, 0)
    assert figure.axes[0].get_yscale() == scale


def test_a_half_written_line_is_left_out(tmp_path):
    run = write_ours(tmp_path / "run")
    (run / "test.csv").write_text((run / "test.csv").read_text() + "9,0.1,0.0")
    assert plot.read_log(run).tables["test"].epoch.max() == 8


def test_a_missing_log_is_left_out(tmp_path):
    run = write_ours(tmp_path / "run")
    (run / "test.csv").write_text("")
    (run / "train.csv").write_text(HEADER + "1,2.0,80,0.1,100,900\n")
    assert list(plot.read_log(run).tables) == ["train"]
    assert plot.main([str(run)]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no log with a row"),
        ("", "has no log with a row"),
        (HEADER, "has no log with a row"),
        ("epoch,loss,error\n1,x,3\n", "train.csv is not a log: could not convert string to float: 'x'"),
        ("epoch,time\n1,2\n", "train.csv is not a log: it has no column"),
        ("\x00\xff\n", "train.csv is not a log"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "train.csv").write_text(content)
    assert plot.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("plot.py: error: ") and err.count("\n") == 1
    assert words in err


def test_a_file_is_no_run_directory(tmp_path, capsys):
    assert plot.main([str(write_ours(tmp_path) / "train.csv")]) == 2
    assert "train.csv is not a run directory" in capsys.readouterr().err


def test_imports_no_torch():
    program = "import sys, plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(plot.__file__).parent).returncode == 0


def write_seeds(folder, count=3):
    runs = []
    for seed in range(1, count + 1):
        run = write_ours(folder / f"sgd.{seed}", epochs=4 + seed)
        rows = "".join(f"{epoch},1,{10 * seed / epoch}\n" for epoch in range(1, 5 + seed))
        (run / "test.csv").write_text("epoch,loss,error\n" + rows)
        runs.append(str(run))
    return runs


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    log = plot.mean_log([plot.read_log(run) for run in write_seeds(tmp_path)])
    assert log.name == "sgd, mean of 3"
    assert plot.mean_log([plot.Log(name, {}) for name in ("black-seed1", "black-seed10")]).name == "black, mean of 2"
    assert log.tables["test"].epoch.tolist() == [1, 2, 3, 4, 5]  # the shortest run has five
    assert log.tables["test"].error.tolist() == pytest.approx([20 / e for e in range(1, 6)])
    assert log.deviations["test"].error.tolist() == pytest.approx([10 / e for e in range(1, 6)])
    assert plot.summary(log) == "test error: final 4.00 ± 2.00 % (epoch 5)"


def test_draws_means_beside_runs(tmp_path, capsys):
    one = str(write_ours(tmp_path / "adam"))
    assert plot.main([one, "--mean", *write_seeds(tmp_path), "--out", str(tmp_path), "--format", "svg"]) == 0
    svg = (tmp_path / "error.svg").read_text()
    assert svg.count("FillBetweenPolyCollection") == 1
    assert plot.main([]) == 2
    assert "name a run directory" in capsys.readouterr().err
