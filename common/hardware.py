"""Choose the device and precision to compute with, once, from what the hardware has."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
import warnings
from pathlib import Path

import psutil
import torch

from common.console import Mistake, counted

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Large tensors in pages of 2 MiB: passes over memory are faster. torch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@functools.cache
def choose_device(name):
    """A torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps". Raises Mistake if this machine lacks it.

    "auto" is the CPU if this build of torch cannot use the GPU that is here, and says so once.
    """
    automatic = name == "auto"
    if automatic:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        with warnings.catch_warnings(action="ignore"):  # of devices that torch no longer supports
            torch.ones(1, device=torch.device(name)).add_(1).item()  # the build may lack the code for an old GPU
    except Exception as error:  # of any type: devices that this build does not support raise what they like
        problem = str(error).partition("\n")[0]
        if not automatic:
            raise Mistake(f"device {name!r} is not available here ({problem}): try cpu") from error
        print(f"device {name} cannot be used ({problem}): computing on the CPU", file=sys.stderr)
        name = "cpu"
    return torch.device(name)


def synchronize(device):
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compiler_problem(device):
    """Why torch.compile does not work here, in a line; None if it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # of any type: a compiler is missing, or Triton, or it fails
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def set_up_device(device):
    """Set up this process, once, for the device that it computes on."""
    if device.type == "cpu":
        # Let glibc keep what is freed: by default every large tensor comes from the kernel anew, page by page.
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: bf16 is for tensor cores
        if device.index is not None:  # without one, it is the current device already
            torch.cuda.set_device(device)  # Triton launches there


def has_bf16(device):
    """True if the hardware computes in bf16; if it does not, bf16 is emulated and slower than fp32.

    The environment variable DENSENET_BF16, 0 or 1, overrides the hardware: tests have to pass either way.
    """
    if override := os.environ.get("DENSENET_BF16"):
        return override == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_precision(name, device):
    """A function that makes the autocast context for one of PRECISIONS or "auto", and the name of the precision.

    "auto" is bf16 if the hardware has it, else fp16 on GPUs with tensor cores (V100, T4, RTX 20), else fp32.
    """
    if name == "auto":
        tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        name = "bf16" if has_bf16(device) else "fp16" if tensor_cores else "fp32"
    amp = functools.partial(torch.autocast, device.type, PRECISIONS[name], enabled=name != "fp32")
    return amp, name


def device_name(device):
    """The name of the GPU, or that of the processor and the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux has this file, and there platform.processor() is often empty
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}"


def busy_note(device, seconds=0.2):
    """A list of a line if fewer threads may be faster beside other programs, which are watched for so many seconds.

    A loop ends with its slowest thread: one that shares its core with another program slows down all.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return []
    idle = sum(1 - busy / 100 for busy in psutil.cpu_percent(seconds, percpu=True))
    if idle > threads - 0.5:
        return []
    fewer = max(1, round(idle))
    return [f"{threads} threads for {idle:.1f} idle cores: OMP_NUM_THREADS={fewer} before the command may be faster"]


def peak_memory_mib(device):
    """Peak memory: of the CUDA allocator since its last reset, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # Linux, whose ru_maxrss starts at the parent process's
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
