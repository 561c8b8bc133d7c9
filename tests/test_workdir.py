"""A run directory: never touched by mistake, whole after a kill at any moment, mended where it was damaged."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, rows

import train
import workdir


def test_an_existing_run_is_never_touched(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "1") == 0
    Path("run/notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    assert tiny("--save", "run") == 2
    assert "run holds a run (latest.pth): --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before
    assert tiny("--save", "run", "--overwrite", "--epochs", "2", "--seed", "2") == 0
    assert len(pd.read_csv("run/test.csv")) == 2
    assert Path("run/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["train.csv", "config.json", "latest.pth"])
def test_files_of_another_program_are_not_replaced(tiny, capsys, name):
    Path("run").mkdir()
    Path("run", name).write_text('{"hidden_size": 768}\n')
    assert tiny("--save", "run", "--overwrite") == 2
    assert f"run holds files of another program ({name})" in capsys.readouterr().err
    assert Path("run", name).read_text() == '{"hidden_size": 768}\n'


def test_a_replacement_that_is_cut_short_leaves_a_run(tiny, monkeypatch):
    assert tiny("--save", "run", "--epochs", "1") == 0
    real, deleted = Path.unlink, []

    def unlink(path, *args, **options):
        if path.name == "latest.pth":
            raise KeyboardInterrupt
        deleted.append(path.name)
        real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert tiny("--save", "run", "--overwrite") == 130
    assert {"train.csv", "test.csv", "config.json"} <= set(deleted)
    assert tiny("--save", "run", "--overwrite", "--epochs", "1") == 0


@pytest.mark.parametrize(("write", "epoch"), [(8, 1), (9, 2)])  # the second epoch's checkpoint, its row of train.csv
def test_a_full_disk_keeps_the_last_epoch(tiny, capsys, monkeypatch, write, epoch):
    assert tiny("--save", "whole") == 0
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == write:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.os, "fsync", full)
        assert tiny("--save", "run") == 1
    err = capsys.readouterr().err
    resume = f"python {shlex.quote(sys.argv[0])} --save run --resume"
    assert f"No space left on device; epoch {epoch} is saved in run/latest.pth; to go on: {resume}\n" in err
    assert not list(Path("run").glob("*.tmp"))
    assert tiny("--save", "run", "--resume", args=[]) == 0
    assert_same_run("whole", "run")


def test_damaged_files_end_in_one_line_or_are_mended(tiny, capsys):
    assert tiny("--save", "whole") == 0
    assert tiny("--save", "run", "--epochs", "3") == 0
    log = Path("run/train.csv")
    log.write_text(log.read_text()[:90])  # most rows are gone, one is cut in half
    Path("run/test.csv").unlink()
    assert tiny("--save", "run", "--resume", "--epochs", "4", args=[]) == 0
    whole, mended = rows("whole/test.csv"), rows("run/test.csv")
    pd.testing.assert_frame_equal(mended[:1], whole[:1])  # later epochs differ: 3 and 4 epochs have other schedules
    assert pd.read_csv(log).epoch.tolist() == pd.read_csv("run/test.csv").epoch.tolist() == [1, 2, 3, 4]

    latest = Path("run/latest.pth")
    latest.write_bytes(latest.read_bytes()[:1000])
    capsys.readouterr()
    assert tiny("--save", "run", "--resume", args=[]) == 2
    assert "run/latest.pth is damaged or no checkpoint" in capsys.readouterr().err


# Programs that run train.py and kill themselves, as kill -9 does, at a moment of the third epoch.
KILLED = {
    "in an epoch": """
        real = torch.optim.SGD.step
        def step(self, *args):
            steps.append(1)
            return kill() if len(steps) == 10 else real(self, *args)
        torch.optim.SGD.step = step""",
    "while a checkpoint is written": """
        real = workdir.os.fsync
        def fsync(descriptor):
            steps.append(1)
            if len(steps) == 11:
                os.truncate(descriptor, 3000)
                kill()
            real(descriptor)
        workdir.os.fsync = fsync""",
    "between checkpoint and CSV row": """
        real = workdir.csv_lines
        def csv_lines(name, rows):
            return kill() if rows and rows[0]["epoch"] == 3 and name == "test" else real(name, rows)
        workdir.csv_lines = csv_lines""",
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*TINY, "--save", str(path), "--no-progress"]) == 0
    return path


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_resumes_bit_for_bit(moment, whole_run, tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train, workdir
steps = []
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if True:{KILLED[moment]}
sys.exit(train.main(sys.argv[1:]))"""
    command = [sys.executable, "-c", program, *TINY, "--save", "run", "--no-progress"]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    saved = torch.load("run/latest.pth", weights_only=True)["epoch"]
    assert saved == (3 if "row" in moment else 2)
    if "written" in moment:
        assert Path("run/latest.pth.tmp").stat().st_size == 3000
    assert train.main(["--resume", "--save", "run", "--no-progress"]) == 0
    assert_same_run(whole_run, "run")
    for name in ("loss.png", "error.png", "loss-error.png"):
        assert Path("run", name).read_bytes() == (whole_run / name).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_says_how_to_go_on(number, status, whole_run):
    command = [sys.executable, ROOT / "train.py", *TINY, "--epochs", "100000", "--block", "fused", "--save", "run", "--no-progress"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch   2/" not in process.stdout.readline():
        assert process.poll() is None
    held = subprocess.run([*command[:-2], "run", "--resume"], capture_output=True, text=True)
    assert (held.returncode, held.stderr.count("\n")) == (2, 1)
    assert "run is in use by another process" in held.stderr
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    epochs = int(re.findall(r"epoch +(\d+)/", out)[-1]) if out else 2
    match = re.search(r"^train.py: stopped; epoch (\d+) is saved in run/latest.pth; to go on: (.*)$", err, re.MULTILINE)
    assert int(match[1]) in (epochs, epochs + 1) and match[2] == f"python {ROOT / 'train.py'} --save run --resume"
    assert torch.load("run/latest.pth", weights_only=True)["epoch"] == int(match[1])


def test_a_failing_plot_is_reported_once_and_hurts_nothing(tiny, capsys, monkeypatch):
    real = workdir.Figures.__init__

    def broken(self, path, enabled):
        real(self, path, enabled=True)
        self.command = [sys.executable, "-c", "raise SystemExit('no ink')"]

    monkeypatch.setattr(workdir.Figures, "__init__", broken)
    assert tiny("--save", "run") == 0
    assert capsys.readouterr().err.splitlines() == ["plot.py failed, training goes on: no ink"]
    assert len(pd.read_csv("run/test.csv")) == 4


def test_best_pth_is_of_the_first_epoch_with_the_lowest_validation_error():
    rows = {"train": [], "valid": [], "test": []}
    with workdir.Run("run") as run:
        run.lock()
        run.start({"epoch": 0, "metrics": rows, "config": {}})
        for epoch, error in enumerate((50.0, 40.0, 45.0, 40.0), 1):
            run.finish_epoch({"epoch": epoch, "metrics": rows, "config": {}}, {"valid": [{"epoch": epoch, "loss": 1.0, "error": error}]})
            assert torch.load("run/best.pth", weights_only=True)["epoch"] == min(epoch, 2)
    assert torch.load("run/latest.pth", weights_only=True)["epoch"] == 4
