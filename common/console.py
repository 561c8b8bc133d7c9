"""Shared by all commands: a user's mistake in one line, streams that cause no traceback, types of arguments."""

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
# In messages of torch, CUDA's libraries, NumPy and the system, if memory runs out.
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")

# They end a run. Schedulers warn by one of the last two, as Slurm does by --signal; Windows has the first two.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Mistake(Exception):
    """A user's mistake. The message is one line: what, where, what to do instead."""


class Parser(argparse.ArgumentParser):
    """Keeps a docstring's line breaks. A mistake is one line with status 2, without the usage before it."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, **options)

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if text.startswith("-") and text.endswith("=--"):  # Python 3.11 makes an empty list of it
                self.error(f"{text}: needs another value")
        return super().parse_known_args(args, namespace)

    def print_help(self, file=None):  # argparse's own passes over a closed pipe
        print(self.format_help(), end="", file=file)

    def error(self, message):
        raise Mistake(message)


def between(low, high, convert=float):
    """The type of an argument: a number in low … high, an integer if ``convert`` is int."""

    def number(text):
        if not low <= convert(text) <= high:
            format_spec = "," if convert is int else "g"
            raise argparse.ArgumentTypeError(f"{text} is not in {low:{format_spec}} … {high:{format_spec}}")
        return convert(text)

    number.__name__ = convert.__name__  # argparse shows it if a text is no number at all
    return number


positive, natural = between(1, 10**9, int), between(0, 10**9, int)
positive_number = between(1e-30, 1e30)  # beyond, float32 would have 0 or infinity
number = between(-1e30, 1e30)
workers = between(0, 1000, int)


def amount(text):
    """The type of an argument: a number of images or, with a point, a fraction of them."""
    return between(0, 0.99)(text) if "." in text else natural(text)


def nonempty(text):
    """The type of an argument: a file or a directory. pathlib would read an empty name as "."."""
    if not text:
        raise argparse.ArgumentTypeError("needs a name, and got nothing")
    return text


def command(main):
    """Decorate the ``main(argv=None)`` of a script: what a user can cause is one line on stderr, not a traceback.

    Returns main's exit status; 2 for a Mistake and for a path that cannot be used; 1 for another failure to read or
    write, such as a full disk, and for too little memory; 141 for a closed pipe (``… | head``), quietly.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None):
        set_up_streams()
        try:
            try:
                return main(argv) or 0
            finally:
                sys.stdout.flush()  # what is buffered meets a closed pipe here, not in the interpreter's finalisation
        except BrokenPipeError:
            discard_output()
            return 141  # 128 + SIGPIPE
        except KeyboardInterrupt:
            return 130  # 128 + SIGINT
        except Exception as error:
            status, message = explain(error)
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"{script}: error: {one_line(message)}", file=sys.stderr)
        return status

    return run


def set_up_streams():
    """Replace characters that a console cannot show; open streams that are closed, before a file takes their number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start, as in daemons
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's has none
            getattr(sys, name).reconfigure(errors="replace")


def explain(error):
    """Exit status and message of an error that a user can cause. Raises every other error again."""
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
    """A message if an error means that memory ran out, else None.

    A DataLoader's worker has no error to raise: the kernel kills it, and torch raises one here.
    """
    text = str(error).lower()
    if "dataloader worker" in text and ("killed" in text or "exited unexpectedly" in text):
        return "a process that decodes images was killed, as happens if memory runs out: use fewer --workers"
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return "too little memory: use smaller batches, smaller images or a smaller network"
    return memory_problem(error.__context__) if error.__context__ else None  # torch's writer raises over a MemoryError


def forget_workers():
    """Keep torch from raising once more for each process of a DataLoader that was killed."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def counted(count, noun):
    """1 image, 2,000 images."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds):
    """0:01:20."""
    return str(datetime.timedelta(seconds=round(seconds)))


def printable(text):
    """Text with the codes of letters that a terminal would obey, or that no font has, in their place."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(message):
    """A message as one line of at most 10,000 letters, whatever names it holds."""
    line = printable(" ".join(str(message).splitlines()))
    return line if len(line) <= 10_000 else f"{line[:5000]} … {line[-4900:]}"


def discard_output():
    """Drop what is still buffered for standard output, and all that is printed from here on."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())


def place_of(error):
    """The path of an OSError. If it has none, an empty line shows if it is that of standard output; else None."""
    try:
        if error.filename is None:
            print(flush=True)
    except OSError:
        discard_output()
        return "standard output"
    return error.filename
