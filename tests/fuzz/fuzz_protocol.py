"""Fuzz target: both state machines of protocol.py, and all of wire.py, under any bytes in any order."""

from __future__ import annotations

import contextlib

from sliplm.errors import InputError, SlipError
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import FaultCode, Header, Kind
from sliplm.protocol.side import FRAME_BYTES, State
from sliplm.protocol.vault_side import Product, VaultSide, Welcome
from sliplm.protocol.worker_side import Deal, Evidence, Hello, Multiply, WorkerSide

MAX_LEN = 2048

SPLIT_ID = "5a" * 16
NONCE = bytes(32)
SHAPES = [[(6, 4), (3, 5)], [(5_000_000, 2)], [(1, 1)] * 300]
_LENGTHS = (0, 1, 48, 72, 1024, 65608, 65609, FRAME_BYTES, FRAME_BYTES + 4, wire.MAX_PAYLOAD, 2**32 - 1)

Side = VaultSide | WorkerSide


class Bytes:
    """The input, eaten from the front; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def __bool__(self) -> bool:
        return self._place < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        part = self._data[self._place : self._place + count]
        self._place += count
        return part + bytes(count - len(part))

    def number(self, count: int = 1) -> int:
        """The next bytes as a number."""
        return int.from_bytes(self.take(count), "little")


def target(data: bytes) -> None:
    """Lead one side through a conversation that the bytes write."""
    source = Bytes(data)
    wire_parsers(source.take(source.number() % 128))
    shapes = SHAPES[source.number() % len(SHAPES)]
    side: Side = (VaultSide if source.number() % 2 else WorkerSide)(SPLIT_ID, shapes)
    while source:
        step(side, source, shapes)


def wire_parsers(data: bytes) -> None:
    """Every parser of one payload."""
    for parse in (wire.parse_header, wire.parse_hello, wire.parse_deal, wire.parse_welcome):
        with contextlib.suppress(SlipError):
            parse(data)  # type: ignore[operator]
    with contextlib.suppress(SlipError):
        _, text = wire.parse_fault(3, data)
        assert text.isprintable() and len(text) <= wire.MAX_FAULT


def step(side: Side, source: Bytes, shapes: list[tuple[int, int]]) -> None:
    """One frame in or out, or a part of one."""
    choice = source.number() % 8
    before = side.state
    try:
        if choice == 0:
            took(side, source.take(28), shapes)
        elif choice == 1:
            side.payload(source.take(source.number() % 64))
        elif choice == 2:
            speak(side, source, shapes)
        else:
            frame(side, source, shapes, honest=choice > 4)
    except InputError:
        assert side.state is before, "our own wrong arguments change nothing"
    except SlipError:
        assert side.state is State.CLOSED
    if before is State.CLOSED:
        assert side.state is State.CLOSED, "closed for good"


def took(side: Side, header: bytes, shapes: list[tuple[int, int]]) -> int:
    """Hand over a header; what it lets in is bounded."""
    length = side.header(header)
    row = 4 * max(max(shape) for shape in shapes)
    assert 0 <= length <= max(FRAME_BYTES, row) and side.state is not State.CLOSED
    if side.state in (State.NEW, State.GREETED, State.PROVING):
        assert length <= wire.WELCOME_BYTES + wire.MAX_EVIDENCE
    return length


def frame(side: Side, source: Bytes, shapes: list[tuple[int, int]], *, honest: bool) -> None:
    """A whole frame: fields near to what may come now, or anything."""
    kind = source.number() % 8
    if honest:
        fields = expected(side, source, shapes)
    else:
        group, rows = source.number(), source.number()
        length = _LENGTHS[source.number() % len(_LENGTHS)] if source.number() % 2 else source.number(4)
        fields = Header(kind, source.number() % 4, group, rows, source.number(2), length)  # type: ignore[arg-type]
    flip = source.number()
    head = bytearray(header_bytes(fields))
    if flip >= 128:
        head[flip % 28] ^= 1 << source.number() % 8
    length = took(side, bytes(head), shapes)
    cut = source.number()
    body = payload(fields.kind, source, length if cut < 240 or length > 2**20 else length + cut - 248)
    if length <= 2**20:
        check(side.payload(body), shapes)


def expected(side: Side, source: Bytes, shapes: list[tuple[int, int]]) -> Header:
    """The header of a frame that may come now, if one may."""
    if isinstance(side, VaultSide):
        if side.state is not State.ASKED:
            evidence = source.number()
            return Header(Kind.WELCOME, 0, 0, 0, 0, wire.WELCOME_BYTES + evidence)
        if source.number() % 8 == 0:
            return Header(Kind.FAULT, 0, 1 + source.number() % 4, 0, 0, source.number())
        group, rows, _ = side._asked
        return Header(
            Kind.PRODUCT, side._sequence, group, rows, source.number(2), 4 * rows * shapes[group][0]
        )
    if side.state is State.NEW:
        return Header(Kind.HELLO, 0, 0, 0, 0, wire.HELLO_BYTES)
    if side.state is State.PROVING:
        return Header(Kind.EVIDENCE, 0, 0, 0, 0, source.number())
    group, rows = source.number() % len(shapes), 1 + source.number() % 4
    following = (side._sequence + 1) & 0xFFFFFFFF
    if source.number() % 4 == 0:
        return Header(Kind.DEAL, following, group, rows, 0, wire.DEAL_BYTES)
    return Header(Kind.MULTIPLY, following, group, rows, 0, 4 * rows * shapes[group][1])


def header_bytes(fields: Header) -> bytes:
    """Like `wire.pack_header`, without its scruples."""
    return (
        b"SLIP"
        + bytes([wire.VERSION, fields.kind, 0, 0])
        + b"".join(value.to_bytes(4, "little") for value in fields[1:])
    )


def payload(kind: int, source: Bytes, length: int) -> bytes:
    """So many bytes, with a greeting in front where one is due."""
    start = b""
    if source.number() % 4:
        if kind == Kind.HELLO:
            start = wire.pack_hello(SPLIT_ID, NONCE)
        elif kind == Kind.WELCOME:
            groups, wants = source.number() % 4, source.number() % 2
            fields = (SPLIT_ID, groups, source.number(4), bool(wants), NONCE, b"")
            start = wire.pack_welcome(wire.WelcomeFields(*fields))
    return (start + source.take(min(64, max(0, length - len(start))))).ljust(max(0, length), b"\0")[
        : max(0, length)
    ]


def check(event: object, shapes: list[tuple[int, int]]) -> None:
    """What comes out fits what was agreed."""
    if isinstance(event, Multiply):
        assert len(event.payload) == 4 * event.rows * shapes[event.group][1]
    elif isinstance(event, Product):
        assert len(event.payload) == 4 * event.rows * shapes[event.group][0]
    elif isinstance(event, Deal):
        assert len(event.key) == 32 and event.rows >= 1 and event.group < len(shapes)
    elif isinstance(event, Hello):
        assert event.split_id == SPLIT_ID and len(event.nonce) == 32
    elif isinstance(event, (Welcome, Evidence)):
        assert len(event.evidence) <= wire.MAX_EVIDENCE
    else:
        raise AssertionError(f"no event: {event!r}")  # noqa: TRY004


def speak(side: Side, source: Bytes, shapes: list[tuple[int, int]]) -> None:
    """Say something, whether it is our turn or not."""
    choice, group, rows = source.number() % 4, source.number() % (len(shapes) + 1), source.number()
    if isinstance(side, VaultSide):
        if choice == 0:
            side.hello(NONCE)
        elif choice == 1:
            side.multiply(group, rows)
        elif choice == 2:
            side.deal(group, rows, NONCE, source.number(4))
        else:
            side.evidence(bytes(rows))
    elif choice == 0:
        side.welcome(NONCE, bytes(rows), wants_evidence=bool(group))
    elif choice == 3 and rows > 200:
        side.fault(FaultCode.INTERNAL, "\udcff" * rows)
    else:
        side.product(rows - 100)


def seeds() -> list[bytes]:
    """Conversations that get far."""
    vault = bytes([0, 0, 1, 2, 0, 0, 0])  # says HELLO
    welcome = bytes([5, 0, 0, 0, 0, 1, 2, 0, 255, 255, 255, 255])
    return [
        vault,
        vault + welcome,
        vault + welcome + bytes([2, 1, 0, 2, 5, 0, 1, 7, 7, 0, 0]),
        bytes([0, 0, 0, 5, 0, 0, 0, 1, 2, 0, 1, 0, 5, 0, 0, 1, 1, 0, 0, 0, 2, 2, 0, 9]),
        bytes([28]) + header_bytes(Header(Kind.HELLO, 0, 0, 0, 0, 48)) + bytes([0, 0, 0])
        + header_bytes(Header(Kind.HELLO, 0, 0, 0, 0, 48)),
        bytes([40]) + "a\u202eb\x1b[31m".encode().ljust(40, b"x"),
    ]  # fmt: skip
