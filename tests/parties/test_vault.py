"""The vault against honest, wrong, silent and dying workers, over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import sliplm
from families import make
from sliplm.arithmetic.field import P, centre
from sliplm.errors import (
    CredentialError,
    DealerError,
    ExhaustedError,
    InputError,
    MaskError,
    MismatchError,
    SlipError,
    VerificationError,
    WireError,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from sliplm.network.transport import Connection
from sliplm.parties.codec import GroupCodec
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.local_worker import LocalWorker
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol.frames import FaultCode, Header, Kind, pack_header
from sliplm.protocol.worker_side import Deal, Multiply, Several, WorkerSide
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker
from sliplm.shares.splitting import CHALLENGE_SETS

Shares = tuple[VaultShare, WorkerShare]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("vault")
    sliplm.split(make("llama", base / "model"), base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def shares(folder: Path) -> Shares:
    return open_vault(folder / "vault"), open_worker(folder / "worker")


@pytest.fixture(scope="module")
def group(shares: Shares) -> str:
    return next(iter(shares[0].groups))


def inputs(shares: Shares, group: str, rows: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, shares[0].groups[group].n)).astype(np.float32)


class Logging(Worker):
    """An honest worker that remembers every message: what a curious one would do."""

    def __init__(self, share: WorkerShare) -> None:
        super().__init__(share, threads=1)
        self.messages: list[tuple[int, np.ndarray]] = []

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        if isinstance(asked, Multiply):
            self.messages.append(
                (asked.group, np.frombuffer(asked.payload, np.uint32).reshape(asked.rows, -1).copy())
            )
        super()._answer(connection, side, asked)


class Rogue(Logging):
    """A worker that answers in its own way."""

    def __init__(self, share: WorkerShare, change: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(share)
        self.change = change

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        assert isinstance(asked, Multiply)
        x = np.frombuffer(asked.payload, np.uint32).reshape(asked.rows, -1)
        self.messages.append((asked.group, x.copy()))
        y = self.change(self._matrices[asked.group].product(x))
        connection.send(side.product(1), memoryview(np.ascontiguousarray(y)), deadline=time.monotonic() + 5)


@contextmanager
def serving(worker: Worker, path: Path) -> Iterator[str]:
    ready = threading.Event()
    address = f"unix:{path}"
    thread = threading.Thread(target=worker.serve, args=(address, None, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(30)
        yield address
    finally:
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "w.sock"


# --- honest workers ----------------------------------------------------------------------------------


def test_products_equal_the_quantised_model_exactly(shares: Shares, socket: Path) -> None:
    """Every group, one row and many, masked and through a socket: the same bits as without masks."""
    local = LocalProducts(*shares)
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=4)) as vault,
    ):
        for name in shares[0].groups:
            for rows in (1, 3, 40):
                x = inputs(shares, name, rows)
                assert np.array_equal(vault.product(name, x), local.product(name, x))


def test_products_of_several_groups_take_one_exchange(shares: Shares, socket: Path) -> None:
    """In whatever order they are asked."""
    local, asked = LocalProducts(*shares), [(name, inputs(shares, name, 2)) for name in shares[0].groups]
    worker = Logging(shares[1])
    with serving(worker, socket) as address, Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
        for parts in (asked, asked[::-1]):
            for y, (name, x) in zip(vault.products(parts), parts, strict=True):
                assert np.array_equal(y, local.product(name, x))
        assert vault.counters.exchanges == 2
        assert vault.counters.rows == 4 * len(asked)
        with pytest.raises(InputError, match="NaN"):
            vault.products([asked[0], (asked[1][0], np.full_like(asked[1][1], np.nan))])


def test_what_exceeds_a_frame_is_cut(shares: Shares, socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sliplm.protocol.side.FRAME_BYTES", 8192)
    local, asked = LocalProducts(*shares), [(name, inputs(shares, name, 20)) for name in shares[0].groups]
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        for y, (name, x) in zip(vault.products(asked), asked, strict=True):
            assert np.array_equal(y, local.product(name, x))
        assert vault.counters.rows == 20 * len(asked)
        least = sum(20 * 4 * max(s.m, s.n) for s in shares[0].groups.values()) / 8192
        assert least / 2 < vault.counters.exchanges < 4 * least


class RogueInOne(Logging):
    """Answers several groups, one of them wrong in its last element."""

    def _answer_several(self, connection: Connection, side: WorkerSide, asked: Several) -> None:
        elements, first, answers = np.frombuffer(asked.payload, np.uint32), 0, []
        for group, rows in asked.parts:
            n = self._shapes[group][1]
            x = elements[first : first + rows * n].reshape(rows, n)
            self.messages.append((group, x.copy()))
            answers.append(self._matrices[group].product(x).reshape(-1))
            first += rows * n
        y = np.concatenate(answers)
        y[-1] = (int(y[-1]) + 1) % P
        connection.send(side.product(1), y.data, deadline=time.monotonic() + 30)


def test_one_wrong_group_of_several_spoils_the_answer(shares: Shares, tmp_path: Path) -> None:
    """M8, M13, M15: nothing of it is used, its sender is quarantined, the next one gets the same bytes."""
    asked = [(name, inputs(shares, name, 2)) for name in shares[0].groups]
    liar, honest = RogueInOne(shares[1]), Repeating(shares[1])
    with serving(liar, tmp_path / "a") as bad, serving(honest, tmp_path / "b") as good:
        with Vault(shares[0], Terms([bad, good], shares[1], ahead=0)) as vault:
            vault.products(asked)
            assert list(vault.quarantined) == [bad]
            (record,) = vault.audit.records
            assert record.group == asked[-1][0]
            sets = [codec._challenges.number for codec in vault._codecs]
    assert sets == [0] * (len(sets) - 1) + [1]
    assert [m.tobytes() for _, m in liar.messages] == [m.tobytes() for _, m in honest.messages]


class Repeating(RogueInOne):
    """Honest, and remembers."""

    def _answer_several(self, connection: Connection, side: WorkerSide, asked: Several) -> None:
        elements, first = np.frombuffer(asked.payload, np.uint32), 0
        for group, rows in asked.parts:
            n = self._shapes[group][1]
            self.messages.append((group, elements[first : first + rows * n].reshape(rows, n).copy()))
            first += rows * n
        Worker._answer_several(self, connection, side, asked)


def test_the_quantised_model_is_the_plain_formula(shares: Shares, group: str) -> None:
    """Steps 1 and 5 by hand, in float64 and Python integers."""
    secrets, w = shares[0].groups[group], shares[1].matrices[group]
    x = inputs(shares, group, 4)
    z = secrets.rotation_in().apply(x).astype(np.float64)
    limit = ((P - 1) / 2 - 1) / secrets.norm - np.sqrt(secrets.n) / 2
    out = []
    for row in z:
        alpha = limit / np.linalg.norm(row)
        integers = [int(v) for v in np.rint(alpha * row)]
        product = [sum(int(a) * b for a, b in zip(r, integers, strict=True)) for r in w]
        assert max(map(abs, product)) <= (P - 1) // 2
        assert centre(np.array([v % P for v in product], np.uint32)).tolist() == product
        out.append((np.array(product) * secrets.scale / alpha).astype(np.float32))
    expected = secrets.rotation_out().apply_transpose(np.array(out)) + (x @ secrets.b.T) @ secrets.a.T
    assert np.allclose(LocalProducts(*shares).product(group, x), expected, rtol=1e-4, atol=1e-5)


def test_products_are_close_to_the_weights(folder: Path, shares: Shares, group: str) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(folder.parent / "model" / "model.safetensors")
    weight = np.concatenate([tensors[f"{member.module}.weight"] for member in shares[0].members[group]])
    x = inputs(shares, group, 8)
    exact = x @ weight.T
    assert np.linalg.norm(LocalProducts(*shares).product(group, x) - exact) < 2e-3 * np.linalg.norm(exact)


def test_no_message_repeats_even_for_the_same_input(shares: Shares, group: str, socket: Path) -> None:
    worker = Logging(shares[1])
    with serving(worker, socket) as address, Vault(shares[0], Terms([address], shares[1], ahead=8)) as vault:
        x = inputs(shares, group, 1)
        for _ in range(100):
            vault.product(group, x)
            vault.product(group, np.zeros_like(x))
    rows = [row.tobytes() for _, message in worker.messages for row in message]
    assert len(rows) == 200
    assert len(set(rows)) == 200
    differences = np.diff(np.concatenate([m for _, m in worker.messages]).astype(np.int64), axis=0) % P
    near = (
        np.minimum(differences, P - differences) < 2**20
    )  # inputs are small: two under one mask would be near
    assert near.mean() < 0.01


def test_an_empty_batch_asks_nobody(shares: Shares, group: str, socket: Path) -> None:
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        assert vault.product(group, inputs(shares, group, 0)).shape == (0, shares[0].groups[group].m)
        assert vault.counters.exchanges == 0


def test_masks_dealt_ahead_are_used(shares: Shares, group: str, socket: Path) -> None:
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=8)) as vault,
    ):
        assert vault.wait_dealt(30)
        vault.deal(20, [group])
        before = vault.counters.rows_dealt_late
        vault.product(group, inputs(shares, group, 20))
        assert vault.counters.rows_dealt_late == before
        vault.product(group, inputs(shares, group, 200))
        assert vault.counters.rows_dealt_late > before
        assert vault.mask_bytes() > 0
    with pytest.raises(MaskError, match="closed"):
        vault.product(group, inputs(shares, group))


def test_masks_laid_ready_for_the_next_group_are_the_next_ones(shares: Shares, tmp_path: Path) -> None:
    """While a worker computes, a mask is burnt for the group that came next the last time: nothing is used
    twice, nothing is lost, and with so many masks as rows nobody has to deal.
    """
    names, rounds = list(shares[0].groups)[:3], 7
    local, worker = LocalProducts(*shares), Logging(shares[1])
    with (
        serving(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as v,
    ):
        v.deal(rounds, names)
        for turn in range(rounds):
            for name in names if turn != 3 else reversed(names):
                x = inputs(shares, name, 1)
                assert np.array_equal(v.product(name, x), local.product(name, x))
            if 0 < turn < rounds - 1:
                assert any(v._supply.memory._hand)
        assert v.counters.rows_dealt_late == 0
        assert [v._supply.memory.available(v._index[name]) for name in names] == [0, 0, 0]
    assert len({row.tobytes() for _, row in worker.messages}) == 3 * rounds


def test_counters_add_up(shares: Shares, group: str, socket: Path) -> None:
    secrets = shares[0].groups[group]
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        vault.product(group, inputs(shares, group, 5))
        counted = vault.counters.as_dict()
    assert (counted["exchanges"], counted["rows"], counted["rows_dealt"]) == (1, 5, 5)
    assert counted["bytes_sent"] == 5 * 4 * secrets.n
    assert counted["bytes_received"] == 5 * 4 * secrets.m


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_no_numbers_are_refused_and_the_vault_lives_on(
    shares: Shares, group: str, socket: Path, bad: float
) -> None:
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        x = inputs(shares, group)
        x[1, 2] = bad
        with pytest.raises(InputError, match="NaN or infinity"):
            vault.product(group, x)
        assert vault.counters.exchanges == 0
        assert np.isfinite(vault.product(group, inputs(shares, group))).all()


def test_wrong_arguments_are_named(shares: Shares, group: str, socket: Path) -> None:
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        with pytest.raises(InputError, match="no group"):
            vault.product("nobody", inputs(shares, group))
        with pytest.raises(InputError, match="float32"):
            vault.product(group, inputs(shares, group).astype(np.float64))
        with pytest.raises(InputError, match="float32"):
            vault.product(group, inputs(shares, group)[:, :-1])
    with pytest.raises(InputError, match="no worker"):
        Terms([], shares[1])
    with pytest.raises(InputError, match="ahead"):
        Terms(["unix:/x"], shares[1], ahead=-1)


# --- workers that are wrong ---------------------------------------------------------------------------


def add(value: int, place: tuple[int, int] = (0, 0)) -> Callable[[np.ndarray], np.ndarray]:
    def change(y: np.ndarray) -> np.ndarray:
        y = y.copy()
        y[place] = (int(y[place]) + value) % P
        return y

    return change


WRONG = {
    "one entry by one": add(1),
    "last entry by minus one": add(P - 1, (-1, -1)),
    "one entry by 2^31": add(2**31),
    "all zero": lambda y: np.zeros_like(y),
    "rows swapped": lambda y: y[::-1].copy(),
    "columns shifted": lambda y: np.roll(y, 1, axis=1),
    "negated": lambda y: ((P - y.astype(np.int64)) % P).astype(np.uint32),
    "not an element": lambda y: np.full_like(y, 2**32 - 1),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_product_is_detected_and_the_worker_quarantined(
    shares: Shares, group: str, socket: Path, kind: str
) -> None:
    worker = Rogue(shares[1], WRONG[kind])
    with serving(worker, socket) as address, Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
        with pytest.raises(VerificationError, match="is wrong") as caught:
            vault.product(group, inputs(shares, group))
        assert caught.value.address == address
        assert address in vault.quarantined
        asked = len(worker.messages)
        with pytest.raises(VerificationError, match="no worker is left"):
            vault.product(group, inputs(shares, group))
        assert len(worker.messages) == asked, "a quarantined worker is never asked again"


def test_another_worker_takes_over_with_the_same_message(shares: Shares, group: str, tmp_path: Path) -> None:
    bad, good = Rogue(shares[1], WRONG["one entry by one"]), Logging(shares[1])
    with serving(bad, tmp_path / "a") as first, serving(good, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0)) as vault:
            x = inputs(shares, group)
            assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))
            assert list(vault.quarantined) == [first]
            assert np.array_equal(bad.messages[0][1], good.messages[0][1]), "one mask, one message"
            vault.product(group, x)
    assert len(bad.messages) == 1


def test_challenges_are_new_after_a_failed_check(shares: Shares, group: str, tmp_path: Path) -> None:
    bad, good = Rogue(shares[1], add(1)), Logging(shares[1])
    with serving(bad, tmp_path / "a") as first, serving(good, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0)) as vault:
            old = vault._codecs[0]._challenges.e.copy()
            vault.product(group, inputs(shares, group))
            assert not np.array_equal(old, vault._codecs[0]._challenges.e)
            other = list(shares[0].groups)[1]
            vault.product(other, inputs(shares, other))  # and the rest go on


def test_challenges_are_used_up_by_failures(shares: Shares, group: str, socket: Path) -> None:
    """Each wrong product costs a set of challenges; with the last one the vault stops, and says so."""
    with serving(Rogue(shares[1], add(1)), socket) as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
            for _ in range(CHALLENGE_SETS - 1):
                with pytest.raises(VerificationError, match="is wrong"):
                    vault.product(group, inputs(shares, group, 1))
                vault.rejoin(address)
            for _ in range(2):
                with pytest.raises(VerificationError, match="used up its challenges"):
                    vault.product(group, inputs(shares, group, 1))
                vault.rejoin(address)


def test_used_up_is_for_good(shares: Shares, group: str, socket: Path) -> None:
    """Once no challenges are left, an honest worker's right products are refused too, and it is not
    blamed.
    """
    rogue = Rogue(shares[1], add(1))
    with serving(rogue, socket) as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0, fallback="here")) as vault:
            for _ in range(CHALLENGE_SETS):
                with contextlib.suppress(ExhaustedError):
                    vault.product(group, inputs(shares, group, 1))
                vault.rejoin(address)
            rogue.change = add(0)
            asked, dealt = len(rogue.messages), vault.counters.rows_dealt
            for act in (
                lambda: vault.product(group, inputs(shares, group, 1)),
                lambda: vault.deal(2, [group]),
            ):
                with pytest.raises(ExhaustedError, match="used up its challenges"):
                    act()
            assert (len(rogue.messages), vault.counters.rows_dealt) == (asked, dealt)
            assert not vault.quarantined
            other = next(name for name in shares[0].groups if name != group)
            vault.product(other, inputs(shares, other, 1))


def test_checks_at_the_same_time_see_number_and_set_together(shares: Shares, group: str) -> None:
    """Whatever two threads do, a set that failed is never in force again, and none is skipped."""
    secrets = shares[0].groups[group]
    x = np.random.default_rng(0).integers(0, P, (2, secrets.n)).astype(np.uint32)
    wrong = np.zeros((2, secrets.m), np.uint32)
    codec = GroupCodec(secrets)
    first = codec._challenges
    start = threading.Barrier(8)

    def check() -> None:
        start.wait(30)
        codec.renew_challenges(first)  # eight threads that saw the same set fail

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codec._challenges.number == 1
    for number in range(1, CHALLENGE_SETS):
        assert codec._challenges.number == number
        assert not codec.accepts(x, wrong)
    with pytest.raises(ExhaustedError):
        codec.accepts(x, wrong)


def test_a_waiting_thread_does_not_use_a_worker_that_was_quarantined_meanwhile(
    shares: Shares, group: str, tmp_path: Path
) -> None:
    worker = Slow(shares[1], add(1))
    with (
        serving(worker, tmp_path / "a") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        caught: list[Exception] = []

        def ask() -> None:
            try:
                vault.product(group, inputs(shares, group))
            except SlipError as error:
                caught.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [type(error) for error in caught] == [VerificationError] * 3
    assert len(worker.messages) == 1


def test_the_first_worker_that_can_serve_does(shares: Shares, group: str, tmp_path: Path) -> None:
    with serving(Logging(shares[1]), tmp_path / "b") as good:
        with Vault(shares[0], Terms([f"unix:{tmp_path / 'nobody'}", good], shares[1], ahead=0)) as vault:
            vault.product(group, inputs(shares, group))


def test_deal_takes_names_and_rows(shares: Shares, socket: Path) -> None:
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        for rows, names in ((0, None), (-1, None), (1, ["nobody"])):
            with pytest.raises(InputError, match="deal takes"):
                vault.deal(rows, names)
        assert vault.groups == tuple(shares[0].groups)


def test_closing_ends_an_exchange_at_once(shares: Shares, group: str, socket: Path) -> None:
    with serving(Silent(shares[1]), socket) as address:
        vault = Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=60))
        closer = threading.Timer(0.3, vault.close)
        closer.start()
        started = time.monotonic()
        with pytest.raises(WorkerUnavailable):
            vault.product(group, inputs(shares, group))
        closer.join()
        assert time.monotonic() - started < 30, "not the limit of 60 seconds ended it"


class Slow(Rogue):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        time.sleep(0.5)
        super()._answer(connection, side, asked)


class Silent(Logging):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        time.sleep(2)


class Short(Logging):
    """Announces a payload that does not fit the question."""

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        header = Header(Kind.PRODUCT, 1, asked.group, asked.rows, 0, 4)
        connection.send(pack_header(header) + bytes(4), deadline=time.monotonic() + 5)


class Garbage(Logging):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, deadline=time.monotonic() + 5)


class Refusing(Logging):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        connection.send(side.fault(FaultCode.INTERNAL, "out of memory"), deadline=time.monotonic() + 5)


class Hanging(Logging):
    """Closes the connection in the middle of a product."""

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        whole = np.zeros((asked.rows, self._shapes[asked.group][0]), np.uint32).tobytes()
        connection.send(side.product(0) + whole[: len(whole) // 2], deadline=time.monotonic() + 5)
        connection.close()


@pytest.mark.parametrize(
    ("kind", "error", "state"),
    [
        (Silent, WorkerTimeout, "suspended"),
        (Short, WireError, "quarantined"),
        (Garbage, WireError, "quarantined"),
        (Refusing, WorkerFault, "suspended"),
        (Hanging, WorkerUnavailable, "suspended"),
    ],
)
def test_bad_answers_are_typed_errors(
    shares: Shares, group: str, socket: Path, kind: type[Logging], error: type[SlipError], state: str
) -> None:
    worker = kind(shares[1])
    with (
        serving(worker, socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, timeout=1)) as vault,
    ):
        with pytest.raises(error):
            vault.product(group, inputs(shares, group))
        assert [status.state for status in vault.workers] == [state]
        (record,) = vault.audit.records
        assert (record.role, record.address, record.event, record.group) == ("worker", address, state, group)
        with pytest.raises(SlipError):
            vault.product(group, inputs(shares, group))
    assert len({message.tobytes() for _, message in worker.messages}) <= 1, "it was asked once"


def test_a_worker_that_dies_in_mid_token_is_told_and_its_successor_found(
    folder: Path, shares: Shares, group: str
) -> None:
    with (
        LocalWorker(folder / "worker", threads=1) as worker,
        LocalWorker(folder / "worker", threads=1) as spare,
    ):
        with Vault(shares[0], Terms([worker.address], shares[1], ahead=0, timeout=10)) as vault:
            vault.product(group, inputs(shares, group))

            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(WorkerUnavailable):
                vault.product(group, inputs(shares, group))
        with Vault(shares[0], Terms([spare.address], shares[1], ahead=0, timeout=10)) as vault:
            vault.product(group, inputs(shares, group))


def test_a_restarted_worker_is_found_again(shares: Shares, group: str, socket: Path) -> None:
    first = Logging(shares[1])
    with serving(first, socket) as address:
        vault = Vault(shares[0], Terms([address], shares[1], ahead=0))
        vault.product(group, inputs(shares, group))
    with serving(Logging(shares[1]), socket), vault:
        x = inputs(shares, group, seed=5)
        assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))


# --- wrong pairs --------------------------------------------------------------------------------------


def test_nobody_listens(shares: Shares, tmp_path: Path) -> None:
    with pytest.raises(WorkerUnavailable, match="is the worker running"):
        Vault(shares[0], Terms([f"unix:{tmp_path / 'nobody'}"], shares[1]))


def test_shares_and_workers_of_another_split(shares: Shares, tmp_path: Path, socket: Path) -> None:
    sliplm.split(make("llama", tmp_path / "model"), tmp_path / "out")
    other = open_worker(tmp_path / "out" / "worker")
    with pytest.raises(MismatchError, match="different splits"):
        Vault(shares[0], Terms(["unix:/nowhere"], other))
    with serving(Logging(other), socket) as address, pytest.raises(MismatchError, match="split"):
        Vault(shares[0], Terms([address], shares[1]))


def test_keys_of_another_authority(folder: Path, shares: Shares, tmp_path: Path) -> None:
    from sliplm.network import authority

    authority.init(tmp_path / "keys")
    authority.init(tmp_path / "other")
    with LocalWorker(folder / "worker", threads=1, authority=tmp_path / "keys") as worker:
        place = worker.address.partition("?")[0]
        with pytest.raises(CredentialError):
            Vault(shares[0], Terms([f"{place}?keys={tmp_path / 'other' / 'vault'}"], shares[1]))


def test_a_damaged_dealing_share_is_found_before_any_mask_is_used(
    shares: Shares, group: str, socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that flips a bit after the digest was checked: O3 catches it."""
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        damaged = np.array(shares[1].matrices[group])
        damaged[0, 0] = int(damaged[0, 0]) // 2 or 1  # no larger than it may be
        from sliplm.arithmetic import kernels

        vault._supply._dealing._here._matrices[0] = kernels.prepare(damaged)
        with pytest.raises(DealerError, match="dealt product is wrong"):
            vault.product(group, inputs(shares, group))
        assert vault.counters.exchanges == 0


def test_reprs_hide_secrets(shares: Shares, socket: Path) -> None:
    with (
        serving(Logging(shares[1]), socket) as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        for thing in (
            vault,
            vault._codecs[0],
            vault._workers,
            vault._workers.links[0],
            vault._supply,
            vault._supply._dealing,
            shares[0],
            vault.counters,
        ):
            assert "array" not in repr(thing)
