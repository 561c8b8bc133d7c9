"""--block auto: what it checks, how it decides, when it keeps away, and that nothing in its process hurts the run."""

import argparse
import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run
from helpers import Replayed, finished, torchrun

import fused
from common.console import Mistake
from densenet import DenseNet
from training import choice, trial

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
JOB = {
    "model": {"depth": 10, "growth_rate": 4, "num_classes": 10, "in_channels": 3},
    "batch_size": 4,
    "image_size": 8,
    "precision": "fp32",
    "device": "cpu",
    "graph": False,
    "blocks": ["naive", "checkpoint", "fused"],
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache is neither read nor written."""
    monkeypatch.setattr(choice.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    monkeypatch.setattr(trial, "TURNS", 3)
    return tmp_path / "cache"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"drop_rate": 0.2}])
def test_every_block_that_can_run_is_checked_and_timed(precision, options):
    blocks, reports = JOB["blocks"][: 2 if options else 3], []
    job = JOB | {"precision": precision, "blocks": blocks, "model": JOB["model"] | options}
    found = trial.try_blocks(job, lambda answer: reports.append(answer["at"]))
    assert found["refused"] == {} and found["lasting"] and found["at"] is None
    assert {block: len(seconds) for block, seconds in found["seconds"].items()} == dict.fromkeys(blocks, 3)
    assert reports == ["reference of 4 images", *blocks, *blocks[::-1] * 4]


@pytest.mark.parametrize("broken", [False, True])
def test_on_a_gpu_steps_are_timed_as_they_will_run(monkeypatch, broken):
    """Replayed, or eager where they cannot be; then another time may differ."""

    class Step(Replayed):
        def capture(self, function):
            if broken and self.model.block == "naive":
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nand more")
            return super().capture(function)

    monkeypatch.setattr(trial, "GraphedStep", Step)
    monkeypatch.setattr(trial, "TURNS", 5)
    found = trial.try_blocks(JOB | {"graph": True, "precision": "fp16"})
    assert found["seconds"].keys() == set(JOB["blocks"]) and found["lasting"] != broken
    reason = "CUDA error: operation failed due to a previous error during capture"
    assert found["refused"] == ({"naive as a CUDA graph": reason} if broken else {})


@pytest.mark.parametrize(
    ("block", "name", "factors"),
    [
        ("fused", "output", [1.001] * 3),
        ("fused", "gradients", [1.001] * 3),
        ("fused", "statistics", [1.001] * 3),
        ("fused", "gradients", [float("nan"), 1, 1]),  # a race, say, that shows in one draw
        ("naive", "output", [1.0005] * 3),  # as in TF32, by which others would be allowed as much
        ("fused", "CUDA out of memory. Tried to allocate", []),
        ("fused", "out of resource: shared memory", []),
    ],
)
def test_a_block_that_is_not_right_is_refused(monkeypatch, block, name, factors):
    right, left = trial.outcome, iter(factors)

    def outcome(model, *args):
        result = right(model, *args)
        if model.block == block and not factors:
            raise RuntimeError(f"{name}\nand more")
        if model.block == block:
            result[name] = result[name] * next(left)
        return result

    monkeypatch.setattr(trial, "outcome", outcome)
    found = trial.try_blocks(JOB)
    assert list(found["seconds"]) == [other for other in JOB["blocks"] if other != block]
    assert found["refused"][block].startswith("computes something else" if factors else name.partition(".")[0].removeprefix("CUDA "))
    assert found["lasting"] == bool(factors)


def test_twice_the_error_of_naive_is_allowed():
    """As the median, and ten times as much in one draw."""
    naive = [{"output": error} for error in (0.005, 0.01, 0.008)]
    for errors, expected in (((0.019, 0.019, 0.19), True), ((0.019, 0.021, 0.021), False), ((0.001, 0.001, 0.21), False)):
        assert trial.is_as_exact([{"output": error} for error in errors], naive) == expected


def test_a_gpu_that_a_kernel_has_left_unusable_ends_the_run_in_a_line(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    for module, name in ((torch.random, "fork_rng"), (torch.cuda, "empty_cache"), (torch.cuda, "reset_peak_memory_stats")):
        monkeypatch.setattr(module, name, lambda *args, **options: contextlib.nullcontext())
    assert choice.measure_here(JOB, CUDA)["seconds"].keys() == set(JOB["blocks"])
    monkeypatch.setattr(trial, "synchronize", synchronize)
    with pytest.raises(Mistake, match=r"\(CUDA error: an illegal memory access was encountered\): name a --block"):
        choice.measure_here(JOB, CUDA)


def test_a_reference_that_does_not_fit_is_made_of_fewer_images(monkeypatch):
    def outcome(model, images, *args):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(model, images, *args)

    right = trial.outcome
    monkeypatch.setattr(trial, "outcome", outcome)
    found = trial.try_blocks(JOB)
    assert found["seconds"].keys() == set(JOB["blocks"]) and found["refused"] == {"reference of 4 images": "out of memory"}


def test_a_block_is_not_its_own_reference(monkeypatch):
    """Where neither block in plain torch fits, fused cannot be checked."""
    right = trial.outcomes

    def outcomes(job, block, count, device, precision, dtype=torch.float32):
        if block != "fused" and dtype is torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(job, block, count, device, precision, dtype)

    monkeypatch.setattr(trial, "outcomes", outcomes)
    found = trial.try_blocks(JOB)
    assert found["seconds"] == {} and choice.describe(found, "naive")[0] == "naive"


@pytest.mark.parametrize(
    ("seconds", "refused", "best", "line"),
    [
        ({"naive": [2.0] * 5, "checkpoint": [2.5] * 5, "fused": [1.92] * 5}, {}, "naive",  # 4 %
         "naive, the fastest here; --block naive pins it"),
        ({"naive": [2.0] * 5, "fused": [1.3, 1.8, 1.8, 2.1, 2.2]}, {}, "naive",  # 11 %, but slower in two turns
         "naive, the fastest here; --block naive pins it"),
        ({"naive": [2.0] * 5, "fused": [1.8, 1.8, 1.85, 1.75, 1.8]}, {}, "fused",
         "fused, 1.11 times as fast as naive here; --block fused pins it"),
        ({"checkpoint": [3.0] * 5, "fused": [2.0] * 5}, {"naive": "out of memory"}, "fused",
         "fused, which runs here; naive: out of memory; --block fused pins it"),
    ],
)  # fmt: skip
def test_naive_stands_unless_another_one_clearly_wins(seconds, refused, best, line):
    assert choice.describe({"seconds": seconds, "refused": refused}, "naive") == (best, f"--block auto took {line}")


@pytest.fixture
def process(monkeypatch):
    """Puts a program in the place of the process of a job, which it finds as the variable ``job``."""

    def replace(source):
        program = f"import json, os, sys, time\njob = json.loads(sys.argv[1])\n{source}"
        monkeypatch.setattr(choice, "PROGRAM", ["-c", program])

    return replace


FOUND = {"seconds": {"naive": [2.0] * 3, "checkpoint": [1.0] * 3}, "refused": {}, "lasting": True, "at": None}
TURN = "print(json.dumps({'at': 'fused', 'seconds': {'naive': [2, 3], 'checkpoint': [1, 1], 'fused': [4]}}), flush=True)\n"
TIMED = {"naive": [2], "checkpoint": [1], "fused": [4]}


@pytest.mark.parametrize(
    ("source", "seconds", "refused"),
    [
        (TURN + "time.sleep(60)", TIMED, {}),  # what was timed when the time was up
        (TURN + "os.kill(os.getpid(), 9)", {"naive": [2, 3], "checkpoint": [1, 1]}, {"fused": "ended with status -9"}),
        (TURN.replace("[4]", "[]") + "time.sleep(60)", {"naive": [2, 3], "checkpoint": [1, 1]}, {"fused": "did not end in time"}),
        ("os._exit(3)", {}, {"the process": "ended with status 3"}),
        ("print(0)\nsys.exit('no such module')", {}, {"the process": "ended with status 1: no such module"}),
        ("time.sleep(60)", {}, {"the process": "did not end in time"}),
    ],
)  # fmt: skip
def test_what_hurts_the_process_is_left_out(process, source, seconds, refused):
    process(source)
    assert choice.measure_apart(JOB, 2) == {"seconds": seconds, "refused": refused, "lasting": False}


@pytest.mark.parametrize("program", ["time.sleep(60)", "os._exit(1)"])
@pytest.mark.parametrize(("at", "block"), [("naive", "fused"), ("fused", "naive")])
def test_without_an_answer_the_default_stands_unless_it_hangs_or_dies(monkeypatch, process, cache, program, at, block):
    monkeypatch.setattr(choice, "seconds_to_measure", lambda job, steps: 2)
    process(f"print(json.dumps({{'at': {at!r}, 'seconds': {{'naive': []}}}}), flush=True)\n{program}")
    taken, line = choice.fastest_block(JOB, "fused", 10**6)
    reason = "did not end in time" if "sleep" in program else "ended with status 1"
    assert (taken, line) == (block, f"--block auto could not measure; {at}: {reason}; it takes {block}")
    assert not cache.exists()


def test_a_process_that_cannot_be_started_is_no_mistake(monkeypatch):
    monkeypatch.setattr(choice.sys, "executable", "nowhere")
    found = choice.measure_apart(JOB, 2)
    assert choice.describe(found, "fused") == ("fused", "--block auto could not measure; the process: [Errno 2] No such file or directory: 'nowhere'; it takes fused")


def test_a_process_ends_with_its_parent():
    """Whose end of a pipe closes even if it is killed."""
    job = JOB | {"batch_size": 4096, "image_size": 64}  # which takes minutes
    ended = subprocess.run([sys.executable, *choice.PROGRAM, json.dumps(job)], cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)
    assert ended.returncode == 1


def test_a_run_measures_where_two_percent_of_it_repay_that(monkeypatch):
    monkeypatch.setattr(choice, "seconds", lambda function, device: 0.2)
    assert choice.expected_seconds(JOB) == pytest.approx(0.6)
    monkeypatch.setattr(choice, "expected_seconds", lambda job: 0.5)
    assert choice.seconds_to_measure(JOB, 10**4) == 100
    assert choice.seconds_to_measure(JOB, 3900) == 0  # 39 s: after checks and turns, 9 are left for the start
    monkeypatch.setattr(choice, "expected_seconds", None)
    assert choice.seconds_to_measure(JOB, 2900) == 0  # checks and turns would take 2.07 %
    assert choice.fastest_block(JOB, "fused", 2900) == ("fused", None)


def test_the_answer_is_kept(monkeypatch, capsys, cache):
    calls, lasting = [], True
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: calls.append(timeout) or (FOUND | {"lasting": lasting}, None))
    monkeypatch.setattr(choice, "expected_seconds", lambda job: 1.0)
    answers = [choice.fastest_block(JOB, "naive", 10**6) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][0] == "checkpoint" and calls == [20_000]
    choice.fastest_block(JOB | {"batch_size": 8}, "naive", 10**6)
    for name, value in (("device_name", "another processor"), ("versions", {"torch": "3.0"})):
        monkeypatch.setattr(choice, name, lambda *_, value=value: value)
        choice.fastest_block(JOB, "naive", 10**6)
    assert len(calls) == 4
    for path in cache.iterdir():
        path.write_text('{"seconds": {"naive": "soon"}, "refused": {}}')
    lasting = False  # what may not happen again is not kept
    assert choice.fastest_block(JOB, "naive", 10**6)[0] == "checkpoint"
    lasting = True
    choice.fastest_block(JOB, "naive", 10**6)  # damaged: measured again, and mended
    choice.fastest_block(JOB, "naive", 10**6)
    assert len(calls) == 6 and capsys.readouterr().out.count("measuring which --block is fastest here") == 6
    (cache.parent / "file").touch()  # no folder to keep anything in
    monkeypatch.setattr(choice.platformdirs, "user_cache_path", lambda name: cache.parent / "file" / "cache")
    assert choice.fastest_block(JOB, "naive", 10**6)[0] == "checkpoint"


def test_the_real_process():
    """In which nothing of this test is patched."""
    found = choice.measure_apart(JOB, 120)
    assert set(found["seconds"]) | set(found["refused"]) == set(JOB["blocks"]) and "naive" in found["seconds"]


@pytest.fixture
def gpu(monkeypatch):
    """As far as a choice asks."""
    monkeypatch.setattr(choice, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))


def test_a_gpu_is_measured_in_this_process(monkeypatch, gpu):
    """Of which another one may find no use, as in exclusive mode. A graph that was refused is tried again."""
    jobs, found = [], FOUND | {"lasting": False}
    monkeypatch.setattr(choice, "measure_here", lambda job, device: jobs.append(job) or found)
    monkeypatch.setattr(choice, "run_process", None)
    job = JOB | {"device": "cuda", "graph": True}
    assert choice.fastest_block(job, "naive", choice.FEW - 1) == ("naive", None) and jobs == []
    for _ in range(2):
        assert choice.fastest_block(job, "naive", choice.FEW)[0] == "checkpoint"
    assert jobs == [job, job]
    found = FOUND
    for _ in range(2):
        assert choice.fastest_block(job, "naive", choice.FEW)[0] == "checkpoint"
    assert len(jobs) == 3
    assert choice.fastest_block(job, "naive", 1)[0] == "checkpoint"  # what is known is used


GPU_ARGS = {"block": "naive", "cuda_graph": None, "compile": False, "deterministic": False, "opt": "sgd"}


@pytest.mark.parametrize(
    ("change", "precision", "expected"),
    [
        ({}, "bf16", ("naive", True)),
        ({"block": "fused", "opt": "adam"}, "fp16", ("fused", True)),
        ({"opt": "rmsprop"}, "fp16", ("naive", False)),
        ({"block": "auto", "deterministic": True}, "bf16", ("naive", True)),
        ({"block": "auto", "compile": True}, "bf16", ("naive", False)),
        ({"cuda_graph": False}, "fp32", ("naive", False)),
    ],
)
def test_on_a_gpu_every_run_that_can_be_is_replayed(gpu, change, precision, expected):
    args = argparse.Namespace(**GPU_ARGS | change)
    entries, notes = choice.choose_block(args, None, None, DenseNet(**JOB["model"]), CUDA, precision)
    assert tuple(entries.values()) == expected and notes == []


@pytest.mark.parametrize(("given", "before", "expected"), [(None, True, True), (None, False, False), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("block", ["auto", "fused"])
def test_a_resumed_run_keeps_its_graph(gpu, given, before, expected, block):
    stage = {"device": "a GPU", "precision": "bf16", "block": "fused", "cuda_graph": before}
    checkpoint = {"epoch": 1, "config": stage | {"arguments": {"block": "auto"}, "resumed": []}}
    args = argparse.Namespace(**GPU_ARGS | {"block": block, "cuda_graph": given})
    picked = choice.choose_block(args, checkpoint, None, DenseNet(**JOB["model"]), CUDA, "bf16")
    assert picked == ({"block": "fused", "cuda_graph": expected}, [])


@pytest.fixture
def measured(monkeypatch):
    """train.py with every run long enough, and a process that finds checkpoint to be the trial. Yields the jobs."""
    jobs = []
    monkeypatch.setattr(choice, "SHARE", 1e9)
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: jobs.append(job) or (FOUND, None))
    return jobs


def block_of(run):
    return json.loads((run / "config.json").read_text())["block"]


def test_train_takes_what_was_measured_and_a_resumed_run_keeps_it(tiny, measured, monkeypatch, tmp_path, capsys):
    assert tiny("--save", "run", "--epochs", "1") == 0
    assert block_of(tmp_path / "run") == "checkpoint"
    assert "--block auto took checkpoint, 2.00 times as fast as naive here" in capsys.readouterr().out
    assert [job["batch_size"] for job in measured] == [64] and measured[0]["image_size"] == 8
    assert tiny("--save", "pinned", "--epochs", "1", "--block", "checkpoint") == 0
    assert_same_run("run", "pinned")  # measuring draws no random number of the run
    capsys.readouterr()
    assert tiny("--save", "run", "--resume", "--epochs", "2", args=[]) == 0
    assert "block checkpoint" in capsys.readouterr().out and len(measured) == 1
    assert tiny("--save", "pinned", "--resume", "--block", "auto", "--epochs", "2", args=[]) == 0
    assert "--block auto took checkpoint" in capsys.readouterr().out  # the user asked for it
    monkeypatch.setattr(choice, "device_name", lambda device: "another processor")
    assert tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 0
    assert len(measured) == 2


@pytest.mark.parametrize("flag", ["--deterministic", "--block=naive"])
def test_what_is_pinned_is_not_measured(tiny, measured, flag, tmp_path):
    assert tiny("--save", "run", "--epochs", "1", flag) == 0
    assert measured == []
    assert block_of(tmp_path / "run") == ("fused" if flag == "--deterministic" and fused.loops else "naive")


@pytest.mark.slow
def test_rank_0_decides_for_all(tmp_path, monkeypatch):
    """Two ranks that would choose differently train with one block: that of rank 0."""
    program = """
import os, train
from training import choice
choice.SHARE = 1e9
block = 'checkpoint' if os.environ['RANK'] == '0' else 'naive'
found = {'seconds': {block: [1.0] * 3}, 'refused': {}, 'lasting': True, 'at': None}
choice.run_process = lambda job, timeout: (found, None)
train.distributed.exit_from(train.main)
"""
    (tmp_path / "ranks.py").write_text(program)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finished(torchrun(2, "ranks.py", *TINY, "--no-plot", "--epochs", "1", "--save", "run"), 0)
    assert block_of(tmp_path / "run") == "checkpoint"
