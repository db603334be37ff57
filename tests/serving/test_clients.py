"""Clients' keys and limits: nobody gets beyond one, whatever comes, and a restart forgives nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import CredentialError, InputError
from sliplm.parties.audit import AuditLog
from sliplm.serving import clients, limits, run
from sliplm.serving.clients import Client, Clients
from sliplm.serving.limits import Limits
from sliplm.serving.refusals import Refusal


def made(**policy: Any) -> Client:
    return Client(name="alice", sha256="0" * 64, created="", **policy)


# --- keys ---------------------------------------------------------------------------------------------------


def test_a_key_opens_and_is_nowhere(tmp_path: Path) -> None:
    key = clients.add(tmp_path / "c", "alice", day=5)
    stored = (tmp_path / "c" / clients.FILE).read_text()
    assert key not in stored
    assert key.removeprefix(clients.PREFIX) not in stored
    assert (tmp_path / "c" / clients.FILE).stat().st_mode & 0o777 == 0o600
    known = Clients(tmp_path / "c")
    found = known.find(key)
    assert found is not None
    assert (found.name, found.day) == ("alice", 5)
    assert found.sha256 not in repr(found)
    for wrong in ("", key[:-1], key + "a", key.upper(), "\ud800"):
        assert known.find(wrong) is None


def test_a_change_is_seen(tmp_path: Path) -> None:
    key = clients.add(tmp_path, "alice")
    known = Clients(tmp_path)
    alice = known.find(key)
    assert alice is not None
    second = clients.add(tmp_path, "bob")
    assert known.find(second) is None
    known.refresh()
    assert known.find(second) is not None
    clients.revoke(tmp_path, "alice")
    known.refresh()
    assert known.find(key) is None
    assert not known.stands(alice)
    again = clients.add(tmp_path, "alice")
    known.refresh()
    assert known.find(again) is not None
    assert known.find(key) is None


@pytest.mark.parametrize("spoil", ["gone", "damaged", "writable"])
def test_where_the_file_cannot_be_trusted_nobody_is_served(tmp_path: Path, spoil: str) -> None:
    key = clients.add(tmp_path, "alice")
    known, file = Clients(tmp_path), tmp_path / clients.FILE
    whole = file.read_text()
    if spoil == "gone":
        file.unlink()
    elif spoil == "damaged":
        file.write_text(whole[:-9])
    else:
        file.write_text(whole + " ")
        file.chmod(0o666)
    known.refresh()
    assert known.find(key) is None
    with pytest.raises(CredentialError):
        Clients(tmp_path)
    file.write_text(whole + "\n")
    file.chmod(0o600)
    known.refresh()
    assert known.find(key) is not None


@pytest.mark.parametrize("name", ["", "a b", "../x", "A", "x" * 64])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="a client's name"):
        clients.add(tmp_path, name)


def test_a_name_has_one_key(tmp_path: Path) -> None:
    clients.add(tmp_path, "alice")
    with pytest.raises(InputError, match="a client alice already"):
        clients.add(tmp_path, "alice")
    with pytest.raises(InputError, match="no client bob"):
        clients.revoke(tmp_path, "bob")


# --- limits -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.booleans()), max_size=60),
    st.sampled_from(["minute", "day", "budget"]),
)
def test_no_requests_at_once_get_beyond_a_limit(asked: list[tuple[int, float, bool]], kind: str) -> None:
    client, accounts, open_ones, used = made(**{kind: 100}), Limits(), [], 0
    for tokens, part, now in asked:
        try:
            taken = accounts.take(client, tokens)
        except Refusal:
            continue
        open_ones.append((taken, int(tokens * part)))
        if now:
            taken, part_used = open_ones.pop(0)
            accounts.settle(taken, part_used)
            accounts.settle(taken, 0)  # once only
            used += part_used
    for taken, part_used in open_ones:
        accounts.settle(taken, part_used)
        used += part_used
    assert used <= 100
    if kind != "minute":
        assert accounts.used().get("alice", (0, 0))[1] == used


def test_a_minute_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    accounts, client = Limits(), made(minute=60)
    accounts.settle(accounts.take(client, 60), 60)
    with pytest.raises(Refusal) as caught:
        accounts.take(client, 10)
    assert (caught.value.code, caught.value.retry) == ("rate_limit_exceeded", 11)
    now += 10.5
    accounts.take(client, 10)
    with pytest.raises(Refusal, match="ask for fewer"):
        accounts.take(client, 61)


def test_a_day_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2030, 1, cls.day, tzinfo=tz)

    monkeypatch.setattr(limits.datetime, "datetime", Clock)
    accounts, client = Limits(), made(day=10, budget=15)
    accounts.settle(accounts.take(client, 10), 10)
    with pytest.raises(Refusal, match="today's tokens"):
        accounts.take(client, 1)
    Clock.day = 2
    accounts.settle(accounts.take(client, 5), 5)
    with pytest.raises(Refusal, match="its budget"):
        accounts.take(client, 1)


def test_a_restart_forgives_nothing(tmp_path: Path) -> None:
    file, client = tmp_path / "audit.jsonl", made(budget=100, day=100)
    log = AuditLog(file)
    for charged in (30, 40):
        log.write("asked", "answered", role="client", address="alice", detail={"charged": charged})
    log.write("asked", "answered", role="client", address="bob", detail={"charged": 99})
    log.write("refused", "x", role="client", address="alice", detail={"charged": 99})
    alerts: list[float] = []
    accounts = Limits(lambda name, part: alerts.append(part))
    run.replay(file, accounts)
    with pytest.raises(Refusal, match="30 tokens left"):
        accounts.take(client, 31)
    accounts.settle(accounts.take(client, 30), 15)
    assert alerts == [0.8]  # 0.5 was said before the restart
    file.write_text(file.read_text().replace('"charged":40', '"charged":10'))
    with pytest.raises(InputError, match="line 2 does not follow"):
        run.replay(file, Limits())


def test_what_a_crash_cut_short_counts_with_all_that_it_might_have_taken(tmp_path: Path) -> None:
    file, client, names = tmp_path / "audit.jsonl", made(budget=100, day=100), ("a", "b", "c")
    log = AuditLog(file)
    for request in names:
        detail = {"request": request, "charged": 30}
        log.write("begun", "let in", role="client", address="alice", detail=detail)
    for request, charged in (("a", 5), ("b", 0)):
        detail = {"request": request, "charged": charged}
        log.write("asked", "answered", role="client", address="alice", detail=detail)
    accounts = Limits()
    run.replay(file, accounts)
    assert accounts.used() == {"alice": (35, 35)}
    with pytest.raises(Refusal, match="65 tokens left"):
        accounts.take(client, 66)


def test_alerts_come_once() -> None:
    alerts: list[float] = []
    accounts, client = Limits(lambda name, part: alerts.append(part)), made(budget=10)
    for _ in range(10):
        accounts.settle(accounts.take(client, 1), 1)
    assert alerts == list(limits.ALERTS)


# --- the server's door --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "options", "message"),
    [
        ("0.0.0.0", {"keys": False, "plain": True}, "it would answer anybody"),
        ("0.0.0.0", {"keys": True, "plain": False}, "in clear"),
        ("::", {"keys": False, "plain": True}, "it would answer anybody"),
        ("nowhere.invalid", {"keys": True, "plain": True}, "no address"),
    ],
)
def test_what_others_reach_needs_keys_and_tls(host: str, options: dict[str, bool], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run.bind(run.Where(host, 0), **options)


def test_this_machine_alone_needs_neither() -> None:
    with run.bind(run.Where("localhost", 0), keys=False, plain=False) as made_socket:
        port = made_socket.getsockname()[1]
        with pytest.raises(InputError, match="cannot be listened on"):
            run.bind(run.Where("localhost", port), keys=False, plain=False)
    with run.bind(run.Where("0.0.0.0", 0), keys=True, plain=True):
        pass


def test_log_lines_are_json(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import logging

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        run.log_lines()
        AuditLog().write("asked", "answered", role="client", address="alice", detail={"charged": 3})
        logging.getLogger("sliplm.serving").error("no %s", "luck")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.getLogger("sliplm").setLevel(logging.NOTSET)
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert (first["event"], first["detail"]["charged"], first["level"]) == ("asked", 3, "info")
    assert second["message"] == "no luck"
