"""Too little memory, closed streams, odd names, another program's environment: one line and the right status."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, TINY, status_of
from helpers import write_folder

import check_data
import evaluate
import make_graph
import plot
import publish
import train
from common import console
from training import step

DIGITS = ROOT / "work/digits.bc16"
unix = pytest.mark.skipif(os.name == "nt", reason="not on Windows")

# Memory.

NO_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # torch's writer, over a MemoryError
)
NO_MEMORY[-1].__context__ = MemoryError()


def after(monkeypatch, calls, error):
    """Let training steps raise an error after so many."""
    real, done = step.Step.__call__, []

    def call(*args):
        done.append(1)
        if len(done) > calls:
            raise error
        return real(*args)

    monkeypatch.setattr(step.Step, "__call__", call)


def test_every_message_of_a_library_is_known():
    assert all(console.memory_problem(error) for error in NO_MEMORY)
    assert not any(map(console.memory_problem, (RuntimeError("CUDA error: an illegal memory access"), OSError(28, "No space"))))


def test_memory_runs_out_in_a_step(tiny, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        after(patch, 5, NO_MEMORY[1])
        assert tiny("--save=-run") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("train.py: error: too little memory: use smaller batches")
    resume = f"python {shlex.quote(sys.argv[0])} --save=-run --resume --block checkpoint (which needs less memory)"
    assert err.endswith(f"; epoch 1 is saved in -run/latest.pth; to go on: {resume}\n")
    assert tiny("--save=-run", "--resume", "--block", "checkpoint", args=[]) == 0
    after(monkeypatch, 0, NO_MEMORY[0])
    assert tiny("--save=-run", "--resume", "--epochs", "5", args=[]) == 1
    assert capsys.readouterr().err.endswith("--save=-run --resume\n")  # it is the block that needs the least


# In a process of its own: this one may keep gigabytes that earlier tests have freed.
LIMITED = """
import re, resource, sys, train
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 150 * 2**20, -1))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
@pytest.mark.parametrize("flags", ["--growth-rate 1000", "--image-size 32 --growth-rate 24 --batch-size 200"])
def test_memory_really_runs_out_in_building_a_network_and_in_a_step(flags):
    flags += " --precision fp32 --block naive --no-plot --no-progress --save run"  # oneDNN's kernels for bf16 may crash
    command = [sys.executable, "-c", LIMITED, *TINY, *flags.split()]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert re.findall("train.py: error: (.*): use", done.stderr) == ["too little memory"]
    assert done.returncode == 1 and "Trace" not in done.stderr


@unix
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_killed_workers_are_one_line(tmp_path, capsys, monkeypatch):
    def kill(*args):
        for child in psutil.Process().children():
            child.kill()

    root = write_folder(tmp_path / "images")
    monkeypatch.setattr(train, "print_epoch", kill)
    flags = "--device cpu --dataset folder --image-size 128 --workers 2 --batch-size 6 --depth 10 --growth-rate 4 --epochs 2"
    assert train.main([*flags.split(), "--data", str(root), "--save", "run", "--no-plot", "--no-progress"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: a process that decodes images was killed") and err.count("\n") == 1
    assert "use fewer --workers; epoch 1 is saved in run/latest.pth; to go on: " in err
    assert err.endswith(" --save run --resume --workers 1\n")


# Streams.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("buffered", [True, False])
def test_an_output_that_cannot_be_written_is_not_blamed_on_the_run(tiny, capsys, monkeypatch, buffered):
    with open("/dev/full", "w") as full:
        full.reconfigure(write_through=not buffered)
        monkeypatch.setattr(sys, "stdout", full)
        assert tiny("--save", "run") == 1
        monkeypatch.undo()
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: standard output: No space left on device; epoch 0 is saved")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_closed_streams_change_nothing(tiny, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, None)
        assert status_of(train.main, [*TINY, "--epochs", "1", "--no-plot", "--save", "run"]) == 0
        assert evaluate.main(["run/latest.pth"]) == 0 and publish.main(["run"]) == 0
        assert status_of(plot.main, ["nowhere"]) == 2


# Names.


@pytest.fixture
def soon():
    """End the tests if one hangs."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have every name")
def test_a_run_directory_of_any_name(capsys):
    name = "-$x_\udcff\n"
    flags = [*TINY, "--epochs", "1", "--no-progress"]
    assert status_of(train.main, [*flags, f"--save={name}"]) == 0
    assert Path(name, "loss-error.png").exists()
    assert status_of(train.main, [f"--save={name}", "--resume", "--epochs", "2", "--no-progress", "--no-plot"]) == 0
    assert evaluate.main([f"./{name}/latest.pth", f"--confusion={name}/c.png", f"--csv={name}/x.csv"]) == 0
    assert publish.main(["--", name]) == 0
    assert plot.main([f"--out={name}/b.png", "--", name, str(DIGITS)]) == 0
    assert make_graph.main(["--depth", "10", f"--out={name}/x.dot"]) == 0
    assert "failed" not in capsys.readouterr().err


@unix
def test_what_is_not_a_file_is_refused_in_a_line(tiny, capsys, soon, tmp_path):
    """Links to nowhere, loops, named pipes, devices and names that are too long, for every argument that is a name."""
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    Path("run").mkdir()
    for file in ("latest.pth", "config.json", "train.csv", "test.csv", "weights.pth"):
        os.mkfifo(f"run/{file}")
    long = "x" * 300
    weights, out = str(DIGITS / "weights.pth"), str(DIGITS)
    lines = [
        *((train.main, [*TINY, "--save", name]) for name in ("link", "loop", "pipe", "run", long, f"link/{long}", "loop/x", "pipe/x")),
        *((train.main, [*TINY, "--save", "run", flag]) for flag in ("--resume", "--overwrite")),
        *((train.main, ["--dataset", "folder", "--data", name]) for name in ("link", "loop", "pipe", long, "loop/x")),
        *((evaluate.main, [name]) for name in ("link", "loop", "pipe", "run/latest.pth", long, "pipe/x", "/dev/zero", ".")),
        *((evaluate.main, [f"{name}.onnx"]) for name in ("pipe", long)),
        *((evaluate.main, [weights, "--csv", name]) for name in ("pipe", long, "pipe/x", "/dev/full", "loop/x")),
        *((evaluate.main, [weights, "--mistakes", f"{name}.png"]) for name in (long, "pipe/x", "loop/x")),
        *((publish.main, [name]) for name in ("link", "loop", "pipe", "run", long)),
        *((plot.main, [name]) for name in ("link", "loop", "pipe", "run", long)),
        *((plot.main, [out, "--out", name]) for name in ("pipe", f"{long}.png", "pipe/x.png", "loop", "loop/x.png", "/dev/full/x.png")),
        *((check_data.main, [name]) for name in ("link", "loop", "pipe", long)),
        *((make_graph.main, ["--depth", "10", "--out", name]) for name in (f"{long}.dot", "pipe/x.dot", "loop/x.dot")),
    ]
    Path("pipe.onnx").symlink_to("pipe")
    for main, argv in lines:
        status, (_, err) = status_of(main, argv), capsys.readouterr()
        assert (status, err.count("\n"), err.startswith(f"{main.__module__}.py: error: ")) == (2, 1, True), (argv, status, err)
    for name in ("pipe", "loop", "link", long, "/dev/zero"):
        assert evaluate.main([weights, name]) == 1
        assert capsys.readouterr().err.count("\n") == 2  # skipped, and a count


@unix
def test_pipes_among_the_images(tmp_path, capsys, soon):
    root = write_folder(tmp_path / "images")
    os.mkfifo(root / "train/cat/pipe.png")
    os.mkfifo(root / ".train-8.cache")
    flags = f"--device cpu --dataset folder --data {root} --image-size 8 --depth 10 --growth-rate 4 --epochs 1 --save run"
    assert train.main([*flags.split(), "--no-plot", "--no-progress"]) == 0
    assert check_data.main([str(root)]) in (0, 1)
