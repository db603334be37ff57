"""Rows "dealers": who deals a mask never sees its message, whatever the network and the dealers do."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ledger import Ledger, size
from sliplm.errors import CredentialError, MismatchError, WorkerUnavailable
from sliplm.masks.anchor import FileAnchor
from sliplm.masks.pool import DiskPool
from sliplm.masks.poolfolder import PoolWriter
from sliplm.network import authority
from sliplm.network.keys import Identity, load_certificate
from sliplm.network.transport import Connection
from sliplm.parties.audit import AuditLog
from sliplm.parties.codec import GroupCodec
from sliplm.parties.dealer import Dealing, ShareDealer
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.quarantine import Quarantine
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.workforce import Role, Workforce
from sliplm.protocol.worker_side import Deal, Multiply, Several, WorkerSide
from test_vault import Logging, Shares, folder, group, inputs, serving, shares
from test_workforce import eventually, serving_tls

__all__ = ["folder", "group", "shares"]


class Keeping(Logging):
    """Keeps every batch key that it is shown, and deals wrongly once it has turned."""

    turned = False

    def __init__(self, shares: Shares) -> None:
        super().__init__(shares[1])
        self.keys: list[bytes] = []

    def _check_asked(self, event: Multiply | Several | Deal) -> None:
        if isinstance(event, Deal):
            self.keys.append(event.key)
        super()._check_asked(event)

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        if self.turned and isinstance(asked, Deal):
            u = np.ones((asked.rows, self._shapes[asked.group][0]), np.uint32)
            connection.send(side.product(1), u.data, deadline=time.monotonic() + 5)
        else:
            super()._answer(connection, side, asked)


def test_a_redirected_dealer_gets_no_key(shares: Shares, tmp_path: Path, ledger: Ledger) -> None:
    """The dealer's address leads to a worker's certificate, and a worker's to a dealer's."""
    keys = tmp_path / "keys"
    authority.init(keys)
    authority.issue(keys, "worker", "second")
    worker, stranger, dealer = Logging(shares[1]), Keeping(shares), Keeping(shares)
    refused = 0
    with (
        serving_tls(worker, keys / "worker", tmp_path) as first,
        serving_tls(stranger, keys / "second", tmp_path) as at,
        serving_tls(dealer, keys / "dealer", tmp_path) as deals,
    ):
        for terms in (
            Terms([first], dealers=[at], ahead=0),
            Terms([deals], shares[1], ahead=0),
            Terms([deals], dealers=[first], ahead=0),
        ):
            try:
                Vault(shares[0], terms)
            except CredentialError:
                refused += 1
    leaked = len(stranger.keys) + len(dealer.keys) + len(dealer.messages)
    ledger.record("dealers: an address leads to another role", 3, refused, leaked, "no key, no message sent")
    assert (refused, leaked) == (3, 0)


def test_no_key_goes_to_two_dealers_and_a_liars_masks_are_dropped(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliplm.parties.standing._PATIENCE", 1e9)  # nobody is tried for the sake of measuring
    keys, audit = tmp_path / "keys", tmp_path / "audit.jsonl"
    authority.init(keys)
    authority.issue(keys, "dealer", "dealer-2")
    worker, liar, honest = Logging(shares[1]), Keeping(shares), Keeping(shares)
    x, local = inputs(shares, group, 4), LocalProducts(*shares)
    with (
        serving_tls(worker, keys / "worker", tmp_path) as first,
        serving_tls(liar, keys / "dealer", tmp_path) as one,
        serving_tls(honest, keys / "dealer-2", tmp_path) as two,
        Vault(shares[0], Terms([first], dealers=[one, two], ahead=0, audit=audit)) as vault,
    ):
        vault.deal(8, [group])
        assert len(liar.keys) == 1 and not honest.keys
        liar.turned = True
        vault.deal(8, [group])  # the lie is seen; the other deals under a key of its own
        held = vault._supply.memory.available(vault._index[group])
        for _ in range(4):
            assert np.array_equal(vault.product(group, x), local.product(group, x))
    events = [json.loads(line) for line in audit.read_text().splitlines()]
    dropped = [event for event in events if event["event"] == "masks dropped"]
    shared = set(liar.keys) & set(honest.keys)
    ledger.record(
        "dealers: one lies, another deals", 2, len(dropped) + (held == 8), len(shared), "fresh keys"
    )
    assert (held, len(dropped), shared) == (8, 1, set())


TWO = """
import sys, threading
from sliplm.parties.worker import Worker
from sliplm.shares.share import open_worker
share = open_worker(sys.argv[1])
for role, path in (("dealer", sys.argv[2]), ("worker", sys.argv[3])):
    ready = threading.Event()
    serve = Worker(share, threads=1, role=role).serve
    asked = f"unix:{path}", None, lambda _, ready=ready: ready.set()
    threading.Thread(target=serve, args=asked, daemon=True).start()
    ready.wait(60)
print("listening", flush=True)
sys.stdin.read()
"""


def test_one_process_never_deals_and_multiplies(
    folder: Path, shares: Shares, group: str, tmp_path: Path, ledger: Ledger
) -> None:
    """A real process with a socket for each role: by every name, and after the dealer hung up."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    command = [sys.executable, "-c", TWO, *map(str, (folder / "worker", tmp_path / "a/d", tmp_path / "a/w"))]
    ways, refused = ("a", "a/../a", "link"), 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process, serving(Logging(shares[1]), tmp_path / "w") as honest:
        try:
            assert process.stdout is not None and b"listening" in process.stdout.readline()
            for way in ways:
                deals, works = f"unix:{tmp_path}/{way}/d", f"unix:{tmp_path}/{way}/w"
                for wrong, terms in (
                    (MismatchError, Terms([deals], shares[1], ahead=0)),  # its own word
                    (MismatchError, Terms([honest], dealers=[works], ahead=0)),
                    (CredentialError, Terms([works], dealers=[deals], ahead=0)),  # the process behind it
                ):
                    with pytest.raises(wrong):
                        Vault(shares[0], terms)
                    refused += 1
            with Vault(shares[0], Terms([honest, works], dealers=[deals], ahead=0)) as vault:
                vault.deal(2, [group])
                for link in vault._dealers.links:  # type: ignore[union-attr]
                    link.rest(WorkerUnavailable, "it hung up")
                with pytest.raises(CredentialError, match="who deals a mask"):
                    vault._workers.links[1].open()
                refused += 1
        finally:
            process.communicate(timeout=60)
    tries = 3 * len(ways) + 1
    ledger.record("dealers: one process as both", tries, refused, tries - refused, "every name of its socket")
    assert refused == tries


class Relay(threading.Thread):
    """A network that leads each new connection to the next of several places, and keeps to the last."""

    def __init__(self, *places: str) -> None:
        super().__init__(daemon=True)
        self.places = [place.partition("?")[0].rpartition(":") for place in places]
        self.keys = places[0].partition("?")[2]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}?{self.keys}"
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                host, _, port = self.places.pop(0) if len(self.places) > 1 else self.places[0]
                far = socket.create_connection((host, int(port)))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self.pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def pass_on(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
        one.close()  # the other end is its own thread's to close


class Leaving(Keeping):
    """Takes the key, and hangs up before it deals, after so many answers."""

    answers = 0

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        if self.answers:
            self.answers -= 1
            super()._answer(connection, side, asked)
        else:
            connection.abort()


@pytest.mark.parametrize("answers", [0, 1])
def test_no_key_goes_on_when_the_address_leads_elsewhere(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """A dealer hangs up in a batch, in its first frame or a later one, and another is found there."""
    monkeypatch.setattr("sliplm.protocol.side.FRAME_BYTES", 4096)
    keys = tmp_path / "keys"
    authority.init(keys)
    authority.issue(keys, "dealer", "dealer-2")
    worker, leaving, other = Logging(shares[1]), Leaving(shares), Keeping(shares)
    leaving.answers = answers
    x = inputs(shares, group, 50)
    with (
        serving_tls(worker, keys / "worker", tmp_path) as first,
        serving_tls(leaving, keys / "dealer", tmp_path) as one,
        serving_tls(other, keys / "dealer-2", tmp_path) as two,
    ):
        relay = Relay(one, two)
        try:
            with Vault(shares[0], Terms([first], dealers=[relay.address], ahead=0, timeout=10)) as vault:
                vault.deal(50, [group])
                assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))
        finally:
            relay.listener.close()
    shared = set(leaving.keys) & set(other.keys)
    ledger.record(
        f"dealers: one takes over in frame {answers}", 1, 1 - len(shared), len(shared), "fresh keys"
    )
    assert leaving.keys and other.keys and not shared


def test_a_liars_pool_is_not_used_by_a_later_vault(shares: Shares, tmp_path: Path, ledger: Ledger) -> None:
    """Quarantine is by key, and a batch on disk knows the key of who dealt it."""
    vault, names = shares[0], list(shares[0].groups)
    shapes = [(secrets.m, secrets.n) for secrets in vault.groups.values()]
    keys, quarantine = tmp_path / "keys", Quarantine(tmp_path / "quarantine.json")
    anchor, pool = FileAnchor(tmp_path / "anchors"), tmp_path / "pool"
    authority.init(keys)
    mark = Identity.of(load_certificate(keys / "dealer" / "certificate.pem")).spki
    with PoolWriter(pool, vault.pool_name, vault.pool_key, shapes, anchor) as writer:
        here = Dealing(
            [GroupCodec(secrets) for secrets in vault.groups.values()], ShareDealer(shares[1]), None
        )
        for i in range(len(names)):
            writer.add(i, 2, here.products)
            writer.add(i, 3, lambda group, fresh: here.products(group, fresh)._replace(marks=(mark,)))
    quarantine.add("dealer.example:7402", mark, "dealer", "its product is wrong")
    audit = tmp_path / "audit.jsonl"
    with serving_tls(Logging(shares[1]), keys / "worker", tmp_path) as first:
        disk = DiskPool(pool, vault.pool_name, vault.pool_key, shapes, anchor)
        terms = Terms([first], pool=disk, quarantine=quarantine, audit=audit)
        with Vault(vault, terms):
            left = [disk.available(i) for i in range(len(names))]
    dropped = [line for line in audit.read_text().splitlines() if '"masks dropped"' in line]
    ledger.record(
        "dealers: a pool of one caught before", len(names), left.count(2), sum(left) - 2 * len(names)
    )
    assert left == [2] * len(names) and len(dropped) == 1


def test_a_later_vault_drops_what_a_revoked_dealer_dealt(
    shares: Shares, tmp_path: Path, ledger: Ledger
) -> None:
    """By the number of his certificate, which the signed list names; also after he has a new one."""
    vault, names = shares[0], list(shares[0].groups)
    shapes = [(secrets.m, secrets.n) for secrets in vault.groups.values()]
    keys, audit = tmp_path / "keys", tmp_path / "audit.jsonl"
    authority.init(keys)
    authority.issue(keys, "dealer", "dealer-2")
    codecs = [GroupCodec(secrets) for secrets in vault.groups.values()]
    anchor, pool = FileAnchor(tmp_path / "anchors"), tmp_path / "pool"
    old = Identity.of(load_certificate(keys / "dealer" / "certificate.pem"))
    with (
        PoolWriter(pool, vault.pool_name, vault.pool_key, shapes, anchor) as writer,
        serving_tls(Logging(shares[1]), keys / "dealer", tmp_path) as one,
        serving_tls(Logging(shares[1]), keys / "dealer-2", tmp_path) as two,
    ):
        for address, rows in ((one, 3), (two, 2)):
            with contextlib.closing(
                Workforce.of([address], "dealer", vault.split_id, shapes, 60, AuditLog())
            ) as others:
                for i in range(len(names)):
                    writer.add(i, rows, Dealing(codecs, None, others).products)

    def left() -> list[int]:
        with serving_tls(Logging(shares[1]), keys / "worker", tmp_path) as first:
            disk = DiskPool(pool, vault.pool_name, vault.pool_key, shapes, anchor)
            with Vault(vault, Terms([first], pool=disk, audit=audit)):
                return [disk.available(i) for i in range(len(names))]

    before = left()
    authority.rotate(keys, "dealer")
    after = left()
    events = [json.loads(line) for line in audit.read_text().splitlines()]
    dropped = [event["reason"] for event in events if event["event"] == "masks dropped"]
    ledger.record(
        "dealers: a pool of one revoked since", len(names), after.count(2), sum(after) - 2 * len(names)
    )
    assert (before, after) == ([5] * len(names), [2] * len(names))
    assert len(dropped) == 1 and f"serial {old.serial:x}" in dropped[0]


def test_a_running_vault_drops_the_masks_of_one_revoked_who_has_left(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger
) -> None:
    """In memory and on disk, also while no connection to him is there, and what comes later."""
    vault = shares[0]
    shapes = [(secrets.m, secrets.n) for secrets in vault.groups.values()]
    keys, audit = tmp_path / "keys", tmp_path / "audit.jsonl"
    authority.init(keys)
    codecs = [GroupCodec(secrets) for secrets in vault.groups.values()]
    anchor, pool = FileAnchor(tmp_path / "anchors"), tmp_path / "pool"
    own = Identity.of(load_certificate(keys / "dealer" / "certificate.pem"))
    here = Dealing(codecs, ShareDealer(shares[1]), None)

    def deal(rows: int) -> None:
        with PoolWriter(pool, vault.pool_name, vault.pool_key, shapes, anchor) as writer:
            for i in range(len(shapes)):
                writer.add(
                    i,
                    rows,
                    lambda group, fresh: here.products(group, fresh)._replace(marks=(own.spki, own.mark)),
                )

    deal(4)
    with (
        serving_tls(Logging(shares[1]), keys / "worker", tmp_path) as first,
        serving_tls(Logging(shares[1]), keys / "dealer", tmp_path) as deals,
    ):
        disk = DiskPool(pool, vault.pool_name, vault.pool_key, shapes, anchor)
        with Vault(vault, Terms([first], dealers=[deals], pool=disk, ahead=0, audit=audit)) as running:
            running.deal(6, [group])
            index = running._index[group]
            held = running._supply.memory.available(index), disk.available(index)
            assert running._dealers is not None
            running._dealers.links[0].rest(WorkerUnavailable, "it hung up")
            authority.revoke(keys, "dealer")
            eventually(lambda: not running._supply.memory.available(index) and not disk.available(index))
            deal(5)
            eventually(lambda: own.mark in disk.dealers())
            later = [disk.available(i) for i in range(len(shapes))]
    ledger.record(
        "dealers: one revoked after he has left", 3, 3 - any(later), sum(later), "memory, disk, later"
    )
    assert held == (6, 4) and not any(later)


class Waiting(Keeping):
    """Greets when all of them have been asked to, and hangs up on its first key."""

    together = threading.Barrier(2)
    left = False

    def _greet(self, connection: Connection, *rest: object) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.together.wait(2)
        super()._greet(connection, *rest)  # type: ignore[arg-type]

    def _check_asked(self, event: Multiply | Several | Deal) -> None:
        super()._check_asked(event)
        if isinstance(event, Deal) and not self.left:
            self.left = True
            raise WorkerUnavailable("it leaves")


def test_two_dealers_that_greet_at_once_share_no_key(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Threads deal with both at a time while both greet, break and greet again: no key twice, all end."""
    keys = tmp_path / "keys"
    authority.init(keys)
    authority.issue(keys, "dealer", "dealer-2")
    dealers = [Waiting(shares), Waiting(shares)]
    x, local = inputs(shares, group, 40), LocalProducts(*shares)
    failed: list[BaseException] = []
    with (
        serving_tls(Logging(shares[1]), keys / "worker", tmp_path) as first,
        serving_tls(dealers[0], keys / "dealer", tmp_path) as one,
        serving_tls(dealers[1], keys / "dealer-2", tmp_path) as two,
        Vault(shares[0], Terms([first], dealers=[one, two], ahead=0)) as vault,
    ):

        def deal() -> None:
            try:
                for _ in range(5):
                    vault.deal(2, [group])
            except BaseException as error:  # shown below
                failed.append(error)

        threads = [threading.Thread(target=deal, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        hanging = sum(thread.is_alive() for thread in threads)
        assert np.array_equal(vault.product(group, x), local.product(group, x))
    shared = set(dealers[0].keys) & set(dealers[1].keys)
    ledger.record(
        "dealers: two greet at once", len(threads), len(threads) - hanging, len(shared), "no key to both"
    )
    assert not hanging and not failed and not shared
    assert all(dealer.keys for dealer in dealers)


def test_a_worker_and_a_dealer_of_one_process_that_greet_at_once(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Whichever is first, the second sees it: never both."""
    tries, both, hung = size(20, 400), 0, 0
    with serving(Logging(shares[1]), tmp_path / "h") as honest:
        with Vault(shares[0], Terms([honest], shares[1], ahead=0)) as vault:
            for i in range(tries):
                mark = i.to_bytes(32, "big")
                ends = [
                    Connection(end, "pair")
                    for pair in (socket.socketpair(), socket.socketpair())
                    for end in pair
                ]
                passed: list[str] = []
                start = threading.Barrier(2)

                def greet(role: Role, connection: Connection, mark: bytes = mark) -> None:
                    connection.mark, connection.marks = mark, (mark,)
                    start.wait(60)  # noqa: B023
                    with contextlib.suppress(CredentialError):
                        vault._check_apart(role, vault._workers.links[0], connection)
                        passed.append(role)  # noqa: B023

                threads = [
                    threading.Thread(target=greet, args=(role, end), daemon=True)
                    for role, end in (("worker", ends[0]), ("dealer", ends[2]))
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                hung += sum(thread.is_alive() for thread in threads)
                both += len(passed) != 1
                for end in ends:
                    end.close()
    ledger.record("dealers: one key greets as both at once", tries, tries - both, both)
    assert (both, hung) == (0, 0)


def slip_deal(folder: Path, dealer: str, audit: Path, state: Path) -> subprocess.CompletedProcess[str]:
    """`slip deal` in a process of its own."""
    words = [folder / "vault", audit.parent / "pool", "--tokens", "3", "--dealer", dealer, "--audit", audit]
    return subprocess.run(
        [sys.executable, "-m", "sliplm", "deal", *map(str, words)],
        env=os.environ | {"SLIPLM_STATE": str(state)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def test_slip_deal_refuses_who_lied_to_an_earlier_process(
    folder: Path, shares: Shares, tmp_path: Path, ledger: Ledger
) -> None:
    """At his address and at another one; and it says in the record who dealt, and who was refused."""
    keys, state, audit = tmp_path / "keys", tmp_path / "state", tmp_path / "audit.jsonl"
    authority.init(keys)
    liar, again = Keeping(shares), Keeping(shares)
    liar.turned = True
    with serving_tls(liar, keys / "dealer", tmp_path) as address:
        caught = slip_deal(folder, address, audit, state)
        asked, liar.turned = len(liar.keys), False
        later = slip_deal(folder, address, audit, state)
        refused = len(liar.keys) == asked
    with serving_tls(again, keys / "dealer", tmp_path) as elsewhere:
        moved = slip_deal(folder, elsewhere, audit, state)
        shown = len(again.keys) + len(list(tmp_path.rglob("*.masks")))
        Quarantine(state / "quarantine.json").clear(address)
        honest = slip_deal(folder, elsewhere, audit, state)
    events = [json.loads(line) for line in audit.read_text().splitlines()]
    found = refused + (moved.returncode != 0)
    ledger.record("dealers: `slip deal` and one who lied before", 2, found, shown, "by address and key")
    assert (caught.returncode, later.returncode, moved.returncode) == (2, 2, 2), caught.stderr
    assert "is wrong" in caught.stderr and "slip quarantine clear" in later.stderr + moved.stderr
    assert refused and not shown and honest.returncode == 0, honest.stderr
    assert [event["event"] for event in events] == ["quarantined", "quarantined", "quarantined", "dealt"]
    assert all("dealer, serial" in event["peer"] for event in (events[0], events[2], events[3]))
    assert events[3]["address"] == elsewhere and events[3]["reason"].startswith("27 rows")
