"""Files that are written whole or not at all, and read only where reading ends."""

import contextlib
import errno
import os
import sys
from pathlib import Path

from common.console import Mistake


def readable(path):
    """The Path of a file to read. Raises Mistake if reading would never end, as of a named pipe or a device."""
    if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
        raise Mistake(f"{path} is not a file, but a pipe, a socket or a device")
    return Path(path)


@contextlib.contextmanager
def written_whole(path, suffix=".tmp", previous=None):
    """A binary file that takes the place of ``path`` in one step when the block ends without an exception.

    Whatever happens meanwhile, ``path`` holds its old content or all of the new. The new content is written beside it
    first, under a name that ends in ``suffix``: the same for all who write, who therefore do so one at a time, or one's
    own. With ``previous``, the old content takes that name, and is under no other for a moment.
    """
    temporary = path.with_name(path.name + suffix)
    if path.exists() and not path.is_file():  # renaming would put a file in the place of a pipe or a device, too
        raise FileExistsError(errno.EEXIST, "is not a file that can be replaced", str(path))
    try:
        temporary.unlink(missing_ok=True)  # left by a kill, or a link that somebody has put there
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync_names(path.parent)
    except BaseException as error:
        if isinstance(error, OSError):  # that of a full disk does not say where
            error.filename = error.filename or str(path)
        with contextlib.suppress(OSError):  # a read-only file system refuses to delete even what is not there
            temporary.unlink(missing_ok=True)
        raise


def sync(descriptor):
    """os.fsync, but for file systems that know no such thing, and refuse it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def sync_names(folder):
    """Let the names in a folder outlive a power cut, as fsync lets a file's content."""
    if sys.platform == "win32":  # which opens no folders
        return
    with contextlib.suppress(OSError):  # a folder that may not be read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
