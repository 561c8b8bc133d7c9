import os

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels on the CPU. It must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import train

TINY = "--device cpu --dataset digits --image-size 8 --depth 10 --growth-rate 4 --limit-train 200 --limit-test 100 --epochs 4".split()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Run train.py in this process on a tiny network, in a folder of its own: tiny("--epochs", "2") → exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, args=TINY):
        try:
            return train.main([*args, "--no-plot", "--no-progress", *flags])
        except SystemExit as error:  # how argparse ends
            return error.code

    return run


@pytest.fixture(autouse=True)
def deterministic_off():
    yield
    torch.use_deterministic_algorithms(False)
