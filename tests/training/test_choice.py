"""--block auto: what it checks, how it decides, when it keeps away, and that nothing in its process hurts the run."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run

import fused
from densenet import DenseNet
from training import choice, trial
from training.step import Step

CPU = torch.device("cpu")
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
def test_every_block_that_can_run_is_checked_and_timed(capfd, precision, options):
    blocks = JOB["blocks"][: 2 if options else 3]
    job = JOB | {"checked_images": 4, "precision": precision, "blocks": blocks, "model": JOB["model"] | options}
    found = trial.try_blocks(job)
    assert found["refused"] == {} and found["graph"] is False
    assert {block: len(seconds) for block, seconds in found["seconds"].items()} == dict.fromkeys(blocks, 3)
    assert [json.loads(line)["at"] for line in capfd.readouterr().out.splitlines()] == ["reference", *blocks * 5]


@pytest.mark.parametrize("kind", ["output", "gradients", "statistics", "nan", "memory"])
def test_a_block_that_is_not_right_is_refused(monkeypatch, kind):
    right, calls = trial.outcome, []

    def outcome(model, *args):
        result = right(model, *args)
        if model.block == "fused":
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            name = "gradients" if kind == "nan" else kind
            calls.append(kind)
            once = kind == "nan" and len(calls) > 1  # a race, say, that shows in one draw
            result[name] = result[name] * (1 if once else float("nan") if kind == "nan" else 1.001)
        return result

    monkeypatch.setattr(trial, "outcome", outcome)
    found = trial.try_blocks(JOB | {"checked_images": 4})
    assert list(found["seconds"]) == ["naive", "checkpoint"]
    assert found["refused"]["fused"].startswith("out of memory" if kind == "memory" else "computes something else")
    assert found["lasting"] == (kind != "memory")


def test_naive_is_no_measure_of_others_where_it_is_off_by_more_than_rounding(monkeypatch):
    """As in TF32, which would allow every block as much."""
    right = trial.outcome

    def outcome(model, *args):
        result = right(model, *args)
        return result | {"output": result["output"] * (1.0005 if model.block == "naive" else 1)}

    monkeypatch.setattr(trial, "outcome", outcome)
    found = trial.try_blocks(JOB | {"checked_images": 4})
    assert list(found["seconds"]) == ["checkpoint", "fused"] and "naive" in found["refused"]


def test_an_error_that_may_leave_the_gpu_unusable_ends_the_process(monkeypatch, capfd):
    def check(job, block, *args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(trial, "check", check)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trial.try_blocks(JOB | {"checked_images": 4})
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["at"] == "naive" and last["refused"] == {"naive": "CUDA error: an illegal memory access was encountered"}


def test_a_block_is_not_its_own_reference(monkeypatch):
    """Where neither block in plain torch fits, fused cannot be checked."""
    right = trial.check

    def check(job, block, *args):
        if block != "fused":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(job, block, *args)

    monkeypatch.setattr(trial, "check", check)
    found = trial.try_blocks(JOB | {"checked_images": 4})
    assert found["seconds"] == {} and choice.describe(found, "naive")[0] == "naive"


@pytest.mark.parametrize(
    ("fused_seconds", "best"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], "fused"),
        ([1.92, 1.92, 1.92, 1.92, 1.92], "naive"),  # 4 %
        ([1.3, 1.8, 1.8, 2.1, 2.2], "naive"),  # 11 %, but slower in two turns
        ([1.8, 1.8, 1.85, 1.75, 1.8], "fused"),
    ],
)
def test_naive_stands_unless_another_one_clearly_wins(fused_seconds, best):
    found = {"naive": [2.0] * 5, "checkpoint": [2.5] * 5, "fused": fused_seconds}
    assert choice.fastest(found)[0] == best


def test_where_naive_does_not_fit_the_fastest_that_does_is_taken():
    found = {"seconds": {"checkpoint": [3.0] * 5, "fused": [2.0] * 5}, "refused": {"naive": "out of memory"}, "graph": False}
    block, _, line = choice.describe(found, "naive")
    assert block == "fused"
    assert line == "--block auto took fused, which runs here; naive: out of memory; --block fused pins it"


def test_the_line_says_by_how_much():
    found = {"seconds": {"naive": [2.0] * 5, "fused": [1.0] * 5}, "refused": {}, "graph": True}
    line = "--block auto took fused --cuda-graph, 2.00 times as fast as naive here; --block fused --cuda-graph pins it"
    assert choice.describe(found, "naive") == ("fused", True, line)


def process(source):
    """A stand-in for the process of a job, which finds the job as the variable ``job``."""

    def run(job, timeout):
        program = f"import json, os, sys, time\njob = json.loads(sys.argv[1])\n{source}"
        command = [sys.executable, "-c", program, json.dumps(job)]
        return choice.last_line(command, timeout)

    return run


FOUND = {"seconds": {"naive": [2.0] * 3, "checkpoint": [1.0] * 3}, "refused": {}, "graph": False, "lasting": True, "at": None}
DIES = f"""
for block in job["blocks"]:
    print(json.dumps({{"at": block}}), flush=True)
    if block == "fused":
        os.kill(os.getpid(), 9)
print(json.dumps({FOUND!r}))
"""


def test_a_block_that_kills_the_process_is_left_out(monkeypatch):
    monkeypatch.setattr(choice, "run_process", process(DIES))
    found = choice.measure_apart(JOB, 60)
    assert found == FOUND | {"refused": {"fused": "ended the process (-9)"}, "lasting": False}


def test_a_reference_that_does_not_fit_is_made_of_fewer_images(monkeypatch):
    source = f"""
print(json.dumps({{"at": "reference"}}), flush=True)
if job["checked_images"] > 1:
    os._exit(1)
print(json.dumps({FOUND!r}))
"""
    monkeypatch.setattr(choice, "run_process", process(source))
    assert choice.measure_apart(JOB, 60) == FOUND


def test_what_was_timed_when_the_time_was_up_is_the_answer(monkeypatch):
    seconds = {"naive": [2.0, 2.1], "checkpoint": [1.0]}
    source = f"print(json.dumps({FOUND | {'at': 'checkpoint', 'seconds': seconds}!r}), flush=True)\ntime.sleep(60)"
    monkeypatch.setattr(choice, "run_process", process(source))
    expected = {"seconds": {"naive": [2.0], "checkpoint": [1.0]}, "at": "checkpoint", "lasting": False}
    assert choice.measure_apart(JOB, 2) == FOUND | expected


@pytest.fixture
def quick(monkeypatch):
    """A run of which 2 % are a second."""
    monkeypatch.setattr(choice, "expected_seconds", lambda job, device: 50e-6)
    monkeypatch.setitem(choice.START, "cpu", 0.4)


@pytest.mark.parametrize("source", ["time.sleep(60)", "os._exit(1)", "print('no JSON')\nprint(0)"])
def test_without_an_answer_the_default_stands(monkeypatch, quick, cache, source):
    monkeypatch.setattr(choice, "run_process", process(source))
    assert choice.fastest_block(JOB, "fused", 10**6) == ("fused", False, "--block auto could not measure; it takes fused")
    assert not cache.exists()


@pytest.mark.parametrize("end", ["time.sleep(60)", "os.kill(os.getpid(), 11)", "os._exit(3)"])
def test_a_default_that_hangs_or_dies_is_not_taken(monkeypatch, quick, end):
    source = f"""
for block in job["blocks"]:
    print(json.dumps({{"at": block}}), flush=True)
    if block == "fused":
        {end}
time.sleep(60)
"""
    monkeypatch.setattr(choice, "run_process", process(source))
    block, _, line = choice.fastest_block(JOB, "fused", 10**6)
    assert block == "naive" and "fused: " in line and line.endswith("it takes naive")


def test_where_the_graph_fails_eager_steps_are_measured(monkeypatch):
    source = f"""
if job["graph"]:
    print(json.dumps({{"at": "--cuda-graph"}}), flush=True)
    os._exit(1)
print(json.dumps({FOUND!r}))
"""
    monkeypatch.setattr(choice, "run_process", process(source))
    reason = {"--cuda-graph": "ended the process (1)"}
    assert choice.measure_apart(JOB | {"graph": True}, 60) == FOUND | {"refused": reason, "lasting": False}


def test_what_may_not_happen_again_is_not_kept(monkeypatch, quick, cache):
    found = FOUND | {"refused": {"fused": "out of memory"}, "lasting": False}
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: (found, 0))
    assert choice.fastest_block(JOB, "fused", 10**6)[0] == "checkpoint" and not cache.exists()
    found |= {"refused": {"fused": "computes something else (relative errors …)"}, "lasting": True}
    assert choice.fastest_block(JOB, "fused", 10**6)[0] == "checkpoint" and cache.exists()


def test_a_process_that_cannot_be_started_is_no_mistake(monkeypatch, quick):
    def run(*args):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(choice, "run_process", run)
    assert choice.fastest_block(JOB, "fused", 10**6)[0] == "fused"


def test_a_short_run_does_not_measure(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(choice, "run_process", refuse)
    monkeypatch.setattr(choice, "expected_seconds", lambda *args: 0.45e-3)  # 450 s: 2 % are 9 s, less than a start takes
    assert choice.fastest_block(JOB, "fused", 10**6) == ("fused", False, None)
    monkeypatch.setattr(choice, "expected_seconds", refuse)
    assert choice.fastest_block(JOB, "fused", 2000) == ("fused", False, None)  # 60 of them would be 3 %


def test_the_answer_is_kept(monkeypatch, capsys, cache):
    calls = []
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: calls.append(job) or (FOUND, 0))
    monkeypatch.setattr(choice, "expected_seconds", lambda *args: 1.0)
    answers = [choice.fastest_block(JOB, "naive", 10**6) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][0] == "checkpoint" and len(calls) == 1
    choice.fastest_block(JOB | {"batch_size": 8}, "naive", 10**6)
    monkeypatch.setattr(choice, "device_name", lambda device: "another processor")
    choice.fastest_block(JOB, "naive", 10**6)
    assert len(calls) == 3
    for path in cache.iterdir():
        path.write_text('{"seconds": {"naive": "soon"}, "refused": {}}')
    choice.fastest_block(JOB, "naive", 10**6)  # damaged: measured again, and mended
    choice.fastest_block(JOB, "naive", 10**6)
    assert len(calls) == 4
    assert capsys.readouterr().out.count("measuring which --block is fastest here") == 4


def test_a_cache_that_cannot_be_written_is_no_mistake(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(choice.platformdirs, "user_cache_path", lambda name: tmp_path / "file" / "cache")
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: (FOUND, 0))
    monkeypatch.setattr(choice, "expected_seconds", lambda *args: 1.0)
    assert choice.fastest_block(JOB, "naive", 10**6)[0] == "checkpoint"


def test_the_real_process():
    """In which nothing of this test is patched."""
    found = choice.measure_apart(JOB, 120)
    assert set(found["seconds"]) | set(found["refused"]) == set(JOB["blocks"]) and "naive" in found["seconds"]


def test_a_graph_that_forgets_the_learning_rate_is_noticed():
    class Forgetful(Step):
        def set_learning_rate(self, value):
            super().set_learning_rate(0.1)

    trial.graphed(JOB, "naive", CPU, kind=Step)()
    with pytest.raises(trial.Wrong):
        trial.graphed(JOB, "naive", CPU, kind=Forgetful)


@pytest.mark.parametrize("right", [True, False])
def test_all_steps_are_replayed_where_those_of_all_blocks_are_right(monkeypatch, right):
    def graphed(job, block, device):
        if block == "fused" and not right:
            raise trial.Wrong("computes something else with block fused")
        return lambda: replayed.append(block)

    replayed = []
    monkeypatch.setattr(trial, "graphed", graphed)
    found = trial.try_blocks(JOB | {"checked_images": 4, "graph": True})
    assert (found["graph"], set(found["seconds"])) == (right, set(JOB["blocks"]))
    assert set(replayed) == (set(JOB["blocks"]) if right else set())
    assert set(found["refused"]) == (set() if right else {"--cuda-graph"}) and found["lasting"]


def test_a_block_whose_graph_does_not_fit_leaves_the_others_theirs(monkeypatch):
    def graphed(job, block, device):
        if block == "naive":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return lambda: None

    monkeypatch.setattr(trial, "graphed", graphed)
    found = trial.try_blocks(JOB | {"checked_images": 4, "graph": True})
    assert (found["graph"], found["lasting"], set(found["seconds"])) == (True, False, {"checkpoint", "fused"})


@pytest.mark.parametrize(("ranks", "given", "expected"), [(1, None, True), (4, None, False), (1, False, False)])
@pytest.mark.parametrize("block", ["auto", "fused"])
def test_a_resumed_run_keeps_its_graph_in_one_process(monkeypatch, ranks, given, expected, block):
    monkeypatch.setattr(choice, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(choice.distributed, "world_size", lambda: ranks)
    stage = {"device": "a GPU", "precision": "bf16", "block": "fused", "cuda_graph": True}
    checkpoint = {"epoch": 1, "config": stage | {"arguments": {"block": "auto"}, "resumed": []}}
    args = argparse.Namespace(block=block, cuda_graph=given, compile=False, deterministic=False)
    picked = choice.choose_block(args, checkpoint, None, DenseNet(**JOB["model"]), torch.device("cuda"), "bf16")
    assert picked == ({"block": "fused", "cuda_graph": expected}, [])


@pytest.fixture
def measured(monkeypatch):
    """train.py with every run long enough, and a process that finds checkpoint to be the trial. Yields the jobs."""
    jobs = []
    monkeypatch.setattr(choice, "SHARE", 1e9)
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: jobs.append(job) or (FOUND, 0))
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
    monkeypatch.setattr(choice, "device_name", lambda device: "another processor")
    assert tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 0
    assert len(measured) == 2


@pytest.mark.parametrize("flag", ["--deterministic", "--block=naive"])
def test_what_is_pinned_is_not_measured(tiny, measured, flag, tmp_path):
    assert tiny("--save", "run", "--epochs", "1", flag) == 0
    assert measured == []
    assert block_of(tmp_path / "run") == ("fused" if flag == "--deterministic" and fused.loops else "naive")


@pytest.mark.slow
def test_rank_0_decides_for_all(tmp_path):
    """Two ranks that would choose differently train with one block: that of rank 0."""
    program = (
        "import os, train\n"
        "from training import choice\n"
        "choice.SHARE = 1e9\n"
        "block = 'checkpoint' if os.environ['RANK'] == '0' else 'naive'\n"
        "found = {'seconds': {block: [1.0] * 3}, 'refused': {}, 'graph': False, 'lasting': True, 'at': None}\n"
        "choice.run_process = lambda job, timeout: (found, 0)\n"
        "train.distributed.exit_from(train.main)\n"
    )
    (tmp_path / "ranks.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "ranks.py", *TINY, "--no-plot"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([*command, "--epochs", "1", "--save", "run"], env=env, check=True, capture_output=True, timeout=240)
    assert block_of(tmp_path / "run") == "checkpoint"
