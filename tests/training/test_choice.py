"""--block auto: what it checks, how it decides, when it keeps away, and that nothing in its process hurts the run."""

import argparse
import json

import pytest
import torch
from conftest import TINY, assert_same_run
from helpers import finished, torchrun

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


@pytest.mark.parametrize(
    ("block", "name", "factors"),
    [
        ("fused", "output", [1.001] * 3),
        ("fused", "gradients", [1.001] * 3),
        ("fused", "statistics", [1.001] * 3),
        ("fused", "gradients", [float("nan"), 1, 1]),  # a race, say, that shows in one draw
        ("naive", "output", [1.0005] * 3),  # as in TF32, by which others would be allowed as much
        ("fused", "output", []),
    ],
)
def test_a_block_that_is_not_right_is_refused(monkeypatch, block, name, factors):
    right, left = trial.outcome, iter(factors)

    def outcome(model, *args):
        result = right(model, *args)
        if model.block == block:
            if not factors:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            result[name] = result[name] * next(left)
        return result

    monkeypatch.setattr(trial, "outcome", outcome)
    found = trial.try_blocks(JOB | {"checked_images": 4})
    assert list(found["seconds"]) == [other for other in JOB["blocks"] if other != block]
    assert found["refused"][block].startswith("computes something else" if factors else "out of memory")
    assert found["lasting"] == bool(factors)


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
    ("seconds", "refused", "graph", "best", "line"),
    [
        ({"naive": [2.0] * 5, "fused": [1.0] * 5}, {}, True, "fused",
         "fused --cuda-graph, 2.00 times as fast as naive here; --block fused --cuda-graph pins it"),
        ({"naive": [2.0] * 5, "checkpoint": [2.5] * 5, "fused": [1.92] * 5}, {}, False, "naive",  # 4 %
         "naive, the fastest here; --block naive pins it"),
        ({"naive": [2.0] * 5, "fused": [1.3, 1.8, 1.8, 2.1, 2.2]}, {}, False, "naive",  # 11 %, but slower in two turns
         "naive, the fastest here; --block naive pins it"),
        ({"naive": [2.0] * 5, "fused": [1.8, 1.8, 1.85, 1.75, 1.8]}, {}, False, "fused",
         "fused, 1.11 times as fast as naive here; --block fused pins it"),
        ({"checkpoint": [3.0] * 5, "fused": [2.0] * 5}, {"naive": "out of memory"}, False, "fused",
         "fused, which runs here; naive: out of memory; --block fused pins it"),
    ],
)  # fmt: skip
def test_naive_stands_unless_another_one_clearly_wins(seconds, refused, graph, best, line):
    found = {"seconds": seconds, "refused": refused, "graph": graph}
    assert choice.describe(found, "naive") == (best, graph, f"--block auto took {line}")


@pytest.fixture
def process(monkeypatch):
    """Puts a program in the place of the process of a job, which it finds as the variable ``job``."""

    def replace(source):
        program = f"import json, os, sys, time\njob = json.loads(sys.argv[1])\n{source}"
        monkeypatch.setattr(choice, "PROGRAM", ["-c", program])

    return replace


FOUND = {"seconds": {"naive": [2.0] * 3, "checkpoint": [1.0] * 3}, "refused": {}, "graph": False, "lasting": True, "at": None}
HALF = {"at": "checkpoint", "seconds": {"naive": [2.0, 2.1], "checkpoint": [1.0]}}
TRIES = """
for block in job["blocks"]:
    print(json.dumps({"at": block}), flush=True)
    if block == "fused":
        END
"""
FEWER = """
print(json.dumps({"at": "reference"}), flush=True)
if job["checked_images"] > 1:
    os._exit(1)
"""
GRAPH = """
if job["graph"]:
    print(json.dumps({"at": "--cuda-graph"}), flush=True)
    os._exit(1)
"""


@pytest.mark.parametrize(
    ("source", "change", "seconds"),
    [
        (TRIES.replace("END", "os.kill(os.getpid(), 9)"), {"refused": {"fused": "ended the process (-9)"}, "lasting": False}, 60),
        (FEWER, {}, 60),  # a reference that does not fit is made of fewer images
        (GRAPH, {"refused": {"--cuda-graph": "ended the process (1)"}, "lasting": False}, 60),
        (f"print(json.dumps({FOUND | HALF!r}), flush=True)\ntime.sleep(60)",  # what was timed when the time was up
         {"seconds": {"naive": [2.0], "checkpoint": [1.0]}, "at": "checkpoint", "lasting": False}, 2),
    ],
    ids=["killed", "fewer", "graph", "late"],
)  # fmt: skip
def test_what_hurts_the_process_is_left_out(process, source, change, seconds):
    process(f"{source}\nprint(json.dumps({FOUND!r}))")
    assert choice.measure_apart(JOB | {"graph": True}, seconds) == FOUND | change


@pytest.fixture
def quick(monkeypatch):
    """A run of which 2 % are a second."""
    monkeypatch.setattr(choice, "expected_seconds", lambda job, device: 50e-6)
    monkeypatch.setitem(choice.START, "cpu", 0.4)


@pytest.mark.parametrize("source", ["time.sleep(60)", "os._exit(1)", "print('no JSON')\nprint(0)"])
def test_without_an_answer_the_default_stands(process, quick, cache, source):
    process(source)
    assert choice.fastest_block(JOB, "fused", 10**6) == ("fused", False, "--block auto could not measure; it takes fused")
    assert not cache.exists()


@pytest.mark.parametrize("end", ["time.sleep(60)", "os._exit(3)"])
def test_a_default_that_hangs_or_dies_is_not_taken(process, quick, end):
    process(TRIES.replace("END", end) + "time.sleep(60)")
    block, _, line = choice.fastest_block(JOB, "fused", 10**6)
    assert block == "naive" and "fused: " in line and line.endswith("it takes naive")


def test_a_process_that_cannot_be_started_is_no_mistake(monkeypatch, quick):
    monkeypatch.setattr(choice.sys, "executable", "nowhere")
    assert choice.fastest_block(JOB, "fused", 10**6)[0] == "fused"


def test_a_short_run_does_not_measure(monkeypatch):
    monkeypatch.setattr(choice, "run_process", None)
    monkeypatch.setattr(choice, "expected_seconds", lambda *args: 0.45e-3)  # 450 s: 2 % are 9 s, less than a start takes
    assert choice.fastest_block(JOB, "fused", 10**6) == ("fused", False, None)
    monkeypatch.setattr(choice, "expected_seconds", None)
    assert choice.fastest_block(JOB, "fused", 2000) == ("fused", False, None)  # 60 of them would be 3 %


def test_the_answer_is_kept(monkeypatch, capsys, cache):
    calls, lasting = [], True
    monkeypatch.setattr(choice, "run_process", lambda job, timeout: calls.append(job) or (FOUND | {"lasting": lasting}, 0))
    monkeypatch.setattr(choice, "expected_seconds", lambda *args: 1.0)
    answers = [choice.fastest_block(JOB, "naive", 10**6) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][0] == "checkpoint" and len(calls) == 1
    choice.fastest_block(JOB | {"batch_size": 8}, "naive", 10**6)
    monkeypatch.setattr(choice, "device_name", lambda device: "another processor")
    choice.fastest_block(JOB, "naive", 10**6)
    assert len(calls) == 3
    for path in cache.iterdir():
        path.write_text('{"seconds": {"naive": "soon"}, "refused": {}}')
    lasting = False  # what may not happen again is not kept
    assert choice.fastest_block(JOB, "naive", 10**6)[0] == "checkpoint"
    lasting = True
    choice.fastest_block(JOB, "naive", 10**6)  # damaged: measured again, and mended
    choice.fastest_block(JOB, "naive", 10**6)
    assert len(calls) == 5 and capsys.readouterr().out.count("measuring which --block is fastest here") == 5
    (cache.parent / "file").touch()  # no folder to keep anything in
    monkeypatch.setattr(choice.platformdirs, "user_cache_path", lambda name: cache.parent / "file" / "cache")
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


@pytest.mark.parametrize(
    ("failing", "error", "expected"),
    [
        (None, None, (True, True, {"naive", "checkpoint", "fused"}, set())),
        ("fused", trial.Wrong("computes something else"), (False, True, {"naive", "checkpoint", "fused"}, {"--cuda-graph"})),
        ("naive", torch.OutOfMemoryError("CUDA out of memory"), (True, False, {"checkpoint", "fused"}, {"naive"})),
    ],
)
def test_all_steps_are_replayed_where_those_of_all_blocks_are_right(monkeypatch, failing, error, expected):
    def graphed(job, block, device):
        if block == failing:
            raise error
        return lambda: replayed.add(block)

    replayed = set()
    monkeypatch.setattr(trial, "graphed", graphed)
    found = trial.try_blocks(JOB | {"checked_images": 4, "graph": True})
    assert (found["graph"], found["lasting"], set(found["seconds"]), set(found["refused"])) == expected
    assert replayed == (set(found["seconds"]) if found["graph"] else set())


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
found = {'seconds': {block: [1.0] * 3}, 'refused': {}, 'graph': False, 'lasting': True, 'at': None}
choice.run_process = lambda job, timeout: (found, 0)
train.distributed.exit_from(train.main)
"""
    (tmp_path / "ranks.py").write_text(program)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finished(torchrun(2, "ranks.py", *TINY, "--no-plot", "--epochs", "1", "--save", "run"), 0)
    assert block_of(tmp_path / "run") == "checkpoint"
