"""Each compiled loop against the same pass in plain torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from fused import Norm, passes

loops = pytest.importorskip("fused.loops")  # needs Numba

pytestmark = pytest.mark.usefixtures("poison")
ROWS = [1, 255, 256, 257, 1000]  # about the length of a slice


def wide(rows, columns, first=0):
    """Columns of a wider matrix."""
    return torch.randn(rows, columns + 5, dtype=torch.float64)[:, first : first + columns]


def inputs(rows, columns=7, first=0):
    """Arguments of every pass: x (rows, columns) and gradients of its shape."""
    torch.manual_seed(0)
    mean, weight, bias, alpha, beta, delta = torch.randn(6, columns, dtype=torch.float64)
    norm = Norm(mean, torch.rand(columns, dtype=torch.float64) + 0.5, weight, bias, 1e-5, True)
    x, d, da = wide(rows, columns, first), wide(rows, columns, first), torch.randn(rows, columns, dtype=torch.float64)
    return {
        "bn_relu": (x, norm),
        "statistics": (x + 100,),
        "relu_backward": (da, x, norm),
        "relu_backward, add": (da, x, norm, d),
        "relu_backward, latest": (da, x, norm, d, torch.zeros(2, rows, 3, dtype=torch.float64)),
        "combine": (d, x, alpha, beta, delta),
    }


PASSES = list(inputs(1))


def results(module, name, arguments):
    """What a pass returns, and what relu_backward changes: a matrix, with the columns beside it, and copies of some."""
    arguments = [a.clone() if isinstance(a, torch.Tensor) and a._base is None else a for a in arguments]
    name, changed = name.split(",")[0], []
    if len(arguments) > 3 and name == "relu_backward":
        d = arguments[3]
        whole = d._base.clone()
        arguments[3] = whole.as_strided(d.shape, d.stride(), d.storage_offset())
        changed = [whole, *arguments[4:]]
    value = getattr(module, name)(*arguments)
    return [*(value if isinstance(value, tuple) else [value]), *changed]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("first", [0, 3])
def test_equals_plain_torch_in_float64(name, rows, first):
    arguments = inputs(rows, first=first)[name]
    for ours, torch_s in zip(results(loops, name, arguments), results(passes, name, arguments), strict=True):
        torch.testing.assert_close(ours, torch_s, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("first", [0, 3])
def test_bfloat16_is_rounded_once(name, rows, first):
    """The error against float64 is that of rounding the result, and at most that of plain torch, which rounds more often."""

    def converted(value, matrices, vectors):
        """An argument with its matrices and vectors in other types; columns of a wider matrix stay that."""
        if isinstance(value, Norm):
            return Norm(*(tensor.to(vectors) for tensor in value[:4]), *value[4:])
        if value.dim() == 1 or value._base is None:
            return value.to(vectors if value.dim() == 1 else matrices)
        return value._base.to(matrices).as_strided(value.shape, value.stride(), value.storage_offset())

    arguments = [converted(value, torch.bfloat16, torch.float32) for value in inputs(rows, first=first)[name]]
    expected = results(passes, name, [converted(value, torch.float64, torch.float64) for value in arguments])
    for ours, torch_s, reference in zip(results(loops, name, arguments), results(passes, name, arguments), expected, strict=True):
        assert ours.dtype == torch_s.dtype
        assert ours.shape == reference.shape
        if ours.dtype == torch.bfloat16:
            size = reference.abs() + (1 if name == "combine" else 0)  # its terms may cancel
            assert ((ours - reference).abs() <= 2**-8 * size + 1e-5).all()
        else:
            error, allowed = (ours - reference).abs().max(), (torch_s - reference).abs().max()
            assert error <= 2 * allowed + 1e-5 * reference.abs().max()


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even():
    x = torch.arange(1, 257, dtype=torch.bfloat16)[:, None].repeat(1, 64)
    scale = torch.linspace(1, 2, 65)[1:]  # products of 16 bits, exact in float32; many lie midway between two of 8 bits
    ours = loops.bn_relu(x, Norm(torch.zeros(64), torch.ones(64), scale, torch.zeros(64), 0.0, True))
    assert torch.equal(ours, (x.float() * scale).bfloat16())
    far = torch.tensor([[float("inf"), float("nan"), 3.4e38, 1e-40, -1.0]], dtype=torch.bfloat16)
    ours = loops.combine(far, torch.zeros_like(far), *(torch.full((5,), value) for value in (1.0, 0.0, 0.0)))
    assert torch.equal(ours.nan_to_num(7), far.nan_to_num(7)) and ours.isnan().tolist() == [[False, True, False, False, False]]


def test_what_is_no_number_passes_through_and_minus_infinity_does_not():
    x, norm = inputs(3)["bn_relu"]
    x = x.clone()
    x[1, 2], x[2, 2] = float("nan"), -float("inf")
    a = loops.bn_relu(x, norm._replace(weight=norm.weight.abs()))
    assert a.isnan().nonzero().tolist() == [[1, 2]] and a[2, 2] == 0
    d_relu = loops.relu_backward(torch.full_like(x, float("nan")), x, norm)[0]
    assert torch.equal(d_relu.isnan(), ~(passes.bn_relu(x, norm) <= 0))


def test_sums_do_not_depend_on_the_number_of_threads():
    x = torch.randn(5000, 30)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(loops.statistics(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_runs_with_the_threads_of_torch():
    """In some installations Numba and torch have one pool of threads, whose size Numba sets when it is imported."""
    program = "import torch; torch.set_num_threads(1); from fused import loops; loops.statistics(torch.randn(5, 3));"
    program += "print(torch.get_num_threads(), loops.numba.get_num_threads())"
    env = os.environ | {"NUMBA_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "1"]


def double(x):
    x *= 2


def test_a_cache_that_is_damaged_or_cannot_be_written_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(loops.numba.config, "CACHE_DIR", str(tmp_path))

    def hits():
        function, x = loops.compiled(double), np.ones(3)
        function(x)
        assert x.tolist() == [2, 2, 2]
        return function.stats.cache_hits.total()

    assert (hits(), hits()) == (0, 1)
    for suffix in ("nbi", "nbc"):
        [path] = tmp_path.rglob(f"*.{suffix}")
        path.write_bytes(bytes(50))
        assert (hits(), hits()) == (0, 1)  # and is mended
    path.unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loops.FunctionCache, "save_overload", full)
    assert hits() == 0
