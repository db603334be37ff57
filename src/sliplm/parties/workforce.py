"""Several workers, or several dealers: who is asked next, who rests, who is never asked again.

state        how it comes about                                    asked again
up
lost         nobody listens, the connection broke, or our own      when nobody else is left, or once a
             keys, evidence, verifier or a date are at fault,      probe in the background finds it
             or it refuses our certificate or evidence, or its
             certificate was revoked while it was connected
suspended    no answer in time, a refusal, an answer cut short     after a pause that doubles each time;
                                                                   where nobody else serves, it is short
quarantined  a wrong product, a broken protocol, wrong keys,       never, unless the operator says so
             wrong split, a certificate that was revoked           (`rejoin`)
drained      the operator's wish                                   after `rejoin`
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Self, get_args

from sliplm import forks
from sliplm.errors import (
    CredentialError,
    InputError,
    MismatchError,
    PassingCredentialError,
    SlipError,
    VerificationError,
    WireError,
    WorkerError,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from sliplm.network import keys
from sliplm.network.addresses import parse_address
from sliplm.network.attestation import Attester, NullAttester, NullVerifier, Verifier
from sliplm.network.link import Greet, Link
from sliplm.network.transport import Connection
from sliplm.parties.audit import AuditLog, Event
from sliplm.parties.quarantine import Quarantine
from sliplm.protocol.side import Shape
from sliplm.protocol.vault_side import Welcome

State = Literal["up", "lost", "suspended", "quarantined", "drained"]
Role = Literal["worker", "dealer"]

FAILURES: Final = (WorkerError, WireError, CredentialError, MismatchError)
"""What a link may raise that another worker could do better."""

_PAUSES: Final = (1.0, 60.0)  # seconds before a lost one is probed: the first time, at most
_SUSPENSIONS: Final = (5.0, 300.0)  # seconds for which a stalled one is left alone
_ALONE: Final = (1.0, 300.0)  # the same where nobody else serves: if it left no question unanswered, at most
_ROUND: Final = 0.25  # seconds between two looks at revocations and probes
_STOP_LIMIT: Final = 5.0

_DOUBLINGS: Final = 30  # of a pause, at most: 2.0**1024 is no number any more
_LATELY: Final = 0.3  # what the last exchange counts in a worker's pace
_AS_FAST: Final = 4.0  # paces within this factor count as equal: messages differ, and so do networks
_PATIENCE: Final = 0.1  # seconds of an exchange after which one that nobody has measured is tried
_ANEW: Final = (60.0, 20.0)  # a slow one is tried again after so many seconds, and so many times what it took


def _greeted(link: Link, connection: Connection, welcome: Welcome) -> None:
    """Nothing more is asked of a new connection."""


class KnownLiar(VerificationError):
    """Its key is on record."""


class Status(NamedTuple):
    """One worker or dealer, for people."""

    address: str
    state: State
    reason: str
    served: int


@dataclass
class _Member:
    link: Link
    state: State = "up"
    reason: str = ""
    until: float = -math.inf  # time.monotonic() before which it is not probed
    soon: float = -math.inf  # the same where nobody else serves
    probed: bool = False  # by a thread, now
    early: bool = False  # that probe came before `until`
    cut: int | None = None  # serial number of the certificate whose connection was ended last
    strikes: int = 0
    served: int = 0
    last: int = 0  # number of the exchange that it served last
    pace: float | None = None  # seconds per unit of work, lately
    took: float = 0.0  # seconds of the last exchange
    again: float = -math.inf  # time.monotonic() from which it is tried once more, however slow it was
    revocations: keys.Revocations | None = field(default=None, repr=False)

    def measured(self, seconds: float, pace: float) -> None:
        """Take an exchange into account; one that is much faster than before has become so."""
        if self.pace is None or pace < self.pace / _AS_FAST:
            self.pace = pace
        else:
            self.pace += _LATELY * (pace - self.pace)
        self.took = seconds
        self.again = time.monotonic() + max(_ANEW[0], _ANEW[1] * seconds)


def work(products: Iterable[tuple[int, int, int]]) -> int:
    """How much an exchange is, in units that make the paces of different ones comparable: reading a matrix
    costs as much as some rows, and the exchange has its trip, once.

    Args:
        products: (m, n, rows) of each group in it.
    """
    return sum(m * n * (rows + 8) for m, n, rows in products) + 2**20


class Workforce:
    """The links of one role, with a thread that probes the lost and watches for revoked certificates."""

    def __init__(
        self, links: Sequence[Link], role: Role, audit: AuditLog, quarantine: Quarantine | None = None
    ) -> None:
        self._role, self._audit = role, audit
        self._quarantine = quarantine or Quarantine()
        self._process = forks.Process()
        self._lock = threading.Lock()
        self._members = [_Member(link, revocations=_revocations(link.address)) for link in links]
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
    ) -> Self:
        """With a `Link` to each address, whose arguments these are."""
        shown, judge = attester or NullAttester(), verifier or NullVerifier()
        links = [Link(address, split_id, shapes, timeout, greet, shown, judge, role) for address in addresses]
        return cls(links, role, audit, quarantine)

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
            return tuple(Status(m.link.address, m.state, m.reason, m.served) for m in self._members)

    def open_one(self) -> None:
        """Connect to the first that can serve.  Raises the first one's error when none can."""
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

    def pick(self, tried: Collection[Link]) -> Link | None:
        """Who is asked next: of those that are up the one that will be done first, as measured, of these the
        one that served last; now and then a slow one, to see whether it still is; then the lost ones; None
        when nobody is left but `tried`.
        """
        with self._lock:
            left = [m for m in self._members if m.link not in tried and m.link.barred is None]
            up = [m for m in left if m.state == "up"]
            lost = [m for m in left if m.state == "lost"]
            if up:
                return _next(up, time.monotonic()).link
            return lost[0].link if lost else None

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
            member.last = self._exchanges
            member.strikes = 0

    def failed(self, link: Link, error: SlipError, group: str | None = None, *, probe: bool = False) -> None:
        """An exchange, or a probe, went wrong: decide what becomes of the worker, and record it."""
        member = self._by_address[link.address]
        event, state, pauses, kind = _verdict(error)
        with self._lock:
            if member.state in ("quarantined", "drained") or self._closing.is_set():
                return  # decided already
            again = (member.state == state == "lost") or (probe and state != "quarantined")
            member.state, member.reason = state, str(error)
            self._set_pauses(member, pauses, early=probe and member.early)
            if kind is not None:
                link.bar(kind, f"{self._role} {link.address} is {state}: {error}")
        if state == "quarantined" and _lied(link, error):
            self._quarantine.add(link.address, link.spki, self._role, str(error))
        if not again:
            self._record(member, event, str(error), group)
        if state == "quarantined":
            self.fallen(link)

    def _set_pauses(self, member: _Member, pauses: tuple[float, float], *, early: bool) -> None:
        """When it is probed again; an early probe makes no pause longer."""
        now, left = time.monotonic(), min(member.link.unanswered, _DOUBLINGS)
        member.until = now + min(pauses[0] * 2.0**member.strikes, pauses[1])
        if not early:
            member.strikes = min(member.strikes + 1, _DOUBLINGS)
        alone = min(_ALONE[0] * 2.0 ** max(0, left - 1), _ALONE[1])
        part = 0.5 + secrets.randbelow(512) / 1024  # many vaults do not come back in step
        member.soon = min(now + part * alone, member.until) if member.state == "suspended" else member.until

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

    def nobody(self) -> SlipError:
        """The error when nobody is left to ask."""
        states = self.states()
        reasons = "; ".join(f"{status.address}: {status.reason or status.state}" for status in states)
        if any(status.state == "quarantined" for status in states):
            return VerificationError(
                f"no {self._role} is left ({reasons}); name another one and load the model again"
            )
        return WorkerUnavailable(f"no {self._role} serves now ({reasons}); see that one runs, then ask again")

    def refusal(self, failure: SlipError | None) -> SlipError:
        """The error of a request that nobody could serve: of the last failure's kind, naming all."""
        everybody = self.nobody()
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
                member.link.bar(
                    VerificationError, f"{self._role} {member.link.address} is quarantined: {known.why()}"
                )
                self._record(member, "quarantined", known.why(), None)

    def _member(self, address: str) -> _Member:
        self._process.check()
        if address not in self._by_address:
            raise InputError(f"{address!r} is no {self._role} of this vault: {', '.join(self._by_address)}")
        return self._by_address[address]

    def _back(self, member: _Member, *when: State) -> None:
        """Up again, if it stands like that now: meanwhile it may have been quarantined or drained."""
        if member.state not in when:
            return  # on the way of every token
        with self._lock:
            if member.state not in when:
                return
            member.state, member.reason = "up", ""
            member.link.admit()
        self._record(member, "rejoined", "serves again", None)

    def _record(self, member: _Member, event: Event, reason: str, group: str | None) -> None:
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

    def _end_revoked(self, member: _Member, revocations: keys.Revocations) -> None:
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

    def _start_probe(self, member: _Member, now: float) -> None:
        member.probed, member.early = True, member.until > now
        member.until = member.soon = now + _PAUSES[1]  # should the probe end as nobody has foreseen
        try:
            threading.Thread(target=self._probe, args=(member,), daemon=True).start()
        except RuntimeError:  # out of threads: those in use come back some time
            member.probed = False

    def _probe(self, member: _Member) -> None:
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


def _next(up: Sequence[_Member], now: float) -> _Member:
    """The one of those that are up to ask; which one is tried for the sake of measuring is noted."""
    paces = [m.pace for m in up if m.pace is not None]
    best = min(paces, default=0.0) * _AS_FAST
    if len(up) > 1 and paces:
        slow = min(m.took for m in up if m.pace is not None) > _PATIENCE
        for m in up:
            if m.again <= now and not m.link.in_flight and (slow if m.pace is None else m.pace > best):
                m.again = now + _ANEW[0]  # one at a time
                return m

    def done(m: _Member) -> tuple[float, int]:
        lag = m.pace / best if m.pace is not None and m.pace > best > 0 else 1.0
        return (m.link.in_flight + 1) * lag, -m.last

    return min(up, key=done)


def _verdict(error: SlipError) -> tuple[Event, State, tuple[float, float], type[WorkerError] | None]:
    """What becomes of a worker after an error: event, state, pauses, and the bar if it is not to be asked."""
    if isinstance(error, (WorkerTimeout, WorkerFault)) or getattr(error, "torn", False):
        return "suspended", "suspended", _SUSPENSIONS, type(error) if isinstance(error, WorkerError) else None
    if isinstance(error, (WorkerUnavailable, PassingCredentialError)):
        return "lost", "lost", _PAUSES, None
    return "quarantined", "quarantined", (math.inf, math.inf), VerificationError


def _lied(link: Link, error: SlipError) -> bool:
    """Whether it did itself what it is quarantined for, past all that the owner may have mistaken."""
    if isinstance(error, KnownLiar):
        return False  # on record already
    return isinstance(error, VerificationError) or (isinstance(error, WireError) and link.greeted)


def _revocations(address: str) -> keys.Revocations | None:
    folder = getattr(parse_address(address), "keys", None)
    return None if folder is None else keys.Revocations(folder)
