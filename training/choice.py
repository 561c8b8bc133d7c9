"""Choose the block that a run trains with: check the one that --block names; for auto, measure which is fastest.

Blocks are measured before the first step (training/trial.py), and the answer is kept in the user's cache folder. On a
CPU a process of its own measures, which may crash, hang or run out of memory; a GPU may allow one process only.
"""

import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs
import torch

import fused
from common.config import stages
from common.console import Mistake
from common.files import readable, written_whole
from common.hardware import device_name
from densenet import BLOCKS, differing_blocks
from training import distributed
from training.flags import can_replay, model_options
from training.run import ROOT, versions
from training.step import in_words
from training.trial import try_blocks

GAIN = 0.05  # another block has to be faster than naive by at least this fraction
STEPS = 10_000  # fewer are not worth measuring: that takes as long as 60 steps, and compilers start first
LONGEST = 3600  # seconds that measuring may take on a CPU
PROGRAM = ["-m", "training.trial"]


def choose_block(args, checkpoint, dataset, model, device, precision):
    """Choose how dense blocks run, and whether steps are replayed as CUDA graphs.

    Returns entries for config.json, and messages. A block that computes something else than the network's code is
    refused, whoever asked for it. A resumed run keeps what it had, on the same device.
    """
    refused = {}

    def computes_the_same(name):
        if name not in ("naive", *refused) and (differing := differing_blocks(model, name)):
            refused[name] = "{}: {}".format(*next(iter(differing.items())))
        return name not in refused

    last = stages(checkpoint["config"])[-1] if checkpoint else {}
    same = (last.get("device"), last.get("precision")) == (device_name(device), precision)
    graph = not same or last["cuda_graph"] if args.cuda_graph is None else args.cuda_graph
    graph = graph and can_replay(args, device, precision)
    block, messages = args.block, []
    if block == "auto":
        block = "naive" if args.compile else default_block(device)
        if same and checkpoint["config"]["arguments"]["block"] == "auto" and not args.compile:
            block = last["block"]
        elif not (args.compile or args.deterministic) and device.type in ("cpu", "cuda"):
            job = {
                "model": model_options(args, len(dataset.classes)),
                "batch_size": min(-(-args.batch_size // distributed.world_size()), len(dataset.train)),
                "image_size": args.image_size,
                "precision": precision,
                "device": str(device),
                "graph": graph,
                "blocks": [name for name in BLOCKS if computes_the_same(name)],
            }
            epochs = args.epochs - (checkpoint["epoch"] if checkpoint else 0)
            block, messages = fastest_block(job, block, epochs * -(-len(dataset.train) // args.batch_size))
    if not computes_the_same(block):
        block = "naive"
    for name, reason in refused.items():
        messages.append(f"block {name} does not compute this network ({reason}): this run takes {block}")
    if fused.NO_LOOPS and device.type == "cpu" and args.block in ("auto", "fused"):
        messages.append(f"block fused runs in plain torch, more slowly: Numba cannot be used ({fused.NO_LOOPS})")
    return {"block": block, "cuda_graph": graph} | ({"refused": refused} if refused else {}), messages


def default_block(device):
    """The block if none is measured: on a CPU the fastest so far, on a GPU the one that needs no compiling."""
    return "fused" if device.type == "cpu" and fused.loops is not None else "naive"


def fastest_block(job, default, steps):
    """The fastest block and a list of a line about it; ``default`` and [] if measuring would not pay."""
    device = torch.device(job["device"])
    path = cache_path(job, device)
    with contextlib.suppress(Exception):  # nothing is there, or a file of another program
        block, lines = describe(json.loads(readable(path).read_text()), default)
        if block in BLOCKS:
            return block, lines
    if steps < STEPS:
        return default, []
    print("measuring which --block is fastest here: naming one skips this", flush=True)
    answer = measure_here(job, device) if device.type == "cuda" else measure_apart(job)
    if "naive" in answer["seconds"] and answer["lasting"]:
        with contextlib.suppress(OSError):  # the next run measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path, f".{os.getpid()}.tmp") as file:
                file.write(json.dumps(answer).encode())
    return describe(answer, default)


def describe(answer, default):
    """The block to take by an answer of ``try_blocks``, and a list of a line that says why.

    That is naive, unless another block gains more than GAIN, and more than lies between the 20th and the 80th
    percentile of its gains, round by round. If nothing was timed, it is ``default``, or naive if that was refused.
    """
    timed, reasons = answer["seconds"], [f"{what}: {reason}" for what, reason in answer["refused"].items()]
    if not timed:
        block = "naive" if default in answer["refused"] else default
        return block, ["; ".join(["--block auto could not measure", *reasons, f"it takes {block}"])]
    block, best, speed = "naive", 1.0, "the fastest"
    if "naive" not in timed:
        block, speed = min(timed, key=lambda name: statistics.median(timed[name])), "the fastest of those that run"
    for name, values in timed.items():
        gains = sorted(slow / fast for slow, fast in zip(timed.get("naive", values), values, strict=True))
        low, median, high = (gains[round(q * (len(gains) - 1))] for q in (0.2, 0.5, 0.8))
        if median - 1 > max(GAIN, high - low) and median > best:
            block, best, speed = name, median, f"{median:.2f} times as fast as naive"
    line = "; ".join([f"--block auto took {block}, {speed} here", *reasons, f"--block {block} pins it"])
    return block, [line]


def measure_here(job, device):
    """Run ``try_blocks`` in this process. Raises Mistake if a kernel has left the GPU unusable."""
    try:
        with contextlib.redirect_stdout(None):
            answer = try_blocks(job)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return answer
    except RuntimeError as error:
        raise Mistake(f"the GPU has failed while --block auto measured ({in_words(error)}): name a --block") from error


def measure_apart(job):
    """Run ``try_blocks`` in another process. Refuses a block at which that dies or hangs.

    After LONGEST seconds, the answer has the rounds that every block has finished.
    """
    answer, said = {"at": "the process", "seconds": {}, "refused": {}, "lasting": False}, ""
    with tempfile.TemporaryFile() as file:  # can be read even if the process hangs
        streams = {"stdin": subprocess.PIPE, "stdout": file, "stderr": subprocess.STDOUT}
        try:
            with subprocess.Popen([sys.executable, *PROGRAM, json.dumps(job)], cwd=ROOT, **streams) as process:
                try:
                    end = f"ended with status {process.wait(LONGEST)}"
                finally:
                    process.kill()
        except subprocess.TimeoutExpired:
            end = None
        except OSError as error:
            end = str(error)
        file.seek(0)
        for line in file.read().decode(errors="replace").splitlines():
            said = f": {line}"
            with contextlib.suppress(ValueError, TypeError):  # printed by a library
                answer, said = answer | json.loads(line), ""
    at, timed = answer.pop("at"), answer["seconds"]
    if at is not None and (end or not min(map(len, timed.values()), default=0)):
        timed.pop(at, None)
        answer["refused"].setdefault(at, f"{end}{said}" if end else "did not end in time")
    rounds = min(map(len, timed.values()), default=0)
    timed = {block: values[:rounds] for block, values in timed.items() if rounds}
    return answer | {"seconds": timed, "lasting": answer["lasting"] and at is None}


def cache_path(job, device):
    """The file that keeps the answer to a job; its name is a hash of everything that the answer depends on."""
    parts = ("densenet.py", "common/hardware.py", "fused/*.py", "training/*.py")
    driver = Path("/proc/driver/nvidia/version")
    sources = [path.read_bytes() for part in parts for path in sorted(ROOT.glob(part))]
    key = job | {
        "hardware": device_name(device),
        "driver": driver.read_text() if driver.exists() else None,
        "versions": versions(),
        "threads": {name: text for name, text in os.environ.items() if name[:3] in ("OMP", "GOM", "KMP", "MKL", "THP")},
        "sources": hashlib.sha256(b"".join(sources)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.suppress(RuntimeError):  # the user has no home
        return platformdirs.user_cache_path("densenet.pytorch") / f"{name}.json"
    return Path(os.devnull, name)  # which no file can have
