"""Which device and precision to compute with: chosen once, from what the hardware has."""

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
# Large tensors in pages of 2 MiB: passes over memory are faster. torch asks when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def choose_device(name):
    """A torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps". Raises Mistake if this machine lacks it.

    "auto" is the CPU, and says so once, where there is a GPU that this build of torch cannot use.
    """
    if name == "auto":
        return found_device()
    if problem := problem_of(name):
        raise Mistake(f"device {name!r} is not available here ({problem}): try cpu")
    return torch.device(name)


@functools.cache
def found_device():
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if problem := problem_of(name):
        print(f"device {name} cannot be used ({problem}): computing on the CPU", file=sys.stderr)
    return torch.device("cpu" if problem else name)


def problem_of(name):
    """Why nothing can be computed on a device, in a line; None if it can."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of devices that are no more
            torch.ones(1, device=torch.device(name)).add_(1).item()  # an old GPU is found, but the build lacks its code
    except Exception as error:  # of any kind: devices that this build has nothing for raise what they like
        return str(error).partition("\n")[0]
    return None


def synchronize(device):
    """Wait until a device has computed all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compiler_problem(device):
    """Why torch.compile does not work here, in a line; None if it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # of any kind: a compiler is missing, or Triton, or it fails
        lines = [line for line in str(error).splitlines() if line]
        return lines[0] if lines else type(error).__name__
    return None


def set_up_device(device):
    """Set up this process for the device that it computes on, once."""
    if device.type == "cpu":
        # Let glibc keep what is freed: by default every large tensor comes from the kernel anew, page by page.
        with contextlib.suppress(OSError, AttributeError):  # another C library, which manages memory its own way
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 shall mean fp32: who wants tensor cores has bf16
        if device.index is not None:  # without one, it is the current device already
            torch.cuda.set_device(device)  # Triton launches there


def has_bf16(device):
    """True if the hardware computes in bf16; if it does not, bf16 is emulated and slower than fp32.

    The environment variable DENSENET_BF16, 0 or 1, answers in the hardware's place: tests have to pass either way.
    """
    if override := os.environ.get("DENSENET_BF16"):
        return override == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_precision(name, device):
    """A function that makes the autocast context for one of PRECISIONS or "auto", and the name of what was chosen.

    "auto" is bf16 where the hardware has it, fp16 on GPUs whose tensor cores have that alone (V100, T4, RTX 20).
    """
    if name == "auto":
        tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        name = "bf16" if has_bf16(device) else "fp16" if tensor_cores else "fp32"
    amp = functools.partial(torch.autocast, device.type, PRECISIONS[name], enabled=name != "fp32")
    return amp, name


def device_name(device):
    """The processor's or GPU's name; of a processor, also the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux alone has this file, and there platform.processor() is often empty
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}"


def busy_note(device, seconds=0.2):
    """A list of lines: what would be faster beside other programs. Watches them for so many seconds.

    The threads of a loop wait for the last of them: one that has to share its core slows down all.
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
    """Most memory in use so far: of the CUDA allocator (since its last reset), elsewhere of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # Linux; its ru_maxrss begins with what the parent process had
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
