"""How large the answers of a matrix in a secret basis get, but with negligible probability (SPEC section 3).

The rows of Q_out v are, for a v that does not depend on Q_out, about |v| / sqrt(m) each; so an input that is
aligned with a row of w, against which the bound by norms guards, does not happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import new_key
from sliplm.arithmetic.fixedpoint import EDGE, ROOM, Floats
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.rotation import gaussians, make

CHANCE = 2.0**-64  # that one product of a fixed input has an answer beyond EDGE
_BEYOND = (2 - EDGE) / EDGE  # times the bound: where an answer could pass for a small one
_RESERVE = 1 + 2.0**-8  # for float32: the rotations are exact to 10^-5
_STARTS, _POWERS = 32, 24
_SHARE = 2.0**-3.25 * math.sqrt(math.pi / 2)  # that all starts have less has probability 2^-104
_BINS = 64  # of an entry's size, for each sqrt(1/m)
_WIDEST = 16  # sqrt(1/m): a row with a larger entry is given up
_STEP = 1.01  # from one argument of the moment function to the next
_ROWS = 64  # of a rotation at a time

Vector = npt.NDArray[np.float64]
Product = Callable[[npt.NDArray[np.floating]], npt.NDArray[np.floating]]


def likely_norm(hidden: Floats, w: npt.NDArray[np.integer], scale: Floats, kind: str, key: bytes) -> float:
    """N for `scale_limit` so that answers stay within EDGE of the field, but with probability CHANCE over the
    secret Q_out for one input that does not depend on it.

    Args:
        hidden: W_R = Q_out M Q_in^T, float32 [m, n].
        w, scale: its integers [m, n] and the scales of its rows, float32 [m].
        kind, key: of Q_out, "fast" or "haar".
    """
    m, n = w.shape
    norms, errors = np.empty(m), np.empty(m)
    for i, (row, integers, s) in enumerate(zip(hidden, w, scale, strict=True)):
        exact = integers.astype(np.float64)
        norms[i] = math.sqrt(float(np.dot(exact, exact)))
        errors[i] = np.linalg.norm(row.astype(np.float64) / float(s) - exact)
    return likely_norm_of(
        norms, errors, scale, n, kind,
        largest=lambda enough: spectral_bound(hidden, enough), uneven=lambda: unevenness(key, m),
    )  # fmt: skip


def likely_norm_of(
    norms: Vector, errors: Vector, scale: Floats, n: int, kind: str,
    *, largest: Callable[[float], float], uneven: Callable[[], Vector],
) -> float:  # fmt: skip
    """`likely_norm` of a matrix that lies anywhere.

    Args:
        norms, errors: of w's rows, and of what rounding has added to W_R's in their scales: [m].
        n: columns.
        largest: `spectral_bound` of W_R, for its argument `enough`.
        uneven: `unevenness` of Q_out, asked only of a fast one.
    """
    m = len(norms)
    longest = int(np.argmax(norms))
    enough = norms[longest] * float(scale[longest]) / _least(kind, m)
    found = largest(enough)
    if found < enough:  # else the longest row's norm is the bound, whatever the basis
        size = found / scale.astype(np.float64)
        reached = _reach(kind, m, uneven)
        sizes = np.minimum(norms, _RESERVE * (reached * size + errors))
    else:
        sizes = norms
    left = EDGE * ROOM - norms * math.sqrt(n) / 2  # the rounding of x_int, bounded for certain
    limit = float((left / np.maximum(1.0, sizes)).min())
    return max(1.0, math.nextafter(ROOM / (max(0.0, limit) + math.sqrt(n) / 2), math.inf))


def reach(kind: str, key: bytes, m: int) -> Vector:
    """tau [m]: for a fixed unit vector v, |(Q v)_i| <= tau_i for all i but with probability CHANCE, and
    |(Q v)_i| <= 9/7 tau_i but with probability 2^-104.

    Args:
        kind, key, m: of the rotation Q, "fast" or "haar".
    """
    return _reach(kind, m, lambda: unevenness(key, m))


def _reach(kind: str, m: int, uneven: Callable[[], Vector]) -> Vector:
    least = _least(kind, m)
    return np.full(m, least) if kind == "haar" else np.minimum(1.0, least * np.sqrt(uneven()))


def _least(kind: str, m: int) -> float:
    """`reach` of a row as even as normal numbers, and of every row of a uniform rotation."""
    if kind == "haar":  # P(|u_1| >= tau) <= (1 - tau^2)^((m-1)/2) for a uniform unit vector u
        return math.sqrt(-math.expm1(2 / (m - 1) * math.log(CHANCE / m))) if m > 1 else 1.0
    return min(1.0, math.sqrt(2 * math.log(2 * m / CHANCE) / m))


class Moments:
    """What `unevenness` asks of the rows of a rotation of R^m.

    Attributes:
        bins, count: entries of size j / bins or more, below (j + 1) / bins, are counted together; what is
            beyond the last of `count` such places is with it.
        points: arguments of the moment function.  table: float64 [count - 1, points] its terms.
    """

    least = (2 * math.cosh(1 / 4) - 2) * 4**2  # below the first point

    def __init__(self, m: int) -> None:
        edges = np.arange(1, _WIDEST * _BINS + 1) / _BINS  # entries are counted by size, rounded up
        first, last = 1 / (4 * _WIDEST), _BEYOND * math.sqrt(2 * math.log(2 * m / CHANCE))
        self.points = first * _STEP ** np.arange(math.ceil(math.log(last / first, _STEP)) + 1)
        self.table = np.cosh(np.outer(edges, self.points))
        self.bins, self.count = _BINS * math.sqrt(m), len(edges) + 1


def unevenness(key: bytes, m: int) -> Vector:
    """kappa [m] of each row q of a fast rotation: ln mean_l cosh(mu sqrt(m) q_l) <= kappa mu^2 / 2 for all mu
    that `reach` needs.

    About 1 where the entries are as even as normal numbers; infinite where one is far larger than the rest.
    """
    turn, asked = make("fast", key, m), Moments(m)
    found = np.empty(m)
    for start in range(0, m, _ROWS):
        ones = np.zeros((min(_ROWS, m - start), m), np.float32)
        np.fill_diagonal(ones[:, start:], 1)
        counts = _sizes(turn.apply_transpose(ones), asked.bins, asked.count)
        with np.errstate(divide="ignore"):
            moments = np.log(counts[:, :-1] @ asked.table / m)  # which grow: at most that at the next point
        kappa = (2 * moments[:, 1:] / asked.points[:-1] ** 2).max(axis=1)
        found[start : start + len(ones)] = np.where(counts[:, -1] > 0, np.inf, kappa)
    return np.maximum(found, asked.least)


def spectral_bound(matrix: Floats, enough: float = math.inf) -> float:
    """At least the largest singular value of a matrix whose squares float32 can hold, but with probability
    2^-104: by the power method from random starts, one of which has its share of the singular vector.

    Args:
        enough: where the singular value is seen to be no less than this, what was seen of it will do.
    """
    return power_bound(lambda x: matrix.T @ (matrix @ x), matrix.shape[1], enough)


def power_bound(squared: Product, n: int, enough: float = math.inf) -> float:
    """`spectral_bound` of a matrix W [m, n] that lies anywhere.

    Args:
        squared: W^T W x for x, float32 or what it gave last, [n, any].
    """
    turned: npt.NDArray[np.floating]
    turned = gaussians(new_key(), n * _STARTS).reshape(n, _STARTS).astype(np.float32)
    grown = -math.log(_SHARE)
    lengths = np.linalg.norm(turned.astype(np.float64), axis=0)
    for _ in range(_POWERS):
        turned = squared(turned)
        before, lengths = lengths, np.linalg.norm(turned.astype(np.float64), axis=0)
        size = lengths.max()
        if size == 0:
            return 0.0
        seen = math.sqrt((lengths / np.maximum(before, np.finfo(np.float32).tiny)).max())
        if seen >= enough:
            return seen
        turned /= np.float32(size)
        lengths /= size
        grown += math.log(size)
    return math.exp(grown / (2 * _POWERS))


@jit
def _sizes(rows: Floats, bins: float, count: int) -> npt.NDArray[np.float64]:
    """How many entries of each row have a size of j / bins or more, below (j + 1) / bins; the last column has
    the rest.
    """
    out = np.zeros((rows.shape[0], count))
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[i, min(count - 1, int(abs(rows[i, j]) * bins))] += 1
    return out
