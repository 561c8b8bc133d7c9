"""A checkpoint is data from outside: whatever is altered in one, each command says so in a line."""

import importlib
import shutil

import pytest
import torch
from conftest import TINY, status_of

import train
from common.checkpoints import read_checkpoint

DELETED = object()
EDITED = " is not a checkpoint of train.py (ValueError: edited by hand"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory and, by optimiser, what its latest.pth holds."""
    folder, checkpoints = tmp_path_factory.mktemp("trained"), {}
    for opt in ("sgd", "adam"):
        path = folder / opt
        flags = ["--valid-size", "50", "--epochs", "2", "--log-every", "2", "--ema", "0.9", "--no-plot", "--no-progress"]
        assert train.main([*TINY, *flags, "--opt", opt, "--save", str(path)]) == 0
        checkpoints[opt] = torch.load(path / "latest.pth", weights_only=True)
    return folder / "sgd", checkpoints


def altered(value, path, new):
    """A copy with ``new`` at ``path``, or nothing if that is DELETED."""
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else list(value)
    items[path[0]] = altered(items.get(path[0]) if isinstance(items, dict) else items[path[0]], path[1:], new)
    if items[path[0]] is DELETED:
        del items[path[0]]
    return items


def older(checkpoint, path, new):
    """An altered copy as an earlier release would have written it, or another program: without a digest."""
    return altered(altered(checkpoint, path, new), ("digest",), DELETED)


def outcomes(checkpoint, source, capsys, commands=("evaluate", "publish", "train")):
    """What commands say of a checkpoint: {name: (exit status, stderr)}."""
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(source, "run", ignore=shutil.ignore_patterns("previous.pth"))
    torch.save(checkpoint, "run/latest.pth")
    shutil.copy("run/latest.pth", "altered.pth")
    answers, flags = {}, {
        "evaluate": ["altered.pth", "--device", "cpu"],
        "publish": ["run", "--ema", "--device", "cpu"],
        "train": ["--resume", "--epochs", "3", "--save", "run", "--no-plot", "--no-progress"],
    }  # fmt: skip
    for name in commands:
        capsys.readouterr()
        answers[name] = status_of(importlib.import_module(name).main, flags[name]), capsys.readouterr().err
    return answers


def test_other_numbers_in_tensors_are_no_edit(trained, capsys):
    """Of weights, means of several runs may be taken."""
    weights = {name: 2 * value for name, value in trained[1]["sgd"]["model"].items()}
    checkpoint = altered(trained[1]["sgd"], ("model",), weights)
    assert outcomes(checkpoint, trained[0], capsys, ["evaluate", "train"]) == {"evaluate": (0, ""), "train": (0, "")}


@pytest.mark.parametrize(
    ("alter", "path", "value", "words"),
    [
        (altered, ("config", "precision"), "fp8", EDITED),
        (altered, ("metrics", "train", 1, "lr"), None, EDITED),
        (altered, ("model", "norm.weight"), torch.ones(15, device="meta"), EDITED),
        (altered, ("optimizer", "state", 0), DELETED, EDITED),
        (older, ("config", "arguments", "batch_size"), 0, "edited, or is of another program: argument --batch-size: 0 is not in 1"),
        (older, ("config", "arguments", "limit_test"), "3", "its argument limit_test is 3"),
        (older, ("config", "arguments", "bottleneck"), 1.5, "argument --bottleneck"),
        (older, ("config", "arguments", "schedule"), DELETED, "its argument schedule is missing"),
        (older, ("config", "model", "growth_rate"), 5, "its network is not that of its arguments"),
        (older, ("config", "block"), "x", "its block is none of naive, checkpoint, fused"),
        (older, ("config",), DELETED, "is not a checkpoint of train.py (KeyError: 'config')"),
        (older, ("classes",), list("abc"), "(ValueError: its classes, or means and standard deviations, are not those of its network)"),
        (older, ("normalize", 1), (1.0,), "is not a checkpoint of train.py (ValueError: expected sequence of length"),
    ],
)
def test_what_no_run_writes_is_refused_by_every_command(trained, capsys, alter, path, value, words):
    checkpoint = alter(trained[1]["sgd"], path, value)
    for name, (status, err) in outcomes(checkpoint, trained[0], capsys).items():
        assert status == 2 and words in err and err.count("\n") == 1, name


@pytest.mark.parametrize("place", [("model",), ("ema", "model")])
@pytest.mark.parametrize(
    ("name", "change"),
    [("norm.weight", lambda x: x[1:]), ("norm.weight", lambda x: x.to("meta")), ("norm.weight", lambda x: DELETED), ("more", torch.clone)],
)
def test_weights_have_to_fit(trained, capsys, place, name, change):
    checkpoint = older(trained[1]["sgd"], (*place, name), change(trained[1]["sgd"]["model"]["norm.weight"]))
    answers = outcomes(checkpoint, trained[0], capsys, ["publish", "train"])
    assert answers["train"][0] == 2 and "the checkpoint's weights do not fit its network" in answers["train"][1]
    assert answers["publish"][0] == (2 if "ema" in place else 0)  # it publishes the averaged ones


@pytest.mark.parametrize("opt", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("path", "value"),
    [((), None), ((0,), {"other": torch.zeros(2)}), ((0,), {"momentum_buffer": torch.zeros(2)}), ((), {99: {"step": torch.zeros(())}})],
)
def test_an_optimiser_takes_only_its_own_state(trained, capsys, opt, path, value):
    checkpoint = older(trained[1][opt], ("optimizer", "state", *path), value)
    assert outcomes(checkpoint, trained[0], capsys, ["train"])["train"] == (
        2, "train.py: error: the optimiser's state in the checkpoint is damaged, or of another program\n",
    )  # fmt: skip


def test_averaged_weights_do_not_go_missing(trained, capsys):
    checkpoint = older(trained[1]["sgd"], ("ema",), DELETED)
    answers = outcomes(checkpoint, trained[0], capsys, ["train", "publish"])
    assert answers["train"][0] == answers["publish"][0] == 2
    assert "training cannot go on from run/latest.pth" in answers["train"][1] and "no averaged weights" in answers["publish"][1]


def test_early_runs_of_several_processes_named_weights_otherwise(trained):
    weights = trained[1]["sgd"]["model"]
    torch.save(older(trained[1]["sgd"], ("model",), {f"module.{name}": value for name, value in weights.items()}), "old.pth")
    assert read_checkpoint("old.pth")["model"].keys() == weights.keys()
