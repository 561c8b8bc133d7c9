"""The choice of the block that a run trains with: wanted, compared with naive, and with --block auto measured.

What is fastest is measured in a process of its own (training/trial.py) and kept in the user's cache folder.
"""

import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import platformdirs
import torch

import fused
from common.config import stages
from common.files import written_whole
from common.hardware import choose_precision, device_name
from densenet import BLOCKS, differing_blocks
from training import distributed
from training.flags import model_options
from training.run import ROOT, versions
from training.trial import GRAPH, make_images, make_model, seconds

GAIN = 0.05  # by which another block must be faster than naive, at least
SHARE = 0.02  # of the time of all training steps, eager ones, that measuring may take
START = {"cpu": 10, "cuda": 20}  # seconds that the start of a process and its compilers take, about
WORK = {"cpu": 60, "cuda": 500}  # training steps that take as long as the checks and turns of three blocks, about
PROGRAM = ["-m", "training.trial"]
NOTHING = {"seconds": {}, "refused": {}, "graph": False, "lasting": False}  # is known


def choose_block(args, checkpoint, dataset, model, device, precision):
    """A stage's entries on how dense blocks run and whether steps are replayed as a CUDA graph, and lines about that.

    A block that would compute something else than the network's code is not taken, whoever asked for it.
    """
    refused = {}

    def computes_the_same(name):
        if name not in ("naive", *refused) and (found := differing_blocks(model, name)):
            refused[name] = "{}: {}".format(*next(iter(found.items())))
        return name not in refused

    block, graph, note = wanted_block(args, checkpoint, dataset, device, precision, computes_the_same)
    if not computes_the_same(block):
        block, graph = "naive", graph and bool(args.cuda_graph)
    notes = [f"block {x} does not compute this network ({why}): this run takes {block}" for x, why in refused.items()]
    entries = {"block": block, "cuda_graph": graph} | ({"refused": refused} if refused else {})
    return entries, [*notes, *filter(None, [note])]


def wanted_block(args, checkpoint, dataset, device, precision, possible):
    """The block that is asked for, whether steps are to be replayed as a CUDA graph, and a line about it or None.

    --block auto measures those that are ``possible`` where it can and it pays. A resumed run keeps what it had, on the
    same device.
    """
    last = stages(checkpoint["config"])[-1] if checkpoint else {}
    same = (last.get("device"), last.get("precision")) == (device_name(device), precision)
    # A CUDA graph holds no step that is left out, as in fp16, and none in which processes exchange gradients.
    replay = device.type == "cuda" and precision != "fp16" and distributed.world_size() == 1 and not args.compile
    graph = replay and (same and last["cuda_graph"] if args.cuda_graph is None else args.cuda_graph)
    if args.block != "auto":
        return args.block, graph, None
    default = "naive" if args.compile else default_block(device)
    if args.deterministic or args.compile or device.type not in ("cpu", "cuda"):
        return default, graph, None
    if same and checkpoint["config"]["arguments"]["block"] == "auto":
        return last["block"], graph, None
    share, finished = -(-args.batch_size // distributed.world_size()), checkpoint["epoch"] if checkpoint else 0
    job = {
        "model": model_options(args, len(dataset.classes)),
        "batch_size": min(share, len(dataset.train)),
        "image_size": args.image_size,
        "precision": precision,
        "device": str(device),
        "graph": args.cuda_graph is not False and replay,
        "blocks": [name for name in BLOCKS if possible(name)],
    }
    steps = (args.epochs - finished) * -(-len(dataset.train) // args.batch_size)
    return fastest_block(job, default, steps, graph)


def default_block(device):
    """The block to use where none is measured: the one that was the fastest on every device of this kind so far."""
    return "fused" if device.type == "cpu" and fused.loops is not None else "naive"


def fastest_block(job, default, steps, graph=False):
    """The block to train ``steps`` steps with, whether to replay them as a CUDA graph, and a line about it or None.

    They are ``default`` and ``graph`` where the training is too short to repay measuring.
    """
    device = torch.device(job["device"])
    path = cache_path(job, device)
    found = read_cache(path)
    if found is None:
        share = SHARE * steps - WORK[device.type]  # steps whose time is left for the start
        if share < 0:
            return default, graph, None
        step = expected_seconds(job, device)
        if share * step < START[device.type]:
            return default, graph, None
        budget = SHARE * steps * step
        print(f"measuring which --block is fastest here, {budget:.0f} s at most; naming one skips this", flush=True)
        found = measure_apart(job, budget)
        if "naive" in found["seconds"] and found["lasting"]:
            write_cache(path, found)
    return describe(found, default, graph)


def fastest(found):
    """(block, how many times as fast as naive, or None where that cannot run) from the seconds of turns.

    naive stands unless another one gains more than GAIN, and more than what lies between the 20th and the 80th
    percentile of its gains turn by turn.
    """
    if "naive" not in found:
        return min(found, key=lambda block: statistics.median(found[block]), default=None), None
    best = "naive", 1.0
    for block, values in found.items():
        gains = sorted(slow / fast for slow, fast in zip(found["naive"], values, strict=True))
        low, median, high = (gains[round(q * (len(gains) - 1))] for q in (0.2, 0.5, 0.8))
        if median - 1 > max(GAIN, high - low) and median > best[1]:
            best = block, median
    return best


def describe(found, default, graph=False):
    """The block that was found to be the fastest, whether with a CUDA graph, and a line that says by how much.

    They are ``default``, or naive where that block did not pass, and ``graph`` where nothing was found.
    """
    block, gain = fastest(found["seconds"])
    reasons = [f"{name}: {reason}" for name, reason in found["refused"].items()]
    if block is None:
        block = "naive" if default in found["refused"] else default
        return block, graph, "; ".join(["--block auto could not measure", *reasons, f"it takes {block}"])
    speed = "which runs" if gain is None else "the fastest" if gain == 1 else f"{gain:.2f} times as fast as naive"
    chosen = f"{block} {GRAPH}" if found["graph"] else block
    parts = [f"--block auto took {chosen}, {speed} here", *reasons, f"--block {chosen} pins it"]
    return block, found["graph"], "; ".join(parts)


def expected_seconds(job, device):
    """About how long a training step takes, from a forward pass: the backward pass takes twice as long."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's own draws stay as they are
        model = make_model(job, "naive", device).eval()
    amp, _ = choose_precision(job["precision"], device)
    images, _ = make_images(job["batch_size"], job, 0, device=device)
    with torch.no_grad(), amp():
        model(images)  # which allocates, and chooses algorithms
        forward = min(seconds(lambda: model(images), device) for _ in range(2))
    if device.type == "cuda":
        del model, images
        torch.cuda.empty_cache()  # the other process needs the room
    return 3 * forward


def run_process(job, timeout):
    """The last line of JSON that the process prints within so many seconds, or {}, and its exit status or None."""
    command = [sys.executable, *PROGRAM, json.dumps(job)]
    with tempfile.TemporaryFile() as file:  # read even if the process hangs
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
                process.wait(10)
        file.seek(0)
        for line in reversed(file.read().decode(errors="replace").splitlines()):
            with contextlib.suppress(ValueError):  # what a library prints
                if isinstance(answer := json.loads(line), dict):
                    return answer, status
    return {}, status


def measure_apart(job, budget):
    """What ``try_blocks`` finds in another process. If that dies or hangs at a block, a next one does without it.

    After ``budget`` seconds, the turns that every block has had until then are the answer.
    """
    job, refused, end = job | {"checked_images": job["batch_size"]}, {}, time.monotonic() + budget
    while job["blocks"] and time.monotonic() < end:
        try:
            answer, status = run_process(job, end - time.monotonic())
        except OSError as error:
            return NOTHING | {"refused": {"the process": str(error)}}
        at, refused = answer.get("at"), refused | answer.get("refused", {})
        turns = min(map(len, answer.get("seconds", {}).values()), default=0)
        if (answer and at is None) or (status is None and turns):
            lasting = at is None and answer["lasting"] and refused == answer["refused"]
            timed = {block: values[:turns] for block, values in answer["seconds"].items()}
            return answer | {"seconds": timed, "refused": refused, "lasting": lasting}
        if at == "reference" and status is not None and job["checked_images"] > 1:
            job["checked_images"] //= 2
        elif at in (*job["blocks"], GRAPH):
            refused.setdefault(at, "did not end in time" if status is None else f"ended the process ({status})")
            job["blocks"] = [name for name in job["blocks"] if name != at]
            job["graph"] = job["graph"] and at != GRAPH
        else:
            break
    return NOTHING | {"refused": refused}


def cache_path(job, device):
    """The file that keeps the answer to a job, named by everything that it depends on."""
    parts = ("densenet.py", "common/hardware.py", "training/choice.py", "training/trial.py", "training/step.py")
    sources = [*sorted(ROOT.glob("fused/*.py")), *(ROOT / name for name in parts)]
    threads = {name: text for name, text in os.environ.items() if name.startswith(("OMP", "GOMP", "KMP", "MKL", "THP"))}
    driver = file.read_text() if (file := Path("/proc/driver/nvidia/version")).exists() else None
    key = job | {
        "hardware": device_name(device),
        "gpu": [torch.cuda.mem_get_info(device)[1], driver] if device.type == "cuda" else None,
        "versions": versions(),
        "threads": threads,
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return platformdirs.user_cache_path("densenet.pytorch") / f"{name}.json"


def read_cache(path):
    try:
        found = json.loads(path.read_text())
        describe(found, "naive")
        return found
    except Exception:  # whatever another program has left there
        return None


def write_cache(path, found):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, f".{os.getpid()}.tmp") as file:
            file.write(json.dumps(found).encode())
    except OSError:  # then it is measured again next time
        pass


