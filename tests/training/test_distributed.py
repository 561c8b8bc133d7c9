"""Several gloo ranks on the CPU end together and start again; what they compute is in test_recipe.py."""

import contextlib
import json
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import TINY
from helpers import ROOT, finished, torchrun

from common.console import Mistake
from training import distributed
from training.run import Run

RUN = [str(ROOT / "train.py"), *TINY, "--batch-size", "7", "--save", "run"]


def lines_of_ours(output):
    return [line for line in output.splitlines() if line.startswith("train.py: ")]


def wait_for_epoch(epoch, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(Mistake):
            if Run("run").latest()[0]["epoch"] >= epoch:
                return
        time.sleep(0.05)
    process.kill()
    pytest.fail("no checkpoint: " + process.communicate()[0])


def kill_rank_1_after(epoch, process):
    """SIGKILL as soon as the checkpoint of ``epoch`` is there."""
    wait_for_epoch(epoch, process)
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == "1":
            child.kill()


def assert_logs_are_whole(epochs):
    for name in ("train", "test"):
        assert pd.read_csv(f"run/{name}.csv")["epoch"].tolist() == list(range(1, epochs + 1))


def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_resumes_it():
    process = torchrun(2, *RUN, "--epochs", "300", "--block", "fused")
    kill_rank_1_after(2, process)
    output = finished(process, 1)
    [line] = lines_of_ours(output)
    assert f"is saved in run/latest.pth; to go on: torchrun --nproc_per_node=2 {ROOT / 'train.py'} --save run --resume" in line
    epoch = torch.load("run/latest.pth", weights_only=True)["epoch"]
    output = finished(torchrun(3, str(ROOT / "train.py"), "--save", "run", "--resume", "--epochs", str(epoch + 2)), 0)
    assert output.count("images/s") == 2  # one rank speaks for all
    assert_logs_are_whole(epoch + 2)
    config = json.loads(Path("run/config.json").read_text())
    assert config["resumed"][0]["epoch"] == epoch
    assert config["command"].startswith("torchrun --nproc_per_node=2 ")
    assert config["resumed"][0]["command"].startswith("torchrun --nproc_per_node=3 ")


def test_a_launch_is_told_from_another(tiny, monkeypatch, capsys):
    def launched(folder, attempt, *flags):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_x/{folder}/attempt_{attempt}/0/error.json")
        return tiny("--save", "run", *flags)

    assert launched("none_a", 0, "--epochs", "1") == 0
    assert launched("none_b", 0) == 2 and "run holds a run" in capsys.readouterr().err
    assert launched("none_b", 0, "--overwrite", "--epochs", "2") == 0
    assert json.loads(Path("run/config.json").read_text())["resumed"] == []
    assert launched("none_b", 1, "--overwrite", "--epochs", "2") == 0  # torchrun has started it anew
    assert [process["epoch"] for process in json.loads(Path("run/config.json").read_text())["resumed"]] == [2]
    assert launched("none_b", 1, "--resume", "--epochs", "3") == 0 and launched("none_a", 0, "--epochs", "3") == 2


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed():
    """One of them in a collective that the other never joins."""
    program = """
import os, pathlib, time, torch
from training import distributed
with distributed.process_group():
    pathlib.Path(f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    distributed.all_reduce(torch.ones(1)) if os.environ["RANK"] == "0" else time.sleep(600)
"""
    Path("rank.py").write_text(program)
    process, deadline = torchrun(2, "rank.py"), time.monotonic() + 120
    while not all(Path(f"{rank}.pid").exists() and Path(f"{rank}.pid").read_text() for rank in "01") and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [psutil.Process(int(Path(f"{rank}.pid").read_text())) for rank in "01"]
    process.kill()
    assert psutil.wait_procs(ranks, timeout=30)[1] == []


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_its_last_checkpoint_and_touches_no_older_one():
    process = torchrun(2, *RUN, "--epochs", "12", options=["--max-restarts=1"])
    kill_rank_1_after(2, process)
    finished(process, 0)
    assert_logs_are_whole(12)
    assert json.loads(Path("run/config.json").read_text())["resumed"][0]["epoch"] >= 2
    before = Path("run/latest.pth").read_bytes()
    lines = lines_of_ours(finished(torchrun(2, *RUN, options=["--max-restarts=1"]), 1))
    assert len(lines) == 2 and all("run holds a run" in line for line in lines)
    assert Path("run/latest.pth").read_bytes() == before
    process = torchrun(2, *RUN, "--epochs", "300", "--resume", "if-any")
    wait_for_epoch(14, process)
    process.terminate()  # as Slurm ends a job
    assert "is saved in run/latest.pth; to go on: torchrun" in process.communicate(timeout=60)[0]


@pytest.mark.parametrize(("flags", "message"), [
    (["--batch-size", "1"], "--batch-size 1: each of 2 processes needs an image of every batch"),
    (["--dataset", "folder", "--data", "nowhere"], "nowhere/train is missing"),
])  # fmt: skip
def test_a_mistake_is_told_once_and_ends_all_ranks(flags, message):
    output = finished(torchrun(2, *RUN, *flags), 1)  # torchrun's own status
    [line] = lines_of_ours(output)
    assert line.startswith("train.py: error: ") and message in line
    assert "exitcode  : 2" in output
    assert not Path("run").exists()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Mistake, match=r"2 processes, but 1 GPU on .*: use --nproc_per_node=1, or --device cpu"):
        distributed.device_of_rank(torch.device("cuda"))
    assert distributed.device_of_rank(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Mistake, match="so use --device cuda"):
        distributed.device_of_rank(torch.device("cuda", 1))
    assert distributed.device_of_rank(torch.device("cuda")) == torch.device("cuda", 1)


def test_an_unexpected_exception_ends_a_rank_at_once():
    """With its traceback, and without waiting for threads that talk to other ranks."""
    program = """
import os, threading, time
from training import distributed
def main():
    if os.environ["RANK"] == "0":
        threading.Thread(target=time.sleep, args=(600,)).start()  # the interpreter's own end would wait for it
        raise ZeroDivisionError("unexpected")
    time.sleep(600)
distributed.exit_from(main)
"""
    Path("rank.py").write_text(program)
    assert "ZeroDivisionError: unexpected" in finished(torchrun(2, "rank.py"), 1)
