import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY

import train
from densenet import DenseNet
from train import learning_rate, make_parser, parse_args

ROOT = Path(__file__).parent.parent


def parsed(command):
    return parse_args(command.split())[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *flags):
    """The one line that train.py says when it refuses ``flags`` with status 2."""
    with pytest.raises(SystemExit) as exit:
        parse_args([*flags])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ") and err.count("\n") == 1
    return err


def test_defaults_are_the_recipe_of_the_paper():
    args = parsed("")
    expected = {
        "dataset": "cifar10", "depth": 100, "growth_rate": 12, "reduction": 0.5, "bottleneck": True, "drop_rate": 0.0,
        "epochs": 300, "batch_size": 64, "opt": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True,
        "weight_decay": 1e-4, "schedule": "step", "augment": True, "crop_fill": "mean", "valid_size": 0,
        "save": "work/cifar10.base",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_block_auto_is_the_one_that_was_measured_to_be_fastest(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert train.choose_block(parsed(""), cpu, "fp32") == "fused"
    assert train.choose_block(parsed("--drop-rate 0.2"), cpu, "fp32") == "naive"
    assert train.choose_block(parsed(""), cpu, "bf16") == train.choose_block(parsed(""), cuda, "bf16") == "naive"
    assert train.choose_block(parsed("--block checkpoint"), cpu, "fp32") == "checkpoint"
    monkeypatch.setattr(train.fused, "loops", None)
    assert train.choose_block(parsed(""), cpu, "fp32") == "naive"


def test_defaults_that_depend_on_data_set_and_optimiser():
    args = parsed("--dataset digits")
    assert (args.depth, args.epochs, args.augment, args.save) == (16, 20, False, "work/digits.base")
    args = parsed("--dataset svhn")
    assert (args.depth, args.epochs, args.augment, args.valid_size) == (100, 40, False, 6000)
    assert (parsed("--opt adam").lr, parsed("--opt adam").schedule) == (1e-3, "constant")
    assert (parsed("--opt rmsprop").lr, parsed("--opt rmsprop --lr 0.5").lr) == (1e-2, 0.5)
    assert parsed("--dataset digits --depth 40 --augment").augment is True


def test_every_flag_says_what_it_does_and_its_default():
    for action in make_parser()._actions:
        if action.option_strings[0] not in ("-h", "--arch"):
            assert "(default: " in action.help, action.option_strings


def test_old_command_lines_of_bamos():
    args = parsed("--batchSz 32 --nEpochs 300 --no-cuda --save DIR --seed 1 --opt adam")
    assert (args.batch_size, args.epochs, args.device, args.save, args.seed, args.opt) == (32, 300, "cpu", "DIR", 1, "adam")


@pytest.mark.parametrize(
    ("flag", "block"), [("--efficient True", "checkpoint"), ("--efficient", "checkpoint"), ("--efficient=False", "naive")]
)
def test_old_command_lines_of_gpleiss(flag, block):
    args = parsed(
        f"{flag} --data DIR --save RUN --depth 100 --growth_rate 12 --n_epochs 300 "
        "--batch_size 64 --valid_size 5000 --seed 1"
    )
    assert (args.block, args.data, args.save, args.depth, args.growth_rate) == (block, "DIR", "RUN", 100, 12)
    assert (args.epochs, args.batch_size, args.valid_size, args.seed) == (300, 64, 5000, 1)


def test_presets_set_the_architecture(capsys):
    args = parsed("--arch densenet_40_12 --drop-rate 0.2")
    assert (args.bottleneck, args.reduction) == (False, 1.0)
    with torch.device("meta"):
        model = DenseNet(**train.model_options(args, 10))
        assert sum(p.numel() for p in model.parameters()) == 1_019_722
        model = DenseNet(**train.model_options(parsed("--arch densenet121"), 1000))
        assert sum(p.numel() for p in model.parameters()) == 7_978_856
    assert "--arch densenet121 sets the depth" in refused(capsys, "--arch", "densenet121", "--depth", "40")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--depth 43", "depth 43: a network with bottlenecks needs depth = 6n + 4, such as 40 or 46"),
        ("--reduction 0", "reduction 0.0: needs a number in (0, 1]"),
        ("--drop-rate 1", "drop rate 1.0"),
        ("--epochs 0", "argument --epochs: 0 is not a positive number"),
        ("--batch-size x", "argument --batch-size: invalid positive value: 'x'"),
        ("--lr nan", "--lr nan: needs a number of 0 or more"),
        ("--momentum 0", "add --no-nesterov"),
        ("--dataset imagenet", "invalid choice: 'imagenet'"),
        ("--depht 40", "unrecognized arguments: --depht 40"),
        ("--device cuda:99", "device 'cuda:99' is not available here"),
        ("--device tpu9", "device 'tpu9' is not available here"),
        ("--resume --overwrite", "--resume and --overwrite exclude each other"),
        ("--block fused --drop-rate 0.2", "--block fused has no dropout"),
        ("--dataset digits --image-size 3", "images of 3×3 pixels are too small for this network"),
        ("--image-size 64", "--image-size 64: the images of cifar10 have 32×32 pixels"),
        ("--dataset digits --crop-fill black", "--crop-fill black: no image is shifted in this run"),
        ("--arch densenet_bc_100_12 --reduction 0.9", "--arch densenet_bc_100_12 sets the reduction"),
        ("--seed 4294967296", "is not in 0 … 2³² − 1"),
        ("--resume --save nowhere", "nowhere has no latest.pth to resume"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(capsys, command, words):
    assert words in refused(capsys, *command.split())
    assert list(Path().iterdir()) == []


def test_step_schedule_drops_at_half_and_three_quarters():
    args = parsed("")
    rates = {epoch: learning_rate(args, epoch, 0.5) for epoch in (1, 149, 150, 224, 225, 300)}
    assert rates == {1: 0.1, 149: 0.1, 150: 0.01, 224: 0.01, 225: 0.001, 300: 0.001}


def test_other_schedules():
    args = parsed("--schedule cosine --epochs 10")
    assert learning_rate(args, 1, 0.0) == 0.1
    assert learning_rate(args, 6, 0.0) == pytest.approx(0.05)
    assert learning_rate(args, 3, 0.5) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(parsed("--schedule constant"), 290, 0.9) == 0.1


def rows(path, drop=("images_per_second", "peak_memory_mib")):
    table = pd.read_csv(path)
    return table.drop(columns=[name for name in drop if name in table])


def assert_same_run(a, b, logs=("train.csv", "test.csv")):
    """Weights, optimiser and logs are equal bit for bit; what was measured in seconds and bytes aside."""
    one, two = (torch.load(Path(run, "latest.pth"), weights_only=True) for run in (a, b))
    assert one["epoch"] == two["epoch"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    momenta = [[state["momentum_buffer"] for state in run["optimizer"]["state"].values()] for run in (one, two)]
    assert len(momenta[0]) > 0
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    for name in logs:
        pd.testing.assert_frame_equal(rows(Path(a, name)), rows(Path(b, name)), check_exact=True)


def test_a_run_writes_what_it_should(tiny, capsys):
    assert tiny("--save", "run") == 0
    assert sorted(p.name for p in Path("run").iterdir()) == [".lock", "config.json", "latest.pth", "test.csv", "train.csv"]
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
        "model", "optimizer", "epoch", "seconds", "rng", "config", "normalize", "classes", "metrics"
    }  # fmt: skip
    assert checkpoint["classes"] == list("0123456789")
    assert checkpoint["metrics"]["test"][-1]["error"] == test.error.iloc[-1]
    assert checkpoint["seconds"] > sum(200 / log.images_per_second)
    out = capsys.readouterr().out
    assert f"test error {test.error.iloc[-1]:.2f} % after epoch 4, the last" in out
    assert "best on test" in out


def test_the_logged_error_is_that_of_the_saved_weights(tiny, capsys):
    import evaluate

    assert tiny("--save", "run") == 0
    logged = pd.read_csv("run/test.csv").error.iloc[-1]
    capsys.readouterr()
    assert evaluate.main(["run/latest.pth"]) == 0
    out = capsys.readouterr().out
    assert f"test error {logged:.2f} % (95 % interval" in out and f"{round(logged)} of 100 images wrong" in out


def test_wilson_interval():
    """Newcombe 1998, table I: 81 of 263, 0 of 20."""
    import evaluate

    assert evaluate.wilson(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert evaluate.wilson(0, 20) == pytest.approx((0, 16.11), abs=0.01)


def test_a_class_without_test_images_has_no_error(capsys):
    import evaluate

    evaluate.print_test_error(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:5] == ["cat    25.00  dog 1", "dog        –  "]


def test_evaluate_classifies_files_and_names_mistakes(tiny, capsys, tmp_path):
    from test_data import write_folder

    import evaluate

    assert tiny("--save", "run", "--epochs", "1") == 0
    image = write_folder(tmp_path / "images") / "train" / "cat" / "0.png"
    capsys.readouterr()
    assert evaluate.main(["run/latest.pth", str(image)]) == 0
    assert re.match(rf"{image}: \d \d+\.\d %, ", capsys.readouterr().out)
    for paths in ([], str(image)):
        with pytest.raises(evaluate.data.DataError, match="is not a list of image files"):
            evaluate.classify(torch.load("run/latest.pth", weights_only=True), paths)
    for arguments, words in ((["run"], "run is not a checkpoint file"), (["run/latest.pth", "x.png"], "x.png is not an image")):
        assert evaluate.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("evaluate.py: error: ") and words in err and err.count("\n") == 1


def test_an_existing_run_is_never_touched(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "1") == 0
    Path("run/notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    assert tiny("--save", "run") == 2
    assert "run holds a run (latest.pth): --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before
    assert tiny("--save", "run", "--overwrite", "--epochs", "2", "--seed", "2") == 0
    assert len(pd.read_csv("run/test.csv")) == 2
    assert Path("run/notes.txt").read_text() == "mine"


def test_seeds_decide_everything(tiny):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert tiny("--save", name, "--seed", seed, "--epochs", "2", "--drop-rate", "0.2", "--augment") == 0
    assert_same_run("a", "b")
    assert not rows("a/train.csv").equals(rows("c/train.csv"))


def test_resume_keeps_the_arguments_and_refuses_others(tiny, capsys):
    assert tiny("--save", "run", "--weight-decay", "0.01", "--epochs", "2") == 0
    assert train.main(["--resume", "--save", "run", "--epochs", "3", "--no-plot", "--no-progress"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["arguments"]["weight_decay"] == 0.01
    assert [entry["epoch"] for entry in config["resumed"]] == [2]
    log, checkpoint = pd.read_csv("run/train.csv"), torch.load("run/latest.pth", weights_only=True)
    assert checkpoint["seconds"] > sum(200 / log.images_per_second)  # of both processes
    capsys.readouterr()
    assert tiny("--resume", "--save", "run", "--block", "fused", args=[]) == 0
    out = capsys.readouterr().out
    assert "block fused" in out and "all 3 epochs are done" in out
    assert pd.read_csv("run/test.csv").epoch.tolist() == [1, 2, 3]
    for flag, value in (("--depth", "16"), ("--seed", "9"), ("--dataset", "cifar10")):
        assert f"was started with {flag}" in refused(capsys, "--resume", "--save", "run", flag, value)
    assert "--epochs 2: the run in run has finished 3 already" in refused(
        capsys, "--resume", "--save", "run", "--epochs", "2"
    )


def test_resume_notices_other_images(tiny, capsys, tmp_path):
    from PIL import Image
    from test_data import write_folder

    write_folder(tmp_path / "images")
    flags = ["--dataset", "folder", "--data", "images", "--depth", "10", "--save", "run"]
    assert tiny("--epochs", "1", args=flags) == 0
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "images" / "train" / "cat" / "0.png")
    assert tiny("--resume", "--save", "run", "--epochs", "2", args=[]) == 2
    assert "was trained on other images or classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.csv", "config.json", "latest.pth"])
def test_files_of_another_program_are_not_replaced(tiny, capsys, name):
    Path("run").mkdir()
    Path("run", name).write_text('{"hidden_size": 768}\n')
    assert tiny("--save", "run", "--overwrite") == 2
    assert f"run holds files of another program ({name})" in capsys.readouterr().err
    assert Path("run", name).read_text() == '{"hidden_size": 768}\n'


def test_a_replacement_that_is_cut_short_leaves_a_run(tiny, monkeypatch):
    assert tiny("--save", "run", "--epochs", "1") == 0
    real, deleted = Path.unlink, []

    def unlink(path, *args, **options):
        if path.name == "latest.pth":
            raise KeyboardInterrupt
        deleted.append(path.name)
        real(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink)
        tiny("--save", "run", "--overwrite")
    assert {"train.csv", "test.csv", "config.json"} <= set(deleted)
    assert tiny("--save", "run", "--overwrite", "--epochs", "1") == 0


def test_a_batch_of_one_image_is_refused_where_batch_norm_would_fail(tiny, capsys):
    flags = ["--image-size", "4", "--limit-train", "65", "--epochs", "1", "--save", "run"]
    assert tiny(*flags) == 2
    err = capsys.readouterr().err
    assert "--batch-size 64 makes a batch of one image" in err and err.count("\n") == 1
    assert not Path("run").exists()
    assert tiny(*flags, "--batch-size", "63") == 0
    assert tiny(*flags, "--image-size", "8", "--save", "other") == 0


def test_a_gpu_without_a_number_is_set_up():
    import evaluate

    with torch.backends.cudnn.flags(allow_tf32=True):
        evaluate.set_up_device(torch.device("cuda"))  # what "cuda" and "auto" choose; torch.cuda.set_device refuses it
        assert not torch.backends.cudnn.allow_tf32


def test_log_every_adds_rows_within_epochs(tiny):
    assert tiny("--save", "run", "--epochs", "2", "--log-every", "2", "--batch-size", "50") == 0
    log = pd.read_csv("run/train.csv")
    assert log.epoch.tolist() == [0.5, 1.0, 1.5, 2.0]
    whole = log[log.epoch == 1].iloc[0]
    assert log.images_per_second.isna().tolist() == [True, False, True, False]
    tiny("--save", "plain", "--epochs", "2", "--batch-size", "50")
    assert pd.read_csv("plain/train.csv").loss[0] == whole.loss


def test_averages_weigh_images():
    steps = torch.tensor([[64 * 1.0, 32, 64], [16 * 2.0, 16, 16]])
    assert train.averages(steps) == (96 / 80, 60.0)


def test_validation_chooses_best_pth(tiny, capsys):
    assert tiny("--save", "run", "--valid-size", "400") == 0
    valid = pd.read_csv("run/valid.csv")
    best = torch.load("run/best.pth", weights_only=True)
    assert best["epoch"] == valid.epoch[valid.error.idxmin()]
    expected = pd.read_csv("run/test.csv").error[best["epoch"] - 1]
    assert f"test error {expected:.2f} % at epoch {best['epoch']}, which has the lowest validation error" in (
        capsys.readouterr().out
    )
    assert tiny("--save", "other", "--valid-size", "1437") == 2
    assert "--valid-size 1437: the training set has 1437 images" in capsys.readouterr().err
    assert not Path("other").exists()


@pytest.mark.parametrize("opt", ["adam", "rmsprop"])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_optimisers_and_schedules(tiny, opt, schedule):
    assert tiny("--save", "run", "--opt", opt, "--schedule", schedule, "--epochs", "2") == 0
    lr = pd.read_csv("run/train.csv").lr
    assert lr[1] < 0.2 * lr[0]


@pytest.mark.parametrize("flags", [["--no-bottleneck", "--reduction", "1"], ["--drop-rate", "0.2"], ["--precision", "bf16"]])
def test_variants_train(tiny, flags):
    assert tiny("--save", "run", "--epochs", "1", *flags) == 0
    assert math.isfinite(pd.read_csv("run/train.csv").loss[0])


def test_imagenet_network_on_a_streamed_folder(tmp_path):
    from test_data import write_folder

    write_folder(tmp_path / "images", train=2, test=1, size=(150, 140))
    flags = "--dataset folder --data images --image-size 128 --arch densenet121 --epochs 1 --batch-size 4 --save run"
    assert train.main([*flags.split(), "--no-plot", "--no-progress"]) == 0
    assert torch.load("run/latest.pth", weights_only=True)["classes"] == ["cat", "dog"]


def test_a_loss_that_is_not_finite_stops_with_status_3(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "2", "--lr", "1e30") == 3
    err = capsys.readouterr().err
    assert re.search(r"the loss is not finite in epoch 1, iteration \d; epoch 0 is saved in run/latest.pth", err)
    assert torch.load("run/latest.pth", weights_only=True)["epoch"] == 0


def test_a_last_update_that_diverges_is_not_saved(tiny, capsys):
    assert tiny("--save", "run", "--epochs", "1", "--limit-train", "64", "--lr", "1e30") == 3  # one iteration, finite
    assert "the loss is not finite in epoch 1, iteration 1; epoch 0 is saved" in capsys.readouterr().err
    model = torch.load("run/latest.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in model.values())


@pytest.mark.parametrize(("write", "epoch"), [(8, 1), (9, 2)])  # the second epoch's checkpoint, its row of train.csv
def test_a_full_disk_keeps_the_last_epoch(tiny, capsys, monkeypatch, write, epoch):
    import workdir

    assert tiny("--save", "whole") == 0
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == write:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.os, "fsync", full)
        assert tiny("--save", "run") == 1
    err = capsys.readouterr().err
    resume = f"python {shlex.quote(sys.argv[0])} --save run --resume"
    assert f"No space left on device; epoch {epoch} is saved in run/latest.pth; to go on: {resume}\n" in err
    assert not list(Path("run").glob("*.tmp"))
    assert tiny("--save", "run", "--resume", args=[]) == 0
    assert_same_run("whole", "run")


def test_damaged_files_end_in_one_line_or_are_mended(tiny, capsys):
    assert tiny("--save", "whole") == 0
    assert tiny("--save", "run", "--epochs", "3") == 0
    log = Path("run/train.csv")
    log.write_text(log.read_text()[:90])  # most rows are gone, one is cut in half
    Path("run/test.csv").unlink()
    assert tiny("--save", "run", "--resume", "--epochs", "4", args=[]) == 0
    whole, mended = rows("whole/test.csv"), rows("run/test.csv")
    pd.testing.assert_frame_equal(mended[:1], whole[:1])  # later epochs differ: 3 and 4 epochs have other schedules
    assert pd.read_csv(log).epoch.tolist() == pd.read_csv("run/test.csv").epoch.tolist() == [1, 2, 3, 4]

    latest = Path("run/latest.pth")
    latest.write_bytes(latest.read_bytes()[:1000])
    capsys.readouterr()
    assert tiny("--save", "run", "--resume", args=[]) == 2
    assert "run/latest.pth is damaged or no checkpoint" in capsys.readouterr().err


# Programs that run train.py and kill themselves, as kill -9 does, at a moment of the third epoch.
KILLED = {
    "in an epoch": """
        real = torch.optim.SGD.step
        def step(self, *args):
            steps.append(1)
            return kill() if len(steps) == 10 else real(self, *args)
        torch.optim.SGD.step = step""",
    "while a checkpoint is written": """
        real = workdir.os.fsync
        def fsync(descriptor):
            steps.append(1)
            if len(steps) == 11:
                os.truncate(descriptor, 3000)
                kill()
            real(descriptor)
        workdir.os.fsync = fsync""",
    "between checkpoint and CSV row": """
        real = workdir.csv_lines
        def csv_lines(name, rows):
            return kill() if rows and rows[0]["epoch"] == 3 and name == "test" else real(name, rows)
        workdir.csv_lines = csv_lines""",
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*TINY, "--save", str(path), "--no-progress"]) == 0
    return path


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_resumes_bit_for_bit(moment, whole_run, tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train, workdir
steps = []
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if True:{KILLED[moment]}
sys.exit(train.main(sys.argv[1:]))"""
    command = [sys.executable, "-c", program, *TINY, "--save", "run", "--no-progress"]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    saved = torch.load("run/latest.pth", weights_only=True)["epoch"]
    assert saved == (3 if "row" in moment else 2)
    if "written" in moment:
        assert Path("run/latest.pth.tmp").stat().st_size == 3000
    assert train.main(["--resume", "--save", "run", "--no-progress"]) == 0
    assert_same_run(whole_run, "run")
    for name in ("loss.png", "error.png", "loss-error.png"):
        assert Path("run", name).read_bytes() == (whole_run / name).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_says_how_to_go_on(number, status, whole_run):
    command = [sys.executable, ROOT / "train.py", *TINY, "--epochs", "100000", "--save", "run", "--no-progress"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch   2/" not in process.stdout.readline():
        assert process.poll() is None
    held = subprocess.run([*command[:-2], "run", "--resume"], capture_output=True, text=True)
    assert (held.returncode, held.stderr.count("\n")) == (2, 1)
    assert "run is in use by another process" in held.stderr
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    epochs = int(re.findall(r"epoch +(\d+)/", out)[-1]) if out else 2
    match = re.search(r"^train.py: stopped; epoch (\d+) is saved in run/latest.pth; to go on: (.*)$", err, re.MULTILINE)
    assert int(match[1]) in (epochs, epochs + 1) and match[2] == f"python {ROOT / 'train.py'} --save run --resume"
    assert torch.load("run/latest.pth", weights_only=True)["epoch"] == int(match[1])


def test_a_failing_plot_is_reported_once_and_hurts_nothing(tiny, capsys, monkeypatch):
    import workdir

    real = workdir.Figures.__init__

    def broken(self, path, enabled):
        real(self, path, enabled=True)
        self.command = [sys.executable, "-c", "raise SystemExit('no ink')"]

    monkeypatch.setattr(workdir.Figures, "__init__", broken)
    assert tiny("--save", "run") == 0
    assert capsys.readouterr().err.splitlines() == ["plot.py failed, training goes on: no ink"]
    assert len(pd.read_csv("run/test.csv")) == 4
