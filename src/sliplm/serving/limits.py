"""How much each client has had: tokens of the last minute, of the day, and of all time, against its policy.

What a request may take at most is taken before it begins, and given back when it took less: no number of
requests at once gets beyond a limit.  The day's and all time's come from the audit record, so that a restart
forgives nothing; the minute begins anew.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sliplm.serving.clients import Client
from sliplm.serving.refusals import Refusal

ALERTS: Final = (0.5, 0.8, 1.0)
"""Parts of a budget at which an alert is given."""

BEGUN: Final = "begun"
ASKED: Final = "asked"
"""The events of the audit record that count: what a request may take, and instead of it what it took."""


@dataclass
class _Account:
    left: float | None = None  # of the minute's tokens: a bucket that fills steadily, at first full
    filled: float = field(default_factory=time.monotonic)
    date: str = ""
    day: int = 0
    ever: int = 0
    alerted: float | None = None


@dataclass
class Taken:
    """What one request has taken; to be settled once."""

    client: Client
    tokens: int
    settled: bool = False


class Limits:
    """The accounts of all clients.  For one thread.

    Args:
        alert: told a client's name and the part of its budget that it has used, once for each of ALERTS.
    """

    def __init__(self, alert: Callable[[str, float], None] = lambda name, part: None) -> None:
        self._accounts: dict[str, _Account] = {}
        self._begun: dict[str, tuple[int, str]] = {}  # while a record is read: what was taken, and when
        self._alert = alert

    def replay(self, record: Mapping[str, Any]) -> None:
        """Count a line of the audit record that was written before.  A request that never ended, because the
        server did, counts with all that it might have taken.
        """
        event, detail, name = record.get("event"), record.get("detail"), record.get("address")
        if event not in (BEGUN, ASKED) or not isinstance(detail, dict) or not isinstance(name, str):
            return
        tokens, request, date = detail.get("charged"), detail.get("request"), str(record.get("time"))[:10]
        if not isinstance(tokens, int) or tokens < 0:
            return
        account = self._accounts.setdefault(name, _Account())
        if event == BEGUN:
            self._begun[str(request)] = tokens, date
        else:
            before, day = self._begun.pop(str(request), (0, date))
            account.ever -= before
            account.day -= before if account.date == day else 0
        self._count(account, tokens, date)

    def take(self, client: Client, tokens: int) -> Taken:
        """Take what a request may use at most.

        Raises: Refusal where a limit leaves less.
        """
        account = self._accounts.setdefault(client.name, _Account())
        self._fill(client, account)
        if client.budget is not None and account.ever + tokens > client.budget:
            raise _used_up("its budget", client.budget - account.ever, tokens)
        if client.day is not None and account.day + tokens > client.day:
            raise _used_up("today's tokens", client.day - account.day, tokens)
        if client.minute is not None and account.left is not None and tokens > account.left:
            raise _too_fast(client.minute, account.left, tokens)
        if account.alerted is None:  # what was said before a restart is not said again
            part = _part(client, account)
            account.alerted = max((level for level in ALERTS if level <= part), default=0.0)
        if account.left is not None:
            account.left -= tokens
        self._count(account, tokens, account.date)
        return Taken(client, tokens)

    def settle(self, taken: Taken, used: int) -> None:
        """Give back what was not used, and look whether an alert is due."""
        if taken.settled:
            return
        taken.settled = True
        account, unused = self._accounts[taken.client.name], max(0, taken.tokens - used)
        account.left = None if account.left is None else account.left + unused
        account.ever -= unused
        account.day = max(0, account.day - unused)
        part = _part(taken.client, account)
        for level in ALERTS:
            if (account.alerted or 0.0) < level <= part:
                account.alerted = level
                self._alert(taken.client.name, level)

    def used(self) -> dict[str, tuple[int, int]]:
        """Tokens of each client, of its last day and of all time."""
        return {name: (account.day, account.ever) for name, account in self._accounts.items()}

    def _fill(self, client: Client, account: _Account) -> None:
        now, today = time.monotonic(), datetime.datetime.now(datetime.UTC).date().isoformat()
        if account.date < today:
            account.date, account.day = today, 0
        if client.minute is not None:
            more = (now - account.filled) * client.minute / 60
            left = client.minute if account.left is None else account.left + more
            account.left = float(min(client.minute, left))
        account.filled = now

    @staticmethod
    def _count(account: _Account, tokens: int, date: str) -> None:
        account.ever += tokens
        if account.date < date:
            account.date, account.day = date, 0
        if account.date == date:  # another replica's line may come after midnight
            account.day += tokens


def _part(client: Client, account: _Account) -> float:
    """How much of its budget a client has used."""
    return 0.0 if client.budget is None else account.ever / client.budget


def _used_up(what: str, left: int, asked: int) -> Refusal:
    return Refusal(
        429,
        f"of {what} your key has {max(0, left)} tokens left, and this request may take {asked}",
        kind="insufficient_quota",
        code="insufficient_quota",
    )


def _too_fast(minute: int, left: float, asked: int) -> Refusal:
    if asked > minute:
        return Refusal(
            429,
            f"this request may take {asked} tokens, and your key has {minute} a minute: ask for fewer",
            kind="tokens",
            code="rate_limit_exceeded",
        )
    wait = int((asked - left) * 60 / minute) + 1
    return Refusal(
        429,
        f"your key has {minute} tokens a minute, and this request may take {asked}: ask again in {wait} s",
        kind="tokens",
        code="rate_limit_exceeded",
        retry=wait,
    )
