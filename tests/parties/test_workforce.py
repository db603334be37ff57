"""Several workers: spread, fail over, suspend, drain, rejoin, revoke; the audit record; padding; none."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sliplm.errors import (
    AttestationError,
    CredentialError,
    InputError,
    MismatchError,
    VerificationError,
    WorkerError,
    WorkerTimeout,
    WorkerUnavailable,
)
from sliplm.network import authority
from sliplm.network.attestation import SoftwareAttester, SoftwareVerifier
from sliplm.network.transport import Connection
from sliplm.parties.audit import AuditLog
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.standing import _SUSPENSIONS
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.workforce import work
from sliplm.protocol.worker_side import Deal, Multiply, WorkerSide
from test_vault import Logging, Rogue, Shares, add, folder, group, inputs, serving, shares  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a fraction of a second, so that nobody waits for them."""
    monkeypatch.setattr("sliplm.parties.standing._PAUSES", (0.1, 0.5))
    monkeypatch.setattr("sliplm.parties.standing._SUSPENSIONS", (0.3, 1.0))


@contextmanager
def serving_tls(worker: Logging, keys: Path, folder: Path) -> Iterator[str]:
    """Serve on loopback with a key folder; the address that a vault takes."""
    found: list[str] = []
    ready = threading.Event()

    def listening(address: str) -> None:
        found.append(address)
        ready.set()

    thread = threading.Thread(target=worker.serve, args=("127.0.0.1:0", keys, listening))
    thread.start()
    try:
        assert ready.wait(30)
        yield f"{found[0]}?keys={folder / 'keys' / 'vault'}"
    finally:
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


def eventually(true: Callable[[], bool], limit: float = 20.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(vault: Vault, address: str) -> str:
    return next(status.state for status in vault.workers if status.address == address)


class Meeting(Logging):
    """Answers when as many exchanges are under way as the barrier asks for."""

    def __init__(self, share: object, barrier: threading.Barrier) -> None:
        super().__init__(share)  # type: ignore[arg-type]
        self.barrier = barrier

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        self.barrier.wait(20)
        super()._answer(connection, side, asked)


class Stalling(Logging):
    """Sleeps over its first question, and is honest ever after."""

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        if isinstance(asked, Multiply) and not self.messages:
            self.messages.append((asked.group, np.frombuffer(asked.payload, np.uint32).copy()))
            time.sleep(1.5)
        super()._answer(connection, side, asked)


def test_requests_spread_over_the_workers(shares: Shares, group: str, tmp_path: Path) -> None:
    """Two requests at a time meet at two workers: each answers only once the other is asked too."""
    barrier = threading.Barrier(2)
    one, two = Meeting(shares[1], barrier), Meeting(shares[1], barrier)
    x = inputs(shares, group)
    expected = LocalProducts(*shares).product(group, x)
    with serving(one, tmp_path / "a") as first, serving(two, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0)) as vault:
            found: list[np.ndarray] = []
            threads = [
                threading.Thread(target=lambda: found.append(vault.product(group, x))) for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert len(found) == 2
            assert all(np.array_equal(y, expected) for y in found)
            assert sorted(status.served for status in vault.workers) == [1, 1]


def test_a_stalled_worker_is_left_alone_and_comes_back(shares: Shares, group: str, tmp_path: Path) -> None:
    slow, good = Stalling(shares[1]), Logging(shares[1])
    x = inputs(shares, group)
    with serving(slow, tmp_path / "a") as first, serving(good, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0, timeout=0.5)) as vault:
            assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))
            assert np.array_equal(slow.messages[0][1], good.messages[0][1].ravel()), "the same message"
            assert vault.counters.retries == 1
            assert vault.counters.seconds_link >= 0.5, "the wait for it is not the vault's own time"
            eventually(lambda: state(vault, first) == "up")
            assert next((r.event, r.address) for r in vault.audit.records if r.role == "worker") == (
                "suspended", first,
            )  # fmt: skip
            vault.drain(second)
            vault.product(group, x)
            assert len(slow.messages) >= 2, "asked again; twice, should it stall in earnest"


def test_pauses_double(shares: Shares, group: str, tmp_path: Path) -> None:
    class Refusing(Logging):
        def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
            time.sleep(1)

    with serving(Refusing(shares[1]), tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=0.3)) as vault:
            member = vault._workers._members[0]
            for strikes in (1, 2):
                eventually(lambda: state(vault, address) == "up")
                with pytest.raises(WorkerTimeout):
                    vault.product(group, inputs(shares, group))
                assert member.strikes == strikes


def test_a_worker_alone_is_looked_for_sooner_but_not_asked_for_ever(
    shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others it rests long; alone, as long as it has left questions unanswered; a look in vain is no
    question, and is not written down.
    """
    monkeypatch.setattr("sliplm.parties.standing._SUSPENSIONS", (1e6, 1e6))
    with (
        serving(Logging(shares[1]), tmp_path / "a") as first,
        serving(Logging(shares[1]), tmp_path / "b") as other,
    ):
        with Vault(shares[0], Terms([first, other], shares[1], ahead=0)) as vault:
            force = vault._workers
            member, link = force._members[0], force.links[0]
            silent = WorkerTimeout("silent", first)
            force.failed(link, silent)
            time.sleep(2)
            assert state(vault, first) == "suspended", "another serves"
            vault.drain(other)
            eventually(lambda: state(vault, first) == "up")
        with Vault(shares[0], Terms([first], shares[1], ahead=0)) as vault:
            force = vault._workers
            member, link = force._members[0], force.links[0]
            monkeypatch.setattr(force, "_start_probe", lambda *_: None)
            for unanswered, most in ((0, 1), (1, 1), (2, 2), (5, 16), (9, 256), (10**6, 300)):
                link.unanswered = unanswered
                force.failed(link, silent)
                now = time.monotonic()
                assert now + most / 2 - 1 < member.soon <= now + most
            strikes, said = member.strikes, len(vault.audit.records)
            for error in (silent, WorkerUnavailable("gone", first), silent):
                member.early = True
                force.failed(link, error, probe=True)
            assert (member.strikes, len(vault.audit.records)) == (strikes, said)


def test_a_lost_worker_is_found_again_without_a_request(shares: Shares, group: str, tmp_path: Path) -> None:
    x = inputs(shares, group)
    with serving(Logging(shares[1]), tmp_path / "b") as second:
        with serving(Logging(shares[1]), tmp_path / "a") as first:
            vault = Vault(shares[0], Terms([first, second], shares[1], ahead=0))
            vault.product(group, x)
        with vault:
            vault.product(group, x)
            assert [status.state for status in vault.workers] == ["lost", "up"]
            with serving(Logging(shares[1]), tmp_path / "a"):
                eventually(lambda: state(vault, first) == "up")
                assert [r.event for r in vault.audit.records if r.address == first][-1] == "rejoined"


def test_drain_and_rejoin(shares: Shares, group: str, tmp_path: Path) -> None:
    one, two = Logging(shares[1]), Logging(shares[1])
    x = inputs(shares, group)
    with serving(one, tmp_path / "a") as first, serving(two, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0)) as vault:
            vault.product(group, x)
            vault.drain(first)
            vault.product(group, x)
            assert (len(one.messages), len(two.messages)) == (1, 1)
            with pytest.raises(InputError, match="no worker of this vault"):
                vault.drain("unix:/nobody")
            vault.drain(second)
            with pytest.raises(WorkerUnavailable, match="no worker serves now"):
                vault.product(group, x)
            vault.rejoin(first)
            vault.product(group, x)
            assert (len(one.messages), len(two.messages)) == (2, 1)
            assert [r.event for r in vault.audit.records if r.event in ("drained", "rejoined")] == [
                "drained", "drained", "rejoined",
            ]  # fmt: skip


def test_draining_lets_the_exchange_under_way_end(shares: Shares, group: str, tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    worker = Meeting(shares[1], barrier)
    x = inputs(shares, group)
    with (
        serving(worker, tmp_path / "a") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        found: list[np.ndarray] = []
        asking = threading.Thread(target=lambda: found.append(vault.product(group, x)))
        asking.start()
        eventually(lambda: barrier.n_waiting == 1)
        draining = threading.Thread(target=vault.drain, args=(address,))
        draining.start()
        barrier.wait(20)
        asking.join(30)
        draining.join(30)
        assert np.array_equal(found[0], LocalProducts(*shares).product(group, x))


def test_a_quarantined_worker_rejoins_by_the_operators_word_alone(
    shares: Shares, group: str, tmp_path: Path
) -> None:
    worker = Rogue(shares[1], add(1))
    with (
        serving(worker, tmp_path / "a") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        with pytest.raises(VerificationError):
            vault.product(group, inputs(shares, group))
        time.sleep(1)  # longer than all pauses
        assert state(vault, address) == "quarantined"
        worker.change = lambda y: y
        vault.rejoin(address)
        vault.product(group, inputs(shares, group))


def test_a_worker_that_drops_every_connection_is_suspended(
    shares: Shares, group: str, tmp_path: Path
) -> None:
    """Each new connection costs all masks that were ready, so it may not go on."""

    class Dropping(Logging):
        def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
            super()._answer(connection, side, asked)
            connection.close()

    with serving(Dropping(shares[1]), tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
            with pytest.raises(WorkerError, match="again and again"):
                deque(vault.product(group, inputs(shares, group, 1)) for _ in range(20))
            assert 3 <= vault.counters.exchanges < 10
            assert state(vault, address) == "suspended"


def test_a_revoked_worker_is_cut_off_within_a_second(shares: Shares, group: str, tmp_path: Path) -> None:
    """The one wait that is promised: from the list's arrival to the end of the live connection."""
    authority.init(tmp_path / "keys")
    authority.issue(tmp_path / "keys", "worker", "worker-2")
    shutil.copytree(tmp_path / "keys" / "worker", tmp_path / "kept")  # it does not want to know
    one, two = Logging(shares[1]), Logging(shares[1])
    x = inputs(shares, group)
    with (
        serving_tls(one, tmp_path / "kept", tmp_path) as first,
        serving_tls(two, tmp_path / "keys" / "worker-2", tmp_path) as second,
    ):
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0)) as vault:
            vault.product(group, x)
            connection = vault._workers.links[0].connection
            assert connection is not None
            authority.revoke(tmp_path / "keys", "worker")
            arrived = time.monotonic()
            eventually(lambda: state(vault, first) == "quarantined")
            assert time.monotonic() - arrived < 1.0
            assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))
            assert (len(one.messages), len(two.messages)) == (1, 1)
            (record,) = [record for record in vault.audit.records if record.event == "revoked"]
            assert (record.address, record.role) == (first, "worker")
            assert record.peer is not None and record.peer.startswith("worker, serial ")
            with pytest.raises(CredentialError, match="revoked"):
                vault.rejoin(first)


def test_a_workers_certificate_deals_nothing(shares: Shares, group: str, tmp_path: Path) -> None:
    """Whoever redirects the dealer's address to a worker gets no key of a batch, and stands in the audit."""
    authority.init(tmp_path / "keys")
    authority.issue(tmp_path / "keys", "worker", "second")
    one, two = Logging(shares[1]), Logging(shares[1])
    asked: list[object] = []
    two._check_asked = asked.append  # type: ignore[method-assign]
    keys, audit = tmp_path / "keys", tmp_path / "audit.jsonl"
    with (
        serving_tls(one, keys / "worker", tmp_path) as first,
        serving_tls(two, keys / "second", tmp_path) as at,
    ):
        with pytest.raises(CredentialError, match="is not a dealer's"):
            Vault(shares[0], Terms([first], dealers=[at], ahead=0, audit=audit))
    assert asked == []
    assert '"dealer"' in audit.read_text() and "worker second, serial" in audit.read_text()


def test_a_dealer_multiplies_nothing(shares: Shares, tmp_path: Path) -> None:
    """Its certificate is no worker's; on a Unix socket its own word counts, and the other way round."""
    authority.init(tmp_path / "keys")
    dealer = Logging(shares[1])
    with serving_tls(dealer, tmp_path / "keys" / "dealer", tmp_path) as at:
        with pytest.raises(CredentialError, match="is not a worker's"):
            Vault(shares[0], Terms([at], shares[1], ahead=0))
    dealer, worker = Logging(shares[1]), Logging(shares[1])
    dealer._wanted = "dealer"
    with serving(dealer, tmp_path / "d") as at, serving(worker, tmp_path / "w") as first:
        with pytest.raises(MismatchError, match="this is a dealer"):
            Vault(shares[0], Terms([at], shares[1], ahead=0))
        with pytest.raises(MismatchError, match="this is a worker"):
            Vault(shares[0], Terms([first], dealers=[f"unix:{tmp_path}/./w"], ahead=0))
    assert dealer.messages == worker.messages == []


@pytest.mark.parametrize("good", [True, False])
def test_evidence_is_judged_by_both_sides(shares: Shares, group: str, tmp_path: Path, good: bool) -> None:
    ours, theirs = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    worker = Logging(shares[1])
    worker._attester = SoftwareAttester(theirs, b"worker 1")
    worker._verifier = SoftwareVerifier(ours.public_key(), [b"vault 1"])
    means: Any = {
        "attester": SoftwareAttester(ours, b"vault 1" if good else b"vault 0"),
        "verifier": SoftwareVerifier(theirs.public_key(), [b"worker 1"]),
    }
    with serving(worker, tmp_path / "w") as address:
        if good:
            with Vault(shares[0], Terms([address], shares[1], ahead=0, **means)) as vault:
                vault.product(group, inputs(shares, group))
        else:
            with pytest.raises(AttestationError, match=r"refuses \(evidence\)"):
                Vault(shares[0], Terms([address], shares[1], ahead=0, **means))
        with pytest.raises(AttestationError, match="nobody here can judge"):
            Vault(shares[0], Terms([address], shares[1], ahead=0))
    assert len(worker.messages) == good


# --- no worker -----------------------------------------------------------------------------------------


def test_the_vault_computes_itself_if_the_owner_says_so(
    shares: Shares, group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = inputs(shares, group, 20)
    with serving(Rogue(shares[1], add(1)), tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0, fallback="here")) as vault:
            for _ in range(2):
                assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))
            assert vault.counters.rows_here == 40
            assert [record.event for record in vault.audit.records] == ["quarantined", "computed here"]
    assert "computed here: slowly" in caplog.text
    with pytest.raises(InputError, match="fallback"):
        Terms(["unix:/x"], shares[1], fallback="pray")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="worker share"):
        Terms(["unix:/x"], dealers=["unix:/y"], fallback="here")


# --- padding -------------------------------------------------------------------------------------------


def test_prompts_are_padded(shares: Shares, group: str, tmp_path: Path) -> None:
    worker = Logging(shares[1])
    local = LocalProducts(*shares)
    with serving(worker, tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0, pad_to=16)) as vault:
            for rows in (1, 2, 15, 16, 17, 33):
                x = inputs(shares, group, rows, seed=rows)
                assert np.array_equal(vault.product(group, x), local.product(group, x))
    assert [len(message) for _, message in worker.messages] == [1, 16, 16, 16, 32, 48]
    with pytest.raises(InputError, match="pad_to"):
        Terms(["unix:/x"], shares[1], pad_to=0)


# --- the audit record -----------------------------------------------------------------------------------


def test_the_audit_file(shares: Shares, group: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with serving(Rogue(shares[1], add(1)), tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0, audit=path)) as vault:
            with pytest.raises(VerificationError):
                vault.product(group, inputs(shares, group))
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["event"] == "quarantined" and record["address"] == address and record["group"] == group
    assert record["time"].endswith("+00:00")
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_audit_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="audit file"):
        AuditLog(tmp_path / "nobody" / "audit.jsonl")
    (tmp_path / "here").mkdir()
    log = AuditLog(tmp_path / "here" / "audit.jsonl")
    (tmp_path / "here" / "audit.jsonl").unlink()
    (tmp_path / "here").rmdir()
    log.write("lost", "gone", address="unix:/x")  # a request does not fail for the record's sake
    assert "cannot be written" in caplog.text
    assert log.records[0].reason == "gone"


def test_suspensions_are_long_outside_of_these_tests() -> None:
    assert _SUSPENSIONS == (5.0, 300.0)


class Paced(Logging):
    """Honest, and as slow as it is told."""

    def __init__(self, share: object, pause: float) -> None:
        super().__init__(share)  # type: ignore[arg-type]
        self.pause = pause

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        time.sleep(self.pause)
        super()._answer(connection, side, asked)


def test_a_slow_worker_is_not_asked_for_ever(
    shares: Shares, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that answers within the limit, and one that answers at once: whichever was named first."""
    slow, fast = Paced(shares[1], 2.0), Paced(shares[1], 0)
    x = inputs(shares, group)
    with serving(slow, tmp_path / "a") as first, serving(fast, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0)) as vault:
            for _ in range(10):
                vault.product(group, x)
            assert (len(slow.messages), len(fast.messages)) == (1, 9)
            slow.pause = 0.0
            monkeypatch.setattr("sliplm.parties.standing._ANEW", (0.0, 0.0))
            member = vault._workers._members[0]
            member.again = 0.0
            vault.product(group, x)
            assert len(slow.messages) == 2, "it is tried again in the end"
            assert member.pace is not None
            assert member.pace * work([(1, 1, 1)]) < 1.0, "and found to be fast"


def test_nothing_is_over_after_a_month(shares: Shares, tmp_path: Path) -> None:
    """A worker that stays away for 10,000 probes is still one that may come back."""
    good = Logging(shares[1])
    with serving(good, tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
            link = vault._workers.links[0]
            for kind in (WorkerUnavailable, WorkerTimeout):
                for _ in range(10_000):
                    vault._workers.failed(link, kind("gone", address))
                member = vault._workers._members[0]
                assert member.until - time.monotonic() <= 1.0
                assert len(vault.audit.records) <= 1000
            eventually(lambda: state(vault, address) == "up")


@pytest.mark.parametrize("before", ["lost", "suspended"])
def test_no_probe_brings_back_a_quarantined_worker(
    shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """It is convicted while the probe greets it, and before the probe begins."""
    good = Logging(shares[1])
    with serving(good, tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
            force = vault._workers
            member, link = force._members[0], force.links[0]
            lie = VerificationError("a lie", address)
            trouble = WorkerUnavailable if before == "lost" else WorkerTimeout
            greeting = link.open

            def meanwhile() -> None:
                greeting()
                force.failed(link, lie)

            monkeypatch.setattr("sliplm.parties.standing._PAUSES", (1e6, 1e6))
            monkeypatch.setattr("sliplm.parties.standing._SUSPENSIONS", (1e6, 1e6))
            monkeypatch.setattr("sliplm.parties.standing._ALONE", (1e6, 1e6))
            force.failed(link, trouble("gone", address))
            assert member.state == before
            monkeypatch.setattr(link, "open", meanwhile)
            force._probe(member)
            assert member.state == "quarantined"
            monkeypatch.setattr(link, "open", greeting)
            force._probe(member)  # found due before, begun after
            assert member.state == "quarantined"
            assert link.barred is not None, "its bar stays"
            with pytest.raises(VerificationError):
                link.open()
            assert "rejoined" not in [record.event for record in vault.audit.records]


def test_who_is_refused_in_greeting_is_named_with_its_certificate(
    shares: Shares, folder: Path, tmp_path: Path
) -> None:
    """M17: it showed a certificate, and then not the evidence that is asked for."""
    root = tmp_path / "tls"
    authority.init(root / "keys")
    judge = SoftwareVerifier(Ed25519PrivateKey.generate().public_key(), [b"worker 1"])
    with serving_tls(Logging(shares[1]), root / "keys" / "worker", root) as address:
        audit = tmp_path / "audit"
        with pytest.raises(AttestationError):
            Vault(shares[0], Terms([address], shares[1], ahead=0, audit=audit, verifier=judge))
        record = json.loads(audit.read_text().splitlines()[0])
        assert record["event"] == "quarantined"
        assert record["peer"] is not None
        assert "sha256" in record["peer"]


def test_an_exchange_of_many_groups_has_one_trip() -> None:
    """A layer's 128 experts are asked in one message: counted as so many trips, whoever serves them looked
    fast, and the next plain request came to the slow one.
    """
    one, trip = (64, 64, 1), work([])
    assert trip > 0
    assert work([one] * 128) - trip == 128 * (work([one]) - trip)


@pytest.mark.parametrize("role", ["worker", "dealer"])
def test_an_address_without_keys_is_refused_before_anything_begins(shares: Shares, role: str) -> None:
    """It is our mistake: nobody is quarantined for it, and no thread stays behind."""
    before = threading.active_count()
    bare = ["worker.example:7400"]
    terms = {
        "worker": Terms(bare, shares[1], ahead=0),
        "dealer": Terms(["unix:/nobody"], None, ahead=0, dealers=bare),
    }
    with pytest.raises(CredentialError, match=r"without keys: write worker.example:7400\?keys="):
        Vault(shares[0], terms[role])
    assert threading.active_count() == before
