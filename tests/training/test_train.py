"""Training: what a run writes, what it goes on with, what ends it. What it computes is in test_recipe.py."""

import functools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import assert_same_run
from helpers import write_folder
from PIL import Image

import publish


def test_a_run_writes_what_it_should(tiny, capsys):
    assert tiny("--save", "run") == 0
    assert sorted(p.name for p in Path("run").iterdir()) == [".lock", "config.json", "latest.pth", "previous.pth", "test.csv", "train.csv"]
    log, test = pd.read_csv("run/train.csv"), pd.read_csv("run/test.csv")
    assert list(log) == ["epoch", "loss", "error", "lr", "images_per_second", "peak_memory_mib"]
    assert list(test) == ["epoch", "loss", "error"]
    assert log.epoch.tolist() == test.epoch.tolist() == [1, 2, 3, 4]
    assert log.lr.tolist() == [0.1, 0.01, 0.001, 0.001]
    assert test.error.between(0, 100).all() and (log.images_per_second > 0).all()
    config = json.loads(Path("run/config.json").read_text())
    assert config["arguments"]["depth"] == 10 and config["arguments"]["lr"] == 0.1
    assert config["parameters"] == 2666 and config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["commit"] or "0" * 40)

    checkpoint = torch.load("run/latest.pth", weights_only=True)
    assert set(checkpoint) == {
        "model", "optimizer", "epoch", "seconds", "rng", "config", "normalize", "classes", "metrics", "scaler",
        "manifest", "measured", "digest",
    }  # fmt: skip
    assert checkpoint["classes"] == list("0123456789")
    assert checkpoint["metrics"]["test"][-1]["error"] == test.error.iloc[-1]
    assert checkpoint["seconds"] > sum(200 / (log.images_per_second + 0.05))  # which is rounded
    out = capsys.readouterr().out
    assert f"test error {test.error.iloc[-1]:.2f} % after epoch 4; all epochs took" in out
    assert "best on test" in out


NEWER = "--label-smoothing 0.1 --cutout 3 --mixup 0.5 --warmup 1.5 --ema 0.9 --decay weights --accumulate 2 --clip-grad 1 --class-weights balanced".split()


def test_a_newer_recipe_resumes_bit_for_bit(tiny, capsys):
    flags = [*NEWER, "--recipe", "modern", "--schedule", "constant", "--batch-size", "30", "--valid-size", "300", "--augment"]
    assert tiny(*flags, "--save", "whole", "--epochs", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert tiny(*flags, "--save", "run", "--epochs", "2") == 0
    assert tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 0
    logs = ("train.csv", "test.csv", "valid.csv", "test-ema.csv", "valid-ema.csv")
    assert_same_run("whole", "run", logs)
    one, two = (torch.load(f"{name}/latest.pth", weights_only=True)["ema"] for name in ("whole", "run"))
    assert one["updates"] == two["updates"] == 3 * 4  # 200 images, 60 in each
    assert all(torch.equal(two["model"][name], value) for name, value in one["model"].items())
    # What stands in the recipe, as other flags have changed it.
    assert "recipe modern: --schedule constant --warmup 1.5 --label-smoothing 0.1 --cutout 3 --ema 0.9" in lines
    error = pd.read_csv("whole/test-ema.csv").error.iloc[-1]
    assert f"test error {error:.2f} % of the averaged weights, after the same epoch" in lines
    assert any(line.startswith("epoch   3") and f"test-ema {error:5.2f} %" in line for line in lines)
    capsys.readouterr()
    assert tiny("--save", "run", "--resume", "--mixup", "0.2", args=[]) == 2
    assert "the run in run was started with --mixup 0.5, not 0.2" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "test"])
def test_resume_notices_a_replaced_image(tiny, capsys, tmp_path, split):
    """Even if mean and standard deviation are what they were."""
    write_folder(tmp_path / "images")
    assert tiny("--epochs", "1", args=["--dataset", "folder", "--data", "images", "--depth", "10", "--save", "run"]) == 0
    assert "few training images: weights trained on others may help, see --init-from\n" in capsys.readouterr().out
    (tmp_path / "images").rename("elsewhere")
    assert tiny("--resume", "--save", "run", "--data", "elsewhere", "--epochs", "2", args=[]) == 0
    one, other = (tmp_path / "elsewhere" / split / name / "0.png" for name in ("cat", "dog"))
    one.rename("moved.png"), other.rename(one), Path("moved.png").rename(other)
    assert tiny("--resume", "--save", "run", "--epochs", "3", args=[]) == 2
    assert f"images in elsewhere ({split}) have changed since the run in run began" in capsys.readouterr().err
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "elsewhere/train/cat/0.png")
    assert tiny("--resume", "--save", "run", "--epochs", "3", args=[]) == 2
    assert "was trained on other images or classes" in capsys.readouterr().err


def test_a_batch_of_one_image_is_refused_where_batch_norm_would_fail(tiny, capsys):
    flags = ["--image-size", "4", "--limit-train", "65", "--epochs", "1", "--save", "run"]
    for size, more in (("64", []), ("2", ["--accumulate", "2"])):  # in the last batch, one pass of one image
        assert tiny(*flags, "--batch-size", size, *more) == 2 and not Path("run").exists()
        assert f"--batch-size {size} makes a batch of one image" in capsys.readouterr().err
    assert tiny(*flags, "--batch-size", "63") == 0
    assert tiny(*flags, "--image-size", "8", "--save", "other") == 0


def test_log_every_adds_rows_within_epochs(tiny):
    assert tiny("--save", "run", "--epochs", "2", "--log-every", "2", "--batch-size", "50") == 0
    log = pd.read_csv("run/train.csv")
    assert log.epoch.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert log.images_per_second.isna().tolist() == [True, False, True, False]
    tiny("--save", "plain", "--epochs", "2", "--batch-size", "50")
    assert pd.read_csv("plain/train.csv").loss[0] == log.loss[1]


def test_validation_chooses_best_pth(tiny, capsys):
    assert tiny("--save", "run", "--valid-size", "400", "--precision", "bf16") == 0
    valid = pd.read_csv("run/valid.csv")
    best = torch.load("run/best.pth", weights_only=True)
    assert best["epoch"] == valid.epoch[valid.error.idxmin()]
    expected = pd.read_csv("run/test.csv").error[best["epoch"] - 1]
    assert f"test error {expected:.2f} % at epoch {best['epoch']}, which has the lowest validation error" in capsys.readouterr().out


def test_patience_ends_a_run_early_and_a_larger_one_goes_on(tiny, capsys):
    flags = ["--valid-size", "100", "--schedule", "constant", "--lr", "1", "--epochs", "9", "--patience"]
    assert tiny("--save", "whole", *flags, "0", "--keep-every", "4") == 0
    error = pd.read_csv("whole/valid.csv").error
    assert sorted(path.name for path in Path("whole").glob("epoch-*")) == ["epoch-0004.pth", "epoch-0008.pth"]
    best = [int(error[:n].argmin()) + 1 for n in range(1, 10)]  # after each epoch
    end = next(n for n in range(1, 10) if n - best[n - 1] == 2)
    assert tiny("--save", "run", *flags, "2") == 0
    capsys.readouterr()
    for _ in range(2):
        assert json.loads(Path("run/config.json").read_text())["stopped_early"] and len(pd.read_csv("run/valid.csv")) == end
        assert tiny("--save", "run", "--resume", args=[]) == 0
        out = capsys.readouterr().out
        assert f"stopped early: no lower validation error since epoch {end - 2}\n" in out and "images/s" not in out
    assert publish.main(["run"]) == 0
    assert tiny("--save", "run", "--resume", "--patience", "0", args=[]) == 0
    assert_same_run("whole", "run", ("train.csv", "valid.csv", "test.csv"))
    assert not json.loads(Path("run/config.json").read_text())["stopped_early"]


def test_classes_that_mirroring_makes_alike_are_told(tiny, capsys, tmp_path):
    write_folder(tmp_path / "images", classes=("Left hand", "right hand"))
    for flags, told in (([], 1), (["--flip", "vertical"], 0), (["--no-augment"], 0)):
        tiny(*"--dataset folder --data images --depth 10 --epochs 1 --overwrite --save run".split(), *flags, args=[])
        out = capsys.readouterr().out
        assert out.count("class right hand has an opposite, and images are mirrored: see --flip\n") == told
        assert "few training images: weights trained on others may help, see --init-from\n" in out


def test_a_tensorboard_file_holds_the_logs_once_whatever_was_resumed(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--save", "run", "--tensorboard", "--log-every", "2"]
    assert tiny(*flags, "--epochs", "2") == 0 and tiny("--save", "run", "--resume", "--epochs", "3", args=[]) == 0
    events = accumulator.EventAccumulator("run/tensorboard").Reload()
    for tag in events.Tags()["scalars"]:
        column, name = tag.split("/")
        log = pd.read_csv(f"run/{name}.csv")
        log = log[log.epoch % 1 == 0]
        assert [point.step for point in events.Scalars(tag)] == log.epoch.tolist() == [1, 2, 3]
        assert [point.value for point in events.Scalars(tag)] == pytest.approx(log[column].tolist())
    assert len(events.Tags()["scalars"]) == 7


def test_fp16_counts_updates_that_it_left_out_and_resumes(tiny, capsys, monkeypatch):
    """The first factors of the loss are too large on purpose."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=3))
    assert tiny("--save", "whole", "--precision", "fp16", "--epochs", "2", "--schedule", "constant") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert re.search(r"left  (\d+) updates skipped, their gradients too large for fp16$", lines[0])
    tiny("--save", "run", "--precision", "fp16", "--epochs", "1", "--schedule", "constant")
    assert tiny("--save", "run", "--resume", "--epochs", "2") == 0
    assert_same_run("whole", "run")
    scalers = [torch.load(f"{name}/latest.pth", weights_only=True)["scaler"] for name in ("whole", "run")]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] < 2.0**20
    assert tiny("--save", "run", "--resume", "--epochs", "3", "--precision", "fp32") == 0


def test_a_loss_that_is_not_finite_stops_with_status_3(tiny, capsys):
    assert tiny("--save", "last", "--epochs", "1", "--limit-train", "64", "--lr", "1e30") == 3  # one iteration, finite
    assert "the loss is not finite in epoch 1, iteration 1; epoch 0 is saved" in capsys.readouterr().err
    model = torch.load("last/latest.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in model.values())
    assert tiny("--save", "run", "--epochs", "2", "--lr", "1e30") == 3
    err = capsys.readouterr().err
    assert re.search(r"the loss is not finite in epoch 1, iteration \d; epoch 0 is saved in run/latest.pth", err)
    assert torch.load("run/latest.pth", weights_only=True)["epoch"] == 0
    assert "--save run --resume --lr 1e+29 (at the same rate, the same would happen)" in err
    assert tiny("--save", "run", "--resume", "--lr", "0.05", args=[]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert [config["lr"], config["arguments"]["lr"], config["resumed"][0]["lr"]] == [1e30, 0.05, 0.05]
    assert pd.read_csv("run/train.csv").lr.tolist() == [0.05, 0.0005]
