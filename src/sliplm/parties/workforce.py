"""Several workers, or several dealers: their links, and a thread that watches them.  Who is asked next, who
rests, and who is never asked again: `standing`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, Self, get_args

from sliplm import forks
from sliplm.errors import (
    CredentialError,
    InputError,
    MismatchError,
    SlipError,
    VerificationError,
    WireError,
    WorkerError,
    WorkerUnavailable,
)
from sliplm.network import keys
from sliplm.network.addresses import parse_address
from sliplm.network.attestation import Attester, NullAttester, NullVerifier, Verifier
from sliplm.network.link import AnotherShard, Greet, Link
from sliplm.network.transport import Connection
from sliplm.parties.audit import AuditLog, Event
from sliplm.parties.quarantine import Quarantine
from sliplm.parties.standing import KnownLiar, Member, State, Status, lied, next_of, nobody, verdict
from sliplm.protocol.side import Shape
from sliplm.protocol.vault_side import Welcome
from sliplm.shares.shards import Shard, shard_with

Role = Literal["worker", "dealer"]

FAILURES: Final = (WorkerError, WireError, CredentialError, MismatchError)
"""What a link may raise that another worker could do better."""

_ROUND: Final = 0.25  # seconds between two looks at revocations and probes
_STOP_LIMIT: Final = 5.0
_AT_ONCE: Final = 16  # connections that are made at a time


def _greeted(link: Link, connection: Connection, welcome: Welcome) -> None:
    """Nothing more is asked of a new connection."""


def work(products: Iterable[tuple[int, int, int]]) -> int:
    """How much an exchange is, in units that make the paces of different ones comparable: reading a matrix
    costs as much as some rows, and the exchange has its trip, once.

    Args:
        products: (m, n, rows) of each group in it.
    """
    total = 2**20
    for m, n, rows in products:
        total += m * n * (rows + 8)
    return total


class Workforce:
    """The links of one role, with a thread that probes the lost and watches for revoked certificates.

    Args:
        shards: the parts of the split, where each member holds one of them: whoever holds the group of a
            message is asked.
    """

    def __init__(
        self,
        links: Sequence[Link],
        role: Role,
        audit: AuditLog,
        quarantine: Quarantine | None = None,
        shards: Sequence[Shard] = (),
    ) -> None:
        self._role, self._audit, self._shards = role, audit, tuple(shards)
        self._quarantine = quarantine or Quarantine()
        self._process = forks.Process()
        self._lock = threading.Lock()
        self._members = [Member(link, revocations=_revocations(link.address)) for link in links]
        self._by_address = {member.link.address: member for member in self._members}
        if len(self._by_address) != len(self._members):
            raise InputError(f"a {role} is named twice: name each once")
        self._remember()
        self.fallen: Callable[[Link], None] = lambda link: None  # told who lied, or lost its certificate
        self.taken_back: Callable[[Collection[int]], None] = lambda serials: None  # told what is revoked anew
        self._listed: frozenset[int] = frozenset()
        self._exchanges = 0
        self._closing = threading.Event()
        self._warden = threading.Thread(target=self._watch, name=f"sliplm-{role}s", daemon=True)
        self._warden.start()

    @classmethod
    def of(
        cls,
        addresses: Sequence[str],
        role: Role,
        split_id: str,
        shapes: Sequence[Shape],
        timeout: float,
        audit: AuditLog,
        greet: Greet = _greeted,
        attester: Attester | None = None,
        verifier: Verifier | None = None,
        quarantine: Quarantine | None = None,
        shards: Sequence[Shard] = (),
    ) -> Self:
        """With a `Link` to each address, whose arguments these are; one shard is as good as none."""
        shown, judge = attester or NullAttester(), verifier or NullVerifier()
        several = tuple(shards) if len(shards) > 1 else ()
        links = [
            Link(address, split_id, shapes, timeout, greet, shown, judge, role, several)
            for address in addresses
        ]
        return cls(links, role, audit, quarantine, several)

    def __repr__(self) -> str:
        return f"Workforce({', '.join(f'{m.link.address}: {m.state}' for m in self._members)})"

    def __len__(self) -> int:
        return len(self._members)

    @property
    def links(self) -> tuple[Link, ...]:
        """All of them, in the order in which they were named."""
        return tuple(member.link for member in self._members)

    def states(self) -> tuple[Status, ...]:
        """How each one stands."""
        self._process.check()
        with self._lock:
            return tuple(
                Status(
                    m.link.address,
                    m.state,
                    m.reason,
                    m.served,
                    m.verified,
                    m.wrong,
                    m.quarantines,
                    self._folder(m),
                )
                for m in self._members
            )

    def serves(self) -> bool:
        """Whether for every group somebody is up."""
        up = [member.link for member in self._members if member.state == "up"]
        return all(any(link.may_hold(shard.first) for link in up) for shard in self._shards) and bool(up)

    def shard_of(self, group: int) -> Shard | None:
        """The part of the split that holds a group; None where there are no parts."""
        return shard_with(self._shards, group) if self._shards else None

    def open_one(self) -> None:
        """Connect to the first that can serve; of a split in shards to everybody, to see who holds what.

        Raises the first one's error when none can, or when nobody can for some shard.
        """
        if self._shards:
            self._open_everybody()
            return
        first: SlipError | None = None
        tried: set[Link] = set()
        while (link := self.pick(tried)) is not None:
            tried.add(link)
            try:
                link.open()
            except FAILURES as error:
                first = first or error
                self.failed(link, error)
            else:
                return
        raise self.refusal(first)

    def _open_everybody(self) -> None:
        """All at once: one that is away would keep the others waiting."""

        def attempt(link: Link) -> SlipError | None:
            try:
                link.open()
            except FAILURES as error:
                self.failed(link, error)
                return error
            return None

        links = [m.link for m in self._members if m.state in ("up", "lost") and m.link.barred is None]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            errors = list(threads.map(attempt, links))
        for shard in self._shards:
            held = [error for link, error in zip(links, errors, strict=True) if link.may_hold(shard.first)]
            if None not in held:
                raise self.refusal(next(iter(held), None), shard.first)

    def pick(self, tried: Collection[Link], group: int = 0) -> Link | None:
        """Who is asked next: of those that are up the one that will be done first, as measured, of these the
        one that served last; now and then a slow one, to see whether it still is; then the lost ones; None
        when nobody is left but `tried`.

        Args:
            group: who is known not to hold it is not asked.
        """
        if len(self._members) == 1:  # as mostly, and on the way of every token
            only = self._members[0]
            asked = only.state in ("up", "lost") and only.link not in tried and only.link.barred is None
            return only.link if asked else None
        with self._lock:
            left = [m for m in self._members if m.link not in tried and m.link.barred is None]
            if self._shards:
                left = [m for m in left if m.link.may_hold(group)]
            up = [m for m in left if m.state == "up"]
            lost = [m for m in left if m.state == "lost"]
            if up:
                return next_of(up, time.monotonic()).link
            return lost[0].link if lost else None

    def rouse(self) -> None:
        """A question is near: wake the worker, if there is only one; of several `pick` decides later."""
        if len(self._members) == 1:
            self._members[0].link.rouse()

    def served(self, link: Link, seconds: float, work: int) -> None:
        """An exchange went well.

        Args:
            seconds: what it took, by our clock.
            work: how much was asked, as `work` says.
        """
        member = self._by_address[link.address]
        self._back(member, "lost")
        with self._lock:
            member.measured(seconds, seconds / work)
            self._exchanges += 1
            member.served += 1
            member.verified = time.time()
            member.last = self._exchanges
            member.strikes = 0

    def wrong(self, link: Link) -> None:
        """Count an answer that failed the check; `failed` decides what becomes of who gave it."""
        with self._lock:
            self._by_address[link.address].wrong += 1

    def failed(self, link: Link, error: SlipError, group: str | None = None, *, probe: bool = False) -> None:
        """An exchange, or a probe, went wrong: decide what becomes of the worker, and record it."""
        if isinstance(error, AnotherShard):
            return  # it serves, and is asked for what it holds
        member = self._by_address[link.address]
        event, state, pauses, kind = verdict(error)
        with self._lock:
            if member.state in ("quarantined", "drained") or self._closing.is_set():
                return  # decided already
            again = (member.state == state == "lost") or (probe and state != "quarantined")
            member.state, member.reason = state, str(error)
            member.quarantines += state == "quarantined"
            member.rest(pauses, early=probe and member.early)
            if kind is not None:
                link.bar(kind, f"{self._role} {link.address} is {state}: {error}")
        if state == "quarantined" and lied(link, error):
            self._quarantine.add(link.address, link.spki, self._role, str(error))
        if not again:
            self._record(member, event, str(error), group)
        if state == "quarantined":
            self.fallen(link)

    def drain(self, address: str) -> None:
        """Let the exchange under way end, close the connection, and ask it nothing more until `rejoin`.

        Raises InputError for an address that is not ours.
        """
        member = self._member(address)
        with self._lock:
            if member.state == "quarantined":
                return  # it is asked nothing already, and why is not forgotten
            member.state, member.reason, member.until = "drained", "by the operator", math.inf
        member.link.rest(WorkerUnavailable, f"{self._role} {address} was drained")
        self._record(member, "drained", "by the operator", None)

    def rejoin(self, address: str) -> None:
        """Connect again now to one that was drained, suspended, lost or even quarantined.

        Raises InputError for an address that is not ours, and what `Link.open` raises; it then stays out.
        """
        member = self._member(address)
        barred, known = member.link.barred, self._quarantine.clear(address, member.link.spki)
        member.link.admit()
        try:
            member.link.open()
        except SlipError:
            if barred is not None:
                member.link.bar(*barred)
            for entry in known:
                self._quarantine.keep(entry)
            raise
        self._back(member, *get_args(State))

    def nobody(self, group: int = 0) -> SlipError:
        """The error when nobody is left to ask for a group."""
        shard = self.shard_of(group)
        return nobody(self._role, self.states(), "" if shard is None else shard.folder)

    def refusal(self, failure: SlipError | None, group: int = 0) -> SlipError:
        """The error of a request that nobody could serve: of the last failure's kind, naming all."""
        everybody = self.nobody(group)
        if failure is None:
            return everybody
        failure.args = (str(everybody), *failure.args[1:])
        return failure

    def close(self) -> None:
        """Close all connections and stop watching; nothing in a forked child."""
        if not self._process.here:
            return
        self._closing.set()
        for link in self.links:
            link.close()
        if threading.current_thread() is not self._warden:
            self._warden.join(_STOP_LIMIT)

    def known_liar(self, link: Link) -> None:
        """Raise VerificationError when the key that it shows was caught lying before, wherever it was."""
        known = None if link.spki is None else self._quarantine.find(None, link.spki)
        if known is not None:
            raise KnownLiar(
                f"{self._role} {link.address} shows the key of {known.address}, {known.why()}", link.address
            )

    def revoked(self) -> frozenset[int]:
        """The serial numbers that the lists in the members' key folders name."""
        lists = [m.revocations.serials for m in self._members if m.revocations is not None]
        return frozenset().union(*lists)

    def _remember(self) -> None:
        """Quarantine those whose address was quarantined before."""
        for member in self._members:
            known = self._quarantine.find(member.link.address, None)
            if known is not None:
                member.state, member.reason, member.until = "quarantined", known.why(), math.inf
                member.quarantines += 1
                member.link.bar(
                    VerificationError, f"{self._role} {member.link.address} is quarantined: {known.why()}"
                )
                self._record(member, "quarantined", known.why(), None)

    def _folder(self, member: Member) -> str:
        shard = member.link.shard
        return shard.folder if self._shards and shard is not None else ""

    def _member(self, address: str) -> Member:
        self._process.check()
        if address not in self._by_address:
            raise InputError(f"{address!r} is no {self._role} of this vault: {', '.join(self._by_address)}")
        return self._by_address[address]

    def _back(self, member: Member, *when: State) -> None:
        """Up again, if it stands like that now: meanwhile it may have been quarantined or drained."""
        if member.state not in when:
            return  # on the way of every token
        with self._lock:
            if member.state not in when:
                return
            member.state, member.reason = "up", ""
            member.link.admit()
        self._record(member, "rejoined", "serves again", None)

    def _record(self, member: Member, event: Event, reason: str, group: str | None) -> None:
        link = member.link
        self._audit.write(event, reason, role=self._role, address=link.address, peer=link.peer, group=group)

    # --- the thread that watches -------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.wait(_ROUND):
            self._look_for_revocations()
            now = time.monotonic()
            alone = not any(member.state == "up" for member in self._members)
            for member in self._members:
                waiting = member.state in ("lost", "suspended") and not member.probed
                if waiting and (member.soon if alone else member.until) <= now:
                    self._start_probe(member, now)

    def _look_for_revocations(self) -> None:
        for member in self._members:
            if member.revocations is not None:
                with contextlib.suppress(CredentialError):  # what was known counts; a handshake says why
                    member.revocations.refresh()
                self._end_revoked(member, member.revocations)
        listed, before = self.revoked(), self._listed
        if listed != before:
            self._listed = listed
            self.taken_back(listed - before)

    def _end_revoked(self, member: Member, revocations: keys.Revocations) -> None:
        """Cut a connection under a certificate that was revoked: the next handshake shows whether the peer
        has a new one.
        """
        connection = member.link.connection
        if connection is None or connection.identity is None:
            return
        name, serial = connection.identity.name, connection.identity.serial
        if serial not in revocations:
            return
        reason = f"the certificate {name}, serial {serial:x}, was revoked"
        with self._lock:
            if member.state == "up":
                member.state, member.reason = "lost", reason
                member.until = member.soon = -math.inf  # at once
        if serial != member.cut:
            self._record(member, "revoked", reason, None)
        member.cut = serial
        member.link.cut()

    def _start_probe(self, member: Member, now: float) -> None:
        member.begin_probe(now)
        try:
            threading.Thread(target=self._probe, args=(member,), daemon=True).start()
        except RuntimeError:  # out of threads: those in use come back some time
            member.probed = False

    def _probe(self, member: Member) -> None:
        """Connect to one that was lost or suspended; whoever greets is asked again."""
        link = member.link
        try:
            with self._lock:
                if member.state not in ("lost", "suspended"):
                    return  # quarantined or drained since it was found due
                link.admit()
            try:
                link.open()
            except FAILURES as error:
                self.failed(link, error, probe=True)
            else:
                self._back(member, "lost", "suspended")
        finally:
            member.probed = False


def _revocations(address: str) -> keys.Revocations | None:
    folder = getattr(parse_address(address), "keys", None)
    return None if folder is None else keys.Revocations(folder)
