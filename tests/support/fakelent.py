"""Lent memory without a card: what two processes share is a file in memory, mapped wherever it is used."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fakecard import at
from sliplm.arithmetic import kernels
from sliplm.arithmetic.kernels.cuda import lent
from sliplm.arithmetic.kernels.cuda.matrix import CudaMatrix
from sliplm.errors import CardError
from sliplm.network.memory import _libc
from sliplm.parties import card_codec, lending


class _Shared:
    def __init__(self, handle: int, size: int) -> None:
        if os.fstat(handle).st_size < 2 * size:
            raise CardError("less memory than was said")
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        self.size, self.questions = (
            size,
            int(_libc().mmap(None, 2 * size, rights, mmap.MAP_SHARED, handle, 0)),
        )
        self.answers = self.questions + size


class FakeLent(_Shared):
    def __init__(self, card: Any, size: int) -> None:
        self._handle = os.memfd_create("lent")
        os.ftruncate(self._handle, 2 * size)
        super().__init__(self._handle, size)
        self.card = card

    def descriptor(self) -> int:
        return os.dup(self._handle)


class FakeBorrowed(_Shared):
    def __init__(self, descriptor: int, size: int, cards: Sequence[Any]) -> None:
        assert cards
        super().__init__(descriptor, size)


class FakeMatrix(CudaMatrix):
    """Multiplies on the processor what lies at addresses."""

    def __init__(self, card: Any, w: kernels.Integers) -> None:
        self.card, self.shape, self._matrix = card, w.shape, kernels.prepare(w, threads=1)

    def product(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return self._matrix.product(x) if out is None else self._matrix.product(x, out)

    def across(self, x: int, out: int, rows: int) -> None:
        m, n = self.shape
        at(out, (rows, m), np.uint32)[:] = self._matrix.product(at(x, (rows, n), np.uint32).copy())


def lend_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on memory is lent so."""
    for module in (lent, lending, card_codec):
        monkeypatch.setattr(module, "Lent", FakeLent)
    for module in (lent, lending):
        monkeypatch.setattr(module, "Borrowed", FakeBorrowed)
    monkeypatch.setattr(lending, "SIZE", 1 << 20)
