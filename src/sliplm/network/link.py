"""One worker or dealer as the vault sees it: connect, exchange, deal, reconnect once."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from sliplm import forks
from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.kernels.cuda.lent import Lent
from sliplm.errors import WireError, WorkerError, WorkerFault, WorkerTimeout, WorkerUnavailable
from sliplm.network.addresses import UnixAddress, anchored, parse_address
from sliplm.network.attestation import NO_SPKI, Attester, Verifier, binding, judge, own_evidence
from sliplm.network.dialling import connect
from sliplm.network.keys import Serving
from sliplm.network.memory import MemoryConnection
from sliplm.network.transport import Connection
from sliplm.protocol.frames import NONCE_BYTES, Party
from sliplm.protocol.side import Rows, Shape
from sliplm.protocol.vault_side import Borrowed, Product, VaultSide, Welcome
from sliplm.shares.shards import Shard, whole

Bar = tuple[type[WorkerError], str]
Marks = tuple[bytes, ...]
Greet = Callable[["Link", Connection, Welcome], None]

_CLOSE_LIMIT = 5.0  # seconds for an exchange to notice that its connection is gone
_BREAKS, _BREAKS_WITHIN = 5, 60.0  # so many lost connections in so many seconds are no accident


class AnotherShard(WorkerUnavailable):
    """Whoever answers at the address holds other groups: no fault, it is asked for those."""


class AnotherParty(WorkerUnavailable):
    """Whoever answers at the address now is not the one who was shown the key."""


class Link:
    """The connection to one worker, made when first needed.  One exchange at a time.

    Args:
        address: as in `addresses`.
        split_id: the split that both sides must hold.
        shapes: (m, n) of every group.
        timeout: limit in seconds of every wait.
        greet: called with each new connection and its WELCOME before anything is asked; may raise.
        attester: makes our evidence, where the peer wants it.  verifier: judges the peer's.
        role: what the peer must be, by its certificate and by its own word.
        shards: the parts of the split of which the peer may hold any one; none where it must hold all.

    Attributes:
        shard: what the peer showed that it holds; None before it has.
    """

    def __init__(
        self,
        address: str,
        split_id: str,
        shapes: Sequence[Shape],
        timeout: float,
        greet: Greet,
        attester: Attester,
        verifier: Verifier,
        role: Serving = "worker",
        shards: Sequence[Shard] = (),
    ) -> None:
        self.address = address
        self.shard = None if shards else whole(split_id, len(shapes))
        self._shards = tuple(shards)
        self._where = anchored(address)  # this process may change its folder
        self.barred: Bar | None = None  # why it is not asked now
        self.connection: Connection | None = None
        self.took = 0.0  # seconds of the last exchange, without the wait for its turn
        self.spki: bytes | None = None  # of the certificate that it showed last
        self.greeted = False  # whether it ever greeted as it should
        self.marks: set[bytes] = set()  # of whoever has greeted here, see `Connection.marks`
        self.unanswered = 0  # questions in a row that it took, and never answered
        self._peer: str | None = None
        self._split_id, self._shapes, self._timeout, self._greet = split_id, shapes, timeout, greet
        self._attester, self._verifier = attester, verifier
        self._role: Serving = role
        self._party = Party.DEALER if role == "dealer" else Party.WORKER
        self._broke: deque[float] = deque(maxlen=_BREAKS)  # when the connection was lost in use
        self._lock = threading.Lock()
        self._waiting: deque[None] = deque()  # one for each exchange under way or waiting for its turn
        self._process = forks.Process()
        self._side = VaultSide(split_id, shapes)
        self._lent: Lent | None = None

    def __repr__(self) -> str:
        return f"Link({self.address!r}, barred={self.barred is not None})"

    @property
    def in_flight(self) -> int:
        """Exchanges under way or waiting for their turn."""
        return len(self._waiting)

    def may_hold(self, group: int) -> bool:
        """Whether it has this group, as far as is known."""
        return self.shard is None or self.shard.holds(group)

    def max_rows(self, group: int) -> int:
        """How many rows of a group one exchange carries."""
        return self._side.max_rows(group)

    def max_lent(self, group: int) -> int:
        """The same by way of lent memory; 0 without it."""
        return self._side.max_lent(group)

    def borrowed(self) -> Lent | None:
        """The memory that the worker has borrowed; connects.  For who has the turn.

        Raises: as `open`.
        """
        if self._lent is None:
            return None
        self._connected()
        return self._lent if self._side.lends else None

    @property
    def max_payload(self) -> int:
        """How many bytes one frame carries."""
        return self._side.max_payload

    def open(self) -> None:
        """Connect and greet now, so that a wrong address or share shows before the first token.

        Raises: WorkerUnavailable, WorkerTimeout, CredentialError, MismatchError, WireError, and the error of
            `bar`.
        """
        with self:
            self._connected()

    def rouse(self) -> None:
        """From any thread: wake the worker, if it shares memory with us and sleeps: a question is near."""
        connection = self.connection
        if isinstance(connection, MemoryConnection) and self._process.here:
            connection.rouse()

    def exchange(
        self, parts: Rows, message: Elements, meanwhile: Callable[[], None]
    ) -> tuple[list[Elements], int]:
        """Steps 2 and 3: send x~ of each group in one frame, give the worker's claims y~, uint32 [rows, m] in
        the groups' order, and its compute time in microseconds.  For who has the turn (`with link:`).

        Args:
            parts: groups by ascending index, each once, with their rows.
            message: x~ uint32 [rows, n] of the groups, behind each other.
            meanwhile: called while the worker computes; again where a connection is made anew.

        The claims are views into the receive buffer, valid until the turn ends, and unverified.  A broken
        connection is made anew once and the *same* message sent again: that is no second use of its mask.

        Raises: as `open`, and WorkerFault.
        """
        product = self._answer(message.data, parts, meanwhile)
        elements = np.frombuffer(product.payload, np.uint32)
        if len(parts) == 1:
            return [elements.reshape(parts[0][1], -1)], product.micros
        first, claims = 0, []
        for group, rows in parts:
            last = first + rows * self._shapes[group][0]
            claims.append(elements[first:last].reshape(rows, -1))
            first = last
        return claims, product.micros

    def lend(self, make: Callable[[], Lent]) -> None:
        """Make memory of a card and offer it, now and with each connection made anew, to a worker that shares
        memory with us.  One that cannot use it is asked as before.

        Raises: as `open`, and what `make` raises.
        """
        target = parse_address(self._where)
        if not isinstance(target, UnixAddress) or not target.memory:
            return
        with self:
            self._lent = make()
            if self.connection is not None:
                try:
                    self._offer(self.connection, self._side, time.monotonic() + self._timeout)
                except BaseException:
                    self._drop()
                    raise

    def exchange_lent(self, group: int, rows: int, meanwhile: Callable[[], None]) -> int:
        """As `exchange`, for x~ that lies in the lent memory, where the claims will lie: only how many
        microseconds the worker computed.

        Raises: as `exchange`.
        """
        return self._answer(
            lambda side: side.multiply(group, rows, lent=True), [(group, rows)], meanwhile, lent=True
        ).micros

    def deal(
        self, group: int, key: bytes, first_row: int, rows: int, out: Elements, shown: Marks | None
    ) -> Marks:
        """Step O2 by the peer: u = w r for rows of the batch with this key into out, uint32 [rows, m];
        unverified.

        Args:
            shown: the marks of whom the key was shown before, None for nobody: another one never sees it.

        Returns: the marks of who dealt, see `Connection.marks`.

        Raises: as `exchange`, and AnotherParty.
        """
        known = shown

        def ask(side: VaultSide) -> bytes:
            nonlocal known
            marks = () if self.connection is None else self.connection.marks
            if known is not None and marks != known:
                raise AnotherParty(f"{self.address} is somebody else than before", self.address)
            known = marks
            return side.deal(group, rows, key, first_row)

        with self:
            product = self._answer(ask, [(group, rows)], _nothing)
            out[:] = np.frombuffer(product.payload, np.uint32).reshape(out.shape)
            return known or ()

    def bar(self, kind: type[WorkerError], why: str) -> None:
        """From any thread: ask it nothing more; whoever waits for it gets an error of this kind."""
        self.barred = kind, why
        self.cut()

    def cut(self) -> None:
        """From any thread: end the connection that there is; whoever waits on it connects anew."""
        connection = self.connection
        if connection is not None and self._process.here:
            connection.abort()  # whoever waits on it wakes up and drops it
            if self._lock.acquire(blocking=False):
                if self.connection is connection:
                    self._drop()
                self._lock.release()

    def admit(self) -> None:
        """Ask it again from now on."""
        self.barred = None

    def rest(self, kind: type[WorkerError], why: str) -> None:
        """Let the exchange under way end, then bar it."""
        self._process.check()
        with self._lock:
            self.barred = kind, why
            self._drop()

    def close(self) -> None:
        """Close the connection for good; whoever waits on it gets WorkerUnavailable.

        Nothing in a forked child.
        """
        if not self._process.here:
            return
        self.bar(WorkerUnavailable, "the vault is closed; load the model again")
        if self._lock.acquire(timeout=_CLOSE_LIMIT):
            self._drop()
            self._lock.release()

    def __enter__(self) -> Self:
        """Wait for the turn, and have it until the end of the block.  Raises: what it was barred with."""
        self._process.check()
        self._waiting.append(None)
        try:
            self._lock.acquire()
            try:
                self._check()  # perhaps it was barred while this thread waited for its turn
            except BaseException:
                self._lock.release()
                raise
        except BaseException:
            self._waiting.pop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._waiting.pop()

    def _answer(
        self,
        asked: memoryview | Callable[[VaultSide], bytes],
        parts: Rows,
        meanwhile: Callable[[], None],
        *,
        lent: bool = False,
    ) -> Product:
        """The answer to x~ of these groups, or to a frame that is made once it is known who answers."""
        fresh = self.connection is None
        while True:
            connection = self._connected()
            self._check_carries(parts, lent=lent)
            try:
                start = time.monotonic()
                deadline = start + self._timeout
                if isinstance(asked, memoryview):
                    connection.send(self._side.question(parts), asked, deadline=deadline)
                else:
                    connection.send(asked(self._side), deadline=deadline)
                meanwhile()
                answer = connection.receive(self._side, deadline=deadline)
                self.took = time.monotonic() - start
            except WorkerUnavailable as error:
                self._drop()
                self._check()
                if error.torn:
                    self.unanswered += 1
                    raise
                self._count_break(error)
                if fresh:
                    raise
                fresh = True
                continue
            except (WorkerTimeout, WorkerFault):
                self.unanswered += 1
                self._drop()
                raise
            except BaseException:
                self._drop()
                raise
            if not isinstance(answer, Product):
                self._drop()
                raise WireError(f"{self.address} answered a question with a greeting")
            self.unanswered = 0
            return answer

    def _check_carries(self, parts: Rows, *, lent: bool) -> None:
        """Whoever is there holds these groups, and one frame, or the lent memory, takes these rows."""
        if not self.may_hold(parts[0][0]):
            raise AnotherShard(f"{self.address} holds other groups", self.address)
        if not (self._side.max_lent(parts[0][0]) >= parts[0][1] if lent else self._side.carries(parts)):
            raise WorkerFault(f"{self.address} takes smaller frames than the others", self.address)

    def _connected(self) -> Connection:
        self._check()
        connection = self.connection
        if connection is None:
            deadline = time.monotonic() + self._timeout
            connection = connect(self._where, self._timeout, self._role)
            if (shown := connection.identity) is not None:  # also of one that is refused: M17
                self.spki = shown.spki
                self._peer = f"{shown.name}, serial {shown.serial:x}, sha256 {shown.fingerprint.hex()}"
            side = VaultSide(self._split_id, self._shapes, self._party, self._shards)
            try:
                welcome = self._hello(connection, side, deadline)
                self._greet(self, connection, welcome)
                self._offer(connection, side, deadline)
            except BaseException:
                connection.close()
                raise
            self.marks.update(connection.marks)
            self.connection, self._side, self.greeted = connection, side, True
            self.shard = welcome.shard
            self._check()  # another thread may have barred it, and seen no connection to end
        return connection

    def _hello(self, connection: Connection, side: VaultSide, deadline: float) -> Welcome:
        """Greet, and judge the peer's evidence before anything else of it counts."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection.send(side.hello(nonce), deadline=deadline)
        welcome = connection.receive(side, deadline=deadline)
        if not isinstance(welcome, Welcome):
            raise WireError(f"{self.address} did not greet")
        theirs = NO_SPKI if connection.identity is None else connection.identity.spki
        judge(self._verifier, welcome.evidence, binding(self._role, theirs, nonce))
        if welcome.wants_evidence:
            ours = NO_SPKI if connection.own is None else connection.own.spki
            evidence = own_evidence(self._attester, binding("vault", ours, welcome.nonce), deadline)
            connection.send(side.evidence(evidence), deadline=deadline)
            connection.receive(side, deadline=deadline)  # ACCEPT: the side lets nothing else through
        return welcome

    def _offer(self, connection: Connection, side: VaultSide, deadline: float) -> None:
        """Lend what there is to lend, where both share memory already."""
        memory = self._lent
        if memory is None or not isinstance(connection, MemoryConnection):
            return
        handle = memory.descriptor()
        try:
            connection.hand_over(handle)
        finally:
            os.close(handle)
        connection.send(side.lend(memory.size), deadline=deadline)
        if not isinstance(connection.receive(side, deadline=deadline), Borrowed):
            raise WireError(f"{self.address} did not answer an offer of memory")

    def _count_break(self, error: WorkerUnavailable) -> None:
        """A peer that drops each connection costs us new masks each time."""
        self._broke.append(time.monotonic())
        if len(self._broke) == _BREAKS and self._broke[-1] - self._broke[0] < _BREAKS_WITHIN:
            self._broke.clear()
            self.unanswered += 1
            raise WorkerFault(
                f"{self.address} breaks the connection again and again", self.address
            ) from error

    @property
    def peer(self) -> str | None:
        """The certificate that it showed last, for the audit record."""
        return self._peer

    def _check(self) -> None:
        if self.barred is not None:
            self._drop()
            kind, why = self.barred
            raise kind(why, self.address)

    def _drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None and self._process.here:  # a forked child has no say in it
            connection.close()


def _nothing() -> None:
    """What is done while a dealer computes."""
