"""How logs are read, also foreign and damaged ones, and averaged."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import HEADER, write_bamos, write_config, write_ours, write_seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import plot
from common.config import read_config
from common.console import Mistake
from reports import curves, logs, tables
from training import arguments, flags


@pytest.mark.parametrize(
    ("write", "fine", "errors", "summary"),
    [
        (partial(write_ours, epochs=6, fine=True), 6, [40, 20, 40 / 3, 10, 8, 40 / 6], "test error: final 9.50 % (epoch 6), best on test 9.00 % (epoch 5)"),
        (write_bamos, 40, [85.95, 76.95, 67.95, 58.95], "test error: final 15.00 % (epoch 4), best on test 15.00 % (epoch 4)"),
    ],
)
def test_reads_logs_of_two_repositories(tmp_path, write, fine, errors, summary):
    """An epoch of bamos has the mean of its iterations."""
    log = logs.read_log(write(tmp_path / "run"))
    assert log.tables["train"].epoch.tolist() == list(range(1, len(errors) + 1))
    assert log.tables["train"].error.tolist() == pytest.approx(errors)
    assert len(log.fine) == fine and curves.summary(log) == summary


@pytest.mark.parametrize(
    ("arguments", "model", "title"),
    [
        ({"dataset": "digits"}, {"activation": "gelu", "scaled": False}, "DenseNet-BC-16 (k = 12, activation = gelu), digits"),
        ({"dataset": "cifar100", "limit_train": 10000}, {"depth": 100}, "DenseNet-BC-100 (k = 12), CIFAR-100, 10,000 training images"),
        ({"dataset": "svhn"}, {"depth": 40, "bottleneck": False, "reduction": 1.0}, "DenseNet-40 (k = 12), SVHN"),
        ({"dataset": "folder", "data": "data/birds", "arch": "densenet161"}, {"depth": None, "growth_rate": 48}, "DenseNet-161 (k = 48), birds"),
    ],
)
def test_a_title_is_the_network_and_its_data(arguments, model, title):
    config = json.loads((ROOT / "work/digits.bc16/config.json").read_text())
    assert logs.Log(Path("run"), {}, config={"arguments": config["arguments"] | arguments, "model": config["model"] | model}).title == title


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("\ufeffepoch,loss,error\r\n1,2,30\r\n2,1,20\r\n", [[1, 2, 30], [2, 1, 20]]),  # as spreadsheets write it
        ('"epoch","loss","error","when"\n1,2,30,today\n2,1,20,\n\n,,,\n', [[1, 2, 30], [2, 1, 20]]),
        ("epoch, error, loss\n2, 20, 1\n1, 30, 2\n", [[1, 2, 30], [2, 1, 20]]),
        ("epoch,loss,error\n1,2,30\n2,7,70\n2,1,20\n", [[1, 2, 30], [2, 1, 20]]),  # resumed after the second epoch was logged
        ("epoch,loss,error\n1,inf,30\n2,-1e308,20\n", [[1, None, 30], [2, None, 20]]),  # a gap
        (f"epoch,loss,error\n3,{0.1 + 0.2},{100 / 3}\n", [[3, 0.1 + 0.2, 100 / 3]]),  # exactly
        *((f"epoch,loss,error\n1,2,30\n{rest}", [[1, 2, 30]]) for rest in ("2,1", "2,1,", "2,1,20.")),  # is being written
        ("epoch,loss,error\n1,2,30\n2,1,20", [[1, 2, 30], [2, 1, 20]]),
    ],
)
def test_logs_that_others_have_touched(tmp_path, text, rows):
    (tmp_path / "test.csv").write_bytes(text.encode())
    (tmp_path / "train.csv").write_text("")
    [(split, table)] = logs.read_log(tmp_path).tables.items()
    table = table[["epoch", "loss", "error"]].astype(object)
    assert split == "test" and table.where(table.notna(), None).to_numpy().tolist() == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train", "", "has no log with a row"),
        ("train", HEADER, "has no log with a row"),
        ("train", "epoch,loss,error\n1,x,3\n", "train.csv is not a log: could not convert string to float: 'x'"),
        ("train", "epoch,time\n1,2\n", "train.csv is not a log: it has no column loss"),
        ("train", "\x00\xff\n", "train.csv is not a log"),
        ("train", "epoch,loss,error\n1,2,3,4\n", "train.csv is not a log: the first row has more cells than there are columns"),
        ("test", "epoch,loss,error\n1,2,3\n1e20,2,3\n", "a damaged log: epoch 1e+20 is not in 0 … 1e+06"),
        ("test", "epoch,loss,error\n1,2,300\n", "a damaged log: error 300 is not in 0 … 100"),
        ("config", "{", "config.json is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, capsys, name, content, words):
    if name == "config":
        write_ours(tmp_path)
    (tmp_path / f"{name}.{'json' if name == 'config' else 'csv'}").write_text(content)
    assert plot.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("plot.py: error: ") and err.count("\n") == 1
    assert words in err


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    runs = write_seeds(tmp_path)
    (runs[0] / "test.csv").write_text((runs[0] / "test.csv").read_text().replace("3,1,", "3,inf,"))
    log = logs.mean_log([logs.read_log(run) for run in runs])
    assert (log.path, log.title) == (tmp_path / "sgd", "DenseNet-BC-16 (k = 12), digits")
    assert log.tables["test"].epoch.tolist() == [1, 2, 3, 4, 5]
    assert log.tables["test"].error.tolist() == pytest.approx([20 / e for e in range(1, 6)])
    assert log.deviations("test").error.tolist() == pytest.approx([10 / e for e in range(1, 6)])
    for table in (log.tables["test"], log.deviations("test")):  # of two losses out of three there is no mean
        assert table.loss.isna().tolist() == [False, False, True, False, False]
    assert curves.drops(log) == [2]
    assert curves.summary(log) == "test error, mean of 3: final 4.00 ± 2.00 % (epoch 5)"


def test_the_name_of_a_mean_is_what_its_runs_share():
    for paths, common in (
        ("a/black-seed1 a/black-seed10", "a/black"), ("a/sgd/1 a/sgd/2", "a/sgd"),
        ("a/seed1/sgd a/seed2/sgd", "a/sgd"), ("a/bc100.1 a/bc100.2", "a/bc100"),
    ):  # fmt: skip
        assert logs.mean_path(paths.split()) == Path(common).absolute()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "cifar10", "epochs": 6}, "they differ in dataset (digits, cifar10), epochs (20, 6): leave some out"),
        ({"mixup": 0.5}, "they differ in mixup (–, 0.5)"),
        ({"limit_train": 500}, "they differ in limit_train (–, 500)"),
        ({"dataset": "folder", "data": "data/birds"}, "they differ in dataset (digits, folder), data (–, birds)"),
        ({"fold": "1/5"}, "they differ in folds (–, 5)"),
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
    assert {"seed"} < logs.NOT_COMPARED <= arguments.RESUMABLE | {"seed", "recipe"}  # a name for others


def test_flags_that_old_runs_do_not_know_have_the_value_of_what_these_did():
    """Where it is not off, a mean or a table would say that old and new runs differ."""
    old, new = (logs.recipe({"arguments": each}) for each in (read_config(ROOT / "tests/old_run")["arguments"], vars(flags.make_parser().parse_args([]))))
    assert not new.keys() - old.keys()


BITS = ["nan", "inf", "-1", "1e20", "1e308", "", ",", '"', "\n", "\r", "\ufeff", "é", "\x00", "{}", "5", "null"]
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12), st.one_of(st.sampled_from(BITS).map(str.encode), st.binary(max_size=3))), max_size=3)


def damaged(text, edits):
    for start, length, new in edits:
        start %= len(text) + 1
        text = text[:start] + new + text[start + length :]
    return text


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("write", [write_ours, write_bamos])
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
            figure = curves.make_figure({"run": log}, ("loss", "error"), curves.View(smooth=smooth))
            assert len(figure.axes) == 2
            assert len(tables.formatted(*tables.comparison({"run": log}), "text").splitlines()) == 2

    check()
