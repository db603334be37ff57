"""Files that others may have put there: opened once, regular, and never longer than was asked for.

A FIFO would block for ever and a device has no end, so neither is read.  Links are followed: what counts is
checked on the bytes that were read, wherever they lie.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.  Raises: OSError; it is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(kind, os.strerror(kind) if stat.S_ISDIR(mode) else "no regular file", str(path))


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a regular file, but not more than `limit` + 1.  Raises: OSError."""
    with open_regular(path) as file:
        return file.read(limit + 1)
