"""Which process something belongs to: a forked child must not use what its parent uses.

A page of memory holds a random token, and the kernel wipes it in every child, also in one that was made by a
bare system call, or whose number is its parent's in another PID namespace.  Where the kernel cannot wipe
(Linux before 4.14), Python's own hook does, and the process number counts beside it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import threading
import weakref
from typing import Final, Protocol

from sliplm.errors import ForkError

_BYTES: Final = 16
_WIPE_ON_FORK: Final = 18  # MADV_WIPEONFORK, which the mmap module does not name
_EMPTY: Final = bytes(_BYTES)

_page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_renewing = threading.Lock()


class Holder(Protocol):
    """Whoever holds descriptors that a child should not keep open."""

    def left_behind(self) -> None:
        """In a forked child: close the child's copies, without a word to whoever is at the other end."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()


def token() -> bytes:
    """16 bytes that are this process's own for as long as it lives."""
    found = _page[:_BYTES]
    if found == _EMPTY:
        with _renewing:
            if _page[:_BYTES] == _EMPTY:
                _page[:_BYTES] = secrets.token_bytes(_BYTES)
            found = _page[:_BYTES]
    return found


class Process:
    """The process that made this object."""

    def __init__(self) -> None:
        self._token, self._pid = token(), os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is it."""
        return _page[:_BYTES] == self._token and (_wiped or os.getpid() == self._pid)

    def check(self) -> None:
        """Raise ForkError in any other process.  To be asked before any lock: another thread may have held
        it at the fork, and nobody lives to release it.
        """
        if not self.here:
            raise ForkError(
                "this process was forked from the one that loaded the model, and must not use its masks and "
                "connections: load the model here, after the fork (a server that forks its workers loads it "
                "in each of them; a DataLoader's workers have no use for it)"
            )


def watch(holder: Holder) -> None:
    """Have a holder of descriptors told in every child that Python forks, as long as it lives."""
    _holders.add(holder)


def _in_child() -> None:
    global _renewing  # noqa: PLW0603 - another thread may have held it
    _renewing = threading.Lock()
    _page[:_BYTES] = _EMPTY
    for holder in list(_holders):
        with contextlib.suppress(OSError):
            holder.left_behind()
    _holders.clear()


def _have_wiped() -> bool:
    """Whether the kernel wipes the page in every child from now on: then the process number, which is a
    system call, need not be asked for in every exchange.
    """
    try:
        _page.madvise(_WIPE_ON_FORK)
    except OSError:
        return False
    return True


_wiped: Final = _have_wiped()
os.register_at_fork(after_in_child=_in_child)
