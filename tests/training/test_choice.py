"""--block auto: what it checks, how and when it decides, and that nothing in its process hurts the run."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run
from helpers import Replayed

import fused
from common.console import Mistake
from densenet import DenseNet
from training import choice, trial

CUDA = torch.device("cuda")
JOB = {"model": {"depth": 10, "growth_rate": 4, "num_classes": 10, "in_channels": 3}, "batch_size": 4, "image_size": 8}
JOB |= {"precision": "fp32", "device": "cpu", "graph": False, "blocks": ["naive", "checkpoint", "fused"]}
FOUND = {"seconds": {"naive": [2.0] * 3, "checkpoint": [1.0] * 3}, "refused": {}, "lasting": True}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache is neither read nor written."""
    monkeypatch.setattr(choice.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    return tmp_path / "cache"


class Unable(Replayed):
    def capture(self, function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("options", "graph"), [({}, None), ({"drop_rate": 0.2}, None), ({}, Replayed), ({}, Unable)])
def test_every_block_that_can_run_is_checked_and_timed(monkeypatch, capfd, precision, options, graph):
    """Where steps cannot be replayed, they are timed as they will run; another time may differ."""
    monkeypatch.setattr(trial, "GraphedStep", graph)
    blocks, reason = JOB["blocks"][: 2 if options else 3], "CUDA error: operation not permitted when stream is capturing"
    found = trial.try_blocks(JOB | {"precision": precision, "blocks": blocks, "model": JOB["model"] | options, "graph": bool(graph)})
    assert found["refused"] == ({f"{block} as a CUDA graph": reason for block in blocks} if graph is Unable else {})
    assert found["lasting"] == (graph is not Unable) and found["at"] is None
    assert {block: len(seconds) for block, seconds in found["seconds"].items()} == dict.fromkeys(blocks, 5)
    assert [json.loads(line)["at"] for line in capfd.readouterr().out.splitlines()] == ["reference", *blocks, *blocks[::-1] * 6]


@pytest.mark.parametrize(("block", "name", "factors"), [
    *(("fused", name, [1.001] * 3) for name in ("output", "gradients", "statistics")),
    ("fused", "gradients", [float("nan"), 1, 1]),  # with one seed only, as a race may have it
    ("naive", "output", [1.0005] * 3),  # as with TF32, by which others would be allowed as much
])  # fmt: skip
def test_a_block_that_is_not_right_is_refused(monkeypatch, block, name, factors):
    right, left = trial.outcome, iter(factors)

    def outcome(model, *args):
        result = right(model, *args)
        return result | {name: result[name] * next(left)} if model.block == block else result

    monkeypatch.setattr(trial, "outcome", outcome)
    found = trial.try_blocks(JOB)
    assert list(found["seconds"]) == [other for other in JOB["blocks"] if other != block]
    assert found["refused"][block].startswith("computes something else") and found["lasting"]


def test_twice_the_error_of_naive_is_allowed():
    """As the median, and ten times as much with one seed."""
    naive = [{"output": error} for error in (0.005, 0.01, 0.008)]
    for errors, expected in (((0.019, 0.019, 0.19), True), ((0.019, 0.021, 0.021), False), ((0.001, 0.001, 0.21), False)):
        assert trial.is_as_exact([{"output": error} for error in errors], naive) == expected


@pytest.mark.parametrize(("fails", "error", "timed", "refused"), [
    (lambda block, count, dtype: block == "fused", "out of resource: shared memory", ["naive", "checkpoint"], ["fused"]),
    (lambda block, count, dtype: block == "naive", "CUDA out of memory. Tried", ["checkpoint", "fused"], ["naive"]),
    (lambda block, count, dtype: count > 1, "CUDA out of memory. Tried", JOB["blocks"], []),  # fewer images fit
    (lambda block, count, dtype: dtype is torch.float64, "not implemented", [], ["reference"]),
    (lambda block, count, dtype: block != "fused" and dtype is not torch.float64, "out of memory", [], JOB["blocks"]),  # not its own reference
])  # fmt: skip
def test_what_fails_is_left_out(monkeypatch, fails, error, timed, refused):
    def outcomes(job, block, count, device, precision, dtype=torch.float32):
        if fails(block, count, dtype):
            raise RuntimeError(f"{error}\nand more")
        return right(job, block, count, device, precision, dtype)

    right = trial.outcomes
    monkeypatch.setattr(trial, "outcomes", outcomes)
    found = trial.try_blocks(JOB)
    assert list(found["seconds"]) == timed and list(found["refused"]) == refused and found["lasting"] == (not refused)
    if refused:
        assert found["refused"][refused[0]] in ("out of memory", error)
    if not timed:
        assert choice.describe(found, "naive")[0] == "naive"


def test_a_gpu_that_a_kernel_has_left_unusable_ends_the_run_in_a_line(monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(trial, "outcomes", fail)
    monkeypatch.setattr(trial, "synchronize", fail)
    with pytest.raises(Mistake, match=r"\(CUDA error: an illegal memory access was encountered\): name a --block"):
        choice.measure_here(JOB, CUDA)


@pytest.mark.parametrize(("seconds", "refused", "line"), [
    ({"naive": [2.0] * 5, "checkpoint": [2.5] * 5, "fused": [1.92] * 5}, {}, "naive, the fastest here"),  # 4 %
    ({"naive": [2.0] * 5, "fused": [1.3, 1.8, 1.8, 2.1, 2.2]}, {}, "naive, the fastest here"),  # 11 %, but slower in two rounds
    ({"naive": [2.0] * 5, "fused": [1.8, 1.8, 1.85, 1.75, 1.8]}, {}, "fused, 1.11 times as fast as naive here"),
    ({"checkpoint": [3.0] * 5, "fused": [2.0] * 5}, {"naive": "no memory"}, "fused, the fastest of those that run here; naive: no memory"),
])  # fmt: skip
def test_naive_stands_unless_another_one_clearly_wins(seconds, refused, line):
    block = line.partition(",")[0]
    answer = choice.describe({"seconds": seconds, "refused": refused}, "naive")
    assert answer == (block, [f"--block auto took {line}; --block {block} pins it"])


ROUND = "print(json.dumps({'at': 'fused', 'seconds': {'naive': [2, 2], 'checkpoint': [1, 1], 'fused': [4]}}), flush=True)\n"
OTHERS = {"naive": [2, 2], "checkpoint": [1, 1]}


@pytest.mark.parametrize(("source", "seconds", "refused", "taken"), [
    (ROUND + "time.sleep(60)", {"naive": [2], "checkpoint": [1], "fused": [4]}, {}, "checkpoint"),  # until the time was up
    (ROUND + "os.kill(os.getpid(), 9)", OTHERS, {"fused": "ended with status -9"}, "checkpoint"),
    (ROUND.replace("[4]", "[]") + "time.sleep(60)", OTHERS, {"fused": "did not end in time"}, "checkpoint"),
    ("print('{\"at\": \"fused\"}', flush=True)\nos._exit(3)", {}, {"fused": "ended with status 3"}, "naive"),
    ("print(0, flush=True)\nsys.exit('no such module')", {}, {"the process": "ended with status 1: no such module"}, "fused"),
    ("time.sleep(60)", {}, {"the process": "did not end in time"}, "fused"),
    (None, {}, {"the process": "[Errno 2] No such file or directory: 'nowhere'"}, "fused"),
])  # fmt: skip
def test_a_process_that_dies_or_hangs_leaves_what_it_found_or_the_default(monkeypatch, cache, source, seconds, refused, taken):
    monkeypatch.setattr(choice, "PROGRAM", ["-c", f"import json, os, sys, time\n{source}"])
    monkeypatch.setattr(choice, "LONGEST", 2)
    monkeypatch.setattr(choice.sys, "executable", sys.executable if source else "nowhere")
    answer = choice.measure_apart(JOB)
    assert answer == {"seconds": seconds, "refused": refused, "lasting": False}
    monkeypatch.setattr(choice, "measure_apart", lambda job: answer)
    block, [line] = choice.fastest_block(JOB, "fused", choice.STEPS)
    assert block == taken and not cache.exists()
    reasons = "; ".join(f"{what}: {reason}" for what, reason in refused.items())
    assert seconds or line == f"--block auto could not measure; {reasons}; it takes {taken}"


def test_the_real_process(monkeypatch):
    """In which nothing of this test is patched."""
    monkeypatch.setattr(choice, "LONGEST", 300)
    found = choice.measure_apart(JOB)
    assert set(found["seconds"]) | set(found["refused"]) == set(JOB["blocks"]) and "naive" in found["seconds"]


def test_a_process_ends_with_its_parent():
    """Whose end of a pipe closes even if it is killed."""
    job = json.dumps(JOB | {"batch_size": 4096, "image_size": 64})  # which takes minutes
    assert subprocess.run([sys.executable, *choice.PROGRAM, job], cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60).returncode == 1


def test_the_answer_is_kept(monkeypatch, capsys, cache):
    calls, lasting = [], True
    monkeypatch.setattr(choice, "measure_apart", lambda job: calls.append(job) or FOUND | {"lasting": lasting})

    def block(job=JOB):
        return choice.fastest_block(job, "naive", choice.STEPS)[0]

    assert block() == block() == "checkpoint" and len(calls) == 1
    block(JOB | {"batch_size": 8})
    for name, value in (("device_name", "another processor"), ("versions", {"torch": "3.0"})):
        monkeypatch.setattr(choice, name, lambda *_, value=value: value)
        block()
    assert len(calls) == 4
    another, odd = '{"seconds": {"another": [1.0]}, "refused": {}}', '{"seconds": {"naive": "soon"}, "refused": {}}'
    for text in (another, odd):
        for path in cache.iterdir():
            path.write_text(text)
        for lasting in (False, True, True):  # noqa: B007 -- what may not happen again is not kept; what is damaged is mended
            assert block() == "checkpoint"
    assert len(calls) == 8 and capsys.readouterr().out.count("measuring which --block is fastest here") == 8
    (cache.parent / "file").touch()  # no folder to keep anything in
    for place in (lambda name: cache.parent / "file" / "cache", lambda name: Path("~no one").expanduser()):  # nor a home
        monkeypatch.setattr(choice.platformdirs, "user_cache_path", place)
        assert block() == "checkpoint"


@pytest.mark.parametrize(("device", "function"), [("cpu", "measure_apart"), ("cuda", "measure_here")])
def test_a_long_run_measures_on_a_gpu_in_its_own_process(monkeypatch, device, function):
    """Another process may not use the GPU in exclusive mode. A graph that was refused is tried again."""
    jobs, job, lasting = [], JOB | {"device": device, "graph": device == "cuda"}, False
    monkeypatch.setattr(choice, "device_name", lambda device: "a processor")
    for name in ("measure_apart", "measure_here"):
        monkeypatch.setattr(choice, name, None)
    monkeypatch.setattr(choice, function, lambda job, *_: jobs.append(job) or FOUND | {"lasting": lasting})
    assert choice.fastest_block(job, "fused", choice.STEPS - 1) == ("fused", []) and jobs == []
    for lasting in (False, True):  # noqa: B007
        assert choice.fastest_block(job, "fused", choice.STEPS)[0] == "checkpoint"
    assert choice.fastest_block(job, "fused", 1)[0] == "checkpoint" and jobs == [job] * 2  # what is known is used


@pytest.mark.parametrize(("before", "change", "precision", "expected"), [
    (None, {}, "bf16", ("naive", True)),
    (None, {"block": "fused", "opt": "adam"}, "fp16", ("fused", True)),
    (None, {"opt": "rmsprop"}, "fp16", ("naive", False)),
    (None, {"block": "auto", "deterministic": True}, "bf16", ("naive", True)),
    (None, {"block": "auto", "compile": True}, "bf16", ("naive", False)),
    (None, {"cuda_graph": False}, "fp32", ("naive", False)),
    (True, {"block": "auto"}, "bf16", ("fused", True)),  # a resumed run keeps what it had
    (False, {"block": "auto", "deterministic": True}, "bf16", ("fused", False)),
    (True, {"cuda_graph": False}, "bf16", ("naive", False)),
    (False, {"cuda_graph": True}, "bf16", ("naive", True)),
    (False, {}, "fp32", ("naive", True)),  # but not from another device or precision
])  # fmt: skip
def test_on_a_gpu_every_run_that_can_be_is_replayed(monkeypatch, before, change, precision, expected):
    monkeypatch.setattr(choice, "device_name", lambda device: "a GPU")
    stage = {"device": "a GPU", "precision": "bf16", "block": "fused", "cuda_graph": before}
    checkpoint = {"epoch": 1, "config": stage | {"arguments": {"block": "auto"}, "resumed": []}} if before is not None else None
    args = {"block": "naive", "cuda_graph": None, "compile": False, "deterministic": False, "opt": "sgd"} | change
    entries, notes = choice.choose_block(argparse.Namespace(**args), checkpoint, None, DenseNet(**JOB["model"]), CUDA, precision)
    assert tuple(entries.values()) == expected and notes == []


@pytest.fixture
def measured(monkeypatch):
    """The jobs of train.py, if every run is long enough, and checkpoint the fastest."""
    jobs = []
    monkeypatch.setattr(choice, "STEPS", 1)
    monkeypatch.setattr(choice, "measure_apart", lambda job: jobs.append(job) or FOUND)
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
    assert tiny("--save", "other", "--epochs", "1", "--deterministic") == 0
    assert len(measured) == 2 and block_of(tmp_path / "other") == ("fused" if fused.loops else "naive")
    assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
