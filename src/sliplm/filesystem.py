"""What a file system cannot do, and the words for it; and file names that are no text.

Whether to go on without is decided where it is asked; here is only which errors mean "cannot", not "may not".
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MISSING: Final = frozenset(
    (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.EINVAL, errno.ENOLCK, errno.ENODEV)
)
# of a rename or link, on file systems that cannot, and where what is to be replaced is a mount itself
_NO_RENAME: Final = frozenset((errno.EEXIST, errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY, errno.EMLINK))
_MODELESS: Final = frozenset(
    ("vfat", "msdos", "exfat", "ntfs", "ntfs3", "fuseblk", "cifs", "smb3", "vboxsf", "drvfs", "9p", "hgfs")
)
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


def readable(name: str | os.PathLike[str]) -> str:
    """A file's name as text that JSON and models hold: names are bytes, and need not be UTF-8."""
    return os.fspath(name).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def utf8_name(folder: Path) -> Iterator[Path]:
    """A folder under a name that is UTF-8, for libraries that take no other, to the end of the block.

    Raises: OSError, where it has no such name and cannot be opened.
    """
    if readable(folder) == os.fspath(folder):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def is_missing(error: OSError) -> bool:
    """Whether an error says that the file system (or the sandbox) has no such call."""
    return error.errno in _MISSING


def kind(path: Path) -> str:
    """The type of the file system that a path is on, as the kernel names it: ext4, nfs4; empty if unknown."""
    try:
        there = path.absolute()
        while not os.path.lexists(there):
            there = there.parent
        real = os.fsencode(os.path.realpath(there))  # unlike resolve, links that go round are no error
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return ""
    best, found = -1, ""
    for line in lines:
        before, _, after = line.partition(b" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = _ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), fields[4])
        inside = real == point or real.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= best:  # of two on one place the later one is seen
            best, found = len(point), after.split()[0].decode("ascii", "replace")
    return found


def because(error: OSError, path: Path, usually: str) -> str:
    """`(REASON): ADVICE` for a message about what could not be done at a path.

    Args:
        usually: the advice where the file system is not to blame.
    """
    reason = error.strerror or str(error) or type(error).__name__
    advice = _advice(error, path)
    return f"({reason}): {usually if advice is None else advice}"


def chmod_advice(path: Path, mode: str) -> str:
    """How to keep others away from a path: `chmod MODE`, but where the file system has no modes."""
    found = kind(path)
    if found in _MODELESS:
        return f"its file system, {found}, may keep no modes: put it on another, and chmod {mode} it there"
    return f"chmod {mode} {shlex.quote(str(path))}"


def _advice(error: OSError, path: Path) -> str | None:
    name = kind(path)
    where = f"its file system{f', {name},' if name else ''}"
    known = {
        errno.ENOSPC: f"{where} is full: make room there, or choose a folder on another",
        errno.EDQUOT: f"your quota on {where} is used up: make room there, or choose a folder on another",
        errno.EFBIG: f"{where} or a limit of this process (ulimit -f) allows no larger file: raise it",
        errno.EROFS: f"{where} is mounted read-only: choose a folder on another",
        errno.ESTALE: f"{where} has lost it: mount that again",
    }
    missing = is_missing(error) and error.errno not in (errno.EINVAL, errno.ENODEV)  # which may mean more
    if missing or (error.errno in _NO_RENAME and error.filename2 is not None):
        return f"{where} cannot do this: choose a folder on a local disk (ext4, xfs, btrfs)"
    return known.get(error.errno or 0)
