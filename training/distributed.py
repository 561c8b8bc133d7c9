"""One run in several processes, the ranks that torchrun starts: who computes what, and how all of them end together.

Without torchrun there is one rank, and nothing here communicates.
"""

import contextlib
import inspect
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.console import Mistake

# How long a rank waits for the others: while one downloads, decodes or measures, and in a step. gloo notices by itself
# that another process has died, but not that the network is cut; NCCL notices neither.
LONG, SHORT = timedelta(hours=6), timedelta(minutes=10)
# What launchers, torchrun and those of clusters, say to a process that is the only one.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}
waiting = None  # the group in which the ranks wait for what one of them does alone


class FailedElsewhere(Exception):
    """Another rank has failed and says why; this one only has to end, with exit status ``status``."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


def is_launched():
    """True if torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size():
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def rank():
    """This process's number, from 0, on all machines together."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank():
    """This process's number, from 0, on its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def share():
    """(rank, world size): which images of each batch are this process's."""
    return rank(), world_size()


def launch_id():
    """A name that only this launch by torchrun has, whatever clocks say; None without torchrun.

    torchrun starts all ranks anew when one has died (--max-restarts). On each machine, a launch has one folder with a
    random name for what its ranks report.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/0/error.json
    return Path(report).parents[2].name if report else None


def end_with_launcher():
    """Let SIGTERM reach this process when torchrun has been killed, which can't send it then."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # for a last line; a thread that waits for a lost rank does not hear of signals
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def process_group():
    """A context in which the ranks can communicate: NCCL between GPUs, gloo between CPUs."""
    global waiting
    for name, alone in ALONE.items():
        if (text := os.environ.get(name, alone)) != alone and not is_launched():  # nobody else would take part
            raise Mistake(f"the environment has {name}={text}, which torchrun has not set: use torchrun, or unset it")
    if is_launched():
        end_with_launcher()
    if world_size() == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())  # before any rank makes a context on GPU 0
    store, *_ = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # After a restart, torchrun on one machine may serve the store of the attempt before, whose addresses are dead.
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=SHORT)
    waiting = dist.new_group(backend="gloo", timeout=LONG)
    yield
    dist.destroy_process_group()  # not after an exception: the others may be waiting in a collective


def device_of_rank(device):
    """The device of this rank, of the kind of ``device``, which all ask for at once. Raises Mistake if it lacks one.

    A rank may see one GPU alone, which nobody else sees (``--gpus-per-task=1``).
    """
    if world_size() == 1:
        return device
    number = local_rank() % max(1, torch.cuda.device_count())
    gpus = all_gather(str(torch.cuda.get_device_properties(number).uuid) if device.type == "cuda" else None)

    def mine():
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise Mistake(f"--device {device.type} runs one process: leave out torchrun, or use --device cpu")
        if device.index is not None:
            raise Mistake(f"--device {device}: each of several processes takes a GPU of its own, so use --device cuda")
        if gpus.count(gpus[rank()]) > 1:
            processes, found = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            where = f"{processes} processes, but {found} GPUs on {socket.gethostname()}"
            raise Mistake(f"{where}: use --nproc_per_node={found}, or --device cpu")
        return torch.device("cuda", number)

    return on_every_rank(mine)


def all_gather(value):
    """The values of all ranks, in a list, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=waiting)
    return values


def on_every_rank(function, *args):
    """Call a function on every rank. Where it fails on some, the first of them raises its exception, all others
    FailedElsewhere: no rank goes on to wait for one that has ended."""
    result = error = None
    try:
        result = function(*args)
    except (Exception, SystemExit) as failure:
        error = failure
    status = None if error is None else getattr(error, "code", 2)  # SystemExit has one
    failed = {number: status for number, status in enumerate(all_gather(status)) if status is not None}
    if failed and min(failed) == rank():
        raise error
    if failed:
        raise FailedElsewhere(failed[min(failed)])
    return result


def on_rank_0(function, *args):
    """Call a function on rank 0 alone and return its result on every rank."""
    answer = [on_every_rank(lambda: function(*args) if rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(answer, group=waiting)
    return answer[0]


def local_rank_0_first(function, *args):
    """Call a function on the first rank of each machine, then on the others, which find what it left on the disk."""
    for turn in (True, False):
        mine = (local_rank() == 0) == turn
        outcome = on_every_rank(lambda mine=mine: function(*args) if mine else None)
        if mine:
            result = outcome
    return result


def data_parallel(model):
    """The model as training calls it: its gradients become the mean over the ranks."""
    if world_size() == 1:
        return model
    # Running statistics are averaged once per epoch, not copied from rank 0 in every step. Newer releases renamed this.
    names = inspect.signature(DistributedDataParallel).parameters
    copies = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{copies: False})


def all_reduce(tensor):
    """The sum of a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_statistics(model):
    """Give every rank the mean of the ranks' running statistics, each measured on its own share of the batches.

    Those of frozen modules are the same everywhere, and stay as they are.
    """
    if world_size() == 1:
        return
    for module in model.modules():
        frozen = not all(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point() and not frozen:
                all_reduce(buffer).div_(world_size())


def is_lost_rank(error):
    """True if an exception tells that another rank cannot be reached any more."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def exit_from(main):
    """End the process with the exit status of ``main()``; where there are several ranks, at once.

    The usual end of a process waits for, or aborts, the threads that talk to ranks which have ended already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but within main: a second Ctrl-C, while the process ends
    if world_size() == 1:
        sys.exit(main())
    try:
        status = main()
    except SystemExit as error:
        status = error.code
    except Exception:
        traceback.print_exc()
        status = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status or 0)


def reports_lost_rank():
    """True if this rank says that another one's end has ended the run: rank 0, and those that may have outlived it."""
    return rank() <= 1 or local_rank() == 0


def launcher():
    """The beginning of the command that starts such a run."""
    if world_size() == 1:
        return "python"
    machines = os.environ["GROUP_WORLD_SIZE"]
    several = "" if machines == "1" else f"--nnodes={machines} … "
    return f"torchrun {several}--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
