"""`slip clients`, `slip audit` and what `slip serve` refuses before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sliplm.cli import audit, clients, serve
from sliplm.errors import InputError
from sliplm.parties.audit import AuditLog


def test_a_client_comes_and_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clients.add(tmp_path, "alice", minute=1000, logprobs=2, json=True)
    key = json.loads(capsys.readouterr().out)["key"]
    clients.list_clients(tmp_path)
    shown = capsys.readouterr().out
    assert "alice" in shown and "1,000" in shown and "logprobs 2" in shown and "good" in shown
    clients.revoke(tmp_path, "alice", json=True)
    capsys.readouterr()
    clients.list_clients(tmp_path, json=True)
    said = capsys.readouterr().out
    [alice] = json.loads(said)["clients"]
    assert alice["revoked"]
    assert key not in said and "sha256" not in said


def test_a_record_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file)
    log.write("lost", "gone", role="worker", address="a")
    noted = log.head
    log.write("rejoined", "back", role="worker", address="a")
    audit.check(file, noted, json=True)
    assert json.loads(capsys.readouterr().out)["lines"] == 2
    audit.check(file)
    assert log.head in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(InputError, match="no line whose hash"):
        audit.check(file, "f" * 64)
    file.write_text(file.read_text().replace("gone", "here"))
    with pytest.raises(InputError, match="line 1 does not follow"):
        audit.check(file)
    with pytest.raises(InputError, match="cannot be read"):
        audit.check(tmp_path / "nothing")


@pytest.mark.parametrize("listen", ["8000", "host:", "host:x", ":1", "host:70000"])
def test_addresses_that_are_none(listen: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        serve._host_port(listen)


def test_addresses() -> None:
    assert serve._host_port("[::1]:8000") == ("::1", 8000)
    assert serve._host_port("localhost:0") == ("localhost", 0)
