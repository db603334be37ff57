"""One-time masks: derive, deal, burn (SPEC steps O1 to O3 and 2).

A mask is a uniform row r in Z_p^n with its product u = w r.  A batch of masks has one key: r is made from it
again when it is used, only u is kept.  `maskpool.MaskPool.take` burns what it hands out before anybody sees
it, so that no row is handed out twice.  `pool.DiskPool` does the same for masks on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sliplm.arithmetic.field import Elements, derive_key, new_key, uniform_rows, uniform_words
from sliplm.errors import MaskError
from sliplm.secrecy import Secret

_ROWS_AT_ONCE = 16  # rows of r made from the key together: opening a key stream costs more than a row of it


class Origin(NamedTuple):
    """The rows of a batch from `first` on, as `field.uniform_words` takes them."""

    key: bytes
    stream: int
    first: int

    def __repr__(self) -> str:
        return f"Origin(stream={self.stream}, first={self.first}, key hidden)"


class Masks(Secret):
    """Masks for one message, burnt already.

    Attributes:
        origin: what their r is made of, where nobody has made it yet; None where it is there.
    """

    __slots__ = ("_n", "_parts", "_u", "_words", "origin")

    def __init__(
        self, words: Elements | None, u: Elements | None, n: int, origin: Origin | None = None,
        parts: Sequence[Masks] = (),
    ) -> None:  # fmt: skip
        self._words, self._u, self._n, self.origin = words, u, n, origin
        self._parts = parts

    @property
    def parts(self) -> Sequence[Masks]:
        """They, or what was put one after the other without a copy."""
        return self._parts or (self,)

    @property
    def u(self) -> Elements:
        """w r, uint32 [rows, m]."""
        u = self._u
        if u is None:
            u = self._u = np.concatenate([part.u for part in self.parts])
        return u

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(len(part.u) for part in self.parts)

    @property
    def words(self) -> Elements:
        """uint32 [rows, n or more], contiguous; the first n of each row are r."""
        words = self._words
        if words is None and len(self.parts) > 1:
            words = self._words = np.concatenate([part.words for part in self.parts])
        if words is None:
            if self.origin is None:
                raise MaskError("masks without a key; load the model again")
            words = self._words = uniform_words(*self.origin, len(self.u), self._n)
        return words

    def __repr__(self) -> str:
        return f"Masks(rows={self.rows}, secrets hidden)"

    @property
    def r(self) -> Elements:
        """The rows that hide x: uint32 [rows, n]."""
        return self.words[:, : self._n]

    def __getitem__(self, rows: slice) -> Masks:
        """Some of them: nobody else may be handed these."""
        return Masks(self.words[rows], self.u[rows], self._n)


Fresh = Callable[[], tuple[bytes, Elements]]
"""Draws a new key and makes its r, uint32 [rows, n]: once for each party that is asked, for a key that has
gone to one is never shown to another.  The last one drawn is the batch's."""


class Dealt(NamedTuple):
    """u = w r, uint32 [rows, m], checked; and who dealt it: marks of 32 bytes, of the key or process and of
    the certificate; none for this machine.
    """

    u: Elements
    marks: tuple[bytes, ...] = ()


@dataclass(repr=False)
class Batch(Secret):
    """Masks dealt under one key; rows from `used` on have not been handed out."""

    key: bytes
    stream: int
    n: int
    u: Elements
    marks: tuple[bytes, ...] = ()
    used: int = 0
    _words: Elements | None = None  # rows `_first` on, made from the key a few at a time
    _first: int = 0

    def __repr__(self) -> str:
        return f"Batch(rows={len(self.u)}, used={self.used}, secrets hidden)"

    def burn(self, rows: int, *, made: bool = True) -> Masks:
        """Hand out up to `rows` masks, and never again; made: with their r."""
        first, last = self.used, min(len(self.u), self.used + rows)
        self.used = last
        if not made:
            return Masks(None, self.u[first:last], self.n, Origin(self.key, self.stream, first))
        words = self._words
        if words is None or last > self._first + len(words):
            count = min(len(self.u), max(last, first + _ROWS_AT_ONCE)) - first
            words = self._words = uniform_words(self.key, self.stream, first, count, self.n)
            self._first = first
        start = self._first
        return Masks(words[first - start : last - start], self.u[first:last], self.n)


def joined(parts: Sequence[Masks]) -> Masks:
    """Masks one after the other."""
    if len(parts) == 1:
        return parts[0]
    if all(part.origin is not None for part in parts):
        return Masks(None, None, parts[0]._n, parts=parts)
    words, u = np.concatenate([p.words for p in parts]), np.concatenate([p.u for p in parts])
    return Masks(words, u, parts[0].r.shape[1])


def fresh_key(freshness: bytes = b"") -> bytes:
    """A key of 32 bytes for one batch.

    Args:
        freshness: bytes that a machine set back to a snapshot would not see again, such as a peer's nonce.
            With the clock they go into the key beside the system's randomness, which a snapshot repeats.
    """
    return derive_key(new_key(), f"batch/{time.time_ns()}/{freshness.hex()}")


def deal(group: int, n: int, rows: int, products: Callable[[Fresh], Dealt], freshness: bytes) -> Batch:
    """A fresh batch for a group of n inputs (O1, O2).

    Args:
        products: draws keys, and gives w r mod p of the last one's r, checked (O3).
        freshness: as for `fresh_key`.
    """
    drawn: list[bytes] = []

    def fresh() -> tuple[bytes, Elements]:
        drawn.append(fresh_key(freshness))
        return drawn[-1], np.ascontiguousarray(uniform_rows(drawn[-1], group, 0, rows, n))

    u, marks = products(fresh)
    return Batch(drawn[-1], group, n, u, marks)
