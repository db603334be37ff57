"""Exact products on any machine: 64-bit integer loops for few rows, float64 BLAS for many.

float64 is exact below 2^53: with |w| < 2^11 and x cut in halves of 16 bits, sums stay below it up to 2^26
columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, P
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.kernels.threads import in_parallel, pieces

_FEW_ROWS = 4
_BLOCK = 256  # rows of w turned into float64 at a time


class PortableMatrix:
    """w [m, n] as it is."""

    kernel = "portable"

    def __init__(self, w: npt.NDArray[np.integer], threads: int = 1) -> None:
        self.shape = (w.shape[0], w.shape[1])
        self._w, self._threads = np.ascontiguousarray(w), threads

    def product(self, x: Elements, out: Elements | None = None) -> Elements:
        """w x mod p for each row x: uint32 [rows, n] -> uint32 [rows, m], new or `out`."""
        out = np.empty((x.shape[0], self.shape[0]), np.uint32) if out is None else out
        x = np.ascontiguousarray(x)
        if x.shape[0] <= _FEW_ROWS:
            threads = pieces(self._threads, self._w.size * x.shape[0])
            in_parallel(lambda first, last: _few_rows(self._w, x, out, first, last), self.shape[0], threads)
        else:
            self._many_rows(x, out)
        return out

    def _many_rows(self, x: Elements, out: Elements) -> None:
        low, high = (x & 0xFFFF).astype(np.float64), (x >> 16).astype(np.float64)
        for first in range(0, self.shape[0], _BLOCK):
            w = self._w[first : first + _BLOCK].astype(np.float64).T
            wide = np.mod((high @ w).astype(np.int64), P) * 65536 + (low @ w).astype(np.int64)
            out[:, first : first + _BLOCK] = np.mod(wide, P)


@jit
def _few_rows(w: npt.NDArray[np.integer], x: Elements, out: Elements, first: int, last: int) -> None:
    n = w.shape[1]
    for i in range(first, last):
        for r in range(x.shape[0]):
            total = np.int64(0)
            for start in range(0, n, 1 << 19):  # terms below 2^43: 2^19 of them stay below 2^62
                weights, elements = w[i, start : start + (1 << 19)], x[r, start : start + (1 << 19)]
                part = np.int64(0)
                for j in range(weights.size):
                    part += np.int64(weights[j]) * np.int64(elements[j])
                total += part % np.int64(P)
            out[r, i] = np.uint32(total % np.int64(P))
