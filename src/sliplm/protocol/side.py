"""The protocol of SPEC section 4 without input or output: two state machines that eat and make bytes.

    state      vault                              worker
    NEW        may send HELLO                     waits for HELLO
    GREETED    waits for WELCOME or FAULT         must send WELCOME
    PROVING    must send EVIDENCE                 waits for EVIDENCE
    PROVED     waits for ACCEPT or FAULT          must send ACCEPT, once the evidence is judged
    READY      may send MULTIPLY, SEVERAL, DEAL   waits for one of them (step 2)
               or LEND
    LENDING    waits for LEND or FAULT            must send LEND
    ASKED      waits for PRODUCT or FAULT         must send PRODUCT (step 3)
    CLOSED     refuses everything                 refuses everything

WELCOME leads to PROVING if the worker asks for the vault's evidence, else to READY.

A worker may send FAULT in every state but CLOSED; it closes both sides.  So does every error.

Whoever reads from a peer does so in two steps: 28 bytes to `header`, which decides on kind, sequence,
group, rows and length *before* any memory is taken and returns how many payload bytes follow; then
these bytes to `payload`, which returns the event.  Of a payload in lent memory none follow.

A `Product` is what the worker claims, and nothing more: it is unverified until the vault has checked it
against the challenges (step 4), and nothing may use it before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from sliplm.errors import InputError, SlipError, WireError
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind
from sliplm.shares.manifest import MAX_GROUPS

FRAME_BYTES: Final = 16 * 2**20
"""Rows are cut so that a frame and its answer stay below this, unless one row alone is longer."""

Bytes = bytes | bytearray | memoryview
Shape = tuple[int, int]
Rows = Sequence[tuple[int, int]]
"""Groups by ascending index, each with its rows: what one question is about."""


class State(IntEnum):  # integers because they are looked up four times an exchange
    """Where a side stands."""

    NEW = 0
    GREETED = 1
    READY = 2
    ASKED = 3
    CLOSED = 4
    PROVING = 5
    PROVED = 6
    LENDING = 7


class Way(IntEnum):
    """The direction of a frame, seen from the side."""

    SEND = 0
    RECEIVE = 1


Table = dict[tuple[State, Way, Kind], State]


class Side(ABC):
    """What both sides share: the state, the table, limits, and closing on every error.

    Args:
        split_id: 32 hexadecimal digits.
        shapes: (m, n) of every group, in the manifest's order.
        table: which kind may go which way in which state, and the state after it.
        first: the index of the first of them in the split.

    Raises InputError for no split's id, no groups, or rows that no frame can carry.
    """

    def __init__(self, split_id: str, shapes: Sequence[Shape], table: Table, first: int = 0) -> None:
        if not 0 < len(shapes) <= MAX_GROUPS:
            raise InputError(f"a split has 1 to {MAX_GROUPS} groups, not {len(shapes)}")
        if min(min(shape) for shape in shapes) < 1:
            raise InputError("every group has at least one row and one column")
        self._split_id = split_id
        wire.pack_split_id(split_id)  # refuses what is none
        self._table = table
        self._lent = 0  # bytes that the lent memory has each way
        self._hold(shapes, first)
        if self._longest > wire.MAX_PAYLOAD:
            raise InputError(f"one row takes {self._longest} bytes, a frame at most {wire.MAX_PAYLOAD}")
        self._fit(max(FRAME_BYTES, self._longest))
        self._state = State.NEW
        self._sequence = 0
        self._incoming: Header | None = None
        self._following = State.CLOSED  # once that header's payload has come

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._state.name.lower()}, {len(self._shapes)} groups)"

    @property
    def state(self) -> State:
        """Where this side stands."""
        return self._state

    def close(self) -> None:
        """Refuse everything from now on."""
        self._state = self._following = State.CLOSED
        self._incoming = None

    def _hold(self, shapes: Sequence[Shape], first: int) -> None:
        """These groups, from index `first` on, are what is asked and answered here."""
        self._shapes = dict(enumerate(shapes, first))
        self._longest = wire.ELEMENT * max(max(shape) for shape in shapes)  # one row of the widest group

    def _fit(self, max_payload: int) -> None:
        """Frames carry so many bytes."""
        self._max_payload = max_payload
        self._most = {
            group: max(1, max_payload // (wire.ELEMENT * max(shape))) for group, shape in self._shapes.items()
        }

    def max_rows(self, group: int) -> int:
        """How many rows of the group one frame, and its answer, can carry; at least 1.

        Raises InputError if there is no such group.
        """
        most = self._most.get(group)
        if most is None:
            raise InputError(f"there is no group {group} here: this share has {len(self._shapes)}")
        return most

    @property
    def lends(self) -> bool:
        """Whether the worker has borrowed memory."""
        return self._lent > 0

    def max_lent(self, group: int) -> int:
        """The same of the lent memory; 0 where there is none, or it is too small."""
        shape = self._shapes.get(group)
        return 0 if shape is None else self._lent // (wire.ELEMENT * max(shape))

    @property
    def max_payload(self) -> int:
        """The longest payload of a frame, and of its answer, in bytes."""
        return self._max_payload

    def carries(self, parts: Rows) -> bool:
        """Whether one frame, and its answer, can carry these rows of these groups."""
        if len(parts) == 1:
            return parts[0][1] <= self.max_rows(parts[0][0])
        return self._lengths(parts) is not None

    def _lengths(self, parts: Rows) -> tuple[int, int] | None:
        """Payload bytes of a SEVERAL with these parts and of its answer; None unless it may be asked."""
        groups = [group for group, _ in parts]
        if len(parts) < 2 or groups != sorted(set(groups)) or min(rows for _, rows in parts) < 1:
            return None
        if any(group not in self._shapes for group in groups):
            return None
        asked = sum(rows * self._shapes[group][1] for group, rows in parts)
        answered = sum(rows * self._shapes[group][0] for group, rows in parts)
        lengths = wire.PART_BYTES * len(parts) + wire.ELEMENT * asked, wire.ELEMENT * answered
        return lengths if max(lengths) <= self._max_payload else None

    def header(self, data: Bytes) -> int:
        """How many payload bytes follow this header.  Raises WireError; the side is then closed."""
        try:
            header, following = self._begin(data)
            self._check(header)
        except SlipError:
            self.close()
            raise
        self._incoming, self._following = header, following
        return 0 if header.lent else header.length

    @abstractmethod
    def _check(self, header: Header) -> None:
        """Is this header the one that may come now?  Raises WireError."""

    def _move(self, way: Way, kind: Kind) -> None:
        following = self._table.get((self._state, way, kind))
        if following is None:
            state = self._state
            self.close()
            raise WireError(
                f"to {way.name} a {kind.name} is not allowed in state {state.name}: connect again"
            )
        self._state = following

    def _begin(self, data: Bytes) -> tuple[Header, State]:
        """Parse a header, and check that its kind may come now and that no header is pending; the state that
        its payload leads to.
        """
        if self._incoming is not None:
            raise WireError("a header came before the payload of the one before")
        header = wire.parse_header(data)
        following = self._table.get((self._state, Way.RECEIVE, header.kind))
        if following is None:
            raise WireError(f"a {header.kind.name} is not allowed in state {self._state.name}")
        return header, following

    def _end(self, data: Bytes) -> Header:
        """The header that announced this payload; moves the state."""
        header = self._incoming
        if header is None:
            raise WireError("a payload without a header")
        if len(data) != (following := 0 if header.lent else header.length):
            raise WireError(f"a payload of {len(data)} bytes where {following} were announced")
        self._incoming, self._state = None, self._following
        return header
