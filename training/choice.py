"""The choice of the block that a run trains with: wanted, compared with naive, and with --block auto measured.

What is fastest is measured before the first step (training/trial.py) and kept in the user's cache folder. On a CPU a
process of its own measures, which may crash, hang or run out of memory; a GPU may be one process's alone.
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
from common.hardware import choose_precision, device_name
from densenet import BLOCKS, differing_blocks
from training import distributed
from training.flags import can_replay, model_options
from training.run import ROOT, versions
from training.step import in_words
from training.trial import make_images, make_model, seconds, try_blocks

GAIN = 0.05  # by which another block must be faster than naive, at least
SHARE = 0.02  # of the time of all training steps that measuring may take on a CPU
START = 10  # seconds that the start of a process and its compilers take there, about
WORK = 60  # training steps that take as long as the checks and turns of three blocks, about
FEW = 10_000  # training steps on a GPU, for which compiling kernels and measuring may take longer than it saves
PROGRAM = ["-m", "training.trial"]


def choose_block(args, checkpoint, dataset, model, device, precision):
    """A stage's entries on how dense blocks run and whether steps are replayed as CUDA graphs, and lines about that.

    A block that would compute something else than the network's code is not taken, whoever asked for it. A resumed run
    keeps what it had, on the same device.
    """
    refused = {}

    def computes_the_same(name):
        if name not in ("naive", *refused) and (found := differing_blocks(model, name)):
            refused[name] = "{}: {}".format(*next(iter(found.items())))
        return name not in refused

    last = stages(checkpoint["config"])[-1] if checkpoint else {}
    same = (last.get("device"), last.get("precision")) == (device_name(device), precision)
    graph = not same or last["cuda_graph"] if args.cuda_graph is None else args.cuda_graph
    graph = graph and can_replay(args, device, precision)
    block, note = args.block, None
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
            block, note = fastest_block(job, block, epochs * -(-len(dataset.train) // args.batch_size))
    if not computes_the_same(block):
        block = "naive"
    notes = [f"block {x} does not compute this network ({why}): this run takes {block}" for x, why in refused.items()]
    if fused.NO_LOOPS and device.type == "cpu" and args.block in ("auto", "fused"):
        notes.append(f"block fused runs in plain torch, more slowly: Numba cannot be used ({fused.NO_LOOPS})")
    entries = {"block": block, "cuda_graph": graph} | ({"refused": refused} if refused else {})
    return entries, [*notes, *filter(None, [note])]


def default_block(device):
    """The block where none is measured: the fastest one on every CPU so far; on a GPU, what needs no compiling."""
    return "fused" if device.type == "cpu" and fused.loops is not None else "naive"


def fastest_block(job, default, steps):
    """The block for so many training steps, and a line; ``default`` and None if measuring would not pay."""
    device = torch.device(job["device"])
    path = cache_path(job, device)
    with contextlib.suppress(Exception):  # nothing is there, or whatever another program has left
        block, line = describe(json.loads(readable(path).read_text()), default)
        if block in BLOCKS:
            return block, line
    budget = steps >= FEW if device.type == "cuda" else seconds_to_measure(job, steps)
    if not budget:
        return default, None
    print("measuring which --block is fastest here; naming one skips this", flush=True)
    found = measure_here(job, device) if device.type == "cuda" else measure_apart(job, budget)
    if "naive" in found["seconds"] and found["lasting"]:
        with contextlib.suppress(OSError):  # then it is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path, f".{os.getpid()}.tmp") as file:
                file.write(json.dumps(found).encode())
    return describe(found, default)


def describe(found, default):
    """The block that was found to be the fastest, and a line that says by how much.

    naive stands unless another one gains more than GAIN, and more than what lies between the 20th and the 80th
    percentile of its gains turn by turn. Where nothing was timed, it is ``default``, or naive where that did not pass.
    """
    timed, reasons = found["seconds"], [f"{what}: {reason}" for what, reason in found["refused"].items()]
    if not timed:
        block = "naive" if default in found["refused"] else default
        return block, "; ".join(["--block auto could not measure", *reasons, f"it takes {block}"])
    block, best, speed = "naive", 1.0, "the fastest"
    if "naive" not in timed:
        block, speed = min(timed, key=lambda name: statistics.median(timed[name])), "which runs"
    for name, values in timed.items():
        gains = sorted(slow / fast for slow, fast in zip(timed.get("naive", values), values, strict=True))
        low, median, high = (gains[round(q * (len(gains) - 1))] for q in (0.2, 0.5, 0.8))
        if median - 1 > max(GAIN, high - low) and median > best:
            block, best, speed = name, median, f"{median:.2f} times as fast as naive"
    return block, "; ".join([f"--block auto took {block}, {speed} here", *reasons, f"--block {block} pins it"])


def seconds_to_measure(job, steps):
    """Seconds that measuring on a CPU may take, 0 if it would not pay."""
    share = SHARE * steps
    if share < WORK:
        return 0
    model, (amp, _) = make_model(job, "naive").eval(), choose_precision(job["precision"], torch.device("cpu"))
    images, _ = make_images(job["batch_size"], job, 0)
    with torch.no_grad(), amp():
        model(images)  # which allocates, and chooses algorithms
        step = 3 * min(seconds(lambda: model(images), images.device) for _ in range(2))  # backward takes twice as long
    return share * step if (share - WORK) * step >= START else 0


def measure_here(job, device):
    """Run ``try_blocks`` in this process. Raises Mistake if a kernel has left the GPU unusable."""
    try:
        with contextlib.redirect_stdout(None):
            found = try_blocks(job)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return found
    except RuntimeError as error:
        raise Mistake(f"the GPU has failed while --block auto measured ({in_words(error)}): name a --block") from error


def measure_apart(job, budget):
    """Run ``try_blocks`` in another process. Refuse a block at which that dies or hangs.

    After ``budget`` seconds, the turns that every block has had until then are the answer.
    """
    found, said = {"at": "the process", "seconds": {}, "refused": {}, "lasting": False}, ""
    with tempfile.TemporaryFile() as file:  # read even if the process hangs
        streams = {"stdin": subprocess.PIPE, "stdout": file, "stderr": subprocess.STDOUT}
        try:
            with subprocess.Popen([sys.executable, *PROGRAM, json.dumps(job)], cwd=ROOT, **streams) as process:
                try:
                    end = f"ended with status {process.wait(budget)}"
                finally:
                    process.kill()
        except subprocess.TimeoutExpired:
            end = None
        except OSError as error:
            end = str(error)
        file.seek(0)
        for line in file.read().decode(errors="replace").splitlines():
            said = f": {line}"
            with contextlib.suppress(ValueError, TypeError):  # what a library prints
                found, said = found | json.loads(line), ""
    at, timed = found.pop("at"), found["seconds"]
    if at is not None and (end or not min(map(len, timed.values()), default=0)):
        timed.pop(at, None)
        found["refused"].setdefault(at, f"{end}{said}" if end else "did not end in time")
    turns = min(map(len, timed.values()), default=0)
    timed = {block: values[:turns] for block, values in timed.items() if turns}
    return found | {"seconds": timed, "lasting": found["lasting"] and at is None}


def cache_path(job, device):
    """The file that keeps the answer to a job, named by everything that it depends on."""
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
    with contextlib.suppress(RuntimeError):  # no HOME, nor a home of the user's number
        return platformdirs.user_cache_path("densenet.pytorch") / f"{name}.json"
    return Path(os.devnull, name)  # where nothing is found or kept
