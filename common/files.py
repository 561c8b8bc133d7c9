"""Write files whole or not at all; refuse to read what never ends."""

import contextlib
import errno
import os
from pathlib import Path

from common.console import Mistake


def readable(path):
    """The Path of a file to read. Raises Mistake for a pipe, a socket or a device, which may never end."""
    if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
        raise Mistake(f"{path} is not a file, but a pipe, a socket or a device")
    return Path(path)


@contextlib.contextmanager
def written_whole(path, suffix=".tmp", previous=None):
    """A binary file that replaces ``path`` in one step when the block ends without an exception.

    At any moment, ``path`` holds its old content or all of the new. The new content is first written to a file beside
    it whose name ends in ``suffix``: processes that write at the same time need different ones. With ``previous``, the
    old content takes that name, and for a moment ``path`` does not exist.
    """
    temporary = path.with_name(path.name + suffix)
    if path.exists() and not path.is_file():  # renaming would replace a pipe or a device, too
        raise FileExistsError(errno.EEXIST, "is not a file that can be replaced", str(path))
    try:
        temporary.unlink(missing_ok=True)  # left by a kill, or a link
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync_names(path.parent)
    except BaseException as error:
        if isinstance(error, OSError):  # a full disk's has none
            error.filename = error.filename or str(path)
        with contextlib.suppress(OSError):  # a read-only file system refuses to delete what is not there
            temporary.unlink(missing_ok=True)
        raise


def sync_names(folder):
    """Write the names in a folder to the disk, so that they survive a power cut."""
    with contextlib.suppress(OSError):  # Windows opens no folders; others may not be readable
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
