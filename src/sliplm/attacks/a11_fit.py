"""Attack 11: fit the fast transform's own parameters to a public relative.

With W_R = Q_out W_D Q_in^T and a relative's B near W_D, singular vectors that match in order give
Q_out = U_R diag(s) U_B^T and Q_in = V_R diag(s) V_B^T, for signs s of which all 2^n choices fit W_R equally
well and give the same estimate of W_D (attack 5).  Only the form of the transform can tell them apart.  Where
its Hadamard blocks of size h tile n, every entry of release 0.2's Q is a multiple of 1/h, so that

    F(s) = mean cos(2 pi h Q_out) + mean cos(2 pi h Q_in)

is near 2 for the true signs and near 0 for others.  A search for them follows; then Q is moved to the
lattice.  If it gets there, W_D is read exactly, and with it how the victim differs from its relative.

That is so of release 0.2.  The angles of today's transform leave no lattice: not even all signs lead to W_D.

This is a study of single matrices, on a CPU and without training: for how many unknown signs, from which
closeness on, and at which rank the fast transform gives way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.rotation import fast_block
from sliplm.attacks.former import DEFAULT, FORMER, transform_as

Matrix = npt.NDArray[np.float64]
Signs = npt.NDArray[np.float64]

CLOSE = (0.0001, 0.001, 0.003, 0.01, 0.05, 0.2)  # |B - W| / |W|
RANKS = (0, 1, 4, 16)
GIVEN = (0.0, 0.5, 0.9, 0.95, 0.98, 1.0)  # of the signs that the attacker is told
_SWEEPS = 60  # of the search for signs
_ROUNDS = 40  # of the way to the lattice
_SEEN = 0.003  # part of a column of Q whose lack blurs its lattice no more than can be seen


@dataclass(frozen=True)
class Fit:
    """What a fit found: an estimate of W_D [n, n], the signs, and whether both Q lie on their lattice."""

    estimate: Matrix
    signs: Signs
    solved: bool


@dataclass(frozen=True)
class Trial:
    """One fit to a perturbed copy.

    Attributes:
        kind: of transform, see `former`.
        rank: removed.  closeness: |B - W| / |W|.  given: part of the signs that the attacker was told.
        right: part of the signs that are right in the end.
        solved: whether the transforms were found, so that W_D is read exactly.
        error: |estimate - W_D| / |B_D - W_D|: below 1, something of the difference was read.
    """

    kind: str
    n: int
    rank: int
    closeness: float
    given: float
    right: float
    solved: bool
    error: float


def study(
    weight: Matrix,
    n: int,
    *,
    ranks: Sequence[int] = RANKS,
    close: Sequence[float] = CLOSE,
    given: Sequence[float] = GIVEN,
) -> Iterator[Trial]:
    """Trials on the upper left n x n of a real matrix: closeness and rank with all signs given, then unknown
    signs where that succeeds; and with all signs given the transform of today.

    Args:
        n: such that blocks tile it: a power of two from 16 on.
    """
    random = np.random.default_rng(0)  # of the trials; the transforms have keys of their own
    for rank in (rank for rank in ranks if rank < n):  # of nothing there is nothing to read
        for closeness in close:
            yield _trial(FORMER, weight[:n, :n], rank, closeness, 1.0, random)
    for told in given:
        yield _trial(FORMER, weight[:n, :n], 0, close[0], told, random)
    for closeness in close:
        yield _trial(DEFAULT, weight[:n, :n], 0, closeness, 1.0, random)


def fit(share: Matrix, base: Matrix, rank: int, signs: Signs, free: npt.NDArray[np.bool_]) -> Fit:
    """Fit square matrices [n, n] from given signs [n - rank], of which the `free` ones are searched for.

    Args:
        share: W_R.  base: the relative, its top `rank` triplets taken away like those of W_D.

    Raises:
        ValueError: blocks do not tile n, so that Q has no lattice.
    """
    n = len(share)
    block = fast_block(n)
    if n % block:
        raise ValueError(f"blocks of {block} do not tile {n}")
    left, _, right = np.linalg.svd(share)
    left_to, _, right_to = np.linalg.svd(base)
    kept = n - rank  # the null spaces have directions of their own, which nothing matches
    sides = [(left, left_to), (right.T.copy(), right_to.T.copy())]
    chosen = signs.copy()
    q = [own[:, :kept] * chosen @ to[:, :kept].T + own[:, kept:] @ to[:, kept:].T for own, to in sides]
    _search(q[0], q[1], left, left_to, sides[1][0], sides[1][1], chosen, free, 2 * np.pi * block, _SWEEPS)
    found = [
        _to_lattice(start, block, own[:, :kept] * chosen, to[:, :kept])
        for start, (own, to) in zip(q, sides, strict=True)
    ]
    if found[0][1] and not found[1][1]:  # one side known, the other follows without any sign
        found[1] = _to_lattice(_nearest(share.T @ found[0][0] @ base), block, left[:, :0], left_to[:, :0])
    elif found[1][1] and not found[0][1]:
        found[0] = _to_lattice(_nearest(share @ found[1][0] @ base.T), block, left[:, :0], left_to[:, :0])
    return Fit(found[0][0].T @ share @ found[1][0], chosen, found[0][1] and found[1][1])


def true_signs(share: Matrix, base: Matrix, rank: int, q_out: Matrix) -> Signs:
    """The signs that the secret Q_out [n, n] makes, as an attacker is told them: [n - rank]."""
    left, left_to = np.linalg.svd(share)[0], np.linalg.svd(base)[0]
    signs = np.sign(np.sum(left * (q_out @ left_to), axis=0))[: len(share) - rank]
    return np.where(signs == 0, 1.0, signs)


def signs_to_guess(base: Matrix) -> int:
    """Signs that must be guessed at once before the lattice shows whether they are right.

    A column of Q shows its lattice once the singular vectors of known signs hold nearly all of its
    coordinate; the coordinate that needs the fewest counts.  base: [n, n].
    """
    energy = np.sort(np.linalg.svd(base)[0] ** 2, axis=1)[:, ::-1].cumsum(axis=1)
    return int((energy < 1 - _SEEN).sum(axis=1).min()) + 1


def without_top(weight: Matrix, rank: int) -> Matrix:
    """W_D [n, n]."""
    left, values, right = np.linalg.svd(weight)
    rest: Matrix = left[:, rank:] * values[rank:] @ right[rank:]
    return rest


def _trial(
    kind: str, weight: Matrix, rank: int, closeness: float, given: float, random: np.random.Generator
) -> Trial:
    n = len(weight)
    noise = random.standard_normal((n, n))
    relative = weight + noise * (closeness * np.linalg.norm(weight) / np.linalg.norm(noise))
    rest, base = without_top(weight, rank), without_top(relative, rank)
    q_out, q_in = transform_as(kind, n, random)[0], transform_as(kind, n, random)[0]
    share = q_out @ rest @ q_in.T
    true = true_signs(share, base, rank, q_out)
    free = np.ones(n - rank, np.bool_)
    free[random.permutation(n - rank)[: round(given * (n - rank))]] = False
    start = np.where(free, random.choice([-1.0, 1.0], n - rank), true)
    found = fit(share, base, rank, start, free)
    error = float(np.linalg.norm(found.estimate - rest) / np.linalg.norm(base - rest))
    return Trial(kind, n, rank, closeness, given, float((found.signs == true).mean()), found.solved, error)


def _to_lattice(q: Matrix, block: int, image: Matrix, known: Matrix) -> tuple[Matrix, bool]:
    """Move an estimate of Q to multiples of 1/block; whether it is there.

    Each round takes the mean lattice point under noise that gets smaller, and the nearest orthogonal matrix;
    one of two ways keeps to Q known = image for a while.
    """
    ways = [_rounds(q, block, image, known), _rounds(q, block, image[:, :0], known[:, :0])]
    best = max(ways, key=lambda way: float(np.cos(2 * np.pi * block * way).mean()))
    exact = np.rint(best * block) / block
    solved = bool(np.abs(exact @ exact.T - np.eye(len(q))).max() < 1e-9)
    return (exact if solved else q), solved


def _rounds(q: Matrix, block: int, image: Matrix, known: Matrix) -> Matrix:
    for i in range(_ROUNDS):
        noise = 0.02 + 0.35 * 0.93**i  # in steps of the lattice
        steps = q * block
        nearest = np.rint(steps)
        weights = [np.exp(-((steps - nearest - j) ** 2) / (2 * noise**2)) for j in (-1, 0, 1)]
        mean = nearest + (weights[2] - weights[0]) / (weights[0] + weights[1] + weights[2])
        q = _nearest(mean / block)
        if i < 0.6 * _ROUNDS:
            q = q + (image - q @ known) @ known.T
    return q


def _nearest(x: Matrix) -> Matrix:
    """The nearest orthogonal matrix."""
    left, _, right = np.linalg.svd(x)
    nearest: Matrix = left @ right
    return nearest


@jit
def _search(
    q_out: Matrix,
    q_in: Matrix,
    left: Matrix,
    left_to: Matrix,
    right: Matrix,
    right_to: Matrix,
    signs: Signs,
    free: npt.NDArray[np.bool_],
    scale: float,
    sweeps: int,
) -> None:
    """Flip free signs one by one as long as F grows; changes q_out, q_in and signs."""
    zero = np.zeros(len(q_out))
    best = _form(q_out, zero, zero, scale) + _form(q_in, zero, zero, scale)
    for _ in range(sweeps):
        moved = False
        for i in range(signs.size):
            if not free[i]:
                continue
            u, v = left[:, i] * (-2 * signs[i]), right[:, i] * (-2 * signs[i])
            value = _form(q_out, u, left_to[:, i], scale) + _form(q_in, v, right_to[:, i], scale)
            if value > best:
                for a in range(len(u)):
                    q_out[a] += u[a] * left_to[:, i]
                    q_in[a] += v[a] * right_to[:, i]
                signs[i] = -signs[i]
                best = value
                moved = True
        if not moved:
            break


@jit
def _form(q: Matrix, u: Matrix, v: Matrix, scale: float) -> float:
    """Mean cos(scale (q + u v^T))."""
    total = 0.0
    for a in range(q.shape[0]):
        for b in range(q.shape[1]):
            total += np.cos(scale * (q[a, b] + u[a] * v[b]))
    return total / q.size
