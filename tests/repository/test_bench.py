"""The benchmark measures the right networks, refuses wrong ones, and knows the hardware's floor."""

from pathlib import Path
from types import SimpleNamespace

import candidates
import few_images
import numpy as np
import pytest
import recipes
import scipy.stats
import speed
from conftest import status_of

from training.arguments import parse_args

NAMES = [*candidates.BLOCKS, *candidates.available()]


def job(name, **options):
    return {"candidate": name, "depth": 10, "precision": "fp32", "compiled": False} | options


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_computes_the_same_function(name):
    checked = candidates.check(job(name), candidates.choose_device("cpu"))
    assert max(checked["float64"].values()) < 1e-8
    assert len(checked["draws"]) == candidates.DRAWS


def errors(output, gradients):
    return {"output": output, "gradients": gradients}


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
@pytest.mark.parametrize("place", ["float64", "draws"])
def test_a_wrong_candidate_is_not_timed(monkeypatch, wrong, place):
    naive = {"float64": errors(0.0, 0.0), "draws": [errors(1e-6, 1e-5)] * 5}
    monkeypatch.setattr(speed, "answer", lambda job, task: naive)
    assert speed.assert_right(job("fused"), naive) == {"output_error": "1.0e-06", "gradient_error": "1.0e-05"}
    bad = naive | ({"float64": errors(0.0, wrong)} if place == "float64" else {"draws": [errors(1e-6, wrong)] * 5})
    monkeypatch.setattr(speed, "answer", lambda job, task: bad)
    with pytest.raises(speed.CandidateError, match="fused computes something else"):
        speed.assert_right(job("fused"), naive)


def test_naive_itself_is_held_to_rounding(monkeypatch):
    in_tf32 = {"float64": errors(0.0, 0.0), "draws": [errors(5.5e-4, 1e-3)] * 5}
    monkeypatch.setattr(speed, "answer", lambda job, task: in_tf32)
    with pytest.raises(speed.CandidateError, match="naive, the measure of rounding"):
        speed.assert_right(job("naive"), in_tf32)


def test_floor_of_the_default_network():
    assert speed.flops(100) == pytest.approx(1.726e9, rel=0.01)
    assert speed.moved_elements(100) == pytest.approx(18.3e6, rel=0.01)


@pytest.mark.slow
def test_candidates_take_turns_with_the_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "TURNS", 1)
    monkeypatch.setattr(speed, "hardware", lambda device, precision: (2e10, 2e11))
    flags = ["--device", "cpu", "--depths", "10", "--batch-size", "2", "--candidates", "fused", "--precisions", "fp32"]
    assert speed.main([*flags, "--csv", str(tmp_path / "b.csv"), "--plot", str(tmp_path / "b.png")]) == 0
    header, row = (tmp_path / "b.csv").read_text().splitlines()
    assert header.startswith("candidate,depth,batch_size,precision,compiled,graph,output_error") and row.startswith("fused,10,2")
    assert (tmp_path / "b.png").stat().st_size > 1000
    monkeypatch.setattr(speed, "run", None)  # it is not called again
    assert speed.main(["--from", str(tmp_path / "b.csv"), "--plot", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--depths 11", "depth 11"), ("--batch-size 0", "0 is not in 1 … "), ("--candidates bamos --precisions bf16", "fp32")],
)
def test_mistakes_end_with_one_line_and_status_2(capsys, flags, words):
    assert status_of(speed.main, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("speed.py: error: ") and words in err and err.count("\n") == 1


def test_rows_are_written_as_they_come(tmp_path, capsys):
    path = tmp_path / "b.csv"
    row = {"candidate": "fused", "precision": "fp32", "compiled": False, "depth": 10, "ms": 1.5, "ms_20": 1.4, "ms_80": 2.0,
           "images_per_second": 9.0, "times_as_fast": 1.0, "infer_images_per_second": 9.0, "infer_times_as_fast": 1.0,
           "peak_mib": 7}  # fmt: skip

    def rows():
        yield row
        assert len(path.read_text().splitlines()) == 2
        yield row

    assert speed.finish(rows(), path, {"commit": "c"}) == [row, row]
    assert path.read_text().splitlines()[1:] == ["fused,fp32,False,10,1.5,1.4,2.0,9.0,1.0,9.0,1.0,7,c"] * 2


def test_a_candidate_that_fails_does_not_end_the_others(monkeypatch, capsys):
    monkeypatch.setattr(speed, "answer", lambda job, task: {"float64": errors(0.0, 0.0), "draws": [errors(1e-6, 1e-5)] * 5})
    monkeypatch.setattr(speed, "row_of", lambda process, reference: {"candidate": process, "ms": 2.0})

    def take_turns(job, reference):
        if job["candidate"] == "naive":
            raise speed.CandidateError("naive ended early")
        return job["candidate"], reference

    monkeypatch.setattr(speed, "take_turns", take_turns)
    args, device = speed.parse_args(["--device", "cpu", "--candidates", "naive", "fused", "--precisions", "fp32"])
    monkeypatch.setattr(speed, "make_floor", lambda device, precisions: lambda job: 1.0)
    rows = list(speed.rows_of(args, device))
    assert rows == [{"candidate": "fused", "ms": 2.0, "floor_share": 0.5}]
    assert capsys.readouterr().err == "speed.py: error: naive ended early\n"


@pytest.mark.slow
def test_fine_tuning_is_compared_with_training_from_scratch(tmp_path, capfd):
    assert few_images.main(["a folder", "--seeds", "1", "--epochs", "1", "--csv", "errors.csv"]) == 0
    assert len(Path("errors.csv").read_text().splitlines()) == 1 + len(few_images.METHODS)
    assert capfd.readouterr().out.count("; fresh: classifier.weight (5, 48), there of other classes") == 3
    counts = [len(list(Path("a folder/seed1", part).glob("train/*/*.png"))) for part in ("0-4", "5-9")]
    assert counts == [700, 25]


def test_recipes_are_trained_once_and_compared_by_seed(monkeypatch, capsys):
    errors = {("paper", 1): 30.0, ("paper", 2): 32.0, ("cutout", 1): 29.5, ("cutout", 2): 31.0, ("ema", 1): 28.0, ("ema", 2): 29.0}
    calls = []

    def call(command, env, stdout):
        calls.append(command)
        path = Path(command[command.index("--save") + 1])
        path.mkdir(parents=True, exist_ok=True)
        if len(calls) == 2:  # killed
            (path / "latest.pth").touch()
            return SimpleNamespace(returncode=143)
        name, seed = path.name.split(".")
        (path / "train.csv").write_text("epoch,images_per_second\n1,100\n2,100\n")
        for kind in ("valid", "valid-ema") if name == "ema" else ("valid",):
            (path / f"{kind}.csv").write_text(f"epoch,error\n1,50\n2,{errors[name, int(seed)] if kind != 'valid' or name != 'ema' else 99}\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(recipes.subprocess, "run", call)
    flags = ["--out", "out", "--epochs", "2", "--only", "paper", "cutout", "ema", "--seeds", "1", "2"]
    assert recipes.main(flags) == 2
    assert "out/cutout.1 ended with status 143: the same command goes on" in capsys.readouterr().err
    assert recipes.main(flags) == 0 and len(calls) == 2 + 5
    assert calls[2] == [*calls[1][:-1], "--resume", "--no-plot"] and "--cutout" in calls[1]
    paper, cutout, ema = capsys.readouterr().out.splitlines()[2:]
    assert paper == "| paper | – | 31.00 ± 1.41 | – | 100 |"
    low, high = scipy.stats.ttest_1samp(np.array([-0.5, -1.0]), 0).confidence_interval(0.95)
    assert cutout == f"| cutout | `--cutout 16` | 30.25 ± 1.06 | {f'-0.75 ({low:+.2f} … {high:+.2f})'.replace('-', '−')} | 100 |"
    assert ema.startswith("| ema | `--ema 0.999` | 28.50 ± 0.71 | −2.50 (")  # of the averaged weights
    assert recipes.main(flags) == 0 and len(calls) == 7


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_of_the_comparison_are_valid(name):
    parse_args(["--epochs", "20", *recipes.RECIPES[name].split()])
