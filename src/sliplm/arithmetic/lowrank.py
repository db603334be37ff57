"""A (B x) for the rows of a message: what stays in the vault, and what an adapter adds.

Each sum is made in the same order whatever rows there are beside it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.jit import fast_jit

_TILE: Final = 512  # outputs: so much of A stays in the nearest cache for all rows
_TOGETHER: Final = 4  # ranks for which x, or the answer, is read once


@fast_jit
def add_low_rank(
    a_transposed: Floats, b: Floats, x: Floats, out: Floats, place: int, first: int, last: int
) -> None:
    """Add A (B x) to the outputs from `place` on, of rows `first` to `last`.

    Args:
        a_transposed: float32 [k, m].  b: float32 [k, n].  x: float32 [rows, n].
        out: float32 [rows, place + m or more].
    """
    factors = np.empty((last - first, b.shape[0]), np.float32)
    for i in range(first, last):
        _factors(b, x[i], factors[i - first])
    m = a_transposed.shape[1]
    for start in range(0, m, _TILE):
        end = min(m, start + _TILE)
        for i in range(first, last):
            _spread(a_transposed, start, end, factors[i - first], out[i, place + start : place + end])


@fast_jit
def _factors(b: Floats, x: Floats, out: Floats) -> None:
    """out = B x."""
    whole = b.shape[0] // _TOGETHER * _TOGETHER
    for k in range(0, whole, _TOGETHER):
        row0, row1, row2, row3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        sum0 = sum1 = sum2 = sum3 = np.float32(0)
        for j in range(x.size):
            sum0 += row0[j] * x[j]
            sum1 += row1[j] * x[j]
            sum2 += row2[j] * x[j]
            sum3 += row3[j] * x[j]
        out[k], out[k + 1], out[k + 2], out[k + 3] = sum0, sum1, sum2, sum3
    for k in range(whole, b.shape[0]):
        row, total = b[k], np.float32(0)
        for j in range(x.size):
            total += row[j] * x[j]
        out[k] = total


@fast_jit
def _spread(a_transposed: Floats, start: int, end: int, factors: Floats, out: Floats) -> None:
    """out += A factors, for the outputs from `start` to `end`."""
    whole = factors.size // _TOGETHER * _TOGETHER
    for k in range(0, whole, _TOGETHER):
        row0, row1 = a_transposed[k, start:end], a_transposed[k + 1, start:end]
        row2, row3 = a_transposed[k + 2, start:end], a_transposed[k + 3, start:end]
        factor0, factor1, factor2, factor3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        for j in range(out.size):
            out[j] += row0[j] * factor0 + row1[j] * factor1 + row2[j] * factor2 + row3[j] * factor3
    for k in range(whole, factors.size):
        row, factor = a_transposed[k, start:end], factors[k]
        for j in range(out.size):
            out[j] += row[j] * factor
