"""Diagonals that make the rows and columns of a matrix equal in norm (SPEC split step 2).

A column that is small beside the others has a singular vector of its own, nearly a unit vector: the share
would show the image of that vector, a column of the secret basis.  And what such a column multiplies is often
an outlier that takes the bits of the rest of the input.  Between the diagonals both are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import new_key
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.rotation import gaussians

Factors = npt.NDArray[np.float64]
Squares = Callable[[Factors], Factors]
"""Of W between a diagonal and nothing: the squared norms of its rows, or columns, float64."""

_DEAD = 2.0**-100  # of the largest norm: a row or column as small is zero for every purpose
_TINY = 2.0**-110  # float32 has room for the factors of a norm above
_ROUNDS, _CLOSE = 16, 0.01  # at most, and until all rows have the same norm to so much
_FAR = 16  # times the median: the columns of a matrix in clear beyond are levelled


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
    d_out, d_in = _factors(w)
    matrix = divided(w * inverse(d_out).astype(np.float32)[:, None], d_in)
    if d_in.any():
        dead_rows, dead_columns = fillings(d_out, d_in)
        matrix[d_out == 0] = dead_rows
        matrix[:, d_in == 0] = dead_columns
    return Equilibrated(matrix, d_out, d_in)


def fillings(d_out: Floats, d_in: Floats) -> tuple[Floats, Floats]:
    """Secret random numbers for the dead rows, float32 [dead, n], and for the dead columns, [m, dead]."""
    m, n = len(d_out), len(d_in)
    rows, columns = int(np.count_nonzero(d_out == 0)), int(np.count_nonzero(d_in == 0))
    return (
        gaussians(new_key(), rows * n).reshape(rows, n).astype(np.float32),
        gaussians(new_key(), columns * m).reshape(m, columns).astype(np.float32),
    )


def column_factors(w: Floats) -> Floats:
    """D_in of W alone, for a matrix in clear, whose rows keep scales of their own: float32 [n], 0 for a dead
    column.

    Only columns far from the others are levelled: what nothing mixes is rounded best as it is.  The same bits
    on every machine (M40): all sums are made in one order.
    """
    factors = _factors(w)[1]
    if not factors.any():
        return factors
    level = factors / np.median(factors[factors > 0])
    return np.where((level >= 1 / _FAR) & (level <= _FAR), np.float32(1), level)


def divided(w: Floats, d_in: Floats) -> Floats:
    """W diag(d_in)^-1, float32 [m, n]; where a factor is 0, so is the column."""
    found: Floats = w * inverse(d_in).astype(np.float32)
    return found


def localisation(matrix: Floats, null: int) -> float:
    """The largest entry of a singular vector, of those on the smaller side of [m, n] that are well defined.

    1 where one of them is a unit vector, whose image is then a column of the secret basis; about 0.2 for a
    Gaussian matrix of 576 columns.

    Args:
        null: singular values that are zero, whose vectors are left out.
    """
    small = matrix if matrix.shape[1] <= matrix.shape[0] else matrix.T
    gram: Floats = small.T @ small
    vectors = np.linalg.eigh(gram)[1][:, null:]
    return float(np.abs(vectors).max(initial=0.0))


def _factors(w: Floats) -> tuple[Floats, Floats]:
    return diagonals(w.shape, lambda by: _row_squares(w, by), lambda by: _column_squares(w, by))


def diagonals(shape: tuple[int, ...], row_squares: Squares, column_squares: Squares) -> tuple[Floats, Floats]:
    """D_out and D_in by Sinkhorn and Knopp's iteration on the squares of W, wherever that lies; D_in is about
    1.

    Args:
        shape: (m, n) of W.
        row_squares: of W diag(f), [m], for f [n].  column_squares: of diag(f) W, [n], for f [m].
    """
    ones = np.ones(shape[0]), np.ones(shape[1])
    rows, columns = _alive(row_squares(ones[1])), _alive(column_squares(ones[0]))
    m, n = max(1, int(np.count_nonzero(rows))), max(1, int(np.count_nonzero(columns)))
    for _ in range(_ROUNDS):
        norms = np.sqrt(row_squares(inverse(columns)) / n) * (rows > 0)
        close = bool(np.all(np.abs(norms - rows) <= _CLOSE * rows))
        rows = norms
        columns = np.sqrt(column_squares(inverse(rows)) / m) * (columns > 0)
        if close:
            break
    size = math.sqrt(math.fsum(columns * columns) / n) or 1.0
    return (rows * size).astype(np.float32), (columns / size).astype(np.float32)


def _alive(squares: Factors) -> Factors:
    """1 where there is something, 0 where not."""
    norms = np.sqrt(squares)
    alive: Factors = (norms > max(_TINY, _DEAD * norms.max(initial=0.0))).astype(np.float64)
    return alive


def inverse(factors: npt.NDArray[np.floating]) -> Factors:
    """1 / f, float64; 0 where f is 0."""
    found = np.zeros(len(factors))
    np.divide(1.0, factors, out=found, where=factors > 0, dtype=np.float64)
    return found


@jit
def _column_squares(w: Floats, factors: Factors) -> Factors:
    total = np.zeros(w.shape[1])
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            value = np.float64(w[i, j]) * factors[i]
            total[j] += value * value
    return total


@jit
def _row_squares(w: Floats, factors: Factors) -> Factors:
    total = np.empty(w.shape[0])
    for i in range(w.shape[0]):
        square = 0.0
        for j in range(w.shape[1]):
            value = np.float64(w[i, j]) * factors[j]
            square += value * value
        total[i] = square
    return total
