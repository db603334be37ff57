"""Diagonals that make the rows and columns of a matrix equal in norm (SPEC split step 2).

A column that is small beside the others has a singular vector of its own, nearly a unit vector: the share
would show the image of that vector, a column of the secret basis.  And what such a column multiplies is often
an outlier that takes the bits of the rest of the input.  Between the diagonals both are gone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import new_key
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.jit import fast_jit, jit
from sliplm.arithmetic.rotation import gaussians

Factors = npt.NDArray[np.float64]

_DEAD = 2.0**-100  # of the largest norm: a row or column as small is zero for every purpose
_TINY = 2.0**-110  # float32 has room for the factors of a norm above
_ROUNDS, _CLOSE = 16, 0.01  # at most, and until all rows have the same norm to so much


class Equilibrated(NamedTuple):
    """W = diag(d_out) matrix diag(d_in).

    Attributes:
        matrix: float32 [m, n], each column of norm sqrt(m), each row of about sqrt(n).
        d_out, d_in: float32 [m] and [n]; 0 where the row or column of W is dead.
    """

    matrix: Floats
    d_out: Floats
    d_in: Floats


def equilibrated(w: Floats) -> Equilibrated:
    """W, float32 [m, n], finite, between its diagonals.

    Dead rows and columns are filled with random numbers as large as the others, so that no null space shows
    where they are; their factor 0 takes them out of every product.  A matrix of zeros stays one.
    """
    rows, columns = _alive(_row_squares(w, np.ones(w.shape[1]))), _alive(_column_squares(w, np.ones(len(w))))
    m, n = int((rows > 0).sum()), int((columns > 0).sum())
    for _ in range(_ROUNDS):  # Sinkhorn and Knopp's iteration on the squares
        columns = np.sqrt(_column_squares(w, _inverse(rows)) / max(m, 1)) * (columns > 0)
        norms = np.sqrt(_row_squares(w, _inverse(columns)) / max(n, 1)) * (rows > 0)
        if np.all(np.abs(norms - rows) <= _CLOSE * rows):
            break
        rows = norms
    size = float(np.sqrt(np.square(columns).sum() / max(n, 1))) or 1.0  # the columns' factors are about 1
    d_out, d_in = (rows * size).astype(np.float32), (columns / size).astype(np.float32)
    matrix = divided(w * _inverse(d_out).astype(np.float32)[:, None], d_in)
    if m and n:
        _fill(matrix, d_out == 0, d_in == 0)
    return Equilibrated(matrix, d_out, d_in)


def column_factors(w: Floats) -> Floats:
    """Norms of the columns of W over their root mean square, float32 [n]; 0 for a dead one.

    The same bits on every machine: sums are made in the order of the rows (M40).
    """
    squares = _column_squares(w, np.ones(len(w)))
    norms = np.sqrt(squares) * _alive(squares)
    live = norms[norms > 0]
    return (norms / np.sqrt(np.square(live).sum() / len(live)) if len(live) else norms).astype(np.float32)


def divided(w: Floats, d_in: Floats) -> Floats:
    """W diag(d_in)^-1, float32 [m, n]; where a factor is 0, so is the column."""
    found: Floats = w * _inverse(d_in).astype(np.float32)
    return found


def _alive(squares: Factors) -> Factors:
    """1 where there is something, 0 where not."""
    norms = np.sqrt(squares)
    return (norms > max(_TINY, _DEAD * norms.max(initial=0.0))).astype(np.float64)


def _inverse(factors: npt.NDArray[np.floating]) -> Factors:
    with np.errstate(divide="ignore"):
        return np.where(factors > 0, 1 / factors.astype(np.float64), 0.0)


def _fill(matrix: Floats, rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]) -> None:
    m, n = matrix.shape
    if rows.any():
        matrix[rows] = gaussians(new_key(), int(rows.sum()) * n).reshape(-1, n)
    if columns.any():
        matrix[:, columns] = gaussians(new_key(), int(columns.sum()) * m).reshape(m, -1)


@jit
def _column_squares(w: Floats, factors: Factors) -> Factors:
    total = np.zeros(w.shape[1])
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            value = np.float64(w[i, j]) * factors[i]
            total[j] += value * value
    return total


@fast_jit
def _row_squares(w: Floats, factors: Factors) -> Factors:
    total = np.empty(w.shape[0])
    for i in range(w.shape[0]):
        row, square = w[i], 0.0
        for j in range(row.size):
            value = np.float64(row[j]) * factors[j]
            square += value * value
        total[i] = square
    return total
