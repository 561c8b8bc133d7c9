"""The flags of train.py: defaults, old spellings, contradictions, what a resumed run may change."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import status_of

import train
from common.console import nonempty
from training import flags
from training.arguments import parse_args
from training.flags import make_parser


def parsed(command):
    return parse_args(command.split())[0]


def refused(capsys, *flags):
    """The one line that train.py says when it refuses ``flags`` with status 2."""
    assert status_of(train.main, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(("command", "expected"), [
    ("", {"dataset": "cifar10", "depth": 100, "growth_rate": 12, "reduction": 0.5, "bottleneck": True, "drop_rate": 0.0}),
    ("", {"epochs": 300, "batch_size": 64, "opt": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    ("", {"schedule": "step", "augment": True, "crop_fill": "mean", "flip": "horizontal", "shift": 4, "save": "work/cifar10.base"}),
    ("", {"valid_size": 0, "patience": 0, "keep_every": 0, "milestones": None, "tensorboard": False}),
    ("--dataset digits", {"depth": 16, "epochs": 20, "augment": False, "save": "work/digits.base"}),
    ("--dataset digits --depth 40 --augment", {"depth": 40, "augment": True}),
    ("--dataset svhn", {"depth": 100, "epochs": 40, "augment": False, "valid_size": 6000}),
    ("--opt adam", {"lr": 1e-3, "schedule": "constant", "weight_decay": 1e-4}),
    ("--opt rmsprop", {"lr": 1e-2}),
    ("--opt adamw", {"weight_decay": 0.01}),
    ("--recipe modern", {"recipe": "modern", "schedule": "cosine", "epochs": 300}),
    ("--dataset folder --arch densenet121", {"image_size": 224}),
    ("--dataset folder --arch densenet121 --image-size 64", {"image_size": 64}),
    ("--dataset folder", {"image_size": 32}),
    ("--arch densenet121", {"image_size": 32}),
])  # fmt: skip
def test_defaults_are_the_recipe_of_the_paper_and_depend_on_others(command, expected):
    args = parsed(command)
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_recipe_is_its_flags_and_single_flags_override_it(monkeypatch):
    monkeypatch.setitem(flags.RECIPES, "modern", {"schedule": "cosine", "cutout": 16, "ema": 0.999, "opt": "adamw"})
    args = parsed("--recipe modern")
    assert (args.schedule, args.cutout, args.ema, args.opt, args.lr) == ("cosine", 16, 0.999, "adamw", 1e-3)
    assert vars(args) == vars(parsed("--schedule cosine --cutout 16 --ema 0.999 --opt adamw")) | {"recipe": "modern"}
    args = parsed("--recipe modern --ema 0 --opt sgd --schedule step")
    assert (args.schedule, args.cutout, args.ema, args.opt, args.lr) == ("step", 16, 0, "sgd", 0.1)


def test_every_flag_says_what_it_does_and_its_default():
    for action in make_parser()._actions:
        if action.option_strings[0] not in ("-h", "--arch"):
            assert "(default: " in action.help, action.option_strings


def test_old_command_lines():
    """Of bamos and gpleiss."""
    args = parsed("--batchSz 32 --nEpochs 300 --no-cuda --save DIR --seed 1 --opt adam")
    assert (args.batch_size, args.epochs, args.device, args.save, args.seed, args.opt) == (32, 300, "cpu", "DIR", 1, "adam")
    for flag, block in (("--efficient True", "checkpoint"), ("--efficient", "checkpoint"), ("--efficient=False", "naive")):
        args = parsed(f"{flag} --depth 40 --growth_rate 24 --n_epochs 9 --batch_size 32 --valid_size 5000")
        assert (args.block, args.depth, args.growth_rate, args.epochs) == (block, 40, 24, 9)
        assert (args.batch_size, args.valid_size) == (32, 5000)


def test_presets_set_the_architecture():
    options = flags.model_options(parsed("--arch densenet_40_12 --drop-rate 0.2"), 10)
    assert (options["depth"], options["bottleneck"], options["reduction"], options["drop_rate"]) == (40, False, 1.0, 0.2)


@pytest.mark.parametrize(("command", "words"), [
    ("--depth 43", "depth 43: a network with bottlenecks needs depth = 6n + 4, such as 40 or 46"),
    ("--reduction 0", "reduction 0.0: needs a number in (0, 1]"),
    ("--drop-rate 1", "drop rate 1.0"),
    ("--epochs 0", "argument --epochs: 0 is not in 1 … 1,000,000"),
    ("--batch-size x", "argument --batch-size: invalid int value: 'x'"),
    ("--momentum 0", "add --no-nesterov"),
    ("--dataset imagenet", "invalid choice: 'imagenet'"),
    ("--depht 40", "unrecognized arguments: --depht 40"),
    ("--device cuda:99", "device 'cuda:99' is not available here"),
    ("--save=", "argument --save: needs a name, and got nothing"),
    ("--device meta", "device 'meta' is not available here"),
    ("--resume --overwrite", "--resume and --overwrite exclude each other"),
    ("--block fused --compile", "--block fused leaves --compile nothing to fuse"),
    ("--cuda-graph --device cpu", "--cuda-graph is for CUDA GPUs, without --compile"),
    ("--dataset digits --image-size 3", "images of 3×3 pixels are too small for this network"),
    ("--dataset digits --white 9", "--white is for --dataset folder: leave it out"),
    ("--channels 1", "images of cifar10 have 32×32 pixels, 3 channels: leave out --image-size, --channels"),
    ("--image-size 64", "images of cifar10 have 32×32 pixels, 3 channels"),
    ("--dataset digits --crop-fill black", "--crop-fill: no image is shifted in this run"),
    ("--no-augment --flip both", "--flip: no image is augmented in this run"),
    ("--dataset folder --image-size 128 --shift 3", "--shift: no image is shifted in this run"),
    ("--dataset folder --policy rand", "--policy: no image is streamed and augmented in this run"),
    ("--dataset digits --fold 1/2", "--fold is for --dataset folder: leave it out"),
    ("--dataset folder --fold 3/2", "argument --fold: 3/2 is none of 1/2 … 2/2"),
    ("--dataset folder --fold 1/2 --test-size 9", "--fold 1/2 is the test split: leave out --test-size"),
    ("--milestones 3 --schedule cosine", "--milestones are for --schedule step"),
    ("--gamma 0.2", "--gamma 0.2 is the factor at --milestones: add those"),
    ("--dataset digits --patience 2", "--patience waits for a lower validation error: hold out images"),
    ("--arch densenet_bc_100_12 --reduction 0.9", "--arch densenet_bc_100_12 sets the reduction"),
    ("--arch densenet121 --depth 40", "--arch densenet121 sets the depth"),
    ("--cutout 33", "--cutout 33 is larger than the images, of 32 pixels"),
    ("--epochs 5 --warmup 5", "--warmup 5 takes all of 5 epochs: choose less"),
    ("--seed 4294967296", "4294967296 is not in 0 … 4,294,967,295"),
    ("--resume --save nowhere", "nowhere has no latest.pth to resume"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(capsys, command, words):
    assert words in refused(capsys, *command.split())
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e39", str(10**20)])
def test_every_number_has_its_range(capsys, value):
    for action in make_parser()._actions:
        if action.type not in (None, nonempty):
            refused(capsys, f"{action.option_strings[0]}={value}")


def test_resume_keeps_the_arguments_and_refuses_others(tiny, capsys):
    assert tiny("--save", "run", "--weight-decay", "0.01", "--epochs", "2", "--head-lr", "0.2") == 0
    assert "--head-lr is kept in proportion to --lr, which is 0" in refused(capsys, "--resume", "--save", "run", "--epochs", "3", "--lr", "0")
    assert "--lr 0.5: no epoch of the run in run is left to train" in refused(capsys, "--resume", "--save", "run", "--lr", "0.5")
    assert train.main(["--resume", "--save", "run", "--epochs", "3", "--no-plot", "--no-progress"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["arguments"]["weight_decay"] == 0.01
    assert [entry["epoch"] for entry in config["resumed"]] == [2]
    log, checkpoint = pd.read_csv("run/train.csv"), torch.load("run/latest.pth", weights_only=True)
    assert checkpoint["seconds"] > sum(200 / (log.images_per_second + 0.05))  # of both processes; rounded
    capsys.readouterr()
    assert tiny("--resume", "--save", "run", "--block", "fused", args=[]) == 0
    out = capsys.readouterr().out
    assert "block fused" in out and "; resuming run after epoch 3\n" in out and "all epochs are done already" in out
    assert pd.read_csv("run/test.csv").epoch.tolist() == [1, 2, 3]
    for flag, value in (("--depth", "16"), ("--seed", "9"), ("--dataset", "cifar10"), ("--batch-size", "65")):
        assert f"was started with {flag}" in refused(capsys, "--resume", "--save", "run", flag, value)
    assert "--epochs 2: the run in run has finished 3 already" in refused(
        capsys, "--resume", "--save", "run", "--epochs", "2"
    )
