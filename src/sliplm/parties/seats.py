"""Who may hold a connection to a worker: vaults that are served, and strangers that have not greeted yet.

Peers that have not greeted are counted apart, and one more of them drives the oldest out: first of those
that have shown no certificate, and of those, one from the address that sent most.  So strangers take no
place from a vault that is served, nor, unless they come from many addresses at once, from one that arrives.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sliplm.errors import WorkerFault
from sliplm.network.keys import Identity, Revocations

MAX_CONNECTIONS: Final = 32  # vaults that are served
MAX_EACH: Final = 16  # of them, with one certificate
MAX_STRANGERS: Final = 32  # peers that have not greeted

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Visit:
    """A peer, from its arrival on; `handle` is a second descriptor of its socket, to end it from outside."""

    source: str
    handle: socket.socket
    thread: threading.Thread | None = None
    identity: Identity | None = None
    greeted: bool = False
    busy: bool = False  # between a question and its answer
    since: float = 0.0  # time.monotonic() of the last answer, or of the greeting
    ended: bool = False

    def end(self) -> None:
        """Whoever waits on the connection gets WorkerUnavailable."""
        self.ended = True
        with contextlib.suppress(OSError):
            self.handle.shutdown(socket.SHUT_RDWR)


class Seats:
    """All visits of one worker, in the order of their arrival; for any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._visits: dict[Visit, None] = {}

    def arrive(self, sock: socket.socket) -> Visit:
        """A stranger has come; where there are too many, another one is driven out.  Raises OSError."""
        visit = Visit(_source(sock), sock.dup())
        with self._guard:
            strangers = [other for other in self._visits if not other.greeted and not other.ended]
            if len(strangers) >= MAX_STRANGERS:
                unwanted = _least_wanted(strangers)
                unwanted.end()
                logger.warning("refused %s: it has not greeted, and others wait", unwanted.source)
            self._visits[visit] = None
        return visit

    def identified(self, visit: Visit, identity: Identity | None) -> None:
        """It has shown this certificate."""
        with self._guard:
            visit.identity = identity

    def seat(self, visit: Visit) -> None:
        """A stranger becomes a vault that is served; where seats are full, the longest idle one goes.

        Raises WorkerFault if all have questions in hand.
        """
        with self._guard:
            seated = [other for other in self._visits if other.greeted and not other.ended]
            own = [other for other in seated if _same_holder(visit, other)]
            crowd: Sequence[Visit] = own if len(own) >= MAX_EACH else seated
            if len(own) >= MAX_EACH or len(seated) >= MAX_CONNECTIONS:
                idle = [other for other in crowd if not other.busy]
                if not idle:
                    raise WorkerFault(f"{len(crowd)} vaults are served already: try again later")
                leaving = min(idle, key=lambda other: other.since)
                leaving.end()
                logger.info("%s was idle longest and makes room", leaving.source)
            visit.greeted, visit.since = True, time.monotonic()

    def leave(self, visit: Visit) -> None:
        """It is over."""
        with self._guard:
            del self._visits[visit]
            visit.handle.close()

    def cut(self, revocations: Revocations) -> None:
        """End the visits of those whose certificates are revoked."""
        with self._guard:
            for visit in self._visits:
                who = visit.identity
                if who is not None and who.serial in revocations and not visit.ended:
                    visit.end()
                    logger.warning("cut off vault %s at %s: it is revoked", who.name, visit.source)

    def end(self, which: Callable[[Visit], bool], limit: float) -> None:
        """End some of the visits, then wait `limit` seconds at most for all."""
        with self._guard:
            visits = list(self._visits)
            for visit in visits:
                if which(visit):
                    visit.end()
        deadline = time.monotonic() + limit
        for visit in visits:
            if visit.thread is not None:
                visit.thread.join(max(0.0, deadline - time.monotonic()))


def _least_wanted(strangers: Sequence[Visit]) -> Visit:
    """The oldest from the busiest address, of those without a certificate where there are any."""
    unknown = [visit for visit in strangers if visit.identity is None] or strangers
    crowd = Counter(visit.source for visit in unknown)
    return max(unknown, key=lambda visit: crowd[visit.source])  # the first of equals is the oldest


def _same_holder(one: Visit, other: Visit) -> bool:
    """Whether both showed the same key; on a Unix socket nobody shows one."""
    return (
        one.identity is not None and other.identity is not None and one.identity.spki == other.identity.spki
    )


def _source(sock: socket.socket) -> str:
    """The address a peer comes from, without its port."""
    return "a Unix socket" if sock.family == socket.AF_UNIX else str(sock.getpeername()[0])
