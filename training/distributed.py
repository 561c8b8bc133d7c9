"""One run in several processes, the ranks that torchrun starts: what each computes, and how all end together.

Without torchrun there is one rank, and nothing here communicates.
"""

import contextlib
import os
import signal
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common.console import Mistake, counted

# How long a rank waits for the others: while one downloads, decodes or measures; and in a step. gloo notices that
# another process has died, but not that the network is cut; NCCL notices neither.
LONG, SHORT = timedelta(hours=6), timedelta(minutes=10)
waiting = None  # the process group that waits LONG


class FailedElsewhere(Exception):
    """Another rank has failed and says why; this one has to end, with exit status ``status``."""

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


def launch_id():
    """A name that only this launch by torchrun has, restarts included (--max-restarts); None without torchrun.

    It is the random name of the folder in which the ranks of a machine report errors.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/0/error.json
    return Path(report).parents[2].name if report else None


@contextlib.contextmanager
def process_group():
    """A context in which the ranks can communicate: NCCL between GPUs, gloo between CPUs."""
    global waiting
    if is_launched():
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # Linux: this process ends if torchrun is killed
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
    """The device of this rank: its own GPU if ``device``, for which all ranks ask, is "cuda". Raises Mistake."""
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise Mistake(f"--device {device.type} runs one process: leave out torchrun, or use --device cpu")
    if device.index is not None:
        raise Mistake(f"--device {device}: each of several processes takes a GPU of its own, so use --device cuda")
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        where = f"{processes} processes, but {counted(gpus, 'GPU')} on {socket.gethostname()}"
        raise Mistake(f"{where}: use --nproc_per_node={gpus}, or --device cpu")
    return torch.device("cuda", local_rank())


def all_gather(value):
    """A list of the ranks' values, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=waiting)
    return values


def on_every_rank(function, *args):
    """Call a function on every rank. If it fails on some, the first of them raises its exception, all others
    FailedElsewhere: no rank waits for one that has ended."""
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
    first = on_every_rank(lambda: function(*args) if local_rank() == 0 else None)
    return on_every_rank(lambda: first if local_rank() == 0 else function(*args))


def all_reduce(tensor):
    """The sum of a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_weights(model):
    """Give every rank the weights of rank 0: processors of two kinds may round the initial ones differently."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def average_statistics(model):
    """Give every rank the mean of the ranks' running statistics, each measured on its own part of the batches.

    Those of frozen modules are the same on every rank, and stay as they are.
    """
    if world_size() == 1:
        return
    for module in model.modules():
        frozen = not all(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point() and not frozen:
                all_reduce(buffer).div_(world_size())


def is_lost_rank(error):
    """True if an exception says that another rank cannot be reached any more."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def exit_from(main):
    """End the process with the exit status of ``main()``; with several ranks, at once.

    Python's own way waits for, or aborts, threads that talk to ranks which have ended already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # main handles it; ignored is a second Ctrl-C, while the process ends
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
    """True if this rank says that the run was stopped: rank 0, and those that may outlive it."""
    return rank() <= 1 or local_rank() == 0


def launcher():
    """The beginning of the command that starts a run of so many processes."""
    if world_size() == 1:
        return "python"
    machines = os.environ["GROUP_WORLD_SIZE"]
    several = "" if machines == "1" else f"--nnodes={machines} … "
    return f"torchrun {several}--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
