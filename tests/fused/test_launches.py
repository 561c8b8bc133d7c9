"""What a step launches on a GPU, counted and compiled without one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton")  # torch comes without it on some systems
import launches


def test_launches_of_a_step():
    """DenseNet-BC-100-12: at most 700 in training, optimiser included; in evaluation no statistics are computed."""
    naive, fused_ones = (sum(launches.count("densenet_bc_100_12", block)) for block in ("naive", "fused"))
    assert fused_ones <= 700 < naive
    operations, ours = launches.count("densenet_bc_100_12", "fused", training=False)
    assert (ours, operations <= 40) == (3 * 48, True)  # of each layer the two convolutions, and what the second one reads


def test_a_step_reads_nothing_back():
    """A CUDA graph could not hold it, and the processor would wait for the GPU."""
    with launches.as_on_a_gpu():
        step = launches.training_step("densenet_40_12", "fused", batch_size=4)
        step()
        with pytest.raises(DataDependentOutputException):
            torch.ones(1).item()  # what it would be noticed by


@pytest.mark.parametrize(
    ("flags", "rows_expected"),
    [
        pytest.param("--networks densenet_bc_100_12 --targets 80 90", 2 * 9, marks=pytest.mark.slow),
        pytest.param("", 6 * (3 * 9 + 7), marks=pytest.mark.long),
    ],
)
def test_kernels_compile_for_gpus_without_spills(flags, rows_expected):
    """For every launch of networks of the paper in training in bf16. Needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench/compile_kernels.py", *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    row = r"^\| densenet_\w+ \| sm_\d+ \| \w+_kernel \| \d+ \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \|$"
    rows = [[int(number.replace(",", "")) for number in found] for found in re.findall(row, result.stdout, re.MULTILINE)]
    assert (result.returncode, len(rows)) == (0, rows_expected), result.stderr
    for registers, stack, shared, limit in rows:
        assert registers <= 255 and stack <= 32 and shared <= limit
