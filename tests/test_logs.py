"""How logs are read, also foreign and damaged ones, and averaged."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arguments
import logs
import plot
import resume
import tables
from cli import Mistake

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


RESULTS = (
    "epoch,train_loss,train_error,valid_loss,valid_error,test_error\n"
    "001,1.500000,0.500000,1.40000,0.45000,\n"
    "002,1.000000,0.300000,1.10000,0.33000,\n"
    ",,,,,0.34000\n"
)


def write_gpleiss(path):
    path.mkdir()
    (path / "results.csv").write_text(RESULTS)
    return path


def write_config(run, **arguments):
    """The config.json of a run, one of this repository's with other arguments."""
    config = json.loads((ROOT / "work/digits.bc16/config.json").read_text())
    config["arguments"] |= arguments
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_reads_the_logs_of_train(tmp_path):
    log = logs.read_log(write_ours(tmp_path / "run", fine=True))
    assert log.tables["train"].epoch.tolist() == list(range(1, 9))
    assert len(log.fine) == 8
    assert plot.drops(log) == [3]  # epoch 4 is the first at a tenth; it begins at 3
    assert plot.summary(log) == "test error: final 9.50 % (epoch 8), best on test 6.43 % (epoch 7)"


def test_reads_the_logs_of_bamos(tmp_path):
    log = logs.read_log(write_bamos(tmp_path / "seed"))
    assert len(log.fine) == 40
    assert log.tables["train"].epoch.tolist() == [1, 2, 3, 4]
    assert log.tables["train"].error[0] == pytest.approx(90 - 9 * 0.45)  # the mean of the steps 0 … 0.9
    assert plot.summary(log) == "test error: final 15.00 % (epoch 4), best on test 15.00 % (epoch 4)"


def test_reads_the_logs_of_gpleiss(tmp_path):
    log = logs.read_log(write_gpleiss(tmp_path / "seed"))
    assert log.tables["train"].error.tolist() == [50, 30]
    assert log.tables["valid"].error.tolist() == [45, 33]
    assert plot.summary(log) == "valid error: final 33.00 % (epoch 2), best 33.00 % (epoch 2); test 34.00 %"


@pytest.mark.parametrize(
    ("arguments", "model", "title"),
    [
        ({"dataset": "digits"}, {}, "DenseNet-BC-16 (k = 12), digits"),
        ({"dataset": "cifar100", "limit_train": 10000}, {"depth": 100}, "DenseNet-BC-100 (k = 12), CIFAR-100, 10,000 training images"),
        ({"dataset": "svhn"}, {"depth": 40, "bottleneck": False, "reduction": 1.0}, "DenseNet-40 (k = 12), SVHN"),
        ({"dataset": "folder", "data": "data/birds", "arch": "densenet161"}, {"depth": None, "growth_rate": 48}, "DenseNet-161 (k = 48), birds"),
    ],
)
def test_a_title_is_the_network_and_its_data(arguments, model, title):
    config = json.loads((ROOT / "work/digits.bc16/config.json").read_text())
    assert logs.Log(Path("run"), {}, config={"arguments": config["arguments"] | arguments, "model": config["model"] | model}).title == title


def test_a_row_counts_when_it_is_whole(tmp_path):
    run = write_ours(tmp_path / "run")
    text = (run / "test.csv").read_text()
    for rest, last in (("9,0.1", 8), ("9,0.1,", 8), ("9,0.1,0.", 8), ("9,0.1,0.5", 9)):
        (run / "test.csv").write_text(text + rest)
        assert logs.read_log(run).tables["test"].epoch.max() == last


def test_a_missing_log_is_left_out(tmp_path):
    run = write_ours(tmp_path / "run")
    (run / "test.csv").write_text("")
    (run / "train.csv").write_text(HEADER + "1,2.0,80,0.1,100,900\n")
    assert list(logs.read_log(run).tables) == ["train"]
    assert plot.main([str(run)]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffepoch,loss,error\r\n1,2,30\r\n2,1,20\r\n",  # as spreadsheets write it
        '"epoch","loss","error","when"\n1,2,30,today\n2,1,20,\n\n,,,\n',
        "epoch, error, loss\n2, 20, 1\n1, 30, 2\n",
        "epoch,loss,error\n1,2,30\n2,7,70\n2,1,20\n",  # resumed after the second epoch was logged
    ],
)
def test_logs_that_others_have_touched(tmp_path, text):
    (tmp_path / "test.csv").write_bytes(text.encode())
    table = logs.read_log(tmp_path).tables["test"]
    assert table[["epoch", "loss", "error"]].to_numpy().tolist() == [[1, 2, 30], [2, 1, 20]]


def test_a_table_of_ones_own_beside_the_logs(tmp_path):
    (write_ours(tmp_path) / "results.csv").write_text("name;score\nbest;3\n")
    assert set(logs.read_log(tmp_path).tables) == {"train", "test"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train", None, "has no log with a row"),
        ("train", "", "has no log with a row"),
        ("train", HEADER, "has no log with a row"),
        ("train", "epoch,loss,error\n1,x,3\n", "train.csv is not a log: line 2: could not convert string to float: 'x'"),
        ("train", "epoch,time\n1,2\n", "train.csv is not a log: it has no column loss"),
        ("train", "\x00\xff\n", "train.csv is not a log"),
        ("train", "epoch,loss,error\n1,2,3,4\n", "train.csv is not a log: line 2 has more than 3 cells"),
        ("test", "epoch,loss,error\nnan,nan,nan\n", "test: a damaged log: epoch nan is not in 0 … 1e+06"),
        ("test", "epoch,loss,error\n1,2,3\n1e20,2,3\n", "a damaged log: epoch 1e+20 is not in 0 … 1e+06"),
        ("test", "epoch,loss,error\n1,2,300\n", "a damaged log: error 300 is not in 0 … 100"),
        ("results", RESULTS.replace("valid_error", "v"), "results.csv is not a log: it has no column valid_error"),
        ("results", RESULTS.replace("epoch", "x"), "results.csv is not a log: it has no header that begins with epoch"),
        ("results", RESULTS.replace("0.33000", "33.000"), "valid: a damaged log: error 3300 is not in 0 … 100"),
        ("config", "{", "config.json is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, capsys, name, content, words):
    if name == "config":
        write_ours(tmp_path)
    if content is not None:
        (tmp_path / f"{name}.{'json' if name == 'config' else 'csv'}").write_text(content)
    assert plot.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("plot.py: error: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(Mistake, match=r"train\.csv is not a file"):
        logs.read_log(tmp_path)


def write_seeds(folder, count=3, epochs=(5, 5, 5), **arguments):
    runs = []
    for seed in range(1, count + 1):
        run = write_config(write_ours(folder / f"sgd.{seed}", epochs=epochs[seed - 1]), seed=seed, **arguments)
        rows = "".join(f"{epoch},1,{10 * seed / epoch}\n" for epoch in range(1, epochs[seed - 1] + 1))
        (run / "test.csv").write_text("epoch,loss,error\n" + rows)
        runs.append(run)
    return runs


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    log = logs.mean_log([logs.read_log(run) for run in write_seeds(tmp_path)])
    assert (log.path, log.title) == (tmp_path / "sgd", "DenseNet-BC-16 (k = 12), digits")
    assert log.tables["test"].epoch.tolist() == [1, 2, 3, 4, 5]
    assert log.tables["test"].error.tolist() == pytest.approx([20 / e for e in range(1, 6)])
    assert log.deviations["test"].error.tolist() == pytest.approx([10 / e for e in range(1, 6)])
    assert plot.drops(log) == [2]
    assert plot.summary(log) == "test error, mean of 3: final 4.00 ± 2.00 % (epoch 5)"


@pytest.mark.parametrize(
    ("paths", "common"),
    [
        (["a/black-seed1", "a/black-seed10"], "a/black"),
        (["a/sgd/1", "a/sgd/2"], "a/sgd"),
        (["a/seed1/sgd", "a/seed2/sgd"], "a/sgd"),
        (["a/bc100.1", "a/bc100.2"], "a/bc100"),
    ],
)
def test_the_name_of_a_mean_is_what_its_runs_share(paths, common):
    assert logs.mean_path([Path(path) for path in paths]) == Path(common).absolute()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "cifar10", "epochs": 6}, "they differ in dataset (digits, cifar10), epochs (20, 6): leave some out"),
        ({"mixup": 0.5}, "they differ in mixup (–, 0.5)"),
        ({"limit_train": 500}, "they differ in limit_train (–, 500)"),
        ({"dataset": "folder", "data": "data/birds"}, "they differ in dataset (digits, folder), data (–, birds)"),
    ],
)
def test_a_mean_is_over_runs_that_differ_in_their_seed(tmp_path, change, words):
    runs = write_seeds(tmp_path)
    write_config(runs[1], seed=2, block="naive", device="cuda", save="elsewhere", mixup=0)
    assert logs.mean_log([logs.read_log(run) for run in runs]).title
    write_config(runs[1], seed=2, **change)
    found = [logs.read_log(run) for run in runs]
    with pytest.raises(Mistake, match=re.escape(words)):
        logs.mean_log(found)
    assert logs.mean_log(found, unlike=True).title == ("" if {"dataset", "limit_train"} & set(change) else found[0].title)


def test_a_mean_is_not_cut_to_the_shortest_run_in_silence(tmp_path):
    found = [logs.read_log(run) for run in write_seeds(tmp_path, epochs=(5, 6, 5))]
    with pytest.raises(Mistake, match=r"they differ in epochs of train \(5, 6\), epochs of test \(5, 6\): leave some out"):
        logs.mean_log(found)
    assert logs.mean_log(found, unlike=True).tables["test"].epoch.tolist() == [1, 2, 3, 4, 5]
    for wrong in (found[:1], [found[0], found[0]]):
        with pytest.raises(Mistake, match="needs two runs or more, each of them once"):
            logs.mean_log(wrong)


def test_what_is_not_compared_changes_at_most_the_rounding():
    assert {"seed"} < logs.NOT_COMPARED <= resume.RESUMABLE | {"seed", "recipe"}  # which is a name for others


def test_flags_that_old_runs_do_not_know_are_off_or_listed():
    old = json.loads((ROOT / "tests/old_run/config.json").read_text())["arguments"]
    defaults = vars(arguments.make_parser().parse_args([]))
    younger = {name: value for name, value in defaults.items() if name not in old and value}
    assert younger == logs.YOUNGER


BITS = ["nan", "inf", "-1", "1e20", "1e308", "", ",", '"', "\n", "\r", "\ufeff", "é", "\x00", "{}", "5", "null"]
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12), st.one_of(st.sampled_from(BITS).map(str.encode), st.binary(max_size=3))), max_size=3)


def damaged(text, edits):
    for start, length, new in edits:
        start %= len(text) + 1
        text = text[:start] + new + text[start + length :]
    return text


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("write", [write_ours, write_bamos, write_gpleiss])
def test_a_damaged_log_is_drawn_or_is_one_line(tmp_path, write, examples):
    run = write(tmp_path / "run")
    files = {path: path.read_bytes() for path in write_config(run, mixup=0.5).iterdir()}

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries(dict.fromkeys(files, EDITS)), st.sampled_from([0, 1e-9, 2, 1e6]))
    def check(edits, smooth):
        for path, content in files.items():
            path.write_bytes(damaged(content, edits[path]))
        try:
            log = logs.read_log(run)
        except Mistake as error:
            assert "\n" not in str(error).replace(str(run), "")
        else:
            figure = plot.make_figure({"run": log}, ("loss", "error"), plot.View(smooth=smooth))
            assert len(figure.axes) == 2
            assert len(tables.formatted(*tables.comparison({"run": log}), "text").splitlines()) == 2

    check()


def test_a_network_with_arguments_of_its_own_is_not_called_the_plain_one():
    model = {"depth": 16, "growth_rate": 12, "reduction": 0.5, "bottleneck": True, "drop_rate": 0.2, "num_classes": 10}
    assert logs.network_name({"model": model, "arguments": {}}) == "DenseNet-BC-16 (k = 12)"
    changed = {"model": model | {"activation": "gelu", "scaled": False}, "arguments": {}}
    assert logs.network_name(changed) == "DenseNet-BC-16 (k = 12, activation = gelu)"
