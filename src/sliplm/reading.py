"""Files that others may have put there: opened once, regular, and never longer than was asked for.

A FIFO would block for ever and a device has no end, so neither is read.  Links are followed: what counts is
checked on the bytes that were read, wherever they lie.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from io import BufferedReader
from pathlib import Path

from sliplm.errors import SlipWarning


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


def is_private(path: Path, status: os.stat_result) -> bool:
    """Whether a secret's file, found to be as `status`, is its owner's alone.

    Containers mount secrets with mode 0440.  That its group may read it is accepted with a SlipWarning where
    nobody else can reach its real folder, or where root put it there (or the mount is read-only) and nobody
    else can write to that folder.  Raises: OSError.
    """
    if status.st_mode & 0o037:
        return False
    if not status.st_mode & 0o040:
        return True
    home = Path(os.path.realpath(path, strict=True)).parent  # behind the links of a mounted secret
    folder = home.stat().st_mode
    given = status.st_uid == 0 or bool(os.statvfs(home).f_flag & os.ST_RDONLY)
    if folder & 0o077 and (folder & 0o022 or not given):
        return False
    warnings.warn(f"{path} is readable by its group: let nobody else be in it", SlipWarning, stacklevel=3)
    return True
