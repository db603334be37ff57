"""Real numbers <-> field elements, with the bound that rules out overflow (SPEC section 3)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import P
from sliplm.arithmetic.jit import fast_jit, jit
from sliplm.errors import InputError

Floats = npt.NDArray[np.float32]

MIN_PRECISION, MAX_PRECISION = 4, 12
ROOM = (P - 1) / 2 - 1  # for an answer; the 1 absorbs float64 rounding (below 10^-2)
EDGE = 7 / 8  # of it: what an answer in a secret basis stays within


def quantise_rows(w: Floats, precision: int) -> tuple[npt.NDArray[np.integer], Floats]:
    """Round each row to integers of `precision` bits (SPEC split step 3).

    Args:
        w: float32 [m, n], finite.  precision: bits b of an integer, sign included, 4 to 12.

    Returns: integers w, int8 (b <= 8) or int16 [m, n], with |w| <= 2^(b-1) - 1; row scales s float32 [m]
        with w * s ~ the input.
        A row of zeros has scale 1.
    """
    largest = largest_integer(precision)
    scale = row_scales(np.abs(w).max(axis=1, initial=0.0), precision)
    rounded = np.rint(w / scale[:, None])
    np.clip(rounded, -largest, largest, out=rounded)
    return np.ascontiguousarray(rounded.astype(np.int8 if precision <= 8 else np.int16)), scale


def largest_integer(precision: int) -> np.float32:
    """2^(b-1) - 1, which |w| does not exceed."""
    return np.float32(2 ** (precision - 1) - 1)


def row_scales(peak: Floats, precision: int) -> Floats:
    """The scales of rows whose largest entries have these sizes, float32 [m]; 1 for a row of zeros."""
    largest = largest_integer(precision)
    # below the smallest normal number a scale would lose its bits; such a row is zero for every purpose
    usual = peak > largest * np.finfo(np.float32).tiny
    return np.where(usual, peak / largest, np.float32(1)).astype(np.float32)


def norm_bound(w: npt.NDArray[np.integer]) -> float:
    """N >= max_i ||w_i||_2 over the rows of the integers w [m, n], at least 1."""
    return bound_of_squares(
        max((int(np.dot(row, row)) for row in (r.astype(np.int64) for r in w)), default=0)
    )


def bound_of_squares(largest: int) -> float:
    """`norm_bound` from the largest ||w_i||_2^2."""
    return max(1.0, math.nextafter(math.sqrt(largest), math.inf))


def scale_limit(norm: float, n: int) -> float:
    """alpha * ||x||_2 for an input x of n entries: the largest scaling at which no product with rows of norm
    N can overflow.

    By Cauchy-Schwarz |w_i x_int| <= N (alpha ||x|| + sqrt(n)/2) <= ROOM.

    Raises: InputError when rows this long leave an input no bits (at 12 bits beyond about 2^20 columns):
        rounding would make half of any answer.
    """
    limit = ROOM / norm - math.sqrt(n) / 2
    if limit < max(1.0, math.sqrt(n / 3)):
        raise InputError(
            f"rows of norm {norm:.3g} over {n} columns leave no room in the field; use a lower precision"
        )
    return limit


@fast_jit
def _square_sum(x: Floats) -> float:
    total = np.float64(0)
    for j in range(x.size):
        total += np.float64(x[j]) * np.float64(x[j])
    return total


@jit
def row_alpha(x: Floats, limit: float) -> float:
    """The secret scale alpha of one input row, float64: limit / ||x||_2; 1 for a zero row; NaN where an
    entry is not finite.
    """
    square = _square_sum(x)
    if square == 0.0:
        return 1.0
    if not np.isfinite(square):
        return np.nan
    return float(limit / np.sqrt(square))


@fast_jit
def input_loss(x: Floats, d_in: Floats, alpha: float) -> float:
    """What rounding one input to integers has cost: the expected relative error of what D_in x, [n], has
    beside its largest entry; 0 where nothing is to lose.
    """
    total = peak = 0.0
    for j in range(x.size):
        square = np.float64(d_in[j] * x[j]) ** 2
        total += square
        if square > peak:  # noqa: PLR1730 -- compiled to vectors, unlike max
            peak = square
    if peak == 0:
        return 0.0
    return float(np.sqrt(x.size / 12 / (total - peak)) / alpha) if total > peak else np.inf


@fast_jit
def answer_loss(y: Floats, noise: float, alpha: float) -> float:
    """What it has cost one answer y, [m]: the expected relative error; 0 where nothing is to lose.

    Args:
        noise: of the answer, times alpha.
    """
    answer = 0.0
    for j in range(y.size):
        answer += np.float64(y[j]) ** 2
    return float(noise / (alpha * np.sqrt(answer))) if answer > 0 else 0.0


@jit
def to_field(value: np.float32, alpha: float) -> np.uint64:
    """round(alpha * value) as an element, uint64 below p (SPEC step 1)."""
    scaled = np.int64(np.rint(alpha * np.float64(value)))
    return np.uint64(scaled + np.int64(P) if scaled < 0 else scaled)
