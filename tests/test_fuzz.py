"""Whatever flags and values a command line has, it works, or ends with one line and status 2."""

import importlib
import os
import re
from pathlib import Path

import pytest
from conftest import status_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arguments
import data
import make_graph
import train
from cli import Mistake

COMMANDS = {  # with what goes before the flags
    "train": [], "evaluate": ["nowhere.pth"], "plot": ["nowhere"], "publish": ["nowhere"], "data": [], "make_graph": [],
}  # fmt: skip
VALUES = st.sampled_from([
    "", "0", "1", "2", "-1", "16", "43", "0.5", "1e39", "-1e39", "1e-39", "nan", "inf", "1_0", "٣", "0x10", str(2**31), str(10**20), "9" * 5000,
    "x", "x" * 300, "a b", "a\nb", "$x", "-", "--", "-x", ".", "..", "*", "\udcff", "é", "cpu", "meta", "privateuseone", "mkldnn", "cuda:99",
    "digits", "folder", "svhn", "adam", "densenet121", "densenet_40_12", "naive", "fused", "fp16", "black", "if-any", "auto", "cosine",
    "file", "file/x", "folder.svg", "x.svg", "x.png", "link", "loop", "pipe", "test", "train",
]) | st.text(st.characters(blacklist_characters="/\0"), max_size=8)  # fmt: skip


@pytest.fixture
def nothing_starts(monkeypatch):
    """Commands end where they would begin to compute."""
    monkeypatch.setattr(train, "train", lambda *args: None)
    monkeypatch.setattr(arguments, "compiler_problem", lambda device: None)
    monkeypatch.setattr(make_graph, "model_graph", lambda *args: None)
    monkeypatch.setattr(make_graph, "autograd_graph", lambda *args: None)
    monkeypatch.setattr(make_graph, "save", lambda graph, path: path)

    def load(*args):
        raise Mistake("no data")

    monkeypatch.setattr(data, "load", load)


def surroundings():
    Path("file").touch()
    Path("folder.svg").mkdir()
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")


def fuzz(name, capsys, examples):
    main, before = importlib.import_module(name).main, COMMANDS[name]
    surroundings()
    assert status_of(main, ["--help"]) == 0
    flags = sorted(set(re.findall(r"--[a-zA-Z][a-zA-Z_-]+", capsys.readouterr().out)) - {"--help"})
    part = st.sampled_from(flags).map(lambda flag: [flag]) | st.tuples(st.sampled_from(flags), VALUES).map(list)
    part |= st.tuples(st.sampled_from(flags), VALUES).map(lambda pair: ["=".join(pair)]) | VALUES.map(lambda text: [text])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(part, max_size=4))
    def check(parts):
        line = [text for part in parts for text in part]
        status = status_of(main, [*before, *line])
        err = capsys.readouterr().err
        assert status in (0, 2)
        if status == 2:
            assert err.startswith(f"{name}.py: error: ") and err.count("\n") == 1 and err.endswith("\n")

    check()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_line_works_or_is_one_line(name, nothing_starts, capsys):
    fuzz(name, capsys, examples=60 if name == "train" else 25)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_line_works_or_is_one_line_many_times(name, nothing_starts, capsys):
    fuzz(name, capsys, examples=1500)
