"""Questions and answers in memory of a card that the vault lends: interpreted, or real."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sliplm
from fakelent import FakeMatrix, lend_without_a_card
from families import make
from interpretedcard import KINDS, InterpretedCard, fetched, open_card
from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.errors import CardError, VerificationError, WireError
from sliplm.network.memory import MemoryConnection
from sliplm.network.transport import Connection
from sliplm.parties import lending
from sliplm.parties.card_codec import FEW
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol.worker_side import Multiply, WorkerSide
from sliplm.shares.share import WorkerShare, open_vault, open_worker
from test_card_codec import PATIENCE, UNTOUCHED, Shares, placed

MANY = FEW + 3


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Shares:
    base = tmp_path_factory.mktemp("lent")
    sliplm.split(make("llama", base / "model"), base / "out")
    return open_vault(base / "out" / "vault"), open_worker(base / "out" / "worker")


@pytest.fixture(params=KINDS)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = open_card(request.param, monkeypatch)
    if isinstance(found, InterpretedCard):
        lend_without_a_card(monkeypatch)
    return found


class Borrower(Worker):
    """A worker on the card, which changes what it has answered there."""

    def __init__(self, share: WorkerShare, card: Any, change: Callable[[int], None] = lambda y: None) -> None:
        interpreted = isinstance(card, InterpretedCard)
        super().__init__(share, threads=1, device="cpu" if interpreted else "cuda")
        if interpreted:
            self._matrices = [FakeMatrix(card, share.matrices[name]) for name in share.names]
        self.change, self.lent, self.all = change, 0, 0

    def _answer(self, connection: Connection, side: WorkerSide, asked: Any) -> None:
        self.all += 1
        super()._answer(connection, side, asked)

    def _answer_lent(self, connection: Connection, side: WorkerSide, asked: Multiply, borrowed: Any) -> None:
        self.all, self.lent = self.all + 1, self.lent + 1
        lending.answer(self._matrices[asked.group], borrowed, asked.rows)
        self.change(borrowed.answers)
        connection.send(side.product(1), deadline=time.monotonic() + 30)


@contextmanager
def lending_to(worker: Worker, path: Path) -> Iterator[str]:
    ready, address = threading.Event(), f"shm:{path}"
    thread = threading.Thread(target=worker.serve, args=(address, None, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(30)
        yield address
    finally:
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_long_questions_stay_on_the_card(card: Any, shares: Shares, tmp_path: Path) -> None:
    """Every group; few rows go by the host as before."""
    worker = Borrower(shares[1], card)
    with (
        lending_to(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        for name in list(shares[0].groups)[:3]:
            there = placed(card, shares, name, MANY)
            vault.product_on_card(name, there.rows, there.out)
            vault.settle()
            want = vault.product(name, there.x)
            assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max(), name
        assert (worker.lent, worker.all) == (3, 6)
        there = placed(card, shares, name, FEW)
        vault.product_on_card(name, there.rows, there.out)
        assert (worker.lent, worker.all) == (3, 7)


def test_nothing_of_a_wrong_answer_is_used(card: Any, shares: Shares, tmp_path: Path) -> None:
    name = next(iter(shares[0].groups))
    m = shares[0].groups[name].m

    def one_more(y: int) -> None:
        last = y + 4 * (MANY * m - 1)
        value = fetched(card, last, (1,), np.uint32)
        put(card, last, np.array([(int(value[0]) + 1) % P], np.uint32))

    with (
        lending_to(Borrower(shares[1], card, one_more), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        there = placed(card, shares, name, MANY)
        with pytest.raises(VerificationError):
            vault.product_on_card(name, there.rows, there.out)
        assert (there.answer() == UNTOUCHED).all()
        assert address in vault.quarantined


def test_what_is_changed_after_the_check_is_never_seen(
    card: Any, shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M68: the claims are copied before they are checked, and only the copy is used."""
    from sliplm.arithmetic.kernels.cuda import vault_steps

    name = next(iter(shares[0].groups))
    check, wiped = vault_steps.Desk.check, []

    def wiping(desk: Any, laid: Any, rows: int, y: int, u: int, e: int) -> None:
        lent = vault._workers.links[0]._lent
        assert lent is not None and not lent.questions <= y < lent.questions + 2 * lent.size
        desk.wait()
        put(card, lent.answers, np.zeros(rows * laid.m, np.uint32))
        wiped.append(rows)
        check(desk, laid, rows, y, u, e)

    monkeypatch.setattr(vault_steps.Desk, "check", wiping)
    with (
        lending_to(Borrower(shares[1], card), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        there = placed(card, shares, name, MANY)
        vault.product_on_card(name, there.rows, there.out)
        vault.settle()
        want = vault.product(name, there.x)
        assert wiped[-1] == MANY  # after the trials of this kind of group on the card
        assert wiped.count(MANY) == 1
        assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max()


def test_a_worker_that_cannot_borrow_is_asked_as_before(
    card: Any, shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its matrices lie on the processor; or its cards cannot reach the memory."""
    name = next(iter(shares[0].groups))

    class Unreachable:
        def __init__(self, *_: object) -> None:
            raise CardError("no way to that card")

    for case, worker in enumerate((Worker(shares[1], threads=1, device="cpu"), Borrower(shares[1], card))):
        if case:
            monkeypatch.setattr(lending, "Borrowed", Unreachable)
        with (
            lending_to(worker, tmp_path / f"w{case}") as address,
            Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
        ):
            there = placed(card, shares, name, MANY)
            vault.product_on_card(name, there.rows, there.out)
            vault.settle()
            want = vault.product(name, there.x)
            assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max()
            assert vault._workers.links[0].borrowed() is None and not vault.quarantined
        if case:
            assert (worker.lent, worker.all) == (0, 2)


def test_memory_is_lent_again_when_the_connection_breaks(card: Any, shares: Shares, tmp_path: Path) -> None:
    name = next(iter(shares[0].groups))
    worker = Borrower(shares[1], card)
    with (
        lending_to(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        for _ in range(2):
            there = placed(card, shares, name, MANY)
            vault.product_on_card(name, there.rows, there.out)
            vault._workers.links[0].cut()
        vault.settle()
        assert worker.lent == 2
        want = vault.product(name, there.x)
        assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max()


def test_a_descriptor_that_never_comes_costs_its_connection_only(
    shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is no memory of a card is declined; none of them stays open in the worker."""
    from sliplm.network.dialling import connect
    from sliplm.protocol.vault_side import Borrowed, VaultSide

    monkeypatch.setattr(lending, "_HANDED_LIMIT", 0.2)
    worker = Worker(shares[1], threads=1, device="cpu")
    shapes = [(group.rows, group.columns) for group in shares[0].manifest.groups]

    def greeted(address: str) -> tuple[Connection, VaultSide]:
        connection, side = connect(address, 30), VaultSide(shares[1].split_id, shapes)
        connection.send(side.hello(bytes(32)), deadline=time.monotonic() + 30)
        connection.receive(side, deadline=time.monotonic() + 30)
        return connection, side

    with lending_to(worker, tmp_path / "w") as address:
        connection, side = greeted(address)
        assert isinstance(connection, MemoryConnection)
        connection.send(side.lend(1 << 20), deadline=time.monotonic() + 30)
        with pytest.raises(sliplm.errors.WorkerError):
            connection.receive(side, deadline=time.monotonic() + 30)
        connection.close()

        connection, side = greeted(address)
        assert isinstance(connection, MemoryConnection)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            handle = os.memfd_create("other")
            connection.hand_over(handle)
            os.close(handle)
            connection.send(side.lend(1 << 20), deadline=time.monotonic() + 30)
            assert connection.receive(side, deadline=time.monotonic() + 30) == Borrowed(False)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        connection.close()

    with pytest.raises(WireError, match="over `shm:` only"):
        lending.borrow(Connection.__new__(Connection), 1, [])


def put(card: Any, address: int, array: np.ndarray) -> None:
    """To a card's memory."""
    if isinstance(card, InterpretedCard):
        from fakecard import at

        at(address, array.shape, np.uint32)[:] = array
    else:
        driver.call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)
        driver.call("cuStreamSynchronize", None)
