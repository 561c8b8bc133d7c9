"""What all commands share: mistakes in one line, streams that cause no traceback, types of arguments."""

import argparse
import contextlib
import datetime
import errno
import functools
import os
import signal
import sys
from pathlib import Path

WRONG_PLACE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
WRONG_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.EROFS)  # which have no class of their own
# How torch, CUDA's libraries, NumPy and the system say it, beside MemoryError.
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")

# By which a run is ended. Schedulers warn by one of the last two, as Slurm does by --signal; Windows has the first two.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Mistake(Exception):
    """A user's mistake. The message is one line: what, where, what to do instead."""


class Parser(argparse.ArgumentParser):
    """Keeps a docstring's line breaks; a mistake ends with one line and status 2, without the usage before it."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, **options)

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if text.startswith("-") and text.endswith("=--"):  # of which Python 3.11 makes an empty list
                self.error(f"{text}: needs another value")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise Mistake(message)


def between(low, high, kind=float):
    """The type of an argument that is a number in low … high, of another ``kind`` if it is to be whole."""

    def number(text):
        if not low <= kind(text) <= high:
            shown = "," if kind is int else "g"
            raise argparse.ArgumentTypeError(f"{text} is not in {low:{shown}} … {high:{shown}}")
        return kind(text)

    number.__name__ = kind.__name__  # as argparse names it where a text is no number at all
    return number


positive, natural = between(1, 10**9, int), between(0, 10**9, int)
positive_number = between(1e-30, 1e30)  # beyond, float32 would have 0 or infinity
number = between(-1e30, 1e30)
workers = between(0, 1000, int)


def amount(text):
    """The type of an argument that is a number of images or, with a point, a share of them."""
    return between(0, 0.99)(text) if "." in text else natural(text)


def nonempty(text):
    """The type of an argument that names a file or a directory: pathlib would take an empty name for "."."""
    if not text:
        raise argparse.ArgumentTypeError("needs a name, and got nothing")
    return text


def command(main):
    """Decorate the ``main(argv=None)`` of a script: what a user can cause is one line on stderr, not a traceback.

    Returns main's exit status; 2 for a Mistake and for a path that cannot be used, 1 for another failure to read or
    write, such as a full disk, and for too little memory. Where the reader of standard output has gone (``… | head``)
    the script ends quietly, with 141, as if SIGPIPE had killed it. A character that the console cannot show becomes a
    question mark.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None):
        set_up_streams()
        try:
            try:
                return main(argv) or 0
            finally:
                flush_output()  # what is buffered meets a closed pipe here, not in the interpreter's finalisation
        except BrokenPipeError:
            discard_output()
            return 141  # closed pipe: 128 + SIGPIPE
        except KeyboardInterrupt:
            return 130  # 128 + SIGINT
        except Exception as error:
            status, message = explain(error)
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"{script}: error: {one_line(message)}", file=sys.stderr)
        return status

    return run


def set_up_streams():
    """Let no character fail to be shown, and nothing be printed into files that have the numbers of closed streams."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start, as daemons have it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # not so in a notebook
            getattr(sys, name).reconfigure(errors="replace")


def explain(error):
    """Exit status and message for what a user can cause. Raises every other error again."""
    if isinstance(error, Mistake):
        return 2, error
    if problem := memory_problem(error):
        forget_workers()
        return 1, problem
    if isinstance(error, OSError):
        status = 2 if isinstance(error, WRONG_PLACE) or error.errno in WRONG_NAME else 1
        place, reason = place_of(error), error.strerror or error
        return status, reason if place is None else f"{place}: {reason}"
    raise error


def memory_problem(error):
    """The message if an error says that memory ran out, which libraries say in many ways; else None.

    A process that only decodes images has no error to raise: the kernel kills it, and torch tells of its death.
    """
    text = str(error).lower()
    if "dataloader worker" in text and ("killed" in text or "exited unexpectedly" in text):
        return "a process that decodes images was killed, as happens where memory runs out: use fewer --workers"
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return "too little memory: use smaller batches, smaller images or a smaller network"
    return memory_problem(error.__context__) if error.__context__ else None  # torch's writer raises over a MemoryError


def forget_workers():
    """Keep torch from raising once more for each process of a DataLoader that is killed, or found to have been."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def counted(count, noun):
    """1 image, 2,000 images."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds):
    """0:01:20."""
    return str(datetime.timedelta(seconds=round(seconds)))


def printable(text):
    """Text in which a letter that a terminal would obey, or that no font has, is its code."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(message):
    """A message as one line that is not endless, whatever names it holds."""
    line = printable(" ".join(str(message).splitlines()))
    return line if len(line) <= 10_000 else f"{line[:5000]} … {line[-4900:]}"


def flush_output():
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        error.filename = "standard output"
        raise


def discard_output():
    """Let nothing that is still buffered for standard output be written, or fail, from here on."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())


def place_of(error):
    """Where an OSError happened, None if nothing is known. Where it does not say, an empty line tries the output."""
    try:
        if error.filename is None:
            print(flush=True)
    except OSError:
        discard_output()
        return "standard output"
    return error.filename
