"""What a step launches on a GPU, counted and compiled without one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")  # torch comes without it on some systems
import compile_kernels

FREE = set(  # operations that only describe or allocate memory
    "alias as_strided as_strided_ detach empty empty_like empty_strided expand new_empty new_empty_strided permute "
    "promote_types select slice squeeze t unbind view".split()
)


class Counter(TorchDispatchMode):
    """Counts the operations of torch that launch something; one on a list of tensors counts once."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        self.operations += namespace == "aten" and name.split(".")[0] not in FREE
        return function(*args, **kwargs or {})


def count(block, training=True):
    """(operations of torch, kernels of ours) of a step of DenseNet-BC-100-12."""
    with compile_kernels.as_on_a_gpu() as launches:
        step = compile_kernels.training_step("densenet_bc_100_12", block, training=training)
        step()  # the first also allocates the optimiser's state
        launches.clear()
        with Counter() as counter:
            step()
        return counter.operations, len(launches)


def test_launches_of_a_step():
    """At most 700 in training, optimiser included; in evaluation no statistics are computed."""
    assert sum(count("fused")) <= 700 < sum(count("naive"))
    operations, ours = count("fused", training=False)
    assert (ours, operations <= 40) == (3 * 48, True)  # of each layer the two convolutions, and what the second one reads


def test_a_step_reads_nothing_back():
    """A CUDA graph could not hold it, and the processor would wait for the GPU."""
    with compile_kernels.as_on_a_gpu():
        compile_kernels.training_step("densenet_40_12", "fused", batch_size=4)()
        with pytest.raises(DataDependentOutputException):
            torch.ones(1).item()  # what it would be noticed by


def test_a_run_compiles_its_kernels_in_its_first_step():
    """Those of an epoch's last batch and of evaluation's are the same, but for one that reads statistics elsewhere."""
    with compile_kernels.as_on_a_gpu() as launches:
        for batch_size, training, most in ((64, True, 36), (17, True, 0), (240, False, 1)):
            before = set(launches)
            compile_kernels.training_step("densenet_bc_100_12", "fused", batch_size, training)()
            assert len(set(launches) - before) <= most


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
