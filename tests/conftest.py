import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side (pyproject.toml)

import pandas as pd
import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels on the CPU. It must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import train
from reports import curves

ROOT = Path(__file__).parent.parent
TINY = "--device cpu --dataset digits --image-size 8 --depth 10 --growth-rate 4 --limit-train 200 --limit-test 100 --epochs 4".split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and leaves torch as it was."""
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


def status_of(main, flags):
    """The exit status of a command that runs in this process."""
    try:
        return main([*flags])
    except SystemExit as error:  # how argparse ends
        return error.code


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name; they are saved, too."""
    saved, save = {}, curves.save

    def kept(figure, path):
        saved[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(curves, "save", kept)
    return saved


@pytest.fixture
def tiny():
    """Run train.py in this process on a tiny network: tiny("--epochs", "2") → exit status."""
    return lambda *flags, args=TINY: status_of(train.main, [*args, "--no-plot", "--no-progress", *flags])


def rows(path, drop=("images_per_second", "peak_memory_mib")):
    """The rows of a log but for what was measured in seconds and bytes."""
    table = pd.read_csv(path)
    return table.drop(columns=[name for name in drop if name in table])


def assert_same_run(a, b, logs=("train.csv", "test.csv"), name="latest.pth"):
    """Weights, optimiser and logs are equal bit for bit; what was measured in seconds and bytes aside."""
    one, two = (torch.load(Path(run, name), weights_only=True) for run in (a, b))
    assert one["epoch"] == two["epoch"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    momenta = [[state["momentum_buffer"] for state in run["optimizer"]["state"].values()] for run in (one, two)]
    assert len(momenta[0]) > 0
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    for log in logs:
        pd.testing.assert_frame_equal(rows(Path(a, log)), rows(Path(b, log)), check_exact=True)


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel or a loop should have written and did not is NaN."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        real = getattr(owner, name)

        def poisoned(*args, real=real, **options):
            result = real(*args, **options)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        monkeypatch.setattr(owner, name, poisoned)
