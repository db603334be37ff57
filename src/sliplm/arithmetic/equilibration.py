"""Diagonals that make the rows and columns of a matrix equal in norm (SPEC split step 2).

A column that is small beside the others has a singular vector of its own, nearly a unit vector: the share
would show the image of that vector, a column of the secret basis.  And what such a column multiplies is often
an outlier that takes the bits of the rest of the input.  Between the diagonals both are gone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import new_key
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.rotation import gaussians

Factors = npt.NDArray[np.float64]

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
    matrix = divided(w * _inverse(d_out).astype(np.float32)[:, None], d_in)
    if d_in.any():
        _fill(matrix, d_out == 0, d_in == 0)
    return Equilibrated(matrix, d_out, d_in)


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
    found: Floats = w * _inverse(d_in).astype(np.float32)
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
    """D_out and D_in by Sinkhorn and Knopp's iteration on the squares of W; D_in is about 1."""
    ones = np.ones(w.shape[0]), np.ones(w.shape[1])
    rows, columns = _alive(_row_squares(w, ones[1])), _alive(_column_squares(w, ones[0]))
    m, n = max(1, int(np.count_nonzero(rows))), max(1, int(np.count_nonzero(columns)))
    for _ in range(_ROUNDS):
        norms = np.sqrt(_row_squares(w, _inverse(columns)) / n) * (rows > 0)
        close = bool(np.all(np.abs(norms - rows) <= _CLOSE * rows))
        rows = norms
        columns = np.sqrt(_column_squares(w, _inverse(rows)) / m) * (columns > 0)
        if close:
            break
    size = math.sqrt(math.fsum(columns * columns) / n) or 1.0
    return (rows * size).astype(np.float32), (columns / size).astype(np.float32)


def _alive(squares: Factors) -> Factors:
    """1 where there is something, 0 where not."""
    norms = np.sqrt(squares)
    alive: Factors = (norms > max(_TINY, _DEAD * norms.max(initial=0.0))).astype(np.float64)
    return alive


def _inverse(factors: npt.NDArray[np.floating]) -> Factors:
    found = np.zeros(len(factors))
    np.divide(1.0, factors, out=found, where=factors > 0, dtype=np.float64)
    return found


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
