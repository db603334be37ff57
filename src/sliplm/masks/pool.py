"""Masks dealt ahead, on disk, that no crash, copy, backup or second vault makes anybody use twice.

The batches of a group (`poolfolder`) are used up in the order of their numbers.  So one position per group,
(number, rows), says what is burnt: all batches before, and so many rows of this one.  A burnt batch that
comes back from a backup is still behind the position.

**A reservation** burns the next rows of every group at once, before any of them is handed out:

    1. write state.json durably: tokens [present, next], and the positions after these rows
    2. anchor.swap(present, next) must succeed
    3. hand out these rows, each once, from this process's memory

A token commits to the positions written with it, B(token).  **Invariant: the positions of a state are at or
behind B(t) for each of its tokens t; a process swaps only from a token of its state, only to one that it
made, and uses only the rows between its state's old positions and B of that one, once its swap has
succeeded.**  The anchor compares and swaps, so its history is one line t0, t1, t2...  Whoever made the step
t_i -> t_i+1 knew t_i, so it hands out rows behind B(t_i) and before B(t_i+1).  These stretches do not
overlap: no row is handed out twice, by however many processes on however many copies, taken between whatever
two system calls.  For each step one of them wins; the others are refused, and close.

After a crash between 1 and 2 the anchor has the first of the state's tokens: the pool opens, and these rows
are lost.  So are rows that were reserved and not used at a crash or `close`; nobody gives them back.

What remains: an anchor that is put back together with the pool (`FileAnchor` in a snapshot of the whole
machine), and memory that is copied while rows are reserved, until clocks or a broken connection tell
(`DiskPool.renew`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from sliplm import durable, forks
from sliplm.closing import Closing
from sliplm.errors import PoolError
from sliplm.filesystem import because
from sliplm.masks.anchor import Anchor
from sliplm.masks.expected import rows_for
from sliplm.masks.maskfile import MaskFile
from sliplm.masks.maskpool import Clocks
from sliplm.masks.masks import Masks, joined
from sliplm.masks.poolfolder import (
    MAX_TOKENS,
    STATE,
    Folder,
    PoolKey,
    Position,
    Shape,
    burnt_rows,
    next_token,
)
from sliplm.secrecy import Secret

RESERVE: Final = 64  # tokens for which one reservation burns ahead
_ROWS_AT_ONCE: Final = 16  # read together
_LOOK: Final = 1.0  # seconds between two looks for new batches while there are few

Piece = tuple[MaskFile, int, int]  # batch, first row, after the last


class _Stock:
    """One group's batches: a position before which all is burnt, and what of that is in hand."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.batches: list[MaskFile] = []  # not wholly burnt, in order
        self.hand: deque[Piece] = deque()
        self.loaded: Masks | None = None  # the first of what is in hand, read already

    def in_hand(self) -> int:
        loaded = 0 if self.loaded is None else len(self.loaded.u)
        return loaded + sum(last - first for _, first, last in self.hand)

    def drop(self) -> None:
        self.hand.clear()
        self.loaded = None

    def cut(self, rows: int) -> Masks:
        """Take at most so many rows out of what is loaded, for good."""
        masks, rest = self.loaded, None
        if masks is None:
            raise PoolError("nothing is loaded")
        if rows < len(masks.u):
            masks, rest = masks[:rows], masks[rows:]
        self.loaded = rest
        return masks

    def unburnt(self) -> int:
        return sum(batch.rows - burnt_rows(self.position, batch) for batch in self.batches)

    def plan(self, rows: int) -> tuple[Position, list[Piece]]:
        """The next rows, at most so many, and the position after them."""
        position, pieces = self.position, []
        for batch in self.batches:
            first = burnt_rows(position, batch)
            last = min(batch.rows, first + max(0, rows))
            if last > first:
                pieces.append((batch, first, last))
                rows -= last - first
                position = Position(batch.number, last, position.total + last - first)
        return position, pieces

    def pop(self, rows: int) -> Iterator[Piece]:
        """Take rows out of the hand, for good."""
        while rows:
            batch, first, last = self.hand.popleft()
            used = min(rows, last - first)
            if first + used < last:
                self.hand.appendleft((batch, first + used, last))
            rows -= used
            yield batch, first, first + used


class DiskPool(Secret, Closing):
    """The masks of one split in a pool folder, for one vault.

    Args:
        pool: the pool folder, which may hold pools of several splits.
        split_id: the vault share's.
        pool_key: gives the secret that seals the pool, from its id.
        shapes: (m, n) of every group, in the share's order.
        anchor: the one that the pool was dealt with.
        uses: of each group, what part of the rows it is expected to see; None for all of them.
        reserve: tokens whose masks are burnt ahead, and lost at a crash or `close`.

    Attributes:
        renewals: how often reserved rows were dropped by `renew` or because the clocks jumped.

    Raises: PoolError when there is no pool, it is in use, a copy, restored or damaged.
    """

    def __init__(
        self,
        pool: Path,
        split_id: str,
        pool_key: PoolKey,
        shapes: Sequence[Shape],
        anchor: Anchor,
        *,
        uses: Sequence[float] | None = None,
        reserve: int = RESERVE,
    ) -> None:
        self._folder, self._anchor = Folder(pool, split_id, pool_key, shapes), anchor
        self._uses, self._ahead = list(uses or [1.0] * len(shapes)), reserve
        self._guard = threading.Lock()
        self._process = forks.Process()
        self._clocks = Clocks()
        self._over: str | None = None  # why nothing is handed out any more
        self.renewals = 0
        self._shunned: set[bytes] = set()
        self._dealt: set[bytes] = set()  # the marks of all who dealt what was ever seen here
        self._locked: int | None = self._folder.lock("vault.lock", "vault")
        try:
            state, self._owner = self._folder.state()
            self._stocks = [_Stock(Position(*burnt)) for burnt in state.burnt]
            self._tokens, self._settled = state.tokens, False
            self._known: dict[Path, MaskFile] = {}
            self._settle()
            self._scan()
        except BaseException:
            self._unlock()
            raise
        forks.watch(self)

    def __repr__(self) -> str:
        return f"DiskPool({str(self._folder.path)!r}, groups={len(self._stocks)}, secrets hidden)"

    def available(self, group: int) -> int:
        """Rows that are ready for a group; new batches are found within a second.  Raises: PoolError."""
        self._process.check()
        with self._guard:
            if self._over is not None:
                return 0
            stock = self._stocks[group]
            rows = stock.in_hand() + stock.unburnt()
            if rows < rows_for(self._ahead, self._uses[group]) and time.monotonic() - self._looked > _LOOK:
                self._scan()
                rows = stock.in_hand() + stock.unburnt()
            return rows

    def dealers(self) -> frozenset[bytes]:
        """The marks of all, but this machine, who dealt what is here or was since it was opened."""
        with self._guard:
            self._scan()
            return frozenset(self._dealt)

    def shun(self, marks: Collection[bytes]) -> None:
        """Use nothing that these have dealt, also if it is dealt later: they are asked online."""
        with self._guard:
            self._shunned.update(marks)

    def drop(self, marks: Collection[bytes]) -> int:
        """Delete what these have dealt, and what is in hand with it; how many rows are lost so."""
        with self._guard:
            if self._over is not None:
                return 0
            self._shunned.update(marks)  # first: what cannot be read now is not used later either
            self._scan()
            if self._dealt.isdisjoint(marks):
                return 0
            rows = sum(stock.in_hand() for stock in self._stocks)
            self._drop()  # what is in hand is burnt, whoever dealt it; its file may be gone already
            for batch in [b for b in self._known.values() if not set(marks).isdisjoint(b.marks)]:
                rows += batch.rows - burnt_rows(self._stocks[batch.group].position, batch)
                with contextlib.suppress(OSError):  # never used again, deleted or not
                    durable.remove(batch.path)
            self._scan()
            return rows

    def stored_bytes(self) -> int:
        """Memory that ready masks take: none, they lie on disk."""
        return 0

    def take(self, group: int, rows: int) -> Masks:
        """Hand out masks for `rows` rows that were burnt durably before.

        Raises: PoolError when there are too few, the disk is full, the anchor fails or refuses, or a batch is
            damaged, or the pool is closed; ForkError in a forked child.
        """
        self._process.check()
        with self._guard:
            self._check()
            if self._clocks.jumped():
                self._drop()
            stock = self._stocks[group]
            if stock.in_hand() < rows:
                self._reserve(group, rows)
            parts = []
            while rows:
                if stock.loaded is None:
                    self._load(stock, rows)
                parts.append(stock.cut(rows))
                rows -= len(parts[-1].u)
            return joined(parts)

    def prepare(self, group: int, rows: int) -> None:
        """Read what the next `take` of so many rows will hand out, of what is burnt already.

        Raises: PoolError when a batch is damaged; ForkError in a forked child.
        """
        self._process.check()
        with self._guard:
            stock = self._stocks[group]
            if self._over is None and stock.loaded is None and stock.in_hand() >= rows:
                self._load(stock, rows)

    def _load(self, stock: _Stock, rows: int) -> None:
        """Read some rows at once: to open a file and its keys costs more than a row."""
        pieces = list(stock.pop(min(stock.in_hand(), max(rows, _ROWS_AT_ONCE))))
        masks = joined([batch.read(first, last - first) for batch, first, last in pieces])
        stock.loaded = masks
        self._delete_used(stock, [batch for batch, _, _ in pieces])

    def renew(self) -> None:
        """Drop what is reserved; before the next row the anchor is asked again.

        For when the machine may have been stopped, copied and started elsewhere: of two such twins one gets a
        new reservation, the other PoolError.
        """
        self._process.check()
        with self._guard:
            self._drop()

    def close(self) -> None:
        """Hand out nothing more, and let another vault have the pool.  Reserved rows are lost.

        Nothing in a forked child.
        """
        if not self._process.here:
            return
        with self._guard:
            self._over = self._over or "the vault is closed; load the model again"
            for stock in self._stocks:
                stock.drop()
            self._unlock()

    def left_behind(self) -> None:
        """In a forked child: it must not hold the parent's lock."""
        self._unlock()

    def _unlock(self) -> None:
        locked, self._locked = self._locked, None
        if locked is not None:
            os.close(locked)

    def _check(self) -> None:
        if self._over is not None:
            raise PoolError(self._over)

    def _drop(self) -> None:
        self.renewals += 1
        for stock in self._stocks:
            stock.drop()

    def _reserve(self, group: int, rows: int) -> None:
        """Burn some tokens' masks ahead for every group, and have at least `rows` of `group` in hand."""
        seen = max(rows, self._ahead) if self._uses[group] >= 1.0 else self._ahead
        wanted = [rows_for(seen, use) for use in self._uses]
        wanted[group] = max(rows, wanted[group])
        if any(stock.unburnt() < want for stock, want in zip(self._stocks, wanted, strict=True)):
            self._scan()
        have = self._stocks[group].in_hand() + self._stocks[group].unburnt()
        if have < rows:
            expert = (
                "" if self._uses[group] >= 1.0 else ", or name a dealer: an expert may be chosen more often"
            )
            raise PoolError(
                f"{self._folder.path}: {have} masks are left for group {group}, and {rows} are needed; "
                f"deal more with `slip deal`{expert}"
            )
        self._settle()
        plans = [stock.plan(want - stock.in_hand()) for stock, want in zip(self._stocks, wanted, strict=True)]
        positions = [position for position, _ in plans]
        base, token = self._tokens[0], next_token(self._owner.secret, positions)
        tokens = [base, *self._tokens[1:][-(MAX_TOKENS - 2) :], token]
        try:
            self._folder.write_state(self._owner, tokens, positions)
        except OSError as error:  # whichever state is there now, the anchor still holds `base`
            raise PoolError(
                f"{self._folder.path / STATE} cannot be written "
                f"{because(error, self._folder.path, 'make room and try again')}; no mask was handed out"
            ) from error
        self._tokens, self._settled = tokens, False
        for stock, position in zip(self._stocks, positions, strict=True):
            stock.position = position  # burnt, whatever the anchor says
        if not self._anchor.swap(self._owner.pool_id, base, token):
            raise self._copied()
        self._tokens, self._settled = [token], True
        for stock, (_, pieces) in zip(self._stocks, plans, strict=True):
            stock.hand.extend(pieces)
            stock.batches = [
                batch for batch in stock.batches if burnt_rows(stock.position, batch) < batch.rows
            ]

    def _settle(self) -> None:
        """Find out which of the state's tokens the anchor holds, after opening or a swap that failed."""
        if self._settled:
            return
        for token in reversed(self._tokens):
            if self._anchor.swap(self._owner.pool_id, token, token):
                if token != self._tokens[0]:
                    self._tokens = [token]
                self._settled = True  # a late swap from tokens[0] to one of the others may still come
                return
        raise self._copied()

    def _copied(self) -> PoolError:
        self._over = (
            f"{self._folder.path} is a copy or a restored backup, or a copy of it was opened: its masks may "
            "have been used; delete the folder and deal again"
        )
        for stock in self._stocks:
            stock.drop()
        return PoolError(self._over)

    def _scan(self) -> None:
        """Find new batches, and delete those that are burnt and not in hand."""
        self._looked = time.monotonic()
        self._known = self._folder.batches(self._owner, self._known)
        self._dealt.update(mark for batch in self._known.values() for mark in batch.marks)
        for stock in self._stocks:
            stock.batches = []
        for batch in sorted(self._known.values(), key=lambda batch: (batch.number, batch.path)):
            stock = self._stocks[batch.group]
            if not self._shunned.isdisjoint(batch.marks):
                continue
            if burnt_rows(stock.position, batch) < batch.rows:
                stock.batches.append(batch)
            else:
                self._delete_used(stock, [batch])

    def _delete_used(self, stock: _Stock, batches: Sequence[MaskFile]) -> None:
        for batch in batches:
            in_hand = any(held is batch for held, _, _ in stock.hand)
            if burnt_rows(stock.position, batch) == batch.rows and not in_hand:
                self._known.pop(batch.path, None)
                with contextlib.suppress(OSError):  # it is burnt, deleted or not
                    durable.remove(batch.path)
