"""A worker process that shares memory with its vault and misuses it, once it has answered honestly.

    python scribbler.py SHARE ADDRESS MISDEED [AFTER]

Prints a line once vaults may connect.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sliplm.network import ring
from sliplm.network.memory import MemoryConnection
from sliplm.parties.worker import Worker
from sliplm.protocol.frames import HEADER_BYTES
from sliplm.shares.share import open_worker

SENT, TAKEN, ASLEEP = 0, 1, 2


class Lines:
    """The page of a connection's memory, without any manners: a side's three counters, and its ring."""

    def __init__(self, connection: MemoryConnection, *, vault: bool) -> None:
        self.connection = connection
        address = connection._area.address
        self.words = (ctypes.c_int64 * 3).from_address(address + (0 if vault else 128))
        self.ring = (ctypes.c_uint8 * ring.RING).from_address(address + 4096 + (0 if vault else ring.RING))

    def fill(self, byte: int) -> None:
        """The whole ring."""
        ctypes.memset(self.ring, byte, ring.RING)


class Scribbler(Worker):
    """Misbehaves from its `after`-th question on."""

    def __init__(self, share: Path, misdeed: Callable[..., None], after: int) -> None:
        super().__init__(open_worker(share), threads=1)
        self.misdeed, self.left = misdeed, after

    def _answer(self, connection: Any, side: Any, asked: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            super()._answer(connection, side, asked)
            return
        x = np.frombuffer(asked.payload, np.uint32).reshape(asked.rows, -1)
        frame = side.product(1) + self._matrices[asked.group].product(x).tobytes()
        self.misdeed(Lines(connection, vault=False), Lines(connection, vault=True), frame)


def write(mine: Lines, data: bytes) -> None:
    """Put bytes into the ring, as they ought to be."""
    start = mine.words[SENT]
    for i, byte in enumerate(data):
        mine.ring[(start + i) % ring.RING] = byte
    mine.words[SENT] = start + len(data)
    mine.connection._sock.send(b"\0")


def rewrites(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """The right answer, and another one in its place as soon as it was taken."""
    write(mine, frame)
    while theirs.words[TAKEN] != mine.words[SENT]:
        pass
    mine.fill(0xA5)


def rewrites_the_header(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """A right header, which says something else once it was taken; then the rest."""
    write(mine, frame[:HEADER_BYTES])
    while theirs.words[TAKEN] != mine.words[SENT]:
        pass
    mine.fill(0xFF)
    write(mine, frame[HEADER_BYTES:])


def sent(value: int) -> Callable[..., None]:
    """A count that cannot be."""

    def misdeed(mine: Lines, theirs: Lines, frame: bytes) -> None:
        mine.words[SENT] = value
        mine.connection._sock.send(b"\0")
        time.sleep(60)

    return misdeed


def taken(value: int) -> Callable[..., None]:
    """The right answer, and a count of the vault's bytes that cannot be, for its next question to meet."""

    def misdeed(mine: Lines, theirs: Lines, frame: bytes) -> None:
        mine.words[TAKEN] = value
        write(mine, frame)

    return misdeed


def goes_back(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """As if less had been sent than before."""
    mine.words[SENT] -= 1
    mine.connection._sock.send(b"\0")
    time.sleep(60)


def announces_more(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """A whole ring of whatever lies there, for an answer."""
    mine.words[SENT] += ring.RING
    mine.connection._sock.send(b"\0")
    time.sleep(60)


def dies(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """In the middle of an answer."""
    write(mine, frame[: len(frame) // 2])
    os._exit(1)


def stalls(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """In the middle of an answer."""
    write(mine, frame[: len(frame) // 2])
    time.sleep(60)


def drips(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """A byte at a time."""
    for i in range(len(frame) - 1):
        write(mine, frame[i : i + 1])
        time.sleep(0.02)


def rings_the_bell(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """Wakes the vault, and has nothing to say, for as long as that is listened to."""
    while True:
        try:
            mine.connection._sock.send(bytes(4096))
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            return


def hangs_up(mine: Lines, theirs: Lines, frame: bytes) -> None:
    """Shuts the door, keeps the memory, and writes on."""
    mine.connection.abort()
    for i in range(len(frame)):
        mine.ring[(mine.words[SENT] + i) % ring.RING] = frame[i]
    time.sleep(0.5)
    mine.words[SENT] += len(frame)
    time.sleep(60)


MISDEEDS: dict[str, Callable[..., None]] = {
    "the answer rewritten": rewrites,
    "the header rewritten": rewrites_the_header,
    "sent: less than nothing": sent(-1),
    "sent: 2^63 - 1": sent(2**63 - 1),
    "sent: 2^40": sent(2**40),
    "sent: goes back": goes_back,
    "taken: less than nothing": taken(-(2**63)),
    "taken: more than was sent": taken(2**62),
    "a ring full of what lies there": announces_more,
    "dies in an answer": dies,
    "stalls in an answer": stalls,
    "one byte at a time": drips,
    "rings without end": rings_the_bell,
    "hangs up and writes on": hangs_up,
}


def main(share: str, address: str, misdeed: str, after: str = "3") -> None:
    """Serve until it is killed."""
    worker = Scribbler(Path(share), MISDEEDS[misdeed], int(after))
    threading.Thread(target=sys.stdin.read, daemon=True).start()
    worker.serve(address, ready=lambda _: print("ready", flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
