"""What all commands share: mistakes in one line, streams that cause no traceback, files that are written whole."""

import argparse
import contextlib
import functools
import os
import sys
import time
import zipfile
from pathlib import Path

WRONG_PLACE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class Mistake(Exception):
    """What a user can set right. The message is one line: what, where, what to do instead."""


class Parser(argparse.ArgumentParser):
    """Keeps a docstring's line breaks; a mistake ends with one line and status 2, without the usage before it."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def natural(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def positive_number(text):
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def command(main):
    """Decorate the ``main(argv=None)`` of a script: what a user can cause is one line on stderr, not a traceback.

    Returns main's exit status; 2 for a Mistake and for a path that cannot be used, 1 for another failure to read or
    write, such as a full disk. Where the reader of standard output has gone (``… | head``) the script ends quietly,
    with 141, as if SIGPIPE had killed it. A character that the console cannot show becomes a question mark.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # not so in a notebook
                stream.reconfigure(errors="replace")
        try:
            try:
                return main(argv) or 0
            finally:
                flush_output()  # what is buffered meets a closed pipe here, not in the interpreter's finalisation
        except BrokenPipeError:
            discard_output()
            return 141  # 128 + SIGPIPE
        except KeyboardInterrupt:
            return 130  # 128 + SIGINT
        except Mistake as error:
            status, message = 2, error
        except OSError as error:
            status = 2 if isinstance(error, WRONG_PLACE) else 1
            message = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)
        print(f"{script}: error: {message}", file=sys.stderr)
        return status

    return run


def flush_output():
    if sys.stdout is None:  # closed from the start, as daemons have it
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        error.filename = "standard output"
        raise


def discard_output():
    """Let nothing that is still buffered for standard output be written, or fail, from here on."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())


@contextlib.contextmanager
def written_whole(path, suffix=".tmp", previous=None):
    """A binary file that takes the place of ``path`` in one step when the block ends without an exception.

    Whatever happens meanwhile, ``path`` holds its old content or all of the new. The new content is written beside it
    first, under a name that ends in ``suffix``: the same for all who write, who therefore do so one at a time, or one's
    own. With ``previous``, the old content takes that name, and is under no other for a moment.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            replace(path, previous)
        replace(temporary, path)
        sync_names(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        with contextlib.suppress(OSError):  # a read-only file system refuses to delete even what is not there
            temporary.unlink(missing_ok=True)
        raise


def sync_names(folder):
    """Let the names in a folder outlive a power cut, as fsync lets a file's content."""
    if sys.platform == "win32":  # which opens no folders
        return
    with contextlib.suppress(OSError):  # some file systems know no such thing, and refuse it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_records(file):
    """Compare every record of a binary file from ``torch.save`` with the checksum that it wrote; torch.load does not.

    Raises nearly anything where the file is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} has another checksum")
    file.seek(0)


def replace(source, target, patience=5):
    """os.replace, which Windows refuses while another process reads ``target``: that is waited for, some seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > end:
                raise
            time.sleep(0.05)
