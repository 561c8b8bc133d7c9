"""The scripts of attic/: each runs, passes, and fails when something is broken."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import status_of

import densenet
import fused
from inputs import splits

ATTIC = Path(__file__).parents[2] / "attic"
SCRIPTS = sorted(path.stem for path in ATTIC.glob("*.py") if path.stem != "checks")
# Small enough for a test.
FLAGS = {
    "compare_grads": ["--small"],
    "loss_at_init": ["--depth", "10", "--image-size", "8"],
    "overfit_one_batch": ["--depth", "16", "--image-size", "8", "--steps", "50", "--batch-size", "32"],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process: run("cudnn_cat", "--with-bug") → exit status and output."""
    monkeypatch.syspath_prepend(ATTIC)

    def run(name, *flags):
        status = status_of(importlib.import_module(name).main, [*FLAGS.get(name, []), *flags])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def quick(monkeypatch, run):
    """numcheck_grads with half of its Jacobians."""
    numcheck_grads = importlib.import_module("numcheck_grads")
    right = numcheck_grads.cases
    monkeypatch.setattr(
        numcheck_grads,
        "cases",
        lambda device: (case for case in right(device) if not case[0].endswith("no bottleneck")),
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_passes(run, name):
    status, output = run(name)
    assert status == 0, output
    assert output.endswith("verdict: passed\n")
    assert "FAILED" not in output


def test_runs_from_anywhere(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ATTIC / "cudnn_cat.py"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_numcheck_tells_a_convolution_from_a_linear_layer(run, quick):
    """As in 2017: with the bug the check of cat and linear passes, that of cat and convolution fails."""
    status, output = run("numcheck_grads", "--with-bug")
    assert status == 1
    results = {line[:20].strip(): line.split()[-1] for line in output.splitlines() if line.endswith(("equal", "WRONG"))}
    assert results == {
        "cat + linear": "equal",
        "cat + convolution": "WRONG",
        "block naive": "WRONG",
        "block checkpoint": "WRONG",
        "block fused": "equal",
    }


def test_numcheck_notices_a_wrong_backward_pass(run, quick, monkeypatch):
    right = fused.conv3x3_backward

    def wrong(*args):
        d_relu, *sums, d_conv = right(*args)
        return d_relu, *sums, d_conv * 1.01

    monkeypatch.setattr(fused, "conv3x3_backward", wrong)
    status, output = run("numcheck_grads")
    failures = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert status == 1
    assert len(failures) == 2 and all("block fused" in line for line in failures)


@pytest.mark.parametrize("name", ["compare_grads", "cudnn_cat", "loss_at_init", "overfit_one_batch"])
def test_would_have_found_the_bug_of_2017(run, name):
    # Gradients grow by a factor per layer: a network of 10 layers is too shallow to show it.
    status, output = run(name, "--with-bug", *(["--depth", "40"] if name == "loss_at_init" else []))
    assert status == 1, output
    assert output.endswith("verdict: failed\n")


def test_compare_notices_wrong_hidden_states_and_statistics(run, monkeypatch):
    right = densenet.BottleneckLayer.after_conv1
    monkeypatch.setattr(densenet.BottleneckLayer, "after_conv1", lambda self, x: 1.001 * right(self, x))
    status, output = run("compare_grads")
    assert status == 1
    assert "FAILED: hidden state of denseblock1.denselayer1" in output
    assert "FAILED: gradient of denseblock1.denselayer1" in output
    assert "FAILED: statistics of denseblock1.denselayer2" in output
    for before in ("hidden state of pool0", "statistics of norm0", "statistics of denseblock1.denselayer1"):
        assert f"FAILED: {before}" not in output


def test_compare_notices_statistics_updated_twice(run, monkeypatch):
    from contextlib import nullcontext

    assert run("compare_grads", "--block", "checkpoint")[0] == 0
    monkeypatch.setattr(densenet, "keep_statistics", lambda norm: (nullcontext(), nullcontext()))
    status, output = run("compare_grads", "--block", "checkpoint")
    assert status == 1
    assert "FAILED: statistics of denseblock1" in output and "FAILED: gradient" not in output


def test_cudnn_cat_notices_that_it_cannot_notice(run, monkeypatch):
    """Were the emulated bug harmless, nothing would follow from the check."""
    checks = importlib.import_module("checks")
    monkeypatch.setattr(checks.ReadAsOutput, "backward", staticmethod(lambda ctx, gradient: gradient))
    status, output = run("cudnn_cat")
    assert status == 1
    assert "proves nothing" in output


def test_loss_at_init_notices_large_logits(run, monkeypatch):
    right = densenet.init_weights

    def wrong(module):
        right(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=5)

    monkeypatch.setattr(densenet, "init_weights", wrong)
    status, output = run("loss_at_init")
    assert status == 1
    assert "FAILED: DenseNet-BC-10: loss" in output


def test_loss_at_init_notices_a_layer_without_gradient(run, monkeypatch):
    right = densenet.Transition.forward
    monkeypatch.setattr(densenet.Transition, "forward", lambda self, x: right(self, 0 * x))
    status, output = run("loss_at_init")
    assert status == 1
    assert "not a positive number in every layer" in output


def test_loss_at_init_notices_images_that_are_not_normalised(run, monkeypatch):
    right = splits.channel_statistics
    monkeypatch.setattr("inputs.datasets.channel_statistics", lambda pixels: tuple(tuple(v / 255 for v in part) for part in right(pixels)))
    status, output = run("loss_at_init")
    assert status == 1
    assert "not normalised" in output


def test_overfitting_notices_training_code_that_does_not_train(run, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    status, output = run("overfit_one_batch")
    assert status == 1
    assert "the training code does not train" in output
    assert "FAILED: VGG-style network: error" in output


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("loss_at_init", ["--depth", "43"], "loss_at_init.py: error: --depth 43: a network with bottlenecks needs"),
        ("loss_at_init", ["--batch-size", "1"], "error: --batch-size 1: batch norm needs"),
        ("overfit_one_batch", ["--steps", "0"], "overfit_one_batch.py: error: --steps 0"),
        ("overfit_one_batch", ["--dataset", "folder", "--data", "nowhere"], "overfit_one_batch.py: error: nowhere"),
        ("compare_grads", ["--block", "fast"], "compare_grads.py: error: argument --block: invalid choice"),
    ],
)
def test_mistakes_end_in_one_line(run, name, flags, message):
    status, output = run(name, *flags)
    assert status == 2
    assert message in output
    assert output.count("\n") == 1
