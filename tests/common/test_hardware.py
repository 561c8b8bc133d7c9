"""Which device, precision and block are chosen."""

import functools

import pytest
import torch

import fused
from common import hardware
from common.console import Mistake
from common.hardware import choose_device, choose_precision, has_bf16, set_up_device
from training.arguments import parse_args
from training.choice import default_block

CPU = torch.device("cpu")


@pytest.mark.parametrize(("answer", "precision"), [("0", "fp32"), ("1", "bf16")])
def test_precision_auto_follows_the_hardware(monkeypatch, answer, precision):
    monkeypatch.setenv("DENSENET_BF16", answer)
    amp, name = choose_precision("auto", CPU)
    assert name == precision
    with amp():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert [choose_precision(name, CPU)[1] for name in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize(("capability", "precision"), [((7, 0), "fp16"), ((6, 1), "fp32")])
def test_a_gpu_without_bf16_computes_in_fp16_if_it_has_tensor_cores(monkeypatch, capability, precision):
    monkeypatch.setenv("DENSENET_BF16", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda"))[1] == precision


def test_without_an_override_the_hardware_answers(monkeypatch):
    monkeypatch.delenv("DENSENET_BF16", raising=False)
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer)
        assert has_bf16(CPU) is answer
    assert not has_bf16(torch.device("mps"))


def test_a_gpu_that_this_build_has_no_code_for_is_passed_over_and_named_once(monkeypatch, capsys):
    def ones(*size, device):
        if device.type == "cuda":
            raise RuntimeError(f"{reason}\nand more")
        return real(*size, device=device)

    reason = "CUDA error: no kernel image is available for execution on the device"
    choose, real = functools.cache(choose_device.__wrapped__), torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    assert [choose("auto") for _ in range(2)] == [CPU, CPU]
    assert capsys.readouterr().err == f"device cuda cannot be used ({reason}): computing on the CPU\n"
    with pytest.raises(Mistake, match=r"device 'cuda' is not available here \(CUDA error: no kernel image"):
        choose("cuda")


def test_a_compiler_that_is_missing_is_named_in_a_line(monkeypatch):
    def fail(x):
        raise RuntimeError("\nNo working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(Mistake, match=r"--compile does not work here \(No working C\+\+ compiler found\): leave it out"):
        parse_args(["--compile", "--device", "cpu"])


def test_the_block_if_none_is_measured(monkeypatch, tiny, capsys):
    monkeypatch.setattr(fused, "loops", "Numba is here")
    assert default_block(CPU) == "fused"
    assert default_block(torch.device("cuda")) == default_block(torch.device("mps")) == "naive"
    monkeypatch.setattr(fused, "loops", None)
    monkeypatch.setattr(fused, "NO_LOOPS", "it refuses this NumPy")
    assert default_block(CPU) == "naive"
    assert tiny("--save", "run", "--epochs", "1") == 0
    assert "block fused runs in plain torch, more slowly: Numba cannot be used (it refuses this NumPy)\n" in capsys.readouterr().out


def test_a_gpu_without_a_number_is_set_up():
    with torch.backends.cudnn.flags(allow_tf32=True):
        set_up_device(torch.device("cuda"))  # what "cuda" and "auto" choose; torch.cuda.set_device refuses it
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("busy", "threads", "fewer"), [([100, 3], 2, 1), ([90, 100, 4, 6], 4, 2), ([2, 9], 2, None), ([100, 2], 1, None)])
def test_a_busy_processor_is_named(monkeypatch, busy, threads, fewer):
    monkeypatch.setattr(hardware.psutil, "cpu_percent", lambda seconds, percpu: busy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lines = hardware.busy_note(CPU)
    assert [f"OMP_NUM_THREADS={fewer}" in line for line in lines] == ([True] if fewer else [])
    assert hardware.busy_note(torch.device("cuda")) == []
