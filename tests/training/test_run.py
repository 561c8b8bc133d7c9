"""A run directory: never touched by mistake, whole after a kill at any moment, mended where it was damaged."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, assert_same_run

import train
from common.checkpoints import read_checkpoint
from training import run


def test_an_existing_run_is_never_touched(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "1") == 0
    Path("run/notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    assert tiny("--save", "run") == 2
    assert "run holds a run (latest.pth): --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before
    Path("kept").mkdir()
    shutil.copy("run/latest.pth", "kept/epoch-0300.pth")
    assert tiny("--save", "kept") == 2 and os.listdir("kept") == ["epoch-0300.pth"]
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


@pytest.mark.parametrize("deleted", ["latest.pth.tmp", "previous.pth", "best.pth", "train.csv", "valid.csv"])
def test_a_replacement_that_is_cut_short_leaves_the_old_run_or_the_new(tiny, monkeypatch, deleted):
    flags = ["--save", "run", "--valid-size", "100", "--epochs", "2"]
    assert tiny(*flags, "--seed", "2") == 0
    assert tiny("--save", "new", *flags[2:]) == 0
    Path("run/latest.pth.tmp").write_bytes(b"left by a kill")
    before = {name: Path("run", name).read_bytes() for name in ("latest.pth", "best.pth", "config.json")}
    real = Path.unlink

    def unlink(path, *args, **options):
        if path.name == deleted and path.parent.name == "run":
            raise KeyboardInterrupt
        real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert tiny(*flags, "--overwrite") == 130
    if deleted == "latest.pth.tmp":
        assert {name: Path("run", name).read_bytes() for name in before} == before
    else:
        assert tiny("--save", "run", "--resume", args=[]) == 0
        assert_same_run("new", "run", ("train.csv", "valid.csv", "test.csv"))
        assert torch.load("run/best.pth", weights_only=True)["config"]["arguments"]["seed"] == 1
    assert not list(Path("run").glob("*.tmp")) or deleted == "latest.pth.tmp"


@pytest.mark.parametrize(("write", "epoch"), [(17, 1), (21, 2)])  # the second epoch's checkpoint, its train.csv
def test_a_full_disk_keeps_the_last_epoch(tiny, capsys, monkeypatch, write, epoch):
    assert tiny("--save", "whole") == 0
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == write:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "fsync", full)
        assert tiny("--save", "run") == 1
    err = capsys.readouterr().err
    resume = f"to go on: python {shlex.quote(sys.argv[0])} --save run --resume"
    assert f"No space left on device; epoch {epoch} is saved in run/latest.pth; {resume}\n" in err
    assert not list(Path("run").glob("*.tmp"))
    assert tiny("--save", "run", "--resume", args=[]) == 0
    assert_same_run("whole", "run")


def test_damaged_logs_are_mended(tiny):
    assert tiny("--save", "run", "--epochs", "3") == 0
    log = Path("run/train.csv")
    log.write_text(log.read_text()[:90])  # most rows are gone, one is cut in half
    Path("run/test.csv").unlink()
    assert tiny("--save", "run", "--resume", "--epochs", "4", args=[]) == 0
    assert pd.read_csv(log).epoch.tolist() == pd.read_csv("run/test.csv").epoch.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["a flipped bit", "missing"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny, capsys, harm):
    assert tiny("--save", "whole") == 0
    assert tiny("--save", "run", "--epochs", "4") == 0
    latest = Path("run/latest.pth")
    if harm == "missing":  # as between two renames
        latest.unlink()
    else:
        content = bytearray(latest.read_bytes())
        content[content.index(read_checkpoint(latest)["model"]["norm.weight"].numpy().tobytes())] ^= 1
        latest.write_bytes(content)
    capsys.readouterr()
    assert tiny("--save", "run", "--resume", args=[]) == 0
    assert capsys.readouterr().err == "run/latest.pth is missing or damaged: going on from run/previous.pth, after epoch 3\n"
    assert_same_run("whole", "run")
    assert [read_checkpoint(f"run/{name}.pth")["epoch"] for name in ("latest", "previous")] == [4, 3]
    for name in ("latest.pth", "previous.pth"):
        Path("run", name).write_bytes(b"PK")
    assert tiny("--save", "run", "--resume", args=[]) == 2
    assert "run/previous.pth is damaged, or holds other things" in capsys.readouterr().err


def test_one_command_line_starts_a_run_and_goes_on_with_it(tiny, capsys):
    flags = ["--save", "run", "--resume", "if-any"]
    assert tiny(*flags, "--epochs", "2") == 0
    assert read_checkpoint("run/latest.pth")["config"]["arguments"]["resume"] is False
    Path("run/latest.pth").unlink()
    assert tiny(*flags) == 0
    assert len(pd.read_csv("run/test.csv")) == 4
    assert tiny(*flags) == 0 and "all epochs are done already: a larger --epochs than 4 goes on" in capsys.readouterr().out
    assert tiny(*flags, "--seed", "3") == 2 and "was started with --seed 1" in capsys.readouterr().err
    assert tiny(*flags, "--overwrite") == 2
    for name in ("latest.pth", "previous.pth"):
        Path("run", name).rename(name)
    assert tiny(*flags) == 2  # a published run, say
    assert "run holds a run (config.json)" in capsys.readouterr().err


def test_what_was_saved_is_told_from_the_disk(tiny, capsys, monkeypatch):
    """A signal just behind a rename, one before training begins, a directory that is gone."""
    def interrupted(*args):
        raise train.Interrupted(signal.SIGTERM)

    write = run.write
    with monkeypatch.context() as patch:
        patch.setattr(run, "write", lambda path, text: interrupted() if "\n1," in text else write(path, text))
        assert tiny("--save", "run") == 143
    assert "stopped; epoch 1 is saved in run/latest.pth; to go on: " in capsys.readouterr().err
    for name, told in (("prepare", "run/latest.pth is as it was, after epoch 1"), ("parse_args", "nothing was written")):
        with monkeypatch.context() as patch:
            patch.setattr(train, name, interrupted)
            assert tiny("--save", "run", "--resume") == 143
            assert capsys.readouterr().err == f"train.py: stopped; {told}\n"
    shutil.copytree("run", "other")
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", lambda *args: shutil.rmtree("run"))
        assert tiny("--save", "run", "--resume", args=[]) == 1
    assert "No such file or directory; nothing was saved" in capsys.readouterr().err
    shutil.copytree("other", "run")
    monkeypatch.setattr(train, "print_epoch", lambda *args: (shutil.rmtree("run"), shutil.copytree("other", "run")))
    assert tiny("--save", "run", "--resume", args=[]) == 2
    assert capsys.readouterr().err.endswith("run was deleted, and begun anew by another process: this run has ended\n")
    one, other = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("run", "other"))
    assert one == other


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none of them")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_closed_terminal_and_a_warning_of_a_scheduler_end_a_run_like_sigterm(tiny, capsys, monkeypatch, name):
    number = getattr(signal, name)
    assert tiny("--save", "run", "--epochs", "1") == 0
    monkeypatch.setattr(train, "print_epoch", lambda *args: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, these tests have it ignored
    try:
        assert tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 128 + number
        assert "stopped; epoch 2 is saved in run/latest.pth; to go on: " in capsys.readouterr().err
        signal.signal(number, signal.SIG_IGN)  # nohup
        assert name == "SIGTERM" or tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 0
    finally:
        signal.signal(number, before)


# Programs that run train.py and kill themselves, as kill -9 does, at a moment of the third epoch.
KILLED = {
    "in an epoch": """
        real = torch.optim.SGD.step
        def step(self, *args):
            steps.append(1)
            return kill() if len(steps) == 10 else real(self, *args)
        torch.optim.SGD.step = step""",
    "while a checkpoint is written": """
        real = run.write_checkpoint
        def write_checkpoint(path, checkpoint, *previous):
            if checkpoint["epoch"] == 3:
                os.fsync = lambda descriptor: (os.truncate(descriptor, 3000), kill())
            real(path, checkpoint, *previous)
        run.write_checkpoint = write_checkpoint""",
    "between checkpoint and logs": """
        real = run.write_checkpoint
        run.write_checkpoint = lambda path, *rest: kill() if path.name == "epoch-0003.pth" else real(path, *rest)""",
}


SEVERAL = "--valid-size 100 --augment --flip both --shift 2 --milestones 1 3 --gamma 0.5 --keep-every 3 --patience 3 --no-progress".split()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*TINY, *SEVERAL, "--save", str(path)]) == 0
    return path


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_resumes_bit_for_bit(moment, whole_run, tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from training import run
steps = []
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if True:{KILLED[moment]}
sys.exit(train.main(sys.argv[1:]))"""
    assert subprocess.run([sys.executable, "-c", program, *TINY, *SEVERAL, "--save", "run"], timeout=600).returncode == -signal.SIGKILL
    saved = torch.load("run/latest.pth", weights_only=True)["epoch"]
    assert saved == (3 if "log" in moment else 2)
    if "written" in moment:
        assert Path("run/latest.pth.tmp").stat().st_size == 3000
    assert train.main(["--resume", "--save", "run", "--no-progress"]) == 0
    for name in ("latest.pth", "best.pth", "epoch-0003.pth"):
        assert_same_run(whole_run, "run", ("train.csv", "valid.csv", "test.csv"), name)
    for name in ("loss.png", "error.png", "loss-error.png"):
        assert Path("run", name).read_bytes() == (whole_run / name).read_bytes()


@pytest.mark.long
def test_runs_survive_harm_at_random():
    result = subprocess.run([sys.executable, ROOT / "tests/campaign.py", "--count", "5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ctrl_c_says_how_to_go_on():
    command = [sys.executable, ROOT / "train.py", *TINY, "--epochs", "100000", "--block", "fused", "--save", "run", "--no-progress"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch   2/" not in process.stdout.readline():
        assert process.poll() is None
    held = subprocess.run([*command[:-2], "run", "--resume"], capture_output=True, text=True)
    assert (held.returncode, held.stderr.count("\n")) == (2, 1)
    assert "run is in use by another process" in held.stderr
    while process.poll() is None:  # once, and again while the process ends
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (130, 1)
    epochs = int(re.findall(r"epoch +(\d+)/", out)[-1]) if out else 2
    where = r"run/(?:latest|previous)\.pth"  # the latter while one takes the other's place
    match = re.search(rf"^train.py: stopped; epoch (\d+) is saved in {where}; to go on: (.*)$", err, re.MULTILINE)
    assert int(match[1]) in (epochs, epochs + 1) and match[2] == f"python {ROOT / 'train.py'} --save run --resume"
    assert torch.load("run/latest.pth", weights_only=True)["epoch"] == int(match[1])


@pytest.mark.parametrize(("program", "told"), [("", ""), ("; raise SystemExit('no ink')", "plot.py failed, training goes on: no ink\n")])
def test_figures_are_drawn_once_a_minute_and_at_the_end(capsys, program, told):
    """A failure is reported once, and ends nothing."""
    figures = run.Figures(".")
    figures.command = [sys.executable, "-c", f"print(end='x', file=open('drawn', 'a')){program}"]
    with figures:
        for _epoch in range(3):
            figures.redraw()
            figures.process.wait()
    assert Path("drawn").read_text() == "xx" and capsys.readouterr().err == told
