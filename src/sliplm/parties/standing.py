"""How a worker or dealer stands: what becomes of it after an error, when it is probed, and who is asked next.

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

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from sliplm.errors import (
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
from sliplm.network.link import Link
from sliplm.parties.audit import Event

State = Literal["up", "lost", "suspended", "quarantined", "drained"]

_PAUSES: Final = (1.0, 60.0)  # seconds before a lost one is probed: the first time, at most
_SUSPENSIONS: Final = (5.0, 300.0)  # seconds for which a stalled one is left alone
_ALONE: Final = (1.0, 300.0)  # the same where nobody else serves: if it left no question unanswered, at most
_DOUBLINGS: Final = 30  # of a pause, at most: 2.0**1024 is no number any more
_LATELY: Final = 0.3  # what the last exchange counts in a worker's pace
_AS_FAST: Final = 4.0  # paces within this factor count as equal: messages differ, and so do networks
_PATIENCE: Final = 0.1  # seconds of an exchange after which one that nobody has measured is tried
_ANEW: Final = (60.0, 20.0)  # a slow one is tried again after so many seconds, and so many times what it took


class KnownLiar(VerificationError):
    """Its key is on record."""


class Status(NamedTuple):
    """One worker or dealer, for people.

    Attributes:
        served: exchanges, or batches of masks.
        verified: `time.time()` of the last answer that was checked and good, or None.
        wrong: answers that failed the check.
        quarantines: how often it was quarantined.
        shard: the folder of what it holds, where that is a part of the split and known; else empty.
    """

    address: str
    state: State
    reason: str
    served: int
    verified: float | None = None
    wrong: int = 0
    quarantines: int = 0
    shard: str = ""


@dataclass
class Member:
    """One of them, with its link."""

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
    verified: float | None = None  # time.time() of the last answer that was checked and good
    wrong: int = 0  # answers that failed the check
    quarantines: int = 0
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

    def rest(self, pauses: tuple[float, float], *, early: bool) -> None:
        """When it is probed again; an early probe makes no pause longer."""
        now, left = time.monotonic(), min(self.link.unanswered, _DOUBLINGS)
        self.until = now + min(pauses[0] * 2.0**self.strikes, pauses[1])
        if not early:
            self.strikes = min(self.strikes + 1, _DOUBLINGS)
        alone = min(_ALONE[0] * 2.0 ** max(0, left - 1), _ALONE[1])
        part = 0.5 + secrets.randbelow(512) / 1024  # many vaults do not come back in step
        self.soon = min(now + part * alone, self.until) if self.state == "suspended" else self.until

    def begin_probe(self, now: float) -> None:
        """It is probed from now on; should that end as nobody has foreseen, it is probed again some time."""
        self.probed, self.early = True, self.until > now
        self.until = self.soon = now + _PAUSES[1]


def next_of(up: Sequence[Member], now: float) -> Member:
    """The one of those that are up to ask; which one is tried for the sake of measuring is noted."""
    paces = [m.pace for m in up if m.pace is not None]
    best = min(paces, default=0.0) * _AS_FAST
    if len(up) > 1 and paces:
        slow = min(m.took for m in up if m.pace is not None) > _PATIENCE
        for m in up:
            if m.again <= now and not m.link.in_flight and (slow if m.pace is None else m.pace > best):
                m.again = now + _ANEW[0]  # one at a time
                return m

    def done(m: Member) -> tuple[float, int]:
        lag = m.pace / best if m.pace is not None and m.pace > best > 0 else 1.0
        return (m.link.in_flight + 1) * lag, -m.last

    return min(up, key=done)


def nobody(role: str, states: Sequence[Status], shard: str) -> SlipError:
    """The error when nobody is left to ask.

    Args:
        shard: the folder of what is asked for, where that is a part of the split; else empty.
    """
    what = f" for shard {shard}" if shard else ""
    states = [status for status in states if not shard or status.shard in ("", shard)]
    reasons = "; ".join(f"{status.address}: {status.reason or status.state}" for status in states)
    if any(status.state == "quarantined" for status in states):
        return VerificationError(
            f"no {role} is left{what} ({reasons}); name another one and load the model again"
        )
    if not states:
        return WorkerUnavailable(
            f"none of the {role}s that were named serves shard {shard}: start one with `slip worker "
            f"{shard}`, name its address too, and load the model again"
        )
    return WorkerUnavailable(f"no {role} serves{what} now ({reasons}); see that one runs, then ask again")


def verdict(error: SlipError) -> tuple[Event, State, tuple[float, float], type[WorkerError] | None]:
    """What becomes of a worker after an error: event, state, pauses, and the bar if it is not to be asked."""
    if isinstance(error, (WorkerTimeout, WorkerFault)) or getattr(error, "torn", False):
        return "suspended", "suspended", _SUSPENSIONS, type(error) if isinstance(error, WorkerError) else None
    if isinstance(error, (WorkerUnavailable, PassingCredentialError)):
        return "lost", "lost", _PAUSES, None
    return "quarantined", "quarantined", (math.inf, math.inf), VerificationError


def lied(link: Link, error: SlipError) -> bool:
    """Whether it did itself what it is quarantined for, past all that the owner may have mistaken."""
    if isinstance(error, KnownLiar):
        return False  # on record already
    return isinstance(error, VerificationError) or (isinstance(error, WireError) and link.greeted)
