"""Workers that misbehave, each in its own way: real servers on real sockets, honest until it is time.

A rogue answers its first `after` questions as it should, and misbehaves from then on, until it is healed.
Those that misbehave when a connection is made hang up first, so that the vault comes back.

    WRONG    answers that are products, and wrong ones
    FRAMES   answers that break the protocol
    SLOW     answers that come late, in part, or never
    DOORS    what happens while the vault connects and greets
    ROGUES   all of them, and those that need more than one function

As a program, an honest worker that writes each message to a file before it answers: to be killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sliplm import errors
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P, uniform_rows
from sliplm.network import authority
from sliplm.network.listener import Listener
from sliplm.network.transport import Connection
from sliplm.parties.seats import Visit
from sliplm.parties.worker import Worker
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import FaultCode, Kind
from sliplm.protocol.worker_side import Deal, Multiply, WorkerSide
from sliplm.shares.share import WorkerShare, open_worker

Asked = Multiply | Deal
Array = np.ndarray

SHORT = 1.5  # seconds that a vault waits for those who come late; for all others it waits long
LIMIT = 30.0


@dataclass
class Means:
    """What a rogue has at hand.

    Attributes:
        share: the worker share that it should serve.
        other: the worker share of another split of the same model.
        keys: the owner's key folder, with a worker's keys named "rogue" and expired ones named "expired".
        strangers: another owner's key folder.
    """

    share: WorkerShare
    other: WorkerShare
    keys: Path
    strangers: Path


class Honest(Worker):
    """Remembers every message: what a curious worker would do."""

    def __init__(self, share: WorkerShare) -> None:
        super().__init__(share, threads=1)
        self.messages: list[tuple[int, Array]] = []
        self.deals = 0

    def inputs(self, asked: Asked) -> Array:
        """The rows that are to be multiplied, uint32 [rows, n]; they are remembered."""
        n = self._shapes[asked.group][1]
        if isinstance(asked, Deal):
            self.deals += 1
            return np.ascontiguousarray(uniform_rows(asked.key, asked.group, asked.first_row, asked.rows, n))
        x = np.frombuffer(asked.payload, np.uint32).reshape(asked.rows, n).copy()
        self.messages.append((asked.group, x))
        return x

    def _answer(self, connection: Connection, side: WorkerSide, asked: Asked) -> None:
        y = self._matrices[asked.group].product(self.inputs(asked))
        send(connection, side.product(1), y)


class Rogue(Honest):
    """The base of all that misbehave; by itself it is honest.

    Attributes:
        after: questions that are answered honestly.
        timeout: what a vault should be told that tries it, in seconds.
        asks: rows of the requests after the honest ones; it is found out at the last.
        ends: how it stands with the vault then.
        error: what the vault raises if nobody else is there.
        tls: whether it makes sense over TLS only.
        same_input: whether the vault should ask the same twice.
        bystander: whether another vault should be connected before.
    """

    after = 2
    timeout = 10.0
    asks: tuple[int, ...] = (3,)
    ends = "quarantined"
    error: type[errors.SlipError] = errors.WireError
    tls = False
    same_input = False
    bystander = False

    def __init__(self, means: Means, after: int | None = None) -> None:
        super().__init__(means.share)
        self.means = means
        self.after = type(self).after if after is None else after
        self.questions = 0
        self.history: list[tuple[int, Array]] = []  # groups and products of what was asked before
        self.over = threading.Event()
        self._healed = False

    @property
    def bad(self) -> bool:
        """Is it time to misbehave?"""
        return self.questions >= self.after and not self._healed

    def heal(self) -> None:
        """Be honest from now on."""
        self._healed = True

    def stop(self) -> None:
        """End `serve`, and whatever it waits for."""
        self.over.set()
        super().stop()

    def _answer(self, connection: Connection, side: WorkerSide, asked: Asked) -> None:
        x = self.inputs(asked)
        y = self._matrices[asked.group].product(x)
        bad = self.bad
        self.questions += 1
        if bad:
            self.lie(connection, side, asked, x, y)
        else:
            send(connection, side.product(1), y)
        self.history.append((asked.group, y))

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Answer in one's own way.

        Args:
            x: the message, uint32 [rows, n].
            y: its right product, uint32 [rows, m].
        """
        send(connection, side.product(1), y)


def send(connection: Connection, header: bytes, y: Array | None = None) -> None:
    """Send a frame, within a limit that nobody reaches."""
    body = None if y is None else memoryview(np.ascontiguousarray(y.astype(np.uint32, copy=False)))
    connection.send(header, body, deadline=time.monotonic() + LIMIT)


# --- wrong products ------------------------------------------------------------------------------------

Change = Callable[[Rogue, Asked, Array, Array], Array]


def add(value: int, row: int = 0, column: int = 0) -> Change:
    """One entry, by `value`."""

    def change(_rogue: Rogue, _asked: Asked, _x: Array, y: Array) -> Array:
        y = y.copy()
        y[row, column] = (int(y[row, column]) + value) % P
        return y

    return change


def times(factor: int) -> Change:
    """The product of another number times the message."""
    return lambda _rogue, _asked, _x, y: (y.astype(object) * factor % P).astype(np.uint32)


def put(value: int, *place: Any) -> Change:
    """Entries of a certain value."""

    def change(_rogue: Rogue, _asked: Asked, _x: Array, y: Array) -> Array:
        y = y.copy()
        y[place] = value
        return y

    return change


def of(message: Callable[[Array], Array]) -> Change:
    """The right product of another message."""

    def change(rogue: Rogue, asked: Asked, x: Array, _y: Array) -> Array:
        return rogue._matrices[asked.group].product(np.ascontiguousarray(message(x).astype(np.uint32)))

    return change


def swapped(axis: int) -> Change:
    """The first two rows, or the first two entries of the first row, in each other's place."""

    def change(_rogue: Rogue, _asked: Asked, _x: Array, y: Array) -> Array:
        y = y.copy()
        if axis == 0:
            y[[0, 1]] = y[[1, 0]]
        else:
            y[0, [0, 1]] = y[0, [1, 0]]
        return y

    return change


def low_rank(_rogue: Rogue, _asked: Asked, _x: Array, y: Array) -> Array:
    """An error in every entry, of rank one."""
    left, right = np.arange(1, len(y) + 1, dtype=np.uint64), np.arange(1, y.shape[1] + 1, dtype=np.uint64)
    return (y + np.outer(left, right)) % P


def rounded(_rogue: Rogue, _asked: Asked, _x: Array, y: Array) -> Array:
    """What float32 would have made of it."""
    return (y.astype(np.float32).astype(np.uint64) % P).astype(np.uint32)


def of_another_share(rogue: Rogue, asked: Asked, x: Array, _y: Array) -> Array:
    """The product with the matrix that another split of the same model has in this place."""
    name = rogue.means.other.names[asked.group]
    return kernels.prepare(rogue.means.other.matrices[name], threads=1).product(x)


def replayed(same_group: bool) -> Change:
    """What was right before: for another message, or for another group."""

    def change(rogue: Rogue, asked: Asked, _x: Array, y: Array) -> Array:
        fitting = (o for g, o in rogue.history if (g == asked.group) == same_group and o.shape == y.shape)
        return next(fitting)

    return change


WRONG: dict[str, Change] = {
    "one entry by one": add(1),
    "one entry by minus one": add(-1),
    "one entry by 2^31": add(2**31),
    "the last entry of the last row": add(1, -1, -1),
    "every entry by one": lambda _r, _a, _x, y: (y.astype(np.uint64) + 1) % P,
    "all zero": put(0, ...),
    "all p - 1": put(P - 1, ...),
    "one row zero": put(0, 1),
    "an entry that is p": put(P, 0, 0),
    "all 2^32 - 1": put(2**32 - 1, ...),
    "rows swapped": swapped(0),
    "entries swapped": swapped(1),
    "columns rotated": lambda _r, _a, _x, y: np.roll(y, 1, axis=1),
    "rows reversed": lambda _r, _a, _x, y: y[::-1],
    "the first row for all": lambda _r, _a, _x, y: np.repeat(y[:1], len(y), axis=0),
    "negated": times(-1),
    "doubled": times(2),
    "a low-rank error": low_rank,
    "rounded to float32": rounded,
    "the product of x + 1": of(lambda x: (x.astype(np.uint64) + 1) % P),
    "the product of -x": of(lambda x: (P - x.astype(np.uint64)) % P),
    "the product of x rotated": of(lambda x: np.roll(x, 1, axis=1)),
    "the product of another split's share": of_another_share,
    "replayed from another group": replayed(False),
    "replayed from another token": replayed(True),
    "replayed from the same input": replayed(True),
}


class Wrong(Rogue):
    """Answers with a wrong product."""

    error = errors.VerificationError

    def __init__(self, means: Means, change: Change, after: int | None = None) -> None:
        super().__init__(means, after)
        self.change = change

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """As `change` says."""
        send(connection, side.product(1), self.change(self, asked, x, y))


class WrongAgain(Wrong):
    """Its lie needs that the vault asks the same twice."""

    same_input = True


class Sleeper(Wrong):
    """Right for a long while."""

    after = 12


class LastRow(Wrong):
    """Right for single tokens, and wrong in the last row of a prompt."""

    asks = (1, 17)

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """As `change` says, if there are several rows."""
        send(connection, side.product(1), self.change(self, asked, x, y) if len(y) > 1 else y)


class TwoFaced(Wrong):
    """Wrong to the second vault that connects, right to all others."""

    bystander = True

    def __init__(self, means: Means, change: Change, after: int | None = None) -> None:
        super().__init__(means, change, after)
        self.greeted: list[Connection] = []

    def _greet(self, connection: Connection, side: WorkerSide, visit: Visit | None) -> None:
        self.greeted.append(connection)
        super()._greet(connection, side, visit)

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """As `change` says, to one."""
        send(
            connection,
            side.product(1),
            self.change(self, asked, x, y) if connection is self.greeted[1] else y,
        )


# --- broken frames -------------------------------------------------------------------------------------


class Fields(NamedTuple):
    """A header's fields, also such that `wire` would not make."""

    kind: int
    sequence: int
    group: int
    rows: int
    micros: int
    length: int
    magic: bytes = b"SLIP"
    version: int = wire.VERSION
    reserved: int = 0

    def packed(self) -> bytes:
        """The 28 bytes."""
        return struct.pack("<4sBBHIIIII", self.magic, self.version, self.kind, self.reserved, *self[1:6])


def right(side: WorkerSide, asked: Asked, y: Array) -> Fields:
    """The header of the right answer."""
    return Fields(Kind.PRODUCT, side._sequence, asked.group, asked.rows, 1, y.nbytes)


def altered(**changes: Callable[[Any], Any]) -> Callable[[Rogue, WorkerSide, Asked, Array], bytes]:
    """The right answer with another header."""

    def made(_rogue: Rogue, side: WorkerSide, asked: Asked, y: Array) -> bytes:
        header = right(side, asked, y)
        changed = {name: change(getattr(header, name)) for name, change in changes.items()}
        return header._replace(**changed).packed() + y.tobytes()

    return made


def fault(
    code: int, text: bytes, length: int | None = None
) -> Callable[[Rogue, WorkerSide, Asked, Array], bytes]:
    """A refusal."""

    def made(_rogue: Rogue, side: WorkerSide, _asked: Asked, _y: Array) -> bytes:
        size = len(text) if length is None else length
        return Fields(Kind.FAULT, side._sequence, code, 0, 0, size).packed() + text

    return made


def welcome(**changes: Any) -> bytes:
    """A WELCOME; `split_id` and `groups` must be given."""
    fields = wire.WelcomeFields("", 0, wire.MAX_PAYLOAD, False, bytes(range(32)), b"")
    payload = wire.pack_welcome(fields._replace(**changes))
    return Fields(Kind.WELCOME, 0, 0, 0, 0, len(payload)).packed() + payload


def twice(_rogue: Rogue, side: WorkerSide, asked: Asked, y: Array) -> bytes:
    """The right answer, and another one at once."""
    whole = right(side, asked, y).packed() + y.tobytes()
    return whole + whole


FRAMES: dict[str, tuple[Callable[[Rogue, WorkerSide, Asked, Array], bytes], str, type[errors.SlipError]]] = {
    name: (made, "quarantined", errors.WireError)
    for name, made in {
        "random bytes": lambda _r, _s, _a, _y: os.urandom(4000),
        "zero bytes": lambda _r, _s, _a, _y: bytes(4000),
        "another protocol's answer": lambda _r, _s, _a, _y: b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4,
        "an announced length of 4 GiB": altered(length=lambda _: 2**32 - 1),
        "an announced length of 64 MiB": altered(length=lambda _: wire.MAX_PAYLOAD),
        "an announced length of 0": altered(length=lambda _: 0),
        "one byte too much announced": altered(length=lambda n: n + 1),
        "another sequence number": altered(sequence=lambda n: n + 1),
        "an earlier sequence number": altered(sequence=lambda n: n - 1),
        "another group": altered(group=lambda g: g + 4),
        "a group that is none": altered(group=lambda _: 2**32 - 1),
        "another number of rows": altered(rows=lambda r: r + 1),
        "another version": altered(version=lambda v: v + 1),
        "another magic": altered(magic=lambda _: b"SLAP"),
        "a kind that is none": altered(kind=lambda _: 77),
        "a reserved field in use": altered(reserved=lambda _: 1),
        "the question sent back": altered(kind=lambda _: Kind.MULTIPLY),
        "WELCOME for an answer": lambda r, _s, _a, _y: welcome(
            split_id=r.means.share.split_id, groups=len(r._shapes)
        ),
        "ACCEPT for an answer": lambda _r, _s, _a, _y: Fields(Kind.ACCEPT, 0, 0, 0, 0, 0).packed(),
        "a second frame in the packet": twice,
        "FAULT of a code that is none": fault(99, b"hello"),
        "FAULT that is no text": fault(FaultCode.INTERNAL, b"\xff\xfe\x80"),
        "FAULT of 2000 bytes": fault(FaultCode.INTERNAL, b"x" * 2000),
    }.items()
} | {
    "FAULT with terminal escapes": (
        fault(FaultCode.INTERNAL, b"\x1b[2J\x1b]0;owned\x07\r\nall is well \xe2\x80\xae"),
        "suspended",
        errors.WorkerFault,
    ),
    "FAULT: another split": (
        fault(FaultCode.MISMATCH, b"your split is another"),
        "quarantined",
        errors.MismatchError,
    ),
    "FAULT: your evidence": (
        fault(FaultCode.EVIDENCE, b"your evidence is bad"),
        "quarantined",
        errors.AttestationError,
    ),
}  # fmt: skip


class Frame(Rogue):
    """Answers with bytes that are no answer."""

    def __init__(self, means: Means, name: str, after: int | None = None) -> None:
        super().__init__(means, after)
        self.made, self.ends, self.error = FRAMES[name]

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """As FRAMES says."""
        send(connection, self.made(self, side, asked, y))
        self.over.wait(LIMIT)  # whoever waits for more waits in vain


class Endless(Rogue):
    """The right header, and bytes without end."""

    error = errors.SlipError  # too much came at once, or what came is wrong, as it happens

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Until the vault hangs up."""
        send(connection, side.product(1))
        while not self.over.is_set():
            send(connection, os.urandom(16000))


class Unasked(Rogue):
    """Answers, and then a question that nobody has asked."""

    asks = (3, 3)
    error = errors.SlipError  # the header or the check tells, as it happens
    tls = True  # where two frames are two records, the first is taken for what it is

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """The right answer, and the same for the next question."""
        send(connection, side.product(1), y)
        header = right(side, asked, y)
        send(connection, header._replace(sequence=header.sequence + 1).packed(), y)


class Boaster(Rogue):
    """Claims a compute time of more than an hour, which decides nothing."""

    ends = "up"

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """The right answer."""
        send(connection, side.product(2**32 - 1), y)


# --- late, in part, never ------------------------------------------------------------------------------


def halves(side: WorkerSide, asked: Asked, y: Array) -> tuple[bytes, bytes]:
    """The right answer in two parts."""
    whole = right(side, asked, y).packed() + y.tobytes()
    return whole[: len(whole) // 2], whole[len(whole) // 2 :]


class Slow(Rogue):
    """The base of those that make the vault wait."""

    timeout = SHORT
    ends = "suspended"
    error = errors.WorkerTimeout


class Stalling(Slow):
    """Never answers."""

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Say nothing."""
        self.over.wait(LIMIT)


class Late(Slow):
    """Answers when nobody waits any more."""

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """The right answer, too late."""
        self.over.wait(2 * SHORT)
        send(connection, side.product(1), y)


class Dripping(Slow):
    """Sends one byte at a time."""

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """The right answer, byte by byte."""
        for byte in b"".join(halves(side, asked, y)):
            send(connection, bytes([byte]))
            if self.over.wait(0.01):
                return


class HalfSilent(Slow):
    """Sends the first half of its answer."""

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """And then nothing."""
        send(connection, halves(side, asked, y)[0])
        self.over.wait(LIMIT)


class HalfGone(Rogue):
    """Hangs up in the middle of its answer."""

    ends = "suspended"
    error = errors.WorkerUnavailable

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """The first half."""
        send(connection, halves(side, asked, y)[0])
        connection.close()


class HeaderGone(HalfGone):
    """Hangs up in the middle of the header."""

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Ten bytes."""
        send(connection, halves(side, asked, y)[0][:10])
        connection.close()


class Gone(Rogue):
    """Hangs up on every question."""

    ends = "lost"
    error = errors.WorkerUnavailable

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Nothing."""
        connection.close()


class Dropping(Rogue):
    """Hangs up after every answer, so that each question needs a connection of its own."""

    asks = (3,) * 6
    ends = "suspended"
    error = errors.WorkerFault

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """The right answer, and away."""
        send(connection, side.product(1), y)
        connection.close()


SLOW: dict[str, type[Rogue]] = {
    "stalls for ever": Stalling,
    "answers too late": Late,
    "one byte at a time": Dripping,
    "half an answer, then silence": HalfSilent,
    "half an answer, then hangs up": HalfGone,
    "half a header, then hangs up": HeaderGone,
    "hangs up on every question": Gone,
    "hangs up after every answer": Dropping,
}


# --- at the door ---------------------------------------------------------------------------------------


class Door(Rogue):
    """Hangs up when it is time, and misbehaves when the vault comes back."""

    @property
    def struck(self) -> bool:
        """Has it hung up, or does it begin so?"""
        return not self._healed and (self.questions > self.after or self.after == 0)

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Hang up."""
        connection.close()


class Greeting(Door):
    """Greets in its own way."""

    def _greet(self, connection: Connection, side: WorkerSide, visit: Visit | None) -> None:
        if not self.struck:
            super()._greet(connection, side, visit)
            return
        got = connection.receive(side, deadline=time.monotonic() + LIMIT)
        self.greet(connection, side, wire.pack_hello(self._split_id, getattr(got, "nonce", bytes(32))))

    def say(self, **changes: Any) -> bytes:
        """The right WELCOME, with changes."""
        return welcome(**{"split_id": self._split_id, "groups": len(self._shapes)} | changes)

    def greet(self, connection: Connection, side: WorkerSide, hello: bytes) -> None:
        """After HELLO."""
        raise NotImplementedError


Greet = Callable[[Greeting, bytes], bytes]

GREETINGS: dict[str, tuple[Greet, type[errors.SlipError]]] = {
    "HELLO echoed": (
        lambda _r, hello: Fields(Kind.HELLO, 0, 0, 0, 0, len(hello)).packed() + hello, errors.WireError,
    ),
    "random bytes for WELCOME": (lambda _r, _h: os.urandom(500), errors.WireError),
    "WELCOME of another split": (lambda r, _h: r.say(split_id="ab" * 16), errors.MismatchError),
    "WELCOME of another number of groups": (lambda r, _h: r.say(groups=3), errors.MismatchError),
    "WELCOME with tiny frames": (lambda r, _h: r.say(max_payload=16), errors.WireError),
    "WELCOME with frames of two rows": (lambda r, _h: r.say(max_payload=4 * 352), errors.WorkerFault),
    "WELCOME cut short": (
        lambda _r, _h: Fields(Kind.WELCOME, 0, 0, 0, 0, 10).packed() + bytes(10), errors.WireError,
    ),
    "WELCOME with a flag that is none": (lambda r, _h: r.say(wants_evidence=7), errors.WireError),
    "WELCOME with evidence of 1 MiB": (
        lambda _r, _h: Fields(Kind.WELCOME, 0, 0, 0, 0, 2**20).packed() + bytes(2**20), errors.WireError,
    ),
    "WELCOME with evidence that nobody asked for": (
        lambda r, _h: r.say(evidence=b"trust me"), errors.AttestationError,
    ),
    "WELCOME twice in a packet": (lambda r, _h: r.say() + r.say(), errors.WireError),
    "ACCEPT for WELCOME": (
        lambda _r, _h: Fields(Kind.ACCEPT, 0, 0, 0, 0, 0).packed(), errors.WireError,
    ),
    "PRODUCT for WELCOME": (
        lambda _r, _h: Fields(Kind.PRODUCT, 1, 0, 3, 0, 12).packed() + bytes(12), errors.WireError,
    ),
    "PRODUCT right after WELCOME": (
        lambda r, _h: r.say() + Fields(Kind.PRODUCT, 1, 0, 3, 0, 1536).packed() + bytes(1536),
        errors.WireError,
    ),
    "FAULT for WELCOME": (
        lambda _r, _h: Fields(Kind.FAULT, 0, FaultCode.MISMATCH, 0, 0, 5).packed() + b"never",
        errors.MismatchError,
    ),
}  # fmt: skip


class Greets(Greeting):
    """Greets with bytes that are no greeting."""

    def __init__(self, means: Means, name: str, after: int | None = None) -> None:
        super().__init__(means, after)
        self.made, self.error = GREETINGS[name]
        if self.error is errors.WorkerFault:
            self.ends = "suspended"

    def greet(self, connection: Connection, side: WorkerSide, hello: bytes) -> None:
        """As GREETINGS says."""
        send(connection, self.made(self, hello))
        self.over.wait(LIMIT)


class Ignoring(Greeting):
    """Does not greet."""

    timeout, ends, error = SHORT, "suspended", errors.WorkerTimeout

    def greet(self, connection: Connection, side: WorkerSide, hello: bytes) -> None:
        """Silence."""
        self.over.wait(LIMIT)


class WelcomeTwice(Greeting):
    """Greets a second time where an answer is due."""

    tls = True  # see Unasked

    def greet(self, connection: Connection, side: WorkerSide, hello: bytes) -> None:
        """In two records."""
        send(connection, self.say())
        send(connection, self.say())
        self.over.wait(LIMIT)


class Curious(Greeting):
    """Asks for evidence, and lies when it has it."""

    error = errors.VerificationError

    def greet(self, connection: Connection, side: WorkerSide, hello: bytes) -> None:
        """As one that asks for evidence."""
        send(connection, side.welcome(bytes(32), wants_evidence=True))
        connection.receive(side, deadline=time.monotonic() + LIMIT)
        self.judge(connection, side)

    def judge(self, connection: Connection, side: WorkerSide) -> None:
        """Whatever was shown is good."""
        send(connection, side.accept())

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Hang up the first time, lie the second."""
        if self.questions == self.after + 1:
            connection.close()
        else:
            send(connection, side.product(1), add(1)(self, asked, x, y))


class CuriousAndSilent(Curious):
    """Asks for evidence, and says nothing when it has it."""

    timeout, ends, error = SHORT, "suspended", errors.WorkerTimeout

    def judge(self, connection: Connection, side: WorkerSide) -> None:
        """Silence."""
        self.over.wait(LIMIT)


class CuriousAndRude(Curious):
    """Asks for evidence, and refuses it, whatever it is."""

    ends, error = "lost", errors.OwnEvidenceError

    def judge(self, connection: Connection, side: WorkerSide) -> None:
        """A refusal."""
        send(connection, side.fault(FaultCode.EVIDENCE, "not good enough"))


class CuriousAgain(Curious):
    """Asks for evidence, and for more of it."""

    error = errors.WireError

    def judge(self, connection: Connection, side: WorkerSide) -> None:
        """Another WELCOME that asks."""
        send(connection, self.say(wants_evidence=True))
        self.over.wait(LIMIT)


class Closed(Door):
    """Hangs up on whoever comes."""

    ends, error = "lost", errors.WorkerUnavailable

    def _visit(self, visit: Visit, listener: Listener, sock: socket.socket) -> None:
        if not self.struck:
            super()._visit(visit, listener, sock)
            return
        with contextlib.suppress(OSError):
            self.receive(visit, sock)
        self._seats.leave(visit)

    def receive(self, visit: Visit, sock: socket.socket) -> None:
        """What happens to a socket that was accepted."""
        sock.close()


class Plain(Closed):
    """Speaks no TLS."""

    tls = True
    ends, error = "quarantined", errors.WireError

    def receive(self, visit: Visit, sock: socket.socket) -> None:
        """Say something else, and wait until the vault is gone."""
        with sock:
            sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n" * 3)
            sock.settimeout(LIMIT)
            while sock.recv(4096):
                pass


class OtherTls(Closed):
    """Speaks TLS with whatever keys and version it likes, and asks the vault for no certificate."""

    tls = True
    ends, error = "quarantined", errors.CredentialError
    newest = ssl.TLSVersion.TLSv1_3

    def folder(self) -> Path:
        """Whose keys it uses."""
        return self.means.keys / "rogue"

    def receive(self, visit: Visit, sock: socket.socket) -> None:
        """Shake hands, and serve."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = self.newest
        context.load_cert_chain(self.folder() / "certificate.pem", self.folder() / "key.pem")
        sock.settimeout(LIMIT)
        with context.wrap_socket(sock, server_side=True) as secure:
            self.attend(Connection(secure, "a vault"), visit)


class OldTls(OtherTls):
    """Speaks TLS 1.2 at most."""

    error = errors.WireError
    newest = ssl.TLSVersion.TLSv1_2


class Stranger(OtherTls):
    """Shows a certificate of another authority."""

    def folder(self) -> Path:
        """Another owner's."""
        return self.means.strangers / self.role


class Disguised(OtherTls):
    """Shows a vault's certificate."""

    def folder(self) -> Path:
        """The vault's own, even."""
        return self.means.keys / "vault"


class Expired(OtherTls):
    """Shows a certificate that has run out: a clock may be wrong, so it is asked again some time."""

    ends, error = "lost", errors.PassingCredentialError

    def folder(self) -> Path:
        """Last year's."""
        return self.means.keys / "expired"


class Revoked(OtherTls):
    """Shows a certificate that its owner has revoked, after the vault's connection broke."""

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Hang up, once the owner has revoked."""
        authority.revoke(self.means.keys, "rogue")
        super().lie(connection, side, asked, x, y)

    def heal(self) -> None:
        """The owner gives it new keys."""
        authority.rotate(self.means.keys, "rogue")
        super().heal()


class RevokedInUse(OtherTls):
    """Its certificate is revoked while the vault waits for its answer, and it shows the same again."""

    timeout = LIMIT
    _owner = threading.Lock()

    def lie(self, connection: Connection, side: WorkerSide, asked: Asked, x: Array, y: Array) -> None:
        """Say nothing: the vault must hang up by itself."""
        with self._owner:
            authority.revoke(self.means.keys, "rogue")
        self.over.wait(LIMIT)

    def heal(self) -> None:
        """The owner gives it new keys."""
        with self._owner:  # who may be at the last folder still
            authority.rotate(self.means.keys, "rogue")
        super().heal()


DOORS: dict[str, type[Rogue]] = {
    "does not greet": Ignoring,
    "WELCOME twice": WelcomeTwice,
    "asks for evidence, then lies": Curious,
    "asks for evidence, then stalls": CuriousAndSilent,
    "asks for evidence, then refuses it": CuriousAndRude,
    "asks for evidence, then for more": CuriousAgain,
    "hangs up on whoever connects": Closed,
    "no TLS": Plain,
    "TLS 1.2": OldTls,
    "another authority's certificate": Stranger,
    "a vault's certificate": Disguised,
    "an expired certificate": Expired,
    "a revoked certificate": Revoked,
}

Maker = Callable[..., Rogue]


def _wrong(kind: type[Wrong], change: Change) -> Maker:
    return lambda means, after=None: kind(means, change, after)


def _named(kind: Callable[..., Rogue], name: str) -> Maker:
    return lambda means, after=None: kind(means, name, after)


ROGUES: dict[str, Maker] = {
    **{name: _wrong(WrongAgain if "same" in name else Wrong, change) for name, change in WRONG.items()},
    "right for long, then one entry by one": _wrong(Sleeper, add(1)),
    "the last row of a prompt only": _wrong(LastRow, add(1, -1, 0)),
    "wrong to one vault of two": _wrong(TwoFaced, add(1)),
    **{name: _named(Frame, name) for name in FRAMES},
    "bytes without end": Endless,
    "PRODUCT that nobody asked for": Unasked,
    "a compute time of an hour": Boaster,
    **SLOW,
    **{name: _named(Greets, name) for name in GREETINGS},
    **DOORS,
    "revoked while it is asked": RevokedInUse,
}
"""Every misbehaviour: (means, after=None) -> a rogue."""


@contextlib.contextmanager
def serving(worker: Worker, where: Path, party: str | None = None) -> Iterator[str]:
    """Serve in shared memory with a socket `where`, or over TLS with the keys of `party` in the folder
    `where`; gives the address for a vault.
    """
    ready: list[str] = []
    came = threading.Event()

    def note(address: str) -> None:
        ready.append(address)
        came.set()

    place = f"shm:{where}" if party is None else "127.0.0.1:0"
    keys = None if party is None else where / party
    thread = threading.Thread(target=worker.serve, args=(place, keys, note))
    thread.start()
    try:
        assert came.wait(LIMIT)
        yield ready[0] if party is None else f"{ready[0]}?keys={where / 'vault'}"
    finally:
        worker.stop()
        thread.join(LIMIT)
        assert not thread.is_alive()


def one_mask_one_message(logs: list[list[tuple[int, Array]]]) -> int:
    """How many pairs of different messages, of all logs together, are under one mask.

    Inputs are small beside p, so two messages under one mask are near each other in every entry.
    """
    groups = {group for log in logs for group, _ in log}
    found = 0
    for group in groups:
        rows = {row.tobytes() for log in logs for g, x in log if g == group for row in x}
        table = np.array([np.frombuffer(row, np.uint32) for row in rows], np.int64)
        for i, row in enumerate(table[:-1]):
            gap = (table[i + 1 :] - row) % P
            near = np.minimum(gap, P - gap) < 2**24
            found += int((near.mean(axis=1) > 0.5).sum())
    return found


def read_log(path: Path, share: WorkerShare) -> list[tuple[int, Array]]:
    """The messages that a killed worker had written; the last one may be cut off."""
    data, at, found = path.read_bytes(), 0, []
    widths = [share.matrices[name].shape[1] for name in share.names]
    while at + 8 <= len(data):
        group, rows = struct.unpack_from("<II", data, at)
        size = 4 * rows * widths[group]
        if at + 8 + size > len(data):
            break
        x = np.frombuffer(data, np.uint32, rows * widths[group], at + 8).reshape(rows, -1)
        found.append((group, x))
        at += 8 + size
    return found


class Writing(Honest):
    """Writes each message to a file before it answers."""

    def __init__(self, share: WorkerShare, log: Path) -> None:
        super().__init__(share)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def inputs(self, asked: Asked) -> Array:
        """As Honest."""
        x = super().inputs(asked)
        os.write(self._log, struct.pack("<II", asked.group, asked.rows) + x.tobytes())
        return x


if __name__ == "__main__":
    Writing(open_worker(sys.argv[1]), Path(sys.argv[3])).serve(
        sys.argv[2], ready=lambda _: print("ready", flush=True)
    )
