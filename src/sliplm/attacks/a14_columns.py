"""Attack 14: from known columns of Q_in to its outermost secret layer.

The attacker is told some columns of Q_in exactly, more than any attack finds by itself on the default.

**Peeling** (release 0.2, where blocks tile the width).  With integers z = h Q e_c and N = sum of z^2 / h over
an outer block, (N - z) / 2 is a count of signs on each row of the block.  Its lowest bit is affine in the
row's hidden label over GF(2), with one linear part for all columns of an inner block; the next bit is
quadratic, with one quadratic part for these, so that differences are affine.  So rows of an outer block share
their parities, and linear algebra gives labels and signs: the layer is gone, and what is left is sparse.

**Correlations of squares** (any transform).  What reaches an outer block from an inner one is by chance more
or less than the mean, so the squares of a block's rows go up and down together over the columns.

    told     somebody who knows the true blocks compares them with random ones
    overlap  how much of the true blocks lies in the leading vectors of the squares, which need no secret
    blind    how far the first singular value of the squares is from what Haar gives: tells one from the other

All three also for the rows of the share in place of columns of Q_in, which is what an attacker really has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.rotation import fast_block
from sliplm.attacks.former import DEFAULT, FORMER, HAAR, Labels, Matrix, hadamard, split_as, transform_as

KNOWN = (0, 8, 12, 16, 20, 32, 64, 128)
KINDS = (HAAR, FORMER, DEFAULT)  # Haar first: what the others are compared with
_SHUFFLES = 200
Bits = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """What known columns gave in fresh splits of one kind, means.

    Attributes:
        known: columns that the attacker was told; 0: he has the rows of the share.
        peeled: part of the outer blocks that the attack over GF(2) took away.
        told: standard deviations, root mean square; 1 is chance.
        overlap: 1 would be all blocks found.
        blind, blind_most: standard deviations, the mean of all splits and the largest; 0 is chance.
    """

    kind: str
    width: int
    known: int
    trials: int
    peeled: float
    told: float
    overlap: float
    blind: float
    blind_most: float


def peeled(columns: Matrix, block: int) -> int:
    """Outer blocks that known columns [n, d] peel, checked without any secret: what is left of each is
    sparse.
    """
    z = np.rint(block * columns).astype(np.int64)
    outer = [rows for rows in alike(z & 1) if len(rows) == block]
    if not outer:
        return 0
    # columns of one inner block put the same energy into each outer one
    inner = alike(np.stack([(z[rows] ** 2).sum(axis=0) for rows in outer], axis=1))
    return sum(_peels(z[rows], inner, block) for rows in outer)


def alike(x: Bits) -> list[npt.NDArray[np.intp]]:
    """Indices of equal rows, together."""
    number = np.unique(x, axis=0, return_inverse=True)[1].ravel()
    return [np.flatnonzero(number == i) for i in range(number.max() + 1)]


def _peels(z: Bits, inner: list[npt.NDArray[np.intp]], block: int) -> bool:
    """Whether the rows z [h, d] of what may be an outer block give it away."""
    free, signed = _functionals(z, inner, block)
    if not signed:
        return False
    free += [bits ^ signed[0] for bits in signed[1:]]
    labels = _labels(free, block)
    if labels is None:
        return False
    placed = np.zeros(z.shape)
    placed[labels] = np.where(signed[0][:, None] == 1, -z, z)
    left = hadamard(block) @ placed / block
    return bool(np.isin(left, (-1, 0, 1)).all())


def _functionals(z: Bits, inner: list[npt.NDArray[np.intp]], block: int) -> tuple[list[Bits], list[Bits]]:
    """Affine functions of the rows' labels [h], and such with the rows' signs added."""
    free: list[Bits] = []
    signed: list[Bits] = []
    for columns in inner:
        first, *others = columns
        terms = int((z[:, first] ** 2).sum()) // block  # N, which a sign does not change
        count = (terms - z) // 2
        (signed if terms % 2 else free).append(count[:, first] & 1)
        for other in others:
            # a sign turns a count c into N - c: the second bit then flips, or not, with N and c mod 4
            as_one = terms % 2 or (count[0, other] & 1) == (count[0, first] & 1)
            (free if as_one else signed).append(((count[:, other] ^ count[:, first]) >> 1) & 1)
    return free, signed


def _labels(functions: list[Bits], block: int) -> Bits | None:
    """Labels of the rows, up to an affine map, from log2(h) independent functions; None if there are not so
    many, or more.
    """
    chosen: list[Bits] = []
    reduced: list[int] = []
    for bits in functions:
        rest = int("".join(map(str, bits ^ bits[0])), 2)
        for other in reduced:
            rest = min(rest, rest ^ other)
        if rest:
            reduced.append(rest)
            chosen.append(bits ^ bits[0])
    if 1 << len(chosen) != block:
        return None
    labels: Bits = np.stack(chosen, axis=1) @ (1 << np.arange(len(chosen)))
    return labels if len(set(labels.tolist())) == block else None


# --- correlations of squares -----------------------------------------------------------------------------


def _squares(x: Matrix) -> Matrix:
    """x [n, samples] squared, each sample over its mean, rows without theirs and of norm 1."""
    squares = np.square(x)
    squares /= squares.mean(axis=0)
    squares -= squares.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(squares, axis=1, keepdims=True)
    return np.asarray(squares / np.where(norms > 0, norms, 1))  # a row may be zero in a few columns


def told(squares: Matrix, blocks: Labels, random: np.random.Generator) -> float:
    """How much more the rows of true blocks correlate than those of random ones, in standard deviations."""

    def within(labels: Labels) -> float:
        return float(np.square(np.eye(labels.max() + 1)[labels].T @ squares).sum())

    chance = [within(random.permutation(blocks)) for _ in range(_SHUFFLES)]
    return float((within(blocks) - np.mean(chance)) / np.std(chance))


def leading(squares: Matrix, count: int) -> tuple[Matrix, float]:
    """The first left singular vectors [n, count] of the rows without their mean, and the first value."""
    vectors, values, _ = np.linalg.svd(squares - squares.mean(axis=0), full_matrices=False)
    return np.asarray(vectors[:, :count]), float(values[0])


def overlap(vectors: Matrix, blocks: Labels) -> float:
    """Part of the blocks, as directions, that lies in the span of vectors [n, count]; chance is count / n."""
    marks = np.eye(blocks.max() + 1)[blocks]
    basis = np.linalg.svd(marks - marks.mean(axis=0), full_matrices=False)[0][:, : vectors.shape[1]]
    return float(np.square(vectors.T @ basis).sum() / vectors.shape[1])


# --- the study -------------------------------------------------------------------------------------------


def study(weight: Floats, rank: int, trials: int, known: Sequence[int] = KNOWN) -> Iterator[Known]:
    """Fresh splits of a real matrix [m, n], with and without known columns.

    Args:
        known: numbers of columns; 0 for none, with the rows of the share instead.
    """
    random = np.random.default_rng(3)
    n = weight.shape[1]
    haar: dict[int, list[float]] = {}
    for kind in KINDS:
        tried: dict[int, list[_Trial]] = {count: [] for count in known}
        for _ in range(trials):
            q_in, blocks = transform_as(kind, n, random)
            for count in filter(None, known):
                columns = q_in[:, random.choice(n, count, replace=False)]
                part = peeled(columns, fast_block(n)) / (n // fast_block(n))
                tried[count].append(_trial(columns, blocks, part, random))
            if 0 in known:
                share = split_as(kind, weight, rank, random)
                rows = share.w / np.maximum(np.linalg.norm(share.w, axis=1, keepdims=True), 1)
                tried[0].append(_trial(rows.T, share.blocks, 0.0, random))
        for count, found in tried.items():
            first = [trial.first for trial in found]
            haar.setdefault(count, first)  # the first kind
            blind = (np.array(first) - np.mean(haar[count])) / np.std(haar[count])
            yield Known(
                kind,
                n,
                count,
                trials,
                float(np.mean([trial.peeled for trial in found])),
                float(
                    np.sqrt(np.mean([trial.told**2 for trial in found]))
                ),  # energies may be too even as well
                float(np.mean([trial.overlap for trial in found])),
                float(blind.mean()),
                float(blind.max()),
            )


class _Trial(NamedTuple):
    peeled: float
    told: float
    overlap: float
    first: float


def _trial(x: Matrix, blocks: Labels, part: float, random: np.random.Generator) -> _Trial:
    squares = _squares(x)
    vectors, first = leading(squares, int(blocks.max()))
    return _Trial(part, told(squares, blocks, random), overlap(vectors, blocks), first)
