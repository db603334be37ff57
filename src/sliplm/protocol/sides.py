"""The protocol of SPEC section 4 without input or output: two state machines that eat and make bytes.

    state      vault                              worker
    NEW        may send HELLO                     waits for HELLO
    GREETED    waits for WELCOME or FAULT         must send WELCOME
    PROVING    must send EVIDENCE                 waits for EVIDENCE
    PROVED     waits for ACCEPT or FAULT          must send ACCEPT, once the evidence is judged
    READY      may send MULTIPLY or DEAL (step 2) waits for MULTIPLY or DEAL
    ASKED      waits for PRODUCT or FAULT         must send PRODUCT (step 3)
    CLOSED     refuses everything                 refuses everything

WELCOME leads to PROVING if the worker asks for the vault's evidence, else to READY.

A worker may send FAULT in every state but CLOSED; it closes both sides.  So does every error.

Whoever reads from a peer does so in two steps: 28 bytes to `header`, which decides on kind, sequence,
group, rows and length *before* any memory is taken and returns how many payload bytes follow; then
these bytes to `payload`, which returns the event.

A `Product` is what the worker claims, and nothing more: it is unverified until `vault` has checked it
against the challenges (step 4), and nothing may use it before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from sliplm.errors import AttestationError, InputError, MismatchError, SlipError, WireError, WorkerFault
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind

FRAME_BYTES: Final = 16 * 2**20
"""Rows are cut so that a frame and its answer stay below this, unless one row alone is longer."""

Bytes = bytes | bytearray | memoryview
Shape = tuple[int, int]


class State(IntEnum):  # integers because they are looked up four times an exchange
    """Where a side stands."""

    NEW = 0
    GREETED = 1
    READY = 2
    ASKED = 3
    CLOSED = 4
    PROVING = 5
    PROVED = 6


class Way(IntEnum):
    """The direction of a frame, seen from the side."""

    SEND = 0
    RECEIVE = 1


Table = dict[tuple[State, Way, Kind], State]

VAULT_TABLE: Final[Table] = {
    (State.NEW, Way.SEND, Kind.HELLO): State.GREETED,
    (State.GREETED, Way.RECEIVE, Kind.WELCOME): State.READY,
    (State.GREETED, Way.RECEIVE, Kind.FAULT): State.CLOSED,
    (State.PROVING, Way.SEND, Kind.EVIDENCE): State.PROVED,
    (State.PROVED, Way.RECEIVE, Kind.ACCEPT): State.READY,
    (State.PROVED, Way.RECEIVE, Kind.FAULT): State.CLOSED,
    (State.READY, Way.SEND, Kind.MULTIPLY): State.ASKED,
    (State.READY, Way.SEND, Kind.DEAL): State.ASKED,
    (State.ASKED, Way.RECEIVE, Kind.PRODUCT): State.READY,
    (State.ASKED, Way.RECEIVE, Kind.FAULT): State.CLOSED,
}

_REFUSALS: Final[dict[wire.FaultCode, type[SlipError]]] = {
    wire.FaultCode.MISMATCH: MismatchError,
    wire.FaultCode.EVIDENCE: AttestationError,
}

WORKER_TABLE: Final[Table] = {
    (State.NEW, Way.RECEIVE, Kind.HELLO): State.GREETED,
    (State.GREETED, Way.SEND, Kind.WELCOME): State.READY,
    (State.PROVING, Way.RECEIVE, Kind.EVIDENCE): State.PROVED,
    (State.PROVED, Way.SEND, Kind.ACCEPT): State.READY,
    (State.READY, Way.RECEIVE, Kind.MULTIPLY): State.ASKED,
    (State.READY, Way.RECEIVE, Kind.DEAL): State.ASKED,
    (State.ASKED, Way.SEND, Kind.PRODUCT): State.READY,
}


class Welcome(NamedTuple):
    """The worker serves this split.  Its evidence, for the nonce of our HELLO, is unverified."""

    groups: int
    max_payload: int
    nonce: bytes
    wants_evidence: bool
    evidence: bytes


class Product(NamedTuple):
    """The worker's claim of w x~ mod p, unverified: `payload` is u32 [rows, m]."""

    group: int
    rows: int
    micros: int
    payload: Bytes


class Hello(NamedTuple):
    """A vault of this split asks to be served; the worker's evidence must be for its nonce."""

    split_id: str
    nonce: bytes


class Accept(NamedTuple):
    """The worker has judged the vault's evidence, and serves it."""


class Evidence(NamedTuple):
    """The vault's evidence, for the nonce of the worker's WELCOME, unverified."""

    evidence: bytes


class Deal(NamedTuple):
    """Step O2: a batch's key; the dealer makes r [rows, n] of it, from `first_row` on, and answers w r."""

    group: int
    rows: int
    key: bytes
    first_row: int

    def __repr__(self) -> str:
        return f"Deal(group={self.group}, rows={self.rows}, key hidden)"


class Multiply(NamedTuple):
    """Masked vectors x~: `payload` is u32 [rows, n]."""

    group: int
    rows: int
    payload: Bytes


class _Side(ABC):
    """What both sides share: the state, the table, limits, and closing on every error."""

    def __init__(self, split_id: str, shapes: Sequence[Shape], table: Table) -> None:
        if not 0 < len(shapes) <= wire.MAX_GROUPS:
            raise InputError(f"a split has 1 to {wire.MAX_GROUPS} groups, not {len(shapes)}")
        if min(min(shape) for shape in shapes) < 1:
            raise InputError("every group has at least one row and one column")
        self._split_id = split_id
        wire.pack_split_id(split_id)  # refuses what is none
        self._shapes = tuple(shapes)
        self._table = table
        self._longest = wire.ELEMENT * max(max(shape) for shape in shapes)  # one row of the widest group
        if self._longest > wire.MAX_PAYLOAD:
            raise InputError(f"one row takes {self._longest} bytes, a frame at most {wire.MAX_PAYLOAD}")
        self._max_payload = max(FRAME_BYTES, self._longest)
        self._state = State.NEW
        self._sequence = 0
        self._incoming: Header | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._state.name.lower()}, {len(self._shapes)} groups)"

    @property
    def state(self) -> State:
        """Where this side stands."""
        return self._state

    def close(self) -> None:
        """Refuse everything from now on."""
        self._state = State.CLOSED
        self._incoming = None

    def max_rows(self, group: int) -> int:
        """How many rows of the group one frame, and its answer, can carry; at least 1.

        Raises InputError if there is no such group.
        """
        if not 0 <= group < len(self._shapes):
            raise InputError(f"there is no group {group}: this split has {len(self._shapes)}")
        return max(1, self._max_payload // (wire.ELEMENT * max(self._shapes[group])))

    def header(self, data: Bytes) -> int:
        """How many payload bytes follow this header.  Raises WireError; the side is then closed."""
        try:
            header = self._begin(data)
            self._check(header)
        except SlipError:
            self.close()
            raise
        self._incoming = header
        return header.length

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

    def _begin(self, data: Bytes) -> Header:
        """Parse a header, and check that its kind may come now and that no header is pending."""
        if self._incoming is not None:
            raise WireError("a header came before the payload of the one before")
        header = wire.parse_header(data)
        if (self._state, Way.RECEIVE, header.kind) not in self._table:
            raise WireError(f"a {header.kind.name} is not allowed in state {self._state.name}")
        return header

    def _end(self, data: Bytes) -> Header:
        """The header that announced this payload; moves the state."""
        header = self._incoming
        if header is None:
            raise WireError("a payload without a header")
        if len(data) != header.length:
            raise WireError(f"a payload of {len(data)} bytes where {header.length} were announced")
        self._incoming = None
        self._move(Way.RECEIVE, header.kind)
        return header


class VaultSide(_Side):
    """The trusted side of one connection.

    Args:
        split_id: 32 hexadecimal digits.
        shapes: (m, n) of every group, in the manifest's order.
    """

    def __init__(self, split_id: str, shapes: Sequence[Shape]) -> None:
        super().__init__(split_id, shapes, VAULT_TABLE)
        self._asked = (0, 0)  # group and rows of the MULTIPLY that waits for its PRODUCT

    def hello(self, nonce: bytes) -> bytes:
        """The first frame, whole; `nonce`: 32 fresh bytes, which the worker's evidence must repeat."""
        payload = wire.pack_hello(self._split_id, nonce)
        self._move(Way.SEND, Kind.HELLO)
        return wire.pack_header(Header(Kind.HELLO, 0, 0, 0, 0, len(payload))) + payload

    def evidence(self, evidence: bytes) -> bytes:
        """The answer to a WELCOME that wants evidence, whole.  Raises InputError, which changes nothing."""
        if len(evidence) > wire.MAX_EVIDENCE:
            raise InputError(f"evidence has at most {wire.MAX_EVIDENCE} bytes, not {len(evidence)}")
        self._move(Way.SEND, Kind.EVIDENCE)
        return wire.pack_header(Header(Kind.EVIDENCE, 0, 0, 0, 0, len(evidence))) + evidence

    def multiply(self, group: int, rows: int) -> bytes:
        """Step 2: the header before u32 [rows, n].  Raises InputError, which changes nothing."""
        self._ask(Kind.MULTIPLY, group, rows)
        length = wire.ELEMENT * rows * self._shapes[group][1]
        return wire.pack_header(Header(Kind.MULTIPLY, self._sequence, group, rows, 0, length))

    def deal(self, group: int, rows: int, key: bytes, first_row: int) -> bytes:
        """Step O2, to a dealer: the frame that carries a batch's key, whole.  Raises InputError."""
        payload = wire.pack_deal(key, first_row)
        self._ask(Kind.DEAL, group, rows)
        return wire.pack_header(Header(Kind.DEAL, self._sequence, group, rows, 0, len(payload))) + payload

    def _ask(self, kind: Kind, group: int, rows: int) -> None:
        if not 0 < rows <= self.max_rows(group):
            raise InputError(f"a frame of group {group} carries 1 to {self.max_rows(group)} rows, not {rows}")
        self._move(Way.SEND, kind)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._asked = (group, rows)

    def payload(self, data: Bytes) -> Welcome | Accept | Product:
        """The event that these bytes complete.

        Raises WireError, MismatchError (a worker of another split), AttestationError (it refuses our
        evidence), WorkerFault; the side is then closed.
        """
        try:
            header = self._end(data)
            if header.kind is Kind.FAULT:
                code, text = wire.parse_fault(header.group, data)
                raise _REFUSALS.get(code, WorkerFault)(f"the worker refuses ({code.name.lower()}): {text}")
            if header.kind is Kind.WELCOME:
                return self._welcome(data)
            if header.kind is Kind.ACCEPT:
                return Accept()
        except SlipError:
            self.close()
            raise
        return Product(header.group, header.rows, header.micros, data)

    def _check(self, header: Header) -> None:
        kind, sequence, group, rows, micros, length = header
        if kind is Kind.PRODUCT:
            asked, asked_rows = self._asked
            expected = wire.ELEMENT * asked_rows * self._shapes[asked][0]
            if (sequence, group, rows, length) != (self._sequence, asked, asked_rows, expected):
                raise WireError("the worker's product does not answer the question that was asked")
        elif kind is Kind.FAULT:  # its sequence is the worker's guess: it closes the connection anyway
            if rows or micros or length > wire.MAX_FAULT:
                raise WireError(f"a fault carries nothing but a text of at most {wire.MAX_FAULT} bytes")
        else:
            least, most = (0, 0) if kind is Kind.ACCEPT else (wire.WELCOME_BYTES, wire.MAX_EVIDENCE)
            if (sequence, group, rows, micros) != (0, 0, 0, 0) or not 0 <= length - least <= most:
                raise WireError(f"the worker's {kind.name} is malformed")

    def _welcome(self, data: Bytes) -> Welcome:
        split_id, groups, max_payload, wants_evidence, nonce, evidence = wire.parse_welcome(data)
        if split_id != self._split_id or groups != len(self._shapes):
            raise MismatchError(
                f"the worker holds split {split_id} with {groups} groups, the vault split {self._split_id} "
                f"with {len(self._shapes)}: start the worker with the share made together with this vault"
            )
        if max_payload < self._longest:
            raise WireError(f"the worker takes {max_payload} bytes a frame, one row needs {self._longest}")
        self._max_payload = min(self._max_payload, max_payload)
        if wants_evidence:
            self._state = State.PROVING
        return Welcome(groups, max_payload, nonce, wants_evidence, evidence)


class WorkerSide(_Side):
    """The untrusted side of one connection.

    Args:
        split_id: 32 hexadecimal digits.
        shapes: (m, n) of every group, in the manifest's order.
    """

    def __init__(self, split_id: str, shapes: Sequence[Shape]) -> None:
        super().__init__(split_id, shapes, WORKER_TABLE)
        self._asked = Header(Kind.HELLO, 0, 0, 0, 0, 0)

    def welcome(self, nonce: bytes, evidence: bytes = b"", *, wants_evidence: bool = False) -> bytes:
        """The answer to HELLO, whole.

        Args:
            nonce: 32 fresh bytes, which the vault's evidence must repeat.
            evidence: the worker's own, for the nonce of the HELLO.
            wants_evidence: the vault must show its own next.

        Raises InputError, which changes nothing.
        """
        fields = wire.WelcomeFields(
            self._split_id, len(self._shapes), self._max_payload, wants_evidence, nonce, evidence
        )
        payload = wire.pack_welcome(fields)
        self._move(Way.SEND, Kind.WELCOME)
        if wants_evidence:
            self._state = State.PROVING
        return wire.pack_header(Header(Kind.WELCOME, 0, 0, 0, 0, len(payload))) + payload

    def accept(self) -> bytes:
        """The answer to EVIDENCE that was found good, whole."""
        self._move(Way.SEND, Kind.ACCEPT)
        return wire.pack_header(Header(Kind.ACCEPT, 0, 0, 0, 0, 0))

    def product(self, micros: int) -> bytes:
        """Step 3: the header before u32 [rows, m], the answer to the MULTIPLY or DEAL that came last."""
        self._move(Way.SEND, Kind.PRODUCT)
        asked = self._asked
        length = wire.ELEMENT * asked.rows * self._shapes[asked.group][0]
        micros = min(max(micros, 0), 0xFFFFFFFF)
        return wire.pack_header(Header(Kind.PRODUCT, asked.sequence, asked.group, asked.rows, micros, length))

    def fault(self, code: wire.FaultCode, text: str) -> bytes:
        """A refusal, whole; allowed in every state, also after an error.  The side is then closed."""
        self.close()
        payload = wire.pack_fault(text)
        return wire.pack_header(Header(Kind.FAULT, self._sequence, int(code), 0, 0, len(payload))) + payload

    def payload(self, data: Bytes) -> Hello | Evidence | Multiply | Deal:
        """The event that these bytes complete.

        Raises WireError, MismatchError (a vault of another split); the side is then closed.
        """
        try:
            header = self._end(data)
            if header.kind is Kind.HELLO:
                return self._hello(data)
        except SlipError:
            self.close()
            raise
        if header.kind is Kind.EVIDENCE:
            return Evidence(bytes(data))
        self._asked = header
        self._sequence = header.sequence
        if header.kind is Kind.DEAL:
            return Deal(header.group, header.rows, *wire.parse_deal(data))
        return Multiply(header.group, header.rows, data)

    def _check(self, header: Header) -> None:
        kind, sequence, group, rows, micros, length = header
        if kind is Kind.HELLO:
            if (sequence, group, rows, micros, length) != (0, 0, 0, 0, wire.HELLO_BYTES):
                raise WireError("the vault's hello is malformed")
            return
        if kind is Kind.EVIDENCE:
            if (sequence, group, rows, micros) != (0, 0, 0, 0) or length > wire.MAX_EVIDENCE:
                raise WireError("the vault's evidence is malformed")
            return
        if micros or sequence != (self._sequence + 1) & 0xFFFFFFFF:
            raise WireError("the vault's frame is out of sequence")
        if group >= len(self._shapes):
            raise WireError(f"there is no group {group}: this share has {len(self._shapes)}")
        if not 0 < rows <= self.max_rows(group):
            raise WireError(f"a frame of group {group} carries 1 to {self.max_rows(group)} rows, not {rows}")
        if length != (wire.DEAL_BYTES if kind is Kind.DEAL else wire.ELEMENT * rows * self._shapes[group][1]):
            raise WireError(f"a {kind.name} of {rows} rows of group {group} has not {length} bytes")

    def _hello(self, data: Bytes) -> Hello:
        split_id, nonce = wire.parse_hello(data)
        if split_id != self._split_id:
            raise MismatchError(
                f"the vault belongs to split {split_id}, this worker holds split {self._split_id}: "
                "start the worker with the share made together with that vault"
            )
        return Hello(split_id, nonce)
