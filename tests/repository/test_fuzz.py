"""Whatever flags and values a command line has, it works, or ends with one line and status 2."""

import importlib
import itertools
import os
import re
from pathlib import Path

import pytest
from conftest import status_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import check_data
import make_graph
import train
from common.console import Mistake
from inputs import datasets
from training import flags

COMMANDS = {  # with the arguments before the flags
    "train": [], "evaluate": ["nowhere.pth"], "plot": ["nowhere"], "publish": ["nowhere"], "check_data": ["nowhere"], "make_graph": [],
}  # fmt: skip
VALUES = (
    "", "0", "1", "2", "-1", "16", "43", "0.5", "1e39", "-1e39", "1e-39", "nan", "inf", "1_0", "٣", "0x10", f"{2**31}", f"{10**20}", "9" * 5000,
    "x", "x" * 300, "a b", "a\nb", "$x", "-", "--", "-x", ".", "..", "*", "\udcff", "é", "cpu", "meta", "privateuseone", "mkldnn", "cuda:99",
    "digits", "folder", "svhn", "adam", "densenet121", "densenet_40_12", "naive", "fused", "fp16", "black", "if-any", "auto", "cosine",
    "file", "file/x", "folder.svg", "x.svg", "x.png", "link", "loop", "pipe", "test", "train",
)  # fmt: skip
DRAWN = st.sampled_from(VALUES) | st.text(st.characters(blacklist_characters="/\0"), max_size=8)


def no_data(*args, **options):
    raise Mistake("no data")


@pytest.fixture
def check(monkeypatch, capsys):
    """check("train", flags): parse a command line; it has to end with status 0, or with one line and status 2."""
    for owner, name in ((train, "train"), (flags, "compiler_problem"), (make_graph, "model_graph")):
        monkeypatch.setattr(owner, name, lambda *args: None)  # nothing is computed
    monkeypatch.setattr(make_graph, "save", lambda graph, path: path)
    for module in (datasets, check_data):  # nothing is downloaded
        monkeypatch.setattr(module, "load", no_data)
    Path("file").touch()
    Path("folder.svg").mkdir()
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")

    def run(name, flags):
        status = status_of(importlib.import_module(name).main, [*COMMANDS[name], *flags])
        err = capsys.readouterr().err
        assert status in (0, 2), flags
        if status == 2:
            assert err.startswith(f"{name}.py: error: ") and err.count("\n") == 1 and err.endswith("\n"), flags

    return run


def flags_of(name, capsys):
    assert status_of(importlib.import_module(name).main, ["--help"]) == 0
    return sorted(set(re.findall(r"--[a-zA-Z][a-zA-Z_-]+", capsys.readouterr().out)) - {"--help"})


@pytest.mark.parametrize("examples", [25, pytest.param(1500, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_work_or_are_one_line(name, examples, check, capsys):
    flag = st.sampled_from(flags_of(name, capsys))
    part = flag.map(lambda flag: [flag]) | DRAWN.map(lambda text: [text])
    part |= st.tuples(flag, DRAWN).map(list) | st.tuples(flag, DRAWN).map(lambda pair: ["=".join(pair)])

    @settings(max_examples=examples * 2 if name == "train" else examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(part, max_size=4))
    def fuzz(parts):
        check(name, [text for part in parts for text in part])

    fuzz()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_with_every_value(name, check, capsys):
    small = ["--depth", "10"] if name in ("train", "make_graph") else []
    for flag, value in itertools.product(flags_of(name, capsys), VALUES):
        check(name, [*small, f"{flag}={value}"])
