"""The vault's side of a connection: what it may send and take in each state, and makes of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sliplm.errors import (
    AttestationError,
    InputError,
    MismatchError,
    OwnEvidenceError,
    SlipError,
    WireError,
    WorkerFault,
)
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind
from sliplm.protocol.side import Bytes, Rows, Shape, Side, State, Table, Way
from sliplm.shares.shards import Shard, whole

VAULT_TABLE: Final[Table] = {
    (State.NEW, Way.SEND, Kind.HELLO): State.GREETED,
    (State.GREETED, Way.RECEIVE, Kind.WELCOME): State.READY,
    (State.GREETED, Way.RECEIVE, Kind.FAULT): State.CLOSED,
    (State.PROVING, Way.SEND, Kind.EVIDENCE): State.PROVED,
    (State.PROVED, Way.RECEIVE, Kind.ACCEPT): State.READY,
    (State.PROVED, Way.RECEIVE, Kind.FAULT): State.CLOSED,
    (State.READY, Way.SEND, Kind.MULTIPLY): State.ASKED,
    (State.READY, Way.SEND, Kind.SEVERAL): State.ASKED,
    (State.READY, Way.SEND, Kind.DEAL): State.ASKED,
    (State.READY, Way.SEND, Kind.LEND): State.LENDING,
    (State.LENDING, Way.RECEIVE, Kind.LEND): State.READY,
    (State.LENDING, Way.RECEIVE, Kind.FAULT): State.CLOSED,
    (State.ASKED, Way.RECEIVE, Kind.PRODUCT): State.READY,
    (State.ASKED, Way.RECEIVE, Kind.FAULT): State.CLOSED,
}

_REFUSALS: Final[dict[wire.FaultCode, type[SlipError]]] = {
    wire.FaultCode.MISMATCH: MismatchError,
    wire.FaultCode.EVIDENCE: OwnEvidenceError,
}


class Welcome(NamedTuple):
    """The worker serves this part of the split.  Its evidence, for the nonce of our HELLO, is unverified."""

    shard: Shard
    max_payload: int
    nonce: bytes
    wants_evidence: bool
    evidence: bytes


class Product(NamedTuple):
    """The worker's claim of w x~ mod p, unverified: `payload` is u32 [rows, m], group after group.

    `group` and `rows` are the header's: how many groups and rows in all, where several were asked.
    """

    group: int
    rows: int
    micros: int
    payload: Bytes


class Accept(NamedTuple):
    """The worker has judged the vault's evidence, and serves it."""


class Borrowed(NamedTuple):
    """Whether the worker can use the memory that it was lent."""

    usable: bool


class VaultSide(Side):
    """The trusted side of one connection.

    Args:
        split_id: 32 hexadecimal digits.
        shapes: (m, n) of every group, in the manifest's order.
        party: whom it means to speak to.
        shards: the parts of the split that workers may hold; none where each holds all of it.
    """

    def __init__(
        self,
        split_id: str,
        shapes: Sequence[Shape],
        party: wire.Party = wire.Party.WORKER,
        shards: Sequence[Shard] = (),
    ) -> None:
        super().__init__(split_id, shapes, VAULT_TABLE)
        self._shards = {shard.share_id: shard for shard in shards or [whole(split_id, len(shapes))]}
        self._asked = (0, 0, 0, False)  # group, rows and bytes of the PRODUCT due, and whether it is lent
        self._offered = 0  # bytes each way of the memory that it has lent last
        self._party = party

    def hello(self, nonce: bytes) -> bytes:
        """The first frame, whole; `nonce`: 32 fresh bytes, which the worker's evidence must repeat."""
        payload = wire.pack_hello(self._split_id, nonce, self._party)
        self._move(Way.SEND, Kind.HELLO)
        return wire.pack_header(Header(Kind.HELLO, 0, 0, 0, 0, len(payload))) + payload

    def evidence(self, evidence: bytes) -> bytes:
        """The answer to a WELCOME that wants evidence, whole.  Raises InputError, which changes nothing."""
        if len(evidence) > wire.MAX_EVIDENCE:
            raise InputError(f"evidence has at most {wire.MAX_EVIDENCE} bytes, not {len(evidence)}")
        self._move(Way.SEND, Kind.EVIDENCE)
        return wire.pack_header(Header(Kind.EVIDENCE, 0, 0, 0, 0, len(evidence))) + evidence

    def lend(self, size: int) -> bytes:
        """Lend memory with so many bytes each way, which has its own way to the worker; the frame, whole.

        Raises InputError, which changes nothing.
        """
        payload = wire.pack_lend(size)
        self._move(Way.SEND, Kind.LEND)
        self._offered = size
        return wire.pack_header(Header(Kind.LEND, 0, 0, 0, 0, len(payload))) + payload

    def question(self, parts: Rows) -> bytes:
        """Step 2: what comes before the elements of one group or several.  Raises as these do."""
        return self.multiply(*parts[0]) if len(parts) == 1 else self.several(parts)

    def multiply(self, group: int, rows: int, *, lent: bool = False) -> bytes:
        """Step 2: the header before u32 [rows, n], or of those in the lent memory.

        Raises InputError, which changes nothing.
        """
        self._ask(Kind.MULTIPLY, group, rows, lent=lent)
        length = wire.ELEMENT * rows * self._shapes[group][1]
        return wire.pack_header(Header(Kind.MULTIPLY, self._sequence, group, rows, 0, length, lent))

    def several(self, parts: Rows) -> bytes:
        """Step 2 for several groups: what comes before u32 [rows, n] of each, in their order.

        Raises InputError, which changes nothing.
        """
        lengths = self._lengths(parts)
        if lengths is None:
            raise InputError(f"a frame cannot carry these groups and rows together: {parts}")
        length, answer = lengths
        rows = sum(rows for _, rows in parts)
        self._expect(Kind.SEVERAL, len(parts), rows, answer)
        head = wire.pack_header(Header(Kind.SEVERAL, self._sequence, len(parts), rows, 0, length))
        return head + wire.pack_parts(parts)

    def deal(self, group: int, rows: int, key: bytes, first_row: int) -> bytes:
        """Step O2, to a dealer: the frame that carries a batch's key, whole.  Raises InputError."""
        payload = wire.pack_deal(key, first_row)
        self._ask(Kind.DEAL, group, rows)
        return wire.pack_header(Header(Kind.DEAL, self._sequence, group, rows, 0, len(payload))) + payload

    def _ask(self, kind: Kind, group: int, rows: int, *, lent: bool = False) -> None:
        most = self.max_lent(group) if lent else self.max_rows(group)
        if not 0 < rows <= most:
            raise InputError(f"a frame of group {group} carries 1 to {most} rows, not {rows}")
        self._expect(kind, group, rows, wire.ELEMENT * rows * self._shapes[group][0], lent=lent)

    def _expect(self, kind: Kind, group: int, rows: int, answer: int, *, lent: bool = False) -> None:
        self._move(Way.SEND, kind)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._asked = (group, rows, answer, lent)

    def payload(self, data: Bytes) -> Welcome | Accept | Borrowed | Product:
        """The event that these bytes complete.

        Raises WireError, MismatchError (a worker of another split), OwnEvidenceError (it refuses our
        evidence), AttestationError (it does so after it had taken it), WorkerFault; the side is then closed.
        """
        late = self.state is State.ASKED
        try:
            header = self._end(data)
            if header.kind is Kind.FAULT:
                code, text = wire.parse_fault(header.group, data)
                kind = _REFUSALS.get(code, WorkerFault)
                if late and kind is OwnEvidenceError:
                    kind = AttestationError
                raise kind(f"the worker refuses ({code.name.lower()}): {text}")
            if header.kind is Kind.WELCOME:
                return self._welcome(data)
            if header.kind is Kind.ACCEPT:
                return Accept()
            if header.kind is Kind.LEND:
                self._lent = self._offered if header.rows else 0
                return Borrowed(self._lent > 0)
        except SlipError:
            self.close()
            raise
        return Product(header.group, header.rows, header.micros, data)

    def _check(self, header: Header) -> None:
        kind, sequence, group, rows, micros, length, lent = header
        if kind is Kind.PRODUCT:
            if (sequence, group, rows, length, lent) != (self._sequence, *self._asked):
                raise WireError("the worker's product does not answer the question that was asked")
        elif kind is Kind.FAULT:  # its sequence is the worker's guess: it closes the connection anyway
            if rows or micros or length > wire.MAX_FAULT:
                raise WireError(f"a fault carries nothing but a text of at most {wire.MAX_FAULT} bytes")
        elif kind is Kind.LEND:
            if rows > 1 or (sequence, group, micros, length) != (0, 0, 0, 0):
                raise WireError("the worker's LEND is malformed")
        else:
            least, most = (0, 0) if kind is Kind.ACCEPT else (wire.WELCOME_BYTES, wire.MAX_EVIDENCE)
            if (sequence, group, rows, micros) != (0, 0, 0, 0) or not 0 <= length - least <= most:
                raise WireError(f"the worker's {kind.name} is malformed")

    def _welcome(self, data: Bytes) -> Welcome:
        share_id, groups, max_payload, wants_evidence, nonce, evidence = wire.parse_welcome(data)
        shard = self._shards.get(share_id)
        if shard is None or groups != shard.groups:
            raise self._stranger(share_id, groups)
        if len(self._shards) > 1:
            held = [self._shapes[group] for group in range(shard.first, shard.first + groups)]
            self._hold(held, shard.first)
        if max_payload < self._longest:
            raise WireError(f"the worker takes {max_payload} bytes a frame, one row needs {self._longest}")
        self._fit(min(self._max_payload, max_payload))
        if wants_evidence:
            self._state = State.PROVING
        return Welcome(shard, max_payload, nonce, wants_evidence, evidence)

    def _stranger(self, share_id: str, groups: int) -> MismatchError:
        if len(self._shards) > 1:
            return MismatchError(
                f"the worker holds the share {share_id} with {groups} groups, which is none of the "
                f"{len(self._shards)} shards that the vault's manifest names: its manifest.json is not what "
                "the split wrote; copy the shard's folder again"
            )
        return MismatchError(
            f"the worker holds split {share_id} with {groups} groups, the vault split {self._split_id} "
            f"with {len(self._shapes)}: start the worker with the share made together with this vault"
        )
