"""The worker's side of a connection: what it may send and take in each state, and makes of questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sliplm.errors import MismatchError, SlipError, WireError
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind
from sliplm.protocol.side import Bytes, Rows, Shape, Side, State, Table, Way
from sliplm.shares.shards import Shard

WORKER_TABLE: Final[Table] = {
    (State.NEW, Way.RECEIVE, Kind.HELLO): State.GREETED,
    (State.GREETED, Way.SEND, Kind.WELCOME): State.READY,
    (State.PROVING, Way.RECEIVE, Kind.EVIDENCE): State.PROVED,
    (State.PROVED, Way.SEND, Kind.ACCEPT): State.READY,
    (State.READY, Way.RECEIVE, Kind.MULTIPLY): State.ASKED,
    (State.READY, Way.RECEIVE, Kind.SEVERAL): State.ASKED,
    (State.READY, Way.RECEIVE, Kind.DEAL): State.ASKED,
    (State.READY, Way.RECEIVE, Kind.LEND): State.LENDING,
    (State.LENDING, Way.SEND, Kind.LEND): State.READY,
    (State.ASKED, Way.SEND, Kind.PRODUCT): State.READY,
}


class Hello(NamedTuple):
    """A vault of this split asks to be served; the worker's evidence must be for its nonce."""

    split_id: str
    nonce: bytes
    party: wire.Party = wire.Party.WORKER


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


class Lend(NamedTuple):
    """The vault has memory of a card for us, with so many bytes each way."""

    size: int


class Multiply(NamedTuple):
    """Masked vectors x~: `payload` is u32 [rows, n], or empty where they lie in the lent memory."""

    group: int
    rows: int
    payload: Bytes
    lent: bool = False


class Several(NamedTuple):
    """Masked vectors x~ of several groups: `payload` is u32 [rows, n], group after group."""

    parts: Rows
    payload: Bytes


class WorkerSide(Side):
    """The untrusted side of one connection.

    Args:
        split_id: 32 hexadecimal digits.
        shapes: (m, n) of every group, in the manifest's order.
        shard: which part of the split that is; None for all of it.
    """

    def __init__(self, split_id: str, shapes: Sequence[Shape], shard: Shard | None = None) -> None:
        super().__init__(split_id, shapes, WORKER_TABLE, 0 if shard is None else shard.first)
        self._share_id = split_id if shard is None else shard.share_id
        self._asked = Header(Kind.HELLO, 0, 0, 0, 0, 0)
        self._answer = 0  # bytes of the PRODUCT that is due
        self._offered = 0  # bytes each way of the memory that was lent last

    def welcome(self, nonce: bytes, evidence: bytes = b"", *, wants_evidence: bool = False) -> bytes:
        """The answer to HELLO, whole.

        Args:
            nonce: 32 fresh bytes, which the vault's evidence must repeat.
            evidence: the worker's own, for the nonce of the HELLO.
            wants_evidence: the vault must show its own next.

        Raises InputError, which changes nothing.
        """
        fields = wire.WelcomeFields(
            self._share_id, len(self._shapes), self._max_payload, wants_evidence, nonce, evidence
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

    def lend(self, *, borrowed: bool) -> bytes:
        """The answer to LEND, whole: questions and answers may lie there from now on, or not."""
        self._move(Way.SEND, Kind.LEND)
        self._lent = self._offered if borrowed else 0
        return wire.pack_header(Header(Kind.LEND, 0, 0, int(borrowed), 0, 0))

    def product(self, micros: int) -> bytes:
        """Step 3: the header before u32 [rows, m], the answer to the question that came last; it lies where
        that did.
        """
        self._move(Way.SEND, Kind.PRODUCT)
        _, sequence, group, rows, _, _, lent = self._asked
        micros = min(max(micros, 0), 0xFFFFFFFF)
        return wire.pack_header(Header(Kind.PRODUCT, sequence, group, rows, micros, self._answer, lent))

    def fault(self, code: wire.FaultCode, text: str) -> bytes:
        """A refusal, whole; allowed in every state, also after an error.  The side is then closed."""
        self.close()
        payload = wire.pack_fault(text)
        return wire.pack_header(Header(Kind.FAULT, self._sequence, int(code), 0, 0, len(payload))) + payload

    def payload(self, data: Bytes) -> Hello | Evidence | Lend | Multiply | Several | Deal:
        """The event that these bytes complete.

        Raises WireError, MismatchError (a vault of another split); the side is then closed.
        """
        try:
            header = self._end(data)
            if header.kind is Kind.HELLO:
                return self._hello(data)
            if header.kind is Kind.LEND:
                self._offered = wire.parse_lend(data)
                return Lend(self._offered)
            parts = self._parts(header, data) if header.kind is Kind.SEVERAL else []
        except SlipError:
            self.close()
            raise
        if header.kind is Kind.EVIDENCE:
            return Evidence(bytes(data))
        self._asked = header
        self._sequence = header.sequence
        if parts:
            return Several(parts, memoryview(data)[wire.PART_BYTES * len(parts) :])
        self._answer = wire.ELEMENT * header.rows * self._shapes[header.group][0]
        if header.kind is Kind.DEAL:
            return Deal(header.group, header.rows, *wire.parse_deal(data))
        return Multiply(header.group, header.rows, data, header.lent)

    def _check(self, header: Header) -> None:
        kind, sequence, group, rows, micros, length, lent = header
        if kind in (Kind.HELLO, Kind.EVIDENCE, Kind.LEND):
            self._check_alone(header)
            return
        if micros or sequence != (self._sequence + 1) & 0xFFFFFFFF:
            raise WireError("the vault's frame is out of sequence")
        if kind is Kind.SEVERAL:
            self._check_several(group, rows, length)
            return
        if group not in self._shapes:
            raise WireError(f"there is no group {group} here: this share has {len(self._shapes)}")
        most = self.max_lent(group) if lent else self.max_rows(group)
        if not 0 < rows <= most:
            raise WireError(f"a frame of group {group} carries 1 to {most} rows, not {rows}")
        if length != (wire.DEAL_BYTES if kind is Kind.DEAL else wire.ELEMENT * rows * self._shapes[group][1]):
            raise WireError(f"a {kind.name} of {rows} rows of group {group} has not {length} bytes")

    def _check_alone(self, header: Header) -> None:
        """A frame that asks for no product."""
        kind, *numbers, length, _ = header
        if kind is Kind.HELLO and (any(numbers) or length != wire.HELLO_BYTES):
            raise WireError("the vault's hello is malformed")
        if kind is Kind.EVIDENCE and (any(numbers) or length > wire.MAX_EVIDENCE):
            raise WireError("the vault's evidence is malformed")
        if kind is Kind.LEND and (any(numbers) or length != wire.LEND_BYTES or self._lent):
            raise WireError("the vault lends memory twice, or its frame is malformed")

    def _check_several(self, groups: int, rows: int, length: int) -> None:
        least = wire.PART_BYTES * groups + wire.ELEMENT * rows
        if not 1 < groups <= len(self._shapes) or rows < groups or not least <= length <= self._max_payload:
            raise WireError(f"a SEVERAL of {groups} groups and {rows} rows has not {length} bytes")

    def _parts(self, header: Header, data: Bytes) -> Rows:
        """What a SEVERAL asks, checked in full before memory is taken for its answer.  Raises WireError."""
        parts = wire.parse_parts(data, header.group)
        lengths = self._lengths(parts)
        if lengths is None or lengths[0] != len(data) or sum(rows for _, rows in parts) != header.rows:
            raise WireError("a SEVERAL's groups, rows and length do not agree")
        self._answer = lengths[1]
        return parts

    def _hello(self, data: Bytes) -> Hello:
        split_id, nonce, party = wire.parse_hello(data)
        if split_id != self._split_id:
            raise MismatchError(
                f"the vault belongs to split {split_id}, this worker holds split {self._split_id}: "
                "start the worker with the share made together with that vault"
            )
        return Hello(split_id, nonce, party)
