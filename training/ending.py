"""What a run prints, and its exit status, if it stops early."""

import contextlib
import shlex
import signal
import sys

from common.checkpoints import Lost
from common.console import SIGNALS, Mistake, forget_workers, memory_problem, place_of
from training import distributed


class NotFinite(Exception):
    """The loss became NaN or infinite in iteration ``step`` (from 1) of an epoch."""

    def __init__(self, step):
        self.step = step


class Interrupted(BaseException):
    """One of SIGNALS arrived."""

    def __init__(self, number):
        self.number = number


@contextlib.contextmanager
def interruptible():
    """Raise Interrupted on SIGNALS. Yields a function that makes the process ignore them from then on.

    Those that are ignored already stay so, as SIGHUP under ``nohup``, but for Ctrl-C and SIGTERM.
    """
    numbers = [number for number in SIGNALS if number in SIGNALS[:2] or signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(number, frame):
        raise Interrupted(number)

    def ignore():
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(error, run):
    """The exit status of a run that ``error`` has ended, and what this rank prints about it, or None.

    Raises unexpected errors again, and those of standard output.
    """
    rank, has_begun = distributed.rank(), run is not None and run.epoch is not None
    if isinstance(error, distributed.FailedElsewhere):
        return error.status, None
    if isinstance(error, Mistake):
        return 2, f"error: {error}" + (f"; {saved(run)}" if has_begun else "")
    if isinstance(error, NotFinite):
        if rank > 0:  # rank 0 knows the epoch
            return 3, None
        where = f"epoch {run.epoch + 1}, iteration {error.step}"
        slower = saved(run, lambda args: f"--lr {args['lr'] / 10:g} (at the same rate, the same would happen)")
        return 3, f"error: the loss is not finite in {where}; {slower}"
    if isinstance(error, Interrupted):
        quiet = not distributed.reports_lost_rank() or (error.number == signal.SIGINT and rank > 0)
        return 128 + error.number, None if quiet else f"stopped; {saved(run)}"
    if (problem := memory_problem(error)) and has_begun:
        forget_workers()
        error.__traceback__ = None  # which keeps what fills the memory
        return 1, f"error: {problem}; {saved(run, lambda args: less_memory(args, problem))}"
    if isinstance(error, OSError) and has_begun and not isinstance(error, BrokenPipeError):
        return 1, f"error: {place_of(error) or run.path}: {error.strerror or error}; {saved(run)}"
    if distributed.is_lost_rank(error):
        quiet = not distributed.reports_lost_rank()
        return 1, None if quiet else f"error: another process of this run has ended; {saved(run)}"
    raise error


def less_memory(args, problem):
    if "--workers" in problem:
        return f"--workers {args['workers'] // 2}"
    return "" if args["block"] == "checkpoint" else "--block checkpoint (which needs less memory)"


def saved(run, change=lambda args: ""):
    """Says what a run that stopped early has on disk, and how to go on.

    ``change`` makes the flag to add of the run's arguments.
    """
    if run is None:
        return "nothing was written"
    try:
        checkpoint, path = run.latest()
    except Lost:
        return "nothing was saved"
    except Mistake as error:
        return str(error)
    if run.epoch is None:
        return f"{path} is as it was, after epoch {checkpoint['epoch']}"
    save = ("--save=" if str(run.path).startswith("-") else "--save ") + shlex.quote(str(run.path))
    resume = f"{distributed.launcher()} {shlex.quote(sys.argv[0])} {save} --resume"
    flag = change(checkpoint["config"]["arguments"])
    return f"epoch {checkpoint['epoch']} is saved in {path}; to go on: {resume} {flag}".rstrip()
