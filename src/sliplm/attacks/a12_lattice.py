"""Attack 12: tell a share from a Haar one by a lattice in its singular vectors.

The right singular vectors of W_R are those of W_D turned by Q_in.  A column of W_D that is nearly zero has a
vector of its own, nearly a unit vector e_c, whose image is nearly the column Q_in e_c.  In release 0.2 the
entries of that are multiples of 1/h, where blocks of size h tile the width: the public integers showed it,
and a column of the secret basis with it.

The attacker takes the smallest singular vector x that is not of the null space, and looks for the lattice at
every scale a that x can have (it holds a part a of the column):

    score(x) = max over a and f = 1, 2 of sqrt(2 n) |mean cos(pi f h x / a)|

f = 2 finds multiples of 1/h, f = 1 those that are all even, or all odd, in a block.  Under Haar x is uniform
on the sphere, whatever W_D is; the score's law there is drawn, and gives the p-value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.rotation import fast_block
from sliplm.attacks.former import ANGLES, DEFAULT, DIAGONALS, FORMER, HAAR, Matrix, Share, split_as

LEVEL = 1e-3  # a p-value below tells a share from a Haar one
KINDS = (FORMER, ANGLES, DIAGONALS, DEFAULT, HAAR)
_SCALES = np.linspace(0.98, 1.0, 41)
_DRAWN = 20_000  # vectors on the sphere
_BATCH = 500


@dataclass(frozen=True)
class Shown:
    """What the statistic says of splits of one kind.

    Attributes:
        kind: of split, see `former`.  width: n.  splits: how many, each with secrets of its own.
        below: part of them with p < LEVEL; LEVEL itself is what chance gives.
        smallest: p of the one that shows most.
        deviation: of the mean of -2 ln p from the 2 that chance gives, in standard deviations; it finds many
            small departures.
    """

    kind: str
    width: int
    splits: int
    below: float
    smallest: float
    deviation: float


def study(
    weights: Sequence[Floats], rank: int, repeats: int, kinds: Sequence[str] = KINDS
) -> Iterator[Shown]:
    """Fresh splits of real matrices [m, n] of one width, `repeats` of each, by each kind of split."""
    n = weights[0].shape[1]
    random = np.random.default_rng(0)
    for kind in kinds:
        shares = (split_as(kind, weight, rank, random) for weight in weights for _ in range(repeats))
        p = np.array([p_value(score(public_vector(share), fast_block(n)), n) for share in shares])
        deviation = float(((-2 * np.log(p)).mean() - 2) / (2 / np.sqrt(len(p))))
        yield Shown(kind, n, len(p), float((p < LEVEL).mean()), float(p.min()), deviation)


def public_vector(share: Share) -> Matrix:
    """The smallest right singular vector of the public integers outside their null space: [n]."""
    rows = share.w.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)  # the row scales are secret
    m, n = rows.shape
    vector: Matrix = np.linalg.eigh(rows.T @ rows)[1][:, n - (min(m, n) - share.rank)]
    return vector


def score(x: Matrix, block: int) -> float:
    """How much a unit vector [n] looks like multiples of 1/block."""
    return float(_scores(x[None], block)[0])


def p_value(found: float, n: int) -> float:
    """Of a score of this width, under Haar."""
    return (1 + int((_drawn(n) >= found).sum())) / (1 + _DRAWN)


@cache
def _drawn(n: int) -> Matrix:
    random, block = np.random.default_rng(1), fast_block(n)
    parts = []
    for _ in range(_DRAWN // _BATCH):
        x = random.standard_normal((_BATCH, n))
        parts.append(_scores(x / np.linalg.norm(x, axis=1, keepdims=True), block))
    return np.concatenate(parts)


def _scores(x: Matrix, block: int) -> Matrix:
    """Scores of unit vectors [count, n]: [count]."""
    best = np.zeros(len(x))
    for scale in _SCALES:
        wave = np.cos(np.pi * block / scale * x)
        once, twice = wave.mean(axis=1), 2 * np.square(wave).mean(axis=1) - 1  # cos 2y = 2 cos^2 y - 1
        best = np.maximum(best, np.maximum(np.abs(once), np.abs(twice)))
    return np.asarray(best * np.sqrt(2 * x.shape[1]))
