"""The benchmark measures the right networks, refuses wrong ones, and knows the hardware's floor."""

import pytest

import bench
import candidates

NAMES = [*candidates.BLOCKS, *candidates.available()]


def job(name, **options):
    return {"candidate": name, "depth": 10, "precision": "fp32", "compiled": False} | options


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_computes_the_same_function(name):
    checked = candidates.check(job(name), candidates.choose_device("cpu"))
    assert max(checked["float64"]) < 1e-8
    assert len(checked["draws"]) == candidates.DRAWS


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
@pytest.mark.parametrize("place", ["float64", "draws"])
def test_a_wrong_candidate_is_not_timed(monkeypatch, wrong, place):
    naive = {"float64": [0.0, 0.0], "draws": [[1e-6, 1e-5]] * 5}
    monkeypatch.setattr(bench, "answer", lambda job, task: naive)
    assert bench.assert_right(job("fused"), naive) == {"output_error": "1.0e-06", "gradient_error": "1.0e-05"}
    bad = naive | ({"float64": [0.0, wrong]} if place == "float64" else {"draws": [[1e-6, wrong]] * 5})
    monkeypatch.setattr(bench, "answer", lambda job, task: bad)
    with pytest.raises(SystemExit, match="fused computes something else"):
        bench.assert_right(job("fused"), naive)


def test_floor_of_the_default_network():
    assert bench.flops(100) == pytest.approx(1.726e9, rel=0.01)
    assert bench.moved_elements(100) == pytest.approx(18.3e6, rel=0.01)


def test_candidates_take_turns_with_the_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "STEPS", 1)
    monkeypatch.setattr(bench, "hardware", lambda device, precision: (2e10, 2e11))
    flags = ["--device", "cpu", "--depths", "10", "--batch-size", "2", "--candidates", "fused", "--precisions", "fp32"]
    assert bench.main([*flags, "--csv", str(tmp_path / "b.csv"), "--plot", str(tmp_path / "b.png")]) == 0
    header, row = (tmp_path / "b.csv").read_text().splitlines()
    assert header.startswith("candidate,depth,batch_size,precision,compiled,output_error") and row.startswith("fused,10,2")
    assert (tmp_path / "b.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as exit:
        bench.main(["--depths", "11"])
    assert exit.value.code == 2
    assert "bench.py: error: depth 11" in capsys.readouterr().err
