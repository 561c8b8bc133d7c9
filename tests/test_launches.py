"""What a step launches on a GPU, counted without one."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton")  # torch comes without it on some systems
import launches


def test_launches_of_a_step():
    """DenseNet-BC-100-12: at most 700 in training, optimiser included; in evaluation no statistics are computed."""
    naive, fused_ones = (sum(launches.count("densenet_bc_100_12", block)) for block in ("naive", "fused"))
    assert fused_ones <= 700 < naive
    operations, ours = launches.count("densenet_bc_100_12", "fused", training=False)
    assert (ours, operations <= 40) == (2 * 48, True)  # the two convolutions of each layer


def test_a_step_reads_nothing_back():
    """A CUDA graph could not hold it, and the processor would wait for the GPU."""
    with launches.as_on_a_gpu():
        step = launches.training_step("densenet_40_12", "fused", batch_size=4)
        step()
        with pytest.raises(DataDependentOutputException):
            torch.ones(1).item()  # what it would be noticed by
