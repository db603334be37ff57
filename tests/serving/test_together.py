"""What replicas share, tried without Ray: a record whose accounts hold wherever a client is, and his way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sliplm.cluster.onserve import Lost, Replica, Replicas, _processors
from sliplm.errors import ClusterError, InputError
from sliplm.parties.audit import AuditLog
from sliplm.serving.clients import Client
from sliplm.serving.limits import ASKED, BEGUN, Limits, Taken
from sliplm.serving.refusals import Refusal
from sliplm.serving.together import Together

ALICE = Client(name="alice", sha256="0" * 64, created="", budget=100, day=100)


class Vault:
    """The accounts of one replica, and its record."""

    def __init__(self, path: Path, noted: str) -> None:
        self.audit, self.limits = AuditLog(path), Limits()
        self.together = Together(self.audit, path, self.limits, noted)

    async def take(self, request: str, tokens: int) -> Taken:
        """As a request is let in."""
        async with self.together.turn():
            taken = self.limits.take(ALICE, tokens)
            detail = {"request": request, "charged": tokens}
            self.audit.write(BEGUN, "let in", role="client", address="alice", detail=detail)
            return taken

    def end(self, request: str, taken: Taken, used: int) -> None:
        """As it ends."""
        self.limits.settle(taken, used)
        detail = {"request": request, "charged": used}
        self.audit.write(ASKED, "answered", role="client", address="alice", detail=detail)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Vault]:
    first = AuditLog(tmp_path / "audit.jsonl")
    first.write("serving", "2 replicas")
    return lambda: Vault(tmp_path / "audit.jsonl", first.head)


def test_a_budget_holds_at_all_of_them_at_once(make: Callable[[], Vault]) -> None:
    both = [make(), make()]

    async def all_at_once() -> list[Any]:
        asked = (both[i % 2].take(str(i), 10) for i in range(20))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(all_at_once())
    assert sum(isinstance(each, Taken) for each in found) == 10
    assert {each.code for each in found if isinstance(each, Refusal)} == {"insufficient_quota"}


def test_what_is_given_back_or_lost_is_known_to_who_takes_over(make: Callable[[], Vault]) -> None:
    first, second = make(), make()

    async def run() -> None:
        first.end("one", await first.take("one", 60), 5)
        await first.take("two", 40)  # and dies
        await second.take("three", 55)
        with pytest.raises(Refusal, match="has 0 tokens left"):
            await second.take("four", 1)

    asyncio.run(run())
    again = make()  # what is started anew
    assert again.limits.used() == {"alice": (100, 100)}


def test_another_file_and_an_altered_one_are_refused(make: Callable[[], Vault], tmp_path: Path) -> None:
    make()
    AuditLog(tmp_path / "other.jsonl").write("serving", "2 replicas elsewhere")  # perhaps at the same time
    with pytest.raises(InputError, match="is not the audit record that the command sees"):
        Vault(tmp_path / "other.jsonl", AuditLog(tmp_path / "audit.jsonl").head)
    altered = (tmp_path / "audit.jsonl").read_text().replace("2 replicas", "3 replicas")
    (tmp_path / "audit.jsonl").write_text(altered)
    with pytest.raises(InputError, match="was altered"):
        make()


def test_a_line_from_before_midnight_takes_nothing_from_the_day_after() -> None:
    limits = Limits()
    for date, tokens in (("2026-11-30", 5), ("2026-12-01", 7), ("2026-11-30", 11)):
        detail = {"request": f"{date}{tokens}", "charged": tokens}
        limits.replay({"event": ASKED, "address": "alice", "time": date, "detail": detail})
    assert limits.used() == {"alice": (7, 23)}


# --- where a client goes ----------------------------------------------------------------------------------


class Handle:
    """A handle of Ray Serve's that is asked for nothing."""

    def options(self, **_: Any) -> Handle:
        return self


def group(names: str) -> Replicas:
    found = [Replica(name, Handle()) for name in names]
    for each in found:
        each._id = "here"
    return Replicas(None, found)


def test_only_clients_of_the_one_that_is_gone_move_and_they_come_back() -> None:
    replicas, people = group("012"), [f"client-{i}" for i in range(90)]
    home = {who: replicas.of(who, bool).name for who in people}
    assert all(15 < list(home.values()).count(name) < 45 for name in "012")
    replicas.all[1]._id = None
    moved = {who for who in people if replicas.of(who, bool).name != home[who]}
    assert moved == {who for who in people if home[who] == "1"}
    replicas.all[1]._id = "anew"
    assert {who: replicas.of(who, bool).name for who in people} == home


def test_one_that_is_of_no_use_is_passed_over_while_another_is_not() -> None:
    replicas = group("01")
    [who] = [f"client-{i}" for i in range(9) if replicas.of(f"client-{i}", lambda _: True).name == "0"][:1]
    replicas.all[0].news, replicas.all[1].news = "no worker", "ready"
    assert replicas.of(who, lambda news: news == "ready").name == "1"
    assert replicas.of(None, lambda news: news == "ready").name == "1"
    assert replicas.of(who, lambda news: False).name == "0"


def test_nobody_in_particular_goes_where_least_is_done() -> None:
    replicas = group("01")
    replicas.all[0].asked = 1
    assert replicas.of(None, bool).name == "1"
    for each in replicas.all:
        each._id = None
    with pytest.raises(Lost):
        replicas.of(None, bool)


@pytest.mark.parametrize(
    ("machines", "count", "each"),
    [([1, 1], 2, 1), ([8, 8], 2, 8), ([8], 3, 2), ([16, 4], 5, 4), ([4.5], 1, 4)],
)
def test_processors_are_shared(machines: list[float], count: int, each: int) -> None:
    assert _processors(machines, count) == each


def test_without_room_it_is_said() -> None:
    with pytest.raises(ClusterError, match="no room for 3 replicas"):
        _processors([1.0, 1.0], 3)
