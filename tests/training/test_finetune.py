"""Fine-tuning: which weights a run starts from, what of them it takes, what stays frozen."""

import copy
import hashlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from conftest import ROOT, TINY, assert_same_run, status_of
from helpers import finished, make, no_amp, sgd, torchrun, write_folder

import evaluate
import fused
import publish
import train
from densenet import BLOCKS, DenseNet, densenet121
from inputs.splits import NORMALIZE
from training.finetune import freeze, parameter_groups, read_source, take, training_mode
from training.step import Step

DIGITS = "--device cpu --dataset digits --image-size 8 --limit-train 200 --limit-test 100 --epochs 1 --precision fp32".split()
FOLDER = "--device cpu --dataset folder --data images --image-size 8 --no-augment --batch-size 4 --precision fp32".split()


def state(path, part="model"):
    return torch.load(path)[part]


def parameters(model):
    return {name: value for name, value in model.items() if "running" not in name and "tracked" not in name}


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def trained(tiny):
    assert tiny("--save", "trained", "--epochs", "1", "--precision", "fp32") == 0 and publish.main(["trained"]) == 0
    return Path("trained/latest.pth")


@pytest.mark.parametrize("name", ["latest.pth", "weights.safetensors"])
def test_a_run_starts_from_weights_and_has_their_network(trained, tiny, name, capsys):
    assert "safetensors" not in name or publish.main(["trained", "--export", "safetensors"]) == 0
    assert tiny("--save", "run", "--lr", "0", "--init-from", f"trained/{name}", args=DIGITS) == 0
    assert f"weights taken from trained/{name}\n" in capsys.readouterr().out
    assert_equal(parameters(state("run/latest.pth")), parameters(state(trained)))
    assert state("run/latest.pth", "config")["arguments"]["depth"] == 10


def test_what_does_not_fit_is_named_and_starts_as_without_weights(trained, tiny, tmp_path, capsys):
    flags = ["--epochs", "1", "--lr", "0", "--depth", "10", "--growth-rate", "4", "--data"]

    def line(*more, classes):
        folder = str(write_folder(tmp_path / classes, size=(8, 8), classes=classes))
        assert tiny("--save", classes, *flags, folder, *more, args=FOLDER) == 0
        return next((line for line in capsys.readouterr().out.splitlines() if "taken from" in line), None)

    assert line(classes="ab") is None
    taken, classifier = f"weights taken from {trained}", "classifier.weight (2, 9), there (10, 9); classifier.bias (2,), there (10,)"
    assert line("--init-from", str(trained), classes="cd") == f"{taken}; fresh: {classifier}"
    run, fresh, before = (parameters(state(path)) for path in ("cd/latest.pth", "ab/latest.pth", trained))
    assert_equal(run, {name: (fresh if name.startswith("classifier.") else before)[name] for name in before})
    grey = line("--init-from", str(trained), "--channels", "1", classes="ef")
    assert grey == f"{taken} (3 input channels summed); fresh: {classifier}"
    assert "fresh: classifier.weight (10, 9), there of other classes; classifier.bias (10,), there" in line("--init-from", str(trained), classes="ghijklmnop")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_stem_for_other_channels_computes_the_same_of_grey_images(channels):
    theirs = DenseNet(depth=10, in_channels=4 - channels).eval()
    torch.save({"model": theirs.state_dict()}, "weights.pth")
    ours, source = DenseNet(depth=10, in_channels=channels).eval(), read_source("weights.pth", channels=channels)
    assert take(ours, source, "that") == f"weights taken from that (its model, {4 - channels} input channels {'summed' if channels == 1 else 'spread'})"
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.expand(-1, channels, -1, -1)), theirs(x.expand(-1, 4 - channels, -1, -1)))


def test_a_resumed_run_with_frozen_parts_is_the_run_that_was_not_stopped(trained, tmp_path, tiny, capsys):
    """It needs the file of weights no more, whose normalisation it has; --head-lr keeps its proportion to --lr."""
    write_folder(tmp_path / "images", size=(8, 8), train=6)
    flags = [*FOLDER, "--valid-size", "4", "--init-from", str(trained), "--freeze", "stem,", "blocks.0", "--head-lr", "0.2", "--schedule", "constant"]
    assert tiny("--save", "whole", "--epochs", "3", args=flags) == 0
    assert tiny("--save", "run", "--epochs", "1", args=flags) == 0
    normalize, before = state(trained, "normalize"), state(trained)
    shutil.rmtree("trained")
    assert tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 0
    assert_same_run("whole", "run", logs=("train.csv", "valid.csv", "test.csv"))
    assert state("run/latest.pth", "normalize") == normalize != state("run/latest.pth", "measured")
    frozen, after = {name for name in before if name.startswith(("stem.", "blocks.0."))}, state("run/latest.pth")
    assert_equal({name: after[name] for name in frozen}, {name: before[name] for name in frozen})
    assert publish.main(["run"]) == 0 and evaluate.main(["run/weights.pth", "--split", "valid", "--precision", "fp32"]) == 0
    assert tiny("--save", "run", "--resume", "--epochs", "4", "--lr", "0.01", args=[]) == 0
    for run, rate in (("whole", 0.1), ("run", 0.01)):
        groups = state(f"{run}/latest.pth", "optimizer")["param_groups"]
        assert [group["lr"] for group in groups] == [pytest.approx(rate), pytest.approx(2 * rate)]
    assert tiny("--save", "run", "--resume", "--freeze", "stem", args=[]) == 2
    assert "was started with --freeze stem,blocks.0, not stem" in capsys.readouterr().err


def test_the_logged_rate_is_that_of_what_trains(trained, tiny):
    flags = ["--init-from", str(trained), "--epochs", "1", "--schedule", "constant", "--lr", "0.1", "--head-lr", "0.02"]
    for parts, rate in (("stem", 0.1), ("features", 0.02)):
        assert tiny("--save", parts, *flags, "--freeze", parts, args=DIGITS) == 0
        assert pd.read_csv(f"{parts}/train.csv").lr.tolist() == [pytest.approx(rate)]


def named(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def features(weights):
    return {name.removeprefix("features."): value for name, value in weights.items() if name.startswith("features.")}


def early(weights):
    """As torchvision's early releases named them."""
    return {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in weights.items() if "tracked" not in k}


MOMENTUM = {"state": {0: {"momentum_buffer": torch.ones(1)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
HEAD = "fresh: classifier.weight (3, 1024), not there; classifier.bias (3,), not there"


@pytest.mark.parametrize(("form", "told"), [
    (dict, ""),
    (early, ""),
    (lambda w: {"optimizer": MOMENTUM, "model_state_dict": w}, " (its model_state_dict)"),
    (lambda w: {"model": {"weights": named("module._orig_mod.", w)}}, " (its model.weights, names without module._orig_mod.)"),
    (lambda w: {k if k.startswith("classifier") else f"backbone.{k}": v for k, v in w.items()}, " (names without backbone.)"),
    (lambda w: named("encoder_q.", w) | {"queue": torch.ones(2)}, " (names without encoder_q.); not taken: queue"),
    (lambda w: named("0.", features(w)), f" (names without 0.); {HEAD}"),
])  # fmt: skip
def test_weights_are_found_in_files_of_other_programs(form, told):
    torch.manual_seed(0)
    theirs, ours = torchvision.models.densenet121(num_classes=3).eval(), densenet121(num_classes=3).eval()
    torch.save(form(theirs.state_dict()), "weights.pth", _use_new_zipfile_serialization=form is not early)
    source = read_source("weights.pth")
    assert source["normalize"] == NORMALIZE["imagenet"]
    assert take(ours, source, "that", list("abc")) == f"weights taken from that{told}"
    ours.classifier, x = theirs.classifier if HEAD in told else ours.classifier, torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_imagenet_is_what_torchvision_publishes(monkeypatch, tmp_path, tiny, capsys):
    """In the place of the web, a folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(early(torchvision.models.densenet121(num_classes=3).state_dict()), "weights.pth", _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(Path("weights.pth").read_bytes()).hexdigest()[:8]
    url = "file://" + str(tmp_path / "web" / f"densenet121-{digest}.pth")
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "url", property(lambda self: url))
    write_folder(tmp_path / "images", size=(40, 40))
    flags = [*FOLDER, "--batch-size", "2", "--image-size", "32", "--init-from", "imagenet", "--save", "run", "--epochs", "1", "--limit-train", "2"]

    assert tiny(args=flags) == 2
    assert "say of which network, with --arch: densenet121, densenet161, densenet169, densenet201" in capsys.readouterr().err
    assert tiny("--arch", "densenet121", args=flags) == 2 and not Path("run").exists()
    err = capsys.readouterr().err
    assert f"cannot download {url} (" in err and err.endswith(f"put that file into {tmp_path / 'home/hub/checkpoints'} by hand\n")
    (tmp_path / "web").mkdir()
    shutil.copy("weights.pth", url.removeprefix("file://"))
    assert tiny("--arch", "densenet121", "--freeze", "features", args=flags) == 0
    out = capsys.readouterr().out
    assert "taken from imagenet; fresh: classifier.weight (2, 1024), there (3, 1024)" in out
    assert "frozen: features; 2,050 parameters are trained" in out
    assert state("run/latest.pth", "normalize") == NORMALIZE["imagenet"]
    expected = {k: v for k, v in read_source("weights.pth")["model"].items() if "classifier" not in k}
    assert_equal({k: v for k, v in state("run/latest.pth").items() if k in expected}, expected)


def train_frozen(block, names):
    """A network and its copy after three steps in float64, and the optimiser."""
    torch.manual_seed(0)
    model = make(growth_rate=4).train()
    model.set_block(block)
    before = copy.deepcopy(model.state_dict())
    freeze(model, names)
    step = Step(model, sgd(parameter_groups(model, None)), no_amp)
    training_mode(model)
    for i in range(3):
        step.set_learning_rate(0.5 ** (3 + i))
        step(torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(10, (6,)), 6)
    return before, model, step.optimizer


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("names", ["stem,blocks.0,transitions.0", "blocks.1,norm", "features", "transitions.1,classifier"])
def test_frozen_parts_stay_as_they_are_with_every_block(monkeypatch, block, names):
    """And what comes before all that is trained keeps nothing for the backward pass in the fused one."""
    kept, apply = [], fused.SharedBuffer.apply
    monkeypatch.setattr(fused.SharedBuffer, "apply", lambda x, layers, keep, *rest: kept.append(keep) or apply(x, layers, keep, *rest))
    before, model, optimizer = train_frozen(block, names)
    assert block != "fused" or kept == [names[:4] not in ("stem", "feat"), *[names != "features"] * 2] * 3
    frozen = tuple(f"{name}." for name in names.split(","))
    for name, value in model.state_dict().items():
        is_frozen = name.startswith(frozen) or ("features" in names and not name.startswith("classifier"))
        assert torch.equal(value, before[name]) == is_frozen, name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert set(optimizer.state) == set(trained) and len(trained) < len(list(model.parameters()))
    expected = train_frozen("naive", names)[1].state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_several_processes_start_from_the_same_weights_and_keep_frozen_parts(trained):
    """Three of them: the sum of equal numbers, divided by three, is not always that number again."""
    flags = ["--epochs", "1", "--init-from", str(trained), "--freeze", "blocks.1,norm", "--head-lr", "0.3", "--block", "fused", "--ema", "0.5"]
    output = finished(torchrun(3, str(ROOT / "train.py"), *TINY, *flags, "--save", "run", "--no-plot"), 0)
    assert output.count("weights taken from") == output.count("frozen: blocks.1, norm") == 1
    before = state(trained)
    for after in (state("run/latest.pth"), state("run/latest.pth", "ema")["model"]):
        for name, value in after.items():
            kept = torch.equal(value, before[name])
            assert kept == name.startswith(("blocks.1.", "norm.")) or "tracked" in name, name


@pytest.mark.parametrize(("flags", "words"), [
    ("--init-from trained/latest.pth --depth 40", "only 0 of this network's 197 tensors are there, among stem.conv.weight, blocks.0.layers.0.norm1.weight, "),
    ("--init-from nowhere.pth", "nowhere.pth is not a checkpoint file, such as latest.pth in a run: No such file"),
    ("--init-from trained/config.json", "trained/config.json is damaged, or holds other things than weights"),
    ("--init-from numbers.pth", "--init-from numbers.pth: the file holds no weights"),
    ("--init-from altered.pth", "altered.pth is not a checkpoint of train.py"),
    ("--init-from file.pt2", "file.pt2 could run any code"),
    ("--freeze blocks.9", "--freeze blocks.9: the network has the parts features, stem, blocks.0, blocks.1, blocks.2, transitions.0, transitions.1, norm, classifier"),
    ("--freeze=", "--freeze : the network has the parts"),
    ("--freeze features,classifier", "--freeze features,classifier leaves nothing to train"),
    ("--freeze classifier --head-lr 1", "--head-lr: the classifier is frozen"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(trained, capsys, flags, words):
    torch.save({0: torch.ones(1)}, "numbers.pth")
    torch.save(torch.load(trained) | {"config": 3}, "altered.pth")
    capsys.readouterr()
    assert status_of(train.main, [*DIGITS, *flags.split(), "--save", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ") and err.count("\n") == 1 and words in err
    assert not Path("run").exists()
