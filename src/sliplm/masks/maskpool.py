"""Masks dealt ahead, in memory: kept, handed out once, thrown away when this machine was set back."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from sliplm import forks
from sliplm.errors import MaskError
from sliplm.masks.masks import Batch, Masks, joined
from sliplm.secrecy import Secret

_JUMP = 1_000_000_000  # nanoseconds
_PAUSES = 0.5, 30.0  # seconds between two tries in the background while nobody deals: first, at most
_LULL = 0.05  # seconds without a request after which the background deals at will
_LEFT = 64  # rows at hand that were left by smaller messages, above which larger ones are made of them too
_NICER = 10  # by how much the background's thread gives way to the others


class Held(NamedTuple):
    """Masks at hand: burnt, made from their key, and not handed out; and who dealt them."""

    masks: Masks
    marks: tuple[bytes, ...]


class Clocks:
    """Notices that the machine was stopped in between: its memory may have been copied, and run elsewhere."""

    def __init__(self) -> None:
        self._last = self._offsets()

    def jumped(self) -> bool:
        """Did the wall clock or the time since boot move against the monotonic clock, by more than a second,
        since the last call?  (So they do when the wall clock is set: that costs some masks, and no harm.)
        """
        before = self._last
        self._last = now = self._offsets()
        return abs(now[0] - before[0]) > _JUMP or abs(now[1] - before[1]) > _JUMP

    @staticmethod
    def _offsets() -> tuple[int, int]:
        now = time.clock_gettime_ns
        monotonic = now(time.CLOCK_MONOTONIC)
        return now(time.CLOCK_REALTIME) - monotonic, now(time.CLOCK_BOOTTIME) - monotonic


class MaskPool(Secret):
    """Masks dealt ahead, in memory, filled by a background thread and by whoever needs more than it holds.

    The thread gives way to requests: it deals when none runs, or for groups that are down to a quarter.

    Keys live in this process alone: after a crash every mask is gone, so none can be used twice.  A forked
    child gets none.

    If the whole machine goes back to a snapshot, its masks go back too.  `renew` throws them away: its user
    calls it whenever a connection had to be made again, which a restored machine has to do, and `take` does
    when the clocks jump.  What remains: the messages made before either is noticed, the first of a restored
    machine that is given the time of its snapshot.

    Attributes:
        renewals: how often all masks were thrown away.
    """

    def __init__(
        self,
        groups: int,
        make: Callable[[int, int, bool, bool], Batch],
        ahead: int,
        uses: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            groups: how many there are.
            make: (group, rows, in the background?, while a request waits?) -> a checked batch.
            ahead: rows to keep ready for each group; 0 deals nothing ahead.
            uses: of each group, what part of the rows it is expected to see; None for all of them.
        """
        self._make, self._ahead = make, ahead
        self._kept = [math.ceil(ahead * use) for use in uses or [1.0] * groups]
        self._ready: list[deque[Batch]] = [deque() for _ in range(groups)]
        self._few = [kept - max(1, kept // 4) for kept in self._kept]  # rows below which more are dealt
        self._count = [0] * groups  # those at hand too
        self._hand: list[list[Held]] = [[] for _ in range(groups)]
        self._lock = threading.RLock()  # of `_change`, whose own methods are slower
        self._change = threading.Condition(self._lock)
        self._failure: Exception | None = None
        self._closed = False
        self._asleep = False  # the background, until it is needed
        self._asked = -math.inf  # time.monotonic() of the last `take`
        self._fallen: set[bytes] = set()
        self.renewals = 0
        self._clocks = Clocks()
        self._process = forks.Process()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to deal ahead in the background, once whoever `make` needs is there."""
        if self._ahead:
            self._thread = threading.Thread(target=self._fill, name="sliplm-dealer", daemon=True)
            self._thread.start()

    def __repr__(self) -> str:
        return f"MaskPool(groups={len(self._ready)}, ahead={self._ahead}, secrets hidden)"

    def available(self, group: int) -> int:
        """Rows that are ready for a group."""
        return self._count[group]

    def stored_bytes(self) -> int:
        """Memory that the products u of the ready masks take."""
        self._process.check()
        with self._change:
            return sum(batch.u.nbytes for batches in self._ready for batch in batches)

    def take(self, group: int, rows: int, *, made: bool = True) -> Masks:
        """Burn and hand out masks for `rows` rows; what is not ready is dealt now.

        Args:
            made: with their r; where it is not, whoever takes them makes it of their origin.

        Raises: MaskError when the pool is closed, what `make` raises; ForkError in a forked child.
        """
        while True:
            parts, missing, age = self._burn_ready(group, rows, made)
            if not missing:
                return parts[0] if len(parts) == 1 else joined(parts)
            late = self._make(group, max(missing, self._step(group) if self._ahead else 0), False, True)
            with self._change:
                if self._failure is not None:  # somebody deals again
                    self._failure = None
                    self._change.notify_all()
                if age == self._age() and self._fallen.isdisjoint(late.marks):
                    last = late.burn(missing, made=made)
                    if late.used < len(late.u) and not self._closed:
                        self._add(group, late)
                    return joined([*parts, last])
            # renewed, or a dealer has fallen meanwhile: what is in hand may be of before, or from him

    def prepare(self, group: int, rows: int) -> None:
        """Have the next rows of a group at hand, burnt and made from their key, as far as they are ready: the
        `take` that comes for them is quick then.
        """
        self._process.check()
        with self._lock:
            ready, hand = self._ready[group], self._hand[group]
            if ready and _rows(hand) < rows + _LEFT and all(len(held.masks.u) < rows for held in hand):
                batch = ready[0]
                hand.append(Held(batch.burn(rows), batch.marks))
                if batch.used == len(batch.u):
                    ready.popleft()

    def renew(self) -> None:
        """Throw away all masks dealt before: none of them is handed out after the return."""
        self._process.check()
        with self._change:
            self._discard()
            self.renewals += 1
            self._change.notify_all()

    def drop(self, marks: Collection[bytes]) -> int:
        """Throw away, now and when they come, the masks that these have dealt; how many rows there were."""
        with self._change:
            self._fallen.update(marks)
            before = sum(self._count)
            for group, ready in enumerate(self._ready):
                self._ready[group] = deque(b for b in ready if self._fallen.isdisjoint(b.marks))
                self._count[group] = sum(len(batch.u) - batch.used for batch in self._ready[group])
                self._hand[group] = [h for h in self._hand[group] if self._fallen.isdisjoint(h.marks)]
                self._count[group] += _rows(self._hand[group])
            self._change.notify_all()
            return before - sum(self._count)

    def _age(self) -> tuple[int, int]:
        """Grows when masks become void, those in somebody's hand too."""
        return self.renewals, len(self._fallen)

    def _burn_ready(self, group: int, rows: int, made: bool) -> tuple[list[Masks], int, tuple[int, int]]:
        """Up to `rows` masks, how many are missing, and the age in which these were good."""
        self._process.check()
        parts: list[Masks] = []
        with self._lock:
            if self._closed:
                raise MaskError("the vault is closed; load the model again")
            if self._clocks.jumped():
                self._discard()
                self.renewals += 1
            while rows:
                part = self._burn(group, rows, made)
                if part is None:
                    break
                rows -= len(part.u)
                parts.append(part)
            self._asked = time.monotonic()
            if self._asleep and self._needs(group):
                self._asleep = False
                self._change.notify_all()
            return parts, rows, self._age()

    def _burn(self, group: int, rows: int, made: bool = True) -> Masks | None:
        """Some masks, at most so many: what is at hand where that is enough, much, or all there is, for to
        join it to others copies them.
        """
        ready, hand = self._ready[group], self._hand[group]
        enough = [k for k, held in enumerate(hand) if rows <= len(held.masks.u)]
        if enough or (hand and (not ready or _rows(hand) >= _LEFT)):
            k = enough[0] if enough else 0
            part, rest = hand[k].masks[:rows], hand[k].masks[rows:]
            hand[k : k + 1] = [Held(rest, hand[k].marks)] if len(rest.u) else []
        elif ready:
            part = ready[0].burn(rows, made=made)
            if ready[0].used == len(ready[0].u):
                ready.popleft()
        else:
            return None
        self._count[group] -= len(part.u)
        return part

    def add(self, groups: Sequence[int], rows: int) -> None:
        """Deal `rows` more masks for each of the groups, now, beyond what the background keeps ready."""
        self._process.check()
        for group in groups:
            age = self.renewals
            self._keep(group, self._make(group, rows, False, False), age)

    def wait_full(self, timeout: float) -> bool:
        """Wait until every group has its masks ready; False after `timeout` seconds."""
        self._process.check()
        with self._change:
            return self._change.wait_for(
                lambda: self._neediest() is None or self._failure is not None, timeout
            )

    def close(self) -> None:
        """Stop dealing and forget all masks; nothing in a forked child."""
        if not self._process.here:
            return
        with self._change:
            self._closed = True
            self._discard()
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _discard(self) -> None:
        for ready in self._ready:
            ready.clear()
        self._hand = [[] for _ in self._ready]
        self._count = [0] * len(self._ready)

    def _keep(self, group: int, batch: Batch, age: int) -> None:
        with self._change:
            if not self._closed and age == self.renewals and self._fallen.isdisjoint(batch.marks):
                self._add(group, batch)
                self._change.notify_all()

    def _add(self, group: int, batch: Batch) -> None:
        self._ready[group].append(batch)
        self._count[group] += len(batch.u) - batch.used

    def _neediest(self) -> int | None:
        needy = (group for group in range(len(self._count)) if self._needs(group))
        return min(needy, key=lambda group: self._count[group] / self._kept[group], default=None)

    def _needs(self, group: int) -> bool:
        return self._count[group] <= self._few[group]

    def _due(self) -> int | None:
        """The group that is dealt for next; None while that can wait for the request that runs."""
        group = self._neediest()
        running = time.monotonic() - self._asked < _LULL
        return None if running and group is not None and 4 * self._count[group] > self._kept[group] else group

    def _step(self, group: int) -> int:
        return max(1, self._kept[group] // 4)

    def _fill(self) -> None:
        _give_way()
        pause = _PAUSES[0]
        while True:
            with self._change:
                while not self._closed and (group := self._due()) is None:
                    self._asleep = self._neediest() is None
                    self._change.wait(None if self._asleep else _LULL)  # woken by take and close
                if self._closed or group is None:
                    return
                age = self.renewals
            try:
                batch = self._make(group, self._step(group), True, False)
            except Exception as error:  # it may be over soon; until then who takes masks asks for himself
                with self._change:
                    self._failure = error
                    self._change.notify_all()
                    again = self._change.wait_for(lambda: self._closed or self._failure is None, pause)
                pause = _PAUSES[0] if again else min(2 * pause, _PAUSES[1])
                continue
            pause, self._failure = _PAUSES[0], None
            self._keep(group, batch, age)


def _rows(hand: Sequence[Held]) -> int:
    return sum([len(held.masks.u) for held in hand])


def _give_way() -> None:
    """Let the other threads of this machine go before the calling one."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # then it competes with them
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICER))
