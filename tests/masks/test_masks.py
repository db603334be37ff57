"""Masks: dealt right, handed out once, forgotten at the end."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sliplm.arithmetic.field import P, uniform_rows
from sliplm.errors import MaskError
from sliplm.masks import maskpool, masks
from sliplm.masks.maskpool import MaskPool

N, M = 6, 4
W = np.arange(M * N).reshape(M, N) - 11


def multiply(r: np.ndarray) -> np.ndarray:
    return np.array(
        [[sum(int(a) * int(b) for a, b in zip(row, v, strict=True)) % P for row in W] for v in r], np.uint32
    )


def dealt(fresh: masks.Fresh) -> masks.Dealt:
    return masks.Dealt(product(*fresh()))


def product(key: bytes, r: np.ndarray) -> np.ndarray:
    return multiply(r)


def make(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
    return masks.deal(group, N, rows, dealt, b"")


def test_a_dealt_batch_is_masks_with_their_products() -> None:
    seen = []

    def noted(fresh: masks.Fresh) -> masks.Dealt:
        seen.append(fresh())
        return masks.Dealt(multiply(seen[0][1]))

    batch = masks.deal(3, N, 5, noted, b"")
    taken, (key, r) = batch.burn(5), seen[0]
    assert key == batch.key
    assert np.array_equal(taken.r, r)
    assert np.array_equal(taken.u, multiply(r))
    assert batch.burn(5).u.size == 0


class PoolMachine(RuleBasedStateMachine):
    """Takes and deals in any order: every row that comes out is a mask, and none comes out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MaskPool(2, make, ahead=0)
        self.seen: set[bytes] = set()
        self.left, maskpool._LEFT = maskpool._LEFT, 5  # so few that what is left is joined here too

    @rule(group=st.integers(0, 1), rows=st.integers(1, 9))
    def take(self, group: int, rows: int) -> None:
        taken = self.pool.take(group, rows)
        assert taken.r.shape == (rows, N)
        assert np.array_equal(taken.u.reshape(rows, M), multiply(taken.r).reshape(rows, M))
        for row in taken.r:
            assert row.tobytes() not in self.seen
            self.seen.add(row.tobytes())

    @rule(group=st.integers(0, 1), rows=st.integers(1, 4))
    def prepare(self, group: int, rows: int) -> None:
        self.pool.prepare(group, rows)

    @rule()
    def renew(self) -> None:
        self.pool.renew()
        assert self.pool.available(0) == self.pool.available(1) == 0

    @rule(groups=st.sampled_from([[0], [1], [0, 1]]), rows=st.integers(1, 7))
    def deal(self, groups: list[int], rows: int) -> None:
        self.pool.add(groups, rows)

    @invariant()
    def counts_are_right(self) -> None:
        for group in range(2):
            ready, hand = self.pool._ready[group], self.pool._hand[group]
            left = sum(len(batch.u) - batch.used for batch in ready) + sum(len(h.masks.u) for h in hand)
            assert self.pool.available(group) == left

    def teardown(self) -> None:
        maskpool._LEFT = self.left
        self.pool.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25)


def test_the_background_fills_and_refills() -> None:
    pool = MaskPool(2, make, ahead=16)
    pool.start()
    try:
        assert pool.wait_full(30)
        assert all(pool.available(group) > 12 for group in range(2))
        assert pool.stored_bytes() >= 2 * 13 * M * 4
        pool.take(0, 12)
        assert pool.wait_full(30)
        assert pool.available(0) > 12
    finally:
        pool.close()


def test_the_background_gives_way_while_a_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for groups that are down to a quarter of what is kept ready."""
    monkeypatch.setattr(maskpool, "_LULL", 0.0)
    pool = MaskPool(2, make, ahead=16)
    pool.start()
    try:
        assert pool.wait_full(30)
        monkeypatch.setattr(maskpool, "_LULL", 1e9)  # from now on one runs
        pool.take(0, pool.available(0) - 9)
        assert pool._neediest() == 0
        assert pool._due() is None
        pool.take(1, 16)
        deadline = time.monotonic() + 30
        while pool.available(1) <= 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert pool.available(0) == 9
        monkeypatch.setattr(maskpool, "_LULL", 0.0)  # it has ended
        pool.renew()
        assert pool.wait_full(30)
        assert min(map(pool.available, range(2))) > 12
    finally:
        pool.close()


def test_the_background_has_a_lower_priority() -> None:
    dealt_at = []

    def noted(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
        dealt_at.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return make(group, rows, background, late)

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    pool = MaskPool(1, noted, ahead=4)
    pool.start()
    assert pool.wait_full(30)
    pool.close()
    assert set(dealt_at) == {min(19, own + 10)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_what_is_dealt_for_a_request_is_dealt_for_the_next_too() -> None:
    """One row at a time costs as much as several."""
    pool = MaskPool(1, make, ahead=16)
    taken = [pool.take(0, 1).r.tobytes() for _ in range(9)]
    assert len(set(taken)) == 9
    assert pool.available(0) == 3
    pool.take(0, 7)
    assert pool.available(0) == 0
    pool.close()


def test_many_takers_never_get_the_same_mask() -> None:
    pool = MaskPool(1, make, ahead=32)
    pool.start()
    taken: list[bytes] = []

    def taker() -> None:
        for _ in range(60):
            rows = [row.tobytes() for row in pool.take(0, 3).r]
            taken.extend(rows)

    threads = [threading.Thread(target=taker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert len(taken) == 4 * 60 * 3
    assert len(set(taken)) == len(taken)


def test_a_dead_dealer_is_told_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maskpool, "_PAUSES", (0.05, 0.1))
    down = threading.Event()
    down.set()

    def broken(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
        if down.is_set():
            raise MaskError("the product is wrong")
        return make(group, rows, background, late)

    pool = MaskPool(1, broken, ahead=8)
    pool.start()
    assert pool.wait_full(30)
    with pytest.raises(MaskError, match="the product is wrong"):
        pool.take(0, 1)
    down.clear()
    deadline = time.monotonic() + 30
    while pool.available(0) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pool.take(0, 1)
    pool.close()


def test_a_closed_pool_gives_nothing() -> None:
    pool = MaskPool(1, make, ahead=8)
    pool.start()
    pool.close()
    assert pool.stored_bytes() == 0
    with pytest.raises(MaskError, match="closed"):
        pool.take(0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of fork beside threads
def test_a_forked_child_gets_no_mask() -> None:
    """Two processes with one pool would send two messages under one mask."""
    pool = MaskPool(1, make, ahead=0)
    pool.add([0], 4)
    child = os.fork()
    if child == 0:
        outcome = 1
        try:
            pool.take(0, 1)
        except MaskError:
            outcome = 0
        os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(pool.take(0, 1).r) == 1
    pool.close()


def test_no_secret_in_repr() -> None:
    batch = masks.deal(0, N, 2, dealt, b"")
    key, r = batch.key, uniform_rows(batch.key, 0, 0, 2, N)
    pool = MaskPool(1, make, ahead=0)
    for thing in (batch, batch.burn(1), pool):
        assert key.hex() not in repr(thing)
        assert str(int(r[0, 0])) not in repr(thing)
        assert "hidden" in repr(thing)
    pool.close()


def test_a_batch_is_made_again_from_its_key() -> None:
    batch = masks.deal(7, N, 3, dealt, b"")
    assert np.array_equal(uniform_rows(batch.key, 7, 0, 3, N), batch.burn(3).r)


# --- a machine that goes back in time ---------------------------------------------------------------------


def test_renewed_masks_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = MaskPool(1, make, ahead=8)
    pool.start()
    assert pool.wait_full(30)
    with pool._change:
        old = {
            row.tobytes()
            for batch in pool._ready[0]
            for row in uniform_rows(batch.key, 0, 0, len(batch.u), N)
        }
    pool.renew()
    assert not old & {row.tobytes() for row in pool.take(0, 8).r}
    assert pool.renewals == 1
    pool.close()


@pytest.mark.parametrize("event", ["fall", "renewal", "jump", "close"])
def test_a_row_at_hand_goes_with_the_rest(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is burnt, but nobody has had it: what makes masks void makes it void."""
    marks = iter([b"one", b"another"])

    def by_somebody(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
        mark = next(marks)
        return masks.deal(group, N, rows, lambda fresh: masks.Dealt(product(*fresh()), (mark,)), b"")

    pool = MaskPool(1, by_somebody, ahead=0)
    pool.add([0], 3)
    pool.prepare(0, 2)
    pool.prepare(0, 2)
    assert pool.available(0) == 3
    hand = pool._hand[0]
    assert [len(held.masks.u) for held in hand] == [2]
    row = hand[0].masks.r.tobytes()
    if event == "fall":
        assert pool.drop([b"one"]) == 3
    elif event == "renewal":
        pool.renew()
    elif event == "jump":
        real, boot = time.clock_gettime_ns, time.CLOCK_BOOTTIME
        monkeypatch.setattr(time, "clock_gettime_ns", lambda c: real(c) + (c == boot) * 10**10)
    else:
        pool.close()
        with pytest.raises(MaskError):
            pool.take(0, 1)
        assert pool._hand == [[]]
        return
    assert row != pool.take(0, 2).r.tobytes()
    pool.close()


def test_messages_of_changing_sizes_find_their_masks_ready_and_leave_few() -> None:
    pool = MaskPool(1, make, ahead=0)
    pool.add([0], 400)
    for rows in (1, 32, 31, 31, 30, 32, 1, 29, 28, 27, 26, 25):
        pool.prepare(0, rows)
        hand = list(pool._hand[0])
        ready = [held.masks.u for held in hand if len(held.masks.u) >= rows]
        assert ready  # none has to be made, or joined
        assert np.shares_memory(pool.take(0, rows).u, ready[0])
        assert sum(len(held.masks.u) for held in pool._hand[0]) < 64
    assert pool.available(0) == 400 - 293
    assert pool.take(0, 107).u.shape == (107, M)
    assert pool._hand == [[]]
    pool.close()


def test_a_batch_that_was_being_dealt_is_thrown_away_too() -> None:
    """It may have been begun before the snapshot, by the background or by whoever waits for it."""
    rounds = []

    def slow(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
        batch = make(group, rows, background, late)
        rounds.append(batch.key)
        if len(rounds) == 1:
            pool.renew()
        return batch

    pool = MaskPool(1, slow, ahead=0)
    taken = pool.take(0, 2)
    assert len(rounds) == 2
    assert np.array_equal(taken.r, uniform_rows(rounds[1], 0, 0, 2, N))
    rounds.clear()
    pool.add([0], 3)
    assert pool.available(0) == 0
    pool.close()


@pytest.mark.parametrize("event", ["fall", "renewal"])
def test_what_one_dealt_who_falls_while_more_is_dealt_is_not_used(event: str) -> None:
    """Nor what was dealt before a snapshot that is noticed while more is dealt."""
    dealers = iter([b"a liar", b"another", b"another"])
    keys = []

    def make(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
        mark = next(dealers)
        if late and mark == b"another" and len(keys) == 1:
            if event == "fall":
                pool.drop([b"a liar"])
            else:
                pool.renew()
        batch = masks.deal(group, N, rows, lambda fresh: masks.Dealt(product(*fresh()), (mark,)), b"")
        keys.append(batch.key)
        return batch

    pool = MaskPool(1, make, ahead=0)
    pool.add([0], 2)
    taken = pool.take(0, 3)
    assert len(keys) == 3
    assert np.array_equal(taken.r, uniform_rows(keys[2], 0, 0, 3, N))
    assert np.array_equal(taken.u, multiply(taken.r))
    pool.close()


@pytest.mark.parametrize("clock", [time.CLOCK_REALTIME, time.CLOCK_BOOTTIME])
@pytest.mark.parametrize("seconds", [-5, 2])
def test_a_jump_of_a_clock_renews(monkeypatch: pytest.MonkeyPatch, clock: int, seconds: int) -> None:
    pool = MaskPool(1, make, ahead=0)
    pool.add([0], 4)
    pool.take(0, 1)
    assert pool.renewals == 0
    assert pool.available(0) == 3
    real = time.clock_gettime_ns
    monkeypatch.setattr(time, "clock_gettime_ns", lambda c: real(c) + (c == clock) * seconds * 10**9)
    pool.take(0, 1)
    assert pool.renewals == 1
    assert pool.available(0) == 0
    pool.take(0, 1)
    assert pool.renewals == 1  # the new time is the time
    pool.close()


def test_a_key_is_new_even_if_the_generator_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored machine: the same random bytes, and the clock of the snapshot."""
    monkeypatch.setattr(masks, "new_key", lambda: bytes(32))
    assert masks.fresh_key() != masks.fresh_key()  # the time
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    assert masks.fresh_key(b"a nonce") != masks.fresh_key(b"another")
    assert masks.deal(0, N, 1, dealt, b"a nonce").key == masks.fresh_key(b"a nonce")
