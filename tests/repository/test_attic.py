"""The scripts of attic/: each runs, passes, and fails when something is broken."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
from conftest import ROOT, status_of

from densenet import BLOCKS

ATTIC = ROOT / "attic"
FLAGS = {  # small enough for a test
    "compare_grads": "--small",
    "cudnn_cat": "",
    "loss_at_init": "--depth 10 --image-size 8",
    "numcheck_grads": "",
    "overfit_one_batch": "--depth 16 --image-size 8 --steps 50 --batch-size 32",
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process: run("cudnn_cat", "--with-bug") → exit status and output."""
    monkeypatch.syspath_prepend(ATTIC)

    def run(name, flags=""):
        status = status_of(importlib.import_module(name).main, f"{FLAGS[name]} {flags}".split())
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.mark.parametrize("bug", ["", " --with-bug"])
@pytest.mark.parametrize("command", [*FLAGS, "compare_grads --block checkpoint"])
def test_passes_and_would_have_found_the_bug_of_2017(run, command, bug):
    # Gradients grow by a factor per layer: a network of 10 layers is too shallow to show it.
    deeper = " --depth 40" if bug and command == "loss_at_init" else ""
    status, output = run(*f"{command}{bug}{deeper}".split(" ", 1))
    assert status == bool(bug), output
    assert output.endswith(f"verdict: {'failed' if bug else 'passed'}\n")
    if bug and command == "numcheck_grads":  # as in 2017, cat and linear layers show nothing
        assert "cat + linear: 540 entries of the Jacobian are right" in output
        failed = re.findall(r"^FAILED: (cat \+ \w+|block \w+) on cpu", output, re.MULTILINE)
        assert failed == ["cat + convolution", *(f"block {name}" for name in BLOCKS)]


def test_runs_from_anywhere(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, ATTIC / "cudnn_cat.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


PLANTED = {  # script and flags, what is replaced, what makes its replacement, what is said then and what is not
    "slightly wrong gradient of a convolution": (
        "numcheck_grads", "fused.conv3x3_backward", lambda right: lambda *args: (*(found := right(*args))[:-1], found[-1] * (1 + 1e-5)),
        ["block fused on cpu: derivatives by"], ["Jacobian", "naive"]),
    "wrong hidden states": (
        "compare_grads", "densenet.BottleneckLayer.after_conv1", lambda right: lambda self, x: 1.001 * right(self, x),
        ["hidden state of denseblock1.denselayer1", "gradient of denseblock1.denselayer1", "statistics of denseblock1.denselayer2"],
        ["hidden state of norm0", "statistics of norm0", "statistics of denseblock1.denselayer1"]),
    "statistics updated twice": (
        "compare_grads --block checkpoint", "densenet.keep_statistics", lambda right: lambda layer: (nullcontext(), nullcontext()),
        ["statistics of denseblock1"], ["gradient"]),
    "harmless bug": (
        "cudnn_cat", "checks.ReadAsOutput.backward", lambda right: staticmethod(lambda ctx, gradient: gradient), ["proves nothing"], []),
    "large loss": (
        "loss_at_init", "torch.nn.functional.cross_entropy", lambda right: lambda *args: 2 * right(*args), ["is not what guessing gives"], []),
    "layer without gradient": (
        "loss_at_init", "densenet.Transition.forward", lambda right: lambda self, x: right(self, 0 * x),
        ["not a positive number in every layer"], []),
    "images that are not normalised": (
        "loss_at_init", "inputs.datasets.channel_statistics",
        lambda right: lambda pixels: tuple(tuple(v / 255 for v in values) for values in right(pixels)), ["not normalised"], []),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_notices(run, monkeypatch, fault):
    command, place, wrong, said, unsaid = PLANTED[fault]
    monkeypatch.setattr(place, wrong(pkgutil.resolve_name(place)))
    status, output = run(*command.split(" ", 1))
    failures = "\n".join(line for line in output.splitlines() if line.startswith("FAILED"))
    assert status == 1
    assert all(words in failures for words in said) and not any(words in failures for words in unsaid), output
