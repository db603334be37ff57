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
    largest = np.float32(2 ** (precision - 1) - 1)
    peak = np.abs(w).max(axis=1, initial=0.0)
    # below the smallest normal number a scale would lose its bits; such a row is zero for every purpose
    scale = np.where(peak > largest * np.finfo(np.float32).tiny, peak / largest, np.float32(1)).astype(
        np.float32
    )
    rounded = np.rint(w / scale[:, None])
    np.clip(rounded, -largest, largest, out=rounded)
    return np.ascontiguousarray(rounded.astype(np.int8 if precision <= 8 else np.int16)), scale


def norm_bound(w: npt.NDArray[np.integer]) -> float:
    """N >= max_i ||w_i||_2 over the rows of the integers w [m, n], at least 1."""
    largest = max((int(np.dot(row, row)) for row in (r.astype(np.int64) for r in w)), default=0)
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
def rounding_losses(
    x: Floats, d_in: Floats, y: Floats, alpha: npt.NDArray[np.float64], noise: float
) -> npt.NDArray[np.float64]:
    """What rounding an input to integers has cost: expected relative errors, 0 where nothing is to lose.

    Args:
        x, y: input [rows, n] and answer [rows, m].  d_in: [n].  alpha: [rows].
        noise: of the answer, times alpha.

    Returns: float64 [rows, 2], the error of the answer, and that of what D_in x has beside its largest entry.
    """
    losses = np.zeros((x.shape[0], 2))
    for i in range(x.shape[0]):
        total = peak = answer = 0.0
        for j in range(x.shape[1]):
            square = np.float64(d_in[j] * x[i, j]) ** 2
            total += square
            if square > peak:  # noqa: PLR1730 -- compiled to vectors, unlike max
                peak = square
        for j in range(y.shape[1]):
            answer += np.float64(y[i, j]) ** 2
        if answer > 0:
            losses[i, 0] = noise / (alpha[i] * np.sqrt(answer))
        if peak > 0:
            losses[i, 1] = np.sqrt(x.shape[1] / 12 / (total - peak)) / alpha[i] if total > peak else np.inf
    return losses


@jit
def to_field(value: np.float32, alpha: float) -> np.uint64:
    """round(alpha * value) as an element, uint64 below p (SPEC step 1)."""
    scaled = np.int64(np.rint(alpha * np.float64(value)))
    return np.uint64(scaled + np.int64(P) if scaled < 0 else scaled)
