"""What is closed at the end of a with block, or when nobody has it any more."""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Self

logger = logging.getLogger(__name__)

_PATIENCE: Final = 5.0  # seconds that whoever drops the last reference waits for the end


class Closing(ABC):
    """A context manager that gives itself, and ends with `close` however its block ends."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; harmless when done already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Undertaker:
    """A thread that closes what was dropped.  The garbage collector drops things in any thread, also in one
    that has just the locks that closing takes; so closing runs in a thread that has none.
    """

    def __init__(self) -> None:
        self.left = SimpleQueue[tuple[Callable[[], None], threading.Event]]()  # may be asked by a collector
        threading.Thread(target=self._work, name="sliplm-undertaker", daemon=True).start()

    def _work(self) -> None:
        while True:
            end, done = self.left.get()
            try:
                end()
            except Exception as error:  # nobody is there to be told
                logger.warning("what was dropped could not be closed: %s", error)
            done.set()


_starting = threading.Lock()
_undertaker: _Undertaker | None = None


def expect_drops() -> None:
    """To be called before `when_dropped`: no thread can be started where it is needed."""
    global _undertaker  # noqa: PLW0603 - one thread for the process
    with _starting:
        if _undertaker is None:
            _undertaker = _Undertaker()


def when_dropped(end: Callable[[], None]) -> None:
    """For a finaliser: run `end` in a thread without locks, and wait for it a while."""
    undertaker = _undertaker
    if undertaker is None:
        end()
        return
    done = threading.Event()
    undertaker.left.put((end, done))
    done.wait(_PATIENCE)


def _in_child() -> None:
    global _undertaker, _starting
    _undertaker, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_in_child)
