"""Small files that a crash or a power cut cannot halve: at any moment the old one or the new one is there.

A file is written under another name, synced, renamed over the old one, and its folder is synced.  After a
return the new one survives a power cut; after an error either may be there, whole.  Two writers of one path
must keep apart by a `lock`.  For whatever has to be believed after a crash: pools, anchors, seals,
revocations.

Not every file system can do all of it (`filesystem`).  Modes and, where `lasting` is False, the syncing of
folders are done without; a power cut may then bring the old file back.  Locks and what must last are refused
with an OSError that says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sliplm.filesystem import is_missing

PART: Final = ".part"
"""How the name of an unfinished file ends; it begins with a dot."""

_FRESH: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def unfinished_name(path: Path) -> Path:
    """Where a file lies until it is finished."""
    return path.with_name(f".{path.name}{PART}")


class Writing:
    """An unfinished file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of the data.  Raises: OSError."""
        view = memoryview(data).cast("B")
        while len(view):
            view = view[os.write(self._descriptor, view) :]


@contextlib.contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Writing]:
    """Write `path` (mode 0600) piece by piece; it is there, or replaced, when the block ends well.

    Args:
        lasting: refuse where a power cut might bring the old one back.

    Raises: OSError; the unfinished file is deleted then.
    """
    unfinished, descriptor = unfinished_name(path), -1
    try:
        descriptor = os.open(unfinished, _FRESH, 0o600)
        try:
            set_mode(descriptor, 0o600)
            yield Writing(descriptor)
            sync(descriptor, lasting=lasting)
        finally:
            os.close(descriptor)
        unfinished.replace(path)
    except BaseException as error:
        if descriptor >= 0 or not isinstance(error, OSError):  # an interrupt may come as soon as it is there
            with contextlib.suppress(OSError):
                unfinished.unlink()
        raise
    sync_folder(path.parent, lasting=lasting)


def replace(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Replace a small file, as `replacing`.  Raises: OSError."""
    with replacing(path, lasting=lasting) as file:
        file.write(data)


def write(path: Path, data: bytes) -> None:
    """Write a file (mode 0600) and sync it; a crash may halve it, and leaves its name in doubt until
    `sync_folder`.  Raises: OSError.
    """
    descriptor = os.open(path, _FRESH, 0o600)
    try:
        set_mode(descriptor, 0o600)
        Writing(descriptor).write(data)
        sync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file that nobody needs; after a power cut it may be there again.  Raises: OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def make_folder(path: Path) -> None:
    """Make a folder of mode 0700, with those above it; no power cut undoes it.  Raises: OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        sync_folder(path.parent, lasting=False)


def sync_folder(path: Path, *, lasting: bool = True) -> None:
    """Make what was created, renamed and deleted in a folder survive a power cut.

    Args:
        lasting: False passes over file systems on which a folder cannot be synced.

    Raises: OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor, lasting=lasting)
    finally:
        os.close(descriptor)


def sync(descriptor: int, *, lasting: bool = False) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; `lasting` as in `sync_folder`.

    Raises: OSError.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_missing(error):
            raise
        if lasting:
            what = "folders" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "files"
            raise OSError(
                errno.EOPNOTSUPP, f"{what} cannot be synced there, so nothing lasts for sure"
            ) from error


def set_mode(descriptor: int, mode: int) -> None:
    """Set the mode of a file of ours, as far as its file system keeps modes.  Raises: OSError."""
    try:
        os.fchmod(descriptor, mode)
    except OSError as error:
        modeless = is_missing(error) or error.errno == errno.EPERM
        if not modeless or os.fstat(descriptor).st_uid != os.geteuid():
            raise


def lock(path: Path, *, wait: bool) -> int:
    """Lock a file, which is made if missing, against every other opener on this machine until the returned
    descriptor is closed or the process ends.

    Raises: BlockingIOError when another has it and `wait` is False; OSError, also where the file system has
        no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        _check_regular(descriptor, path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and is_missing(error):
            raise OSError(errno.EOPNOTSUPP, "files cannot be locked there") from error
        raise
    return descriptor


def _check_regular(descriptor: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))


@contextlib.contextmanager
def locked_folder(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep out everybody else who asks so; where a folder cannot be locked, nobody is kept out.

    Raises: BlockingIOError when another has it and `wait` is False; OSError when there is no such folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not (is_missing(error) or error.errno == errno.EBADF):  # NFS locks what can be written
                raise
        yield
    finally:
        os.close(descriptor)
