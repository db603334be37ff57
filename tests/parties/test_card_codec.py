"""A vault whose activations lie on a card, against honest and wrong workers: interpreted, or real."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sliplm
from families import make
from interpretedcard import KINDS, fetched, open_card
from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.vault_steps import CardRows
from sliplm.errors import CardError, InputError, PrecisionError, VerificationError
from sliplm.network.transport import Connection
from sliplm.parties import card_trial
from sliplm.parties.card_codec import FEW, CardCodec
from sliplm.parties.codec import GroupCodec
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol.worker_side import Deal, Multiply, WorkerSide
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker

Shares = tuple[VaultShare, WorkerShare]
PATIENCE = 300.0  # seconds for an answer: an interpreter makes what is done meanwhile
UNTOUCHED = np.float32(1234.5)


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Shares:
    base = tmp_path_factory.mktemp("card")
    sliplm.split(make("llama", base / "model"), base / "out")
    return open_vault(base / "out" / "vault"), open_worker(base / "out" / "worker")


@pytest.fixture(params=KINDS)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return open_card(request.param, monkeypatch)


class Changing(Worker):
    """A worker that changes what it answers, and remembers what it was asked."""

    def __init__(self, share: WorkerShare, change: Callable[[np.ndarray], np.ndarray] = lambda y: y) -> None:
        super().__init__(share, threads=1, device="cpu")
        self.change, self.messages = change, list[bytes]()

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        assert isinstance(asked, Multiply)
        x = np.frombuffer(asked.payload, np.uint32).reshape(asked.rows, -1).copy()
        self.messages.append(x.tobytes())
        y = np.ascontiguousarray(self.change(self._matrices[asked.group].product(x)))
        connection.send(side.product(1), memoryview(y), deadline=time.monotonic() + 5)


@contextmanager
def serving(worker: Worker, path: Path) -> Iterator[str]:
    ready, address = threading.Event(), f"unix:{path}"
    thread = threading.Thread(target=worker.serve, args=(address, None, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(30)
        yield address
    finally:
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


class Placed:
    """An input and room for an answer on the card."""

    def __init__(self, card: Any, x: np.ndarray, m: int) -> None:
        self.card, self.x, self.m = card, x, m
        self._memory = [driver.Memory(x.nbytes), driver.Memory(4 * len(x) * m)]
        self._memory[0].write(0, x)
        self._memory[1].write(0, np.full((len(x), m), UNTOUCHED, np.float32))
        self.rows = CardRows(card, 0, self._memory[0].address, *x.shape, "float32")
        self.out = CardRows(card, 0, self._memory[1].address, len(x), m, "float32")

    def answer(self) -> np.ndarray:
        return fetched(self.card, self.out.address, (len(self.x), self.m), np.float32)


def placed(card: Any, shares: Shares, group: str, rows: int = 3) -> Placed:
    secrets = shares[0].groups[group]
    x = np.random.default_rng(rows).standard_normal((rows, secrets.n)).astype(np.float32)
    return Placed(card, x, secrets.m)


def test_products_are_those_of_the_processor_but_for_rounding(
    card: Any, shares: Shares, tmp_path: Path
) -> None:
    """Every group, one row and many, through a socket: an integer of x~ in a thousand may differ by one."""
    with (
        serving(Changing(shares[1]), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        for index, name in enumerate(shares[0].groups):
            for rows in (1, 18) if not index else (1,):
                there = placed(card, shares, name, rows)
                vault.product_on_card(name, there.rows, there.out)
                vault.settle()
                want = vault.product(name, there.x)
                assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max(), name


def test_what_exceeds_a_frame_is_cut(
    card: Any, shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(iter(shares[0].groups))
    with (
        serving(Changing(shares[1]), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        monkeypatch.setattr(vault._workers.links[0], "max_rows", lambda group: 4)
        there = placed(card, shares, name, 10)
        before = vault.counters.exchanges
        vault.product_on_card(name, there.rows, there.out)
        vault.settle()
        assert vault.counters.exchanges == before + 3
        want = vault.product(name, there.x)
        assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("rows", [3, FEW + 2])
def test_nothing_of_a_wrong_answer_is_used(card: Any, shares: Shares, tmp_path: Path, rows: int) -> None:
    """By either check.  M13: one entry of the last row is one too large; the answer's memory is as it was.
    M15: other challenges are in force.
    """

    def one_more(y: np.ndarray) -> np.ndarray:
        y[-1, -1] = (int(y[-1, -1]) + 1) % P
        return y

    name = next(iter(shares[0].groups))
    with (
        serving(Changing(shares[1], one_more), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        there, old = placed(card, shares, name, rows), vault._codecs[0].left()
        with pytest.raises(VerificationError):
            vault.product_on_card(name, there.rows, there.out)
        assert (there.answer() == UNTOUCHED).all()
        assert address in vault.quarantined
        assert vault._codecs[0].left() is not old


@pytest.mark.parametrize("rows", [3, FEW + 2])
def test_no_element_at_all_is_found_too(card: Any, shares: Shares, tmp_path: Path, rows: int) -> None:
    """p in the place of 0 leaves every sum as it was."""
    name = next(iter(shares[0].groups))

    def another_form(y: np.ndarray) -> np.ndarray:
        y[0, 0] = P if y[0, 0] == 0 else y[0, 0]
        return np.where(y < 4, y + np.uint32(P), y)  # 2^32 - 5 + 4 still fits

    zeros = dataclasses.replace(shares[1], matrices={k: w * 0 for k, w in shares[1].matrices.items()})
    with (
        serving(Changing(zeros, another_form), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        there = placed(card, shares, name, rows)
        with pytest.raises(VerificationError):
            vault.product_on_card(name, there.rows, there.out)


def test_another_worker_is_sent_the_same_message(card: Any, shares: Shares, tmp_path: Path) -> None:
    """M8."""
    wrong = Changing(shares[1], lambda y: (y + np.uint32(1)) % np.uint32(P))
    right = Changing(shares[1])
    name = next(iter(shares[0].groups))
    with (
        serving(wrong, tmp_path / "a") as first,
        serving(right, tmp_path / "b") as second,
        Vault(shares[0], Terms([first, second], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        there = placed(card, shares, name)
        for _ in range(2):
            vault.product_on_card(name, there.rows, there.out)
            vault.settle()
        assert list(vault.quarantined) == [first]
        assert wrong.messages and wrong.messages[0] == right.messages[0]
        want = vault.product(name, there.x)
        assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max()


def test_the_vault_computes_where_nobody_serves(card: Any, shares: Shares, tmp_path: Path) -> None:
    """M16."""
    name = next(iter(shares[0].groups))
    with (
        serving(Changing(shares[1], lambda y: y[:, ::-1]), tmp_path / "a") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE, fallback="here")) as vault,
    ):
        there = placed(card, shares, name)
        vault.product_on_card(name, there.rows, there.out)
        vault.settle()
        assert vault.counters.rows_here == 3
        want = vault.product(name, there.x)
        assert np.abs(there.answer() - want).max() <= 1e-3 * np.abs(want).max()


def test_an_input_that_is_no_number_is_refused(card: Any, shares: Shares, tmp_path: Path) -> None:
    worker = Changing(shares[1])
    name = next(iter(shares[0].groups))
    with (
        serving(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        x = placed(card, shares, name).x
        x[1, 2] = np.nan
        there = Placed(card, x, shares[0].groups[name].m)
        with pytest.raises(InputError, match="NaN"):
            vault.product_on_card(name, there.rows, there.out)
        assert not worker.messages


def test_a_lost_row_is_nothing_and_an_error(card: Any, shares: Shares, tmp_path: Path) -> None:
    """M51: with the next product or at the end, whichever is first; until then it is NaN."""
    name = next(iter(shares[0].groups))
    secrets = dataclasses.replace(shares[0].groups[name], norm=5e7, noise=1e9)
    share = dataclasses.replace(shares[0], groups={**shares[0].groups, name: secrets})
    with (
        serving(Changing(shares[1]), tmp_path / "w") as address,
        Vault(share, Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        x = placed(card, shares, name).x
        x[1] = 1e-4
        x[1, 3] = 1e4
        there = Placed(card, x, secrets.m)
        vault.product_on_card(name, there.rows, there.out)
        with pytest.raises(PrecisionError):
            vault.settle()
        assert np.isnan(there.answer()[1]).all()
        vault.settle()  # said once
        vault.product_on_card(name, there.rows, there.out)
        with pytest.raises(PrecisionError):
            vault.product_on_card(name, there.rows, there.out)


def test_a_group_is_laid_on_a_card_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two threads are first at the same time."""
    made: list[Any] = []
    others: list[threading.Thread] = []

    def slowly(codec: Any, card: Any) -> object:
        made.append(codec)
        if not others:
            others.append(threading.Thread(target=lambda: codecs[0]))
            others[0].start()
            time.sleep(0.2)  # the other waits for this one
        return object()

    monkeypatch.setattr(card_trial, "CardCodec", slowly)
    monkeypatch.setattr(card_trial, "difference", lambda *_: None)
    codec = SimpleNamespace(m=1, n=1, secrets=SimpleNamespace(rotation="fast", b=[]))
    codecs = card_trial.CardCodecs([codec], None)  # type: ignore[arg-type, list-item]
    first = codecs[0]
    others[0].join(30)
    assert made == [codec] and codecs[0] is first


@pytest.mark.parametrize("change", ["nothing", "orders_in", "orders_out", "scale", "a", "challenge"])
def test_a_card_is_tried_before_a_group_is_used_there(card: Any, shares: Shares, change: str) -> None:
    """What is wrong is found, whichever step it is in."""
    name = next(iter(shares[0].groups))
    codec = GroupCodec(shares[0].groups[name])
    made = CardCodec(codec, card)
    zeros = made._laid.put(np.zeros(100 * (codec.m + codec.n), np.float32))
    if change == "challenge":
        made._challenges[codec.left().number] = zeros, made._addresses(codec.left())[1]
    elif change != "nothing":
        setattr(made._laid, change, zeros)
    found = card_trial.difference(codec, made, card)
    steps = {"orders_in": "`ask`", "challenge": "`check`"}
    assert (found is None) == (change == "nothing")
    assert found is None or steps.get(change, "`opened`") in found
    assert codec.left().number == 0  # none was used up


def test_a_card_that_fails_leaves_the_steps_to_the_processor(
    card: Any,
    shares: Shares,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = next(iter(shares[0].groups))
    with (
        serving(Changing(shares[1]), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=PATIENCE)) as vault,
    ):
        assert vault.works_on_card(name, card)
        monkeypatch.setattr(card_trial, "difference", lambda *_: "`ask` of 1 rows")
        vault._on_cards.clear()
        assert not vault.works_on_card(name, card)
        assert "the vault's steps are done on the processor: `ask` of 1 rows" in caplog.text
        there = placed(card, shares, name)
        with pytest.raises(CardError, match="update driver"):
            vault.product_on_card(name, there.rows, there.out)
