"""The benchmark measures the right networks and refuses wrong ones."""

import os
import subprocess
import sys
from pathlib import Path

import candidates
import pandas as pd
import pytest
import speed
from conftest import ROOT, status_of

from common.console import Mistake
from common.hardware import choose_device

JOB = {"candidate": "fused", "depth": 10, "precision": "fp32", "kernels": None}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "compiled" in name else []) for name in candidates.NAMES])
def test_every_candidate_computes_the_same_function(name):
    checked = candidates.check(JOB | {"candidate": name}, choose_device("cpu"))
    assert max(checked["float64"].values()) < 1e-8 and len(checked["trials"]) == candidates.TRIALS


def answer(float64=0.0, output=1e-6, gradients=1e-5):
    trials = [{"output": output, "gradients": gradients}] * candidates.TRIALS
    return {"float64": {"output": 0.0, "gradients": float64}, "trials": trials}


@pytest.mark.parametrize(
    ("ours", "naive", "words"),
    [
        *((answer(float64=error), answer(), "fused computes something else") for error in (1e-3, float("nan"))),
        *((answer(gradients=error), answer(), "fused computes something else") for error in (1e-3, float("nan"))),
        (answer(output=5.5e-4, gradients=1e-3), answer(output=5.5e-4, gradients=1e-3), "naive, the measure of rounding"),  # TF32
    ],
)
def test_a_wrong_candidate_is_not_timed(ours, naive, words):
    assert speed.assert_right(JOB, answer(), answer()) == {"output_error": "1.0e-06", "gradient_error": "1.0e-05"}
    with pytest.raises(Mistake, match=words):
        speed.assert_right(JOB, ours, naive)


# Stands for candidates.py: one candidate dies, one is wrong; fused is twice as fast, if naive's row is written by then.
STAND_IN = """
import json, os, sys
job = json.loads(sys.argv[1])
trials = [{"output": 1e-6, "gradients": 1e-5}] * 5
if job["candidate"] == "checkpoint":
    sys.exit(1)
if job["task"] == "check":
    sys.exit(print(json.dumps({"float64": {"output": job["candidate"] == "bamos"}, "trials": trials})))
print(json.dumps(job | {"saved_mib": 3.5}), flush=True)
for word in sys.stdin:
    print(json.dumps([0.25 if job["candidate"] == "fused" and os.path.exists("of/b.csv") else 0.5, 100]), flush=True)
"""


def test_rows_are_written_as_they_come_and_those_of_candidates_that_fail_are_missing(monkeypatch, capsys):
    Path("stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(candidates, "__file__", "stand_in.py")
    flags = "--device cpu --depths 10 --batch-size 2 --candidates checkpoint bamos naive fused --reference naive --precisions fp32"
    assert speed.main([*flags.split(), "--csv", "of/b.csv", "--plot", "b.png"]) == 1
    dead, wrong = capsys.readouterr().err.splitlines()
    assert "checkpoint ended early" in dead and "bamos computes something else" in wrong
    rows = pd.read_csv("of/b.csv")
    assert (rows.candidate.tolist(), rows.ms.tolist(), rows.times_as_fast.tolist()) == (["naive", "fused"], [500, 250], [1, 2])
    assert (rows.images_per_second.tolist(), rows.saved_mib.tolist(), rows.peak_mib.tolist()) == ([4, 8], [3.5] * 2, [100] * 2)
    assert speed.main(["--from", "of/b.csv"]) == 0
    assert Path("of/b.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.slow
def test_candidates_take_turns_with_the_reference(capfd):
    flags = "--device cpu --depths 10 --batch-size 2 --candidates fused --precisions fp32 --csv b.csv".split()
    assert speed.main(flags) == 0
    [row] = pd.read_csv("b.csv").itertuples()
    assert row.candidate == "fused" and row.ms > 0 and row.saved_mib > 0 and row.peak_mib > 100
    assert speed.main([*flags, "--profile"]) == 0 and "SharedBufferBackward" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["cpu-depths", "epyc", "epyc-epochs", "h200"])
def test_what_was_measured_can_be_drawn(name):
    assert speed.main(["--from", str(ROOT / f"bench/{name}.csv"), "--plot", "b.png"]) == 0 and Path("b.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--depths 11", "argument --depths: invalid choice: 11 (choose from 10, 16, 22, "), ("--batch-size 0", "0 is not in 1 … "), ("--candidates bamos --precisions bf16", "fp32")],
)
def test_mistakes_end_with_one_line_and_status_2(capsys, flags, words):
    assert status_of(speed.main, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("speed.py: error: ") and words in err and err.count("\n") == 1


def test_the_script_for_gpus_names_what_exists():
    result = subprocess.run(["bash", ROOT / "bench/gpu.sh", "plan"], capture_output=True, text=True, env=os.environ | {"PY": sys.executable})
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.count("python bench/speed.py") >= 9
