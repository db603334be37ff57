"""Attack 13: columns of Q_in from the null space of a share, by lattice reduction.

Inputs that are always zero (pruned channels, padding) are columns of W_D that are zero.  Where these are
split as they are, the null space of the public integers holds Q_in e_c for each of them, beside the images of
the k removed vectors.  In release 0.2 those are integers over h: the only short ones in that null space, and
LLL finds them from the share alone.

    constraints   P z = 0 for the z = h x with x in the null space, on some of the coordinates
    lattice       the rows of (1, K P^T), scaled and rounded to integers: z is short there, all else is long
    check         a short z, carried on to all n coordinates, is near integers on each of them
    columns       sums of these that have the length h of a column

In the default dead columns are filled before anything is published, so that the null space is that of the
rank alone; and the angles leave no integers in it, filled or not.  Needs python-flint (the extra `attacks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.rotation import fast_block
from sliplm.attacks.former import ANGLES, DEFAULT, DIAGONALS, FORMER, HAAR, Matrix, Share, split_as
from sliplm.errors import ReportError

DEAD = (1, 2, 4, 8)
KINDS = (FORMER, ANGLES, DIAGONALS, DEFAULT, HAAR)
_WEIGHT = 1500.0  # K: of a constraint against a coordinate
_DIGITS = 16.0  # what both are scaled with before they are rounded
_NEAR = 0.15  # of an integer; the roundings of w leave a true one so near
_LONGEST = 3.0  # times h: a combination of a few columns still counts
_FEW, _MOST = 5, 8  # vectors whose sums are tried: 9^5, or 5^8
_SAME = 0.999  # |cosine| from which a vector is a column of Q_in


@dataclass(frozen=True)
class Found:
    """What the reduction found in splits of one kind.

    Attributes:
        dead: channels of zeros.  null: dimensions of the null space, the largest of all splits.
        integers: independent integer vectors found in it, of all splits.
        columns: true columns of Q_in among their sums, of `dead` times `splits`.
    """

    kind: str
    width: int
    dead: int
    splits: int
    null: int
    integers: int
    columns: int


def study(
    weight: Floats, rank: int, repeats: int, dead: Sequence[int] = DEAD, kinds: Sequence[str] = KINDS
) -> Iterator[Found]:
    """Splits of a real matrix [m, n] with some inputs set to zero.

    Raises:
        ReportError: python-flint is not installed.
    """
    need_flint()
    n = weight.shape[1]
    random = np.random.default_rng(2)
    for kind in kinds:
        for count in dead:
            null = integers = columns = 0
            for _ in range(repeats):
                channels = random.choice(n, count, replace=False)
                pruned = weight.copy()
                pruned[:, channels] = 0
                share = split_as(kind, pruned, rank, random)
                space = null_space(share)
                vectors = integer_vectors(space, fast_block(n), random)
                null, integers = max(null, space.shape[1]), integers + len(vectors)
                candidates = sums(vectors[:_MOST], fast_block(n))
                columns += true_columns(candidates, share.q_in[:, channels])
            yield Found(kind, n, count, repeats, null, integers, columns)


def need_flint() -> None:
    """Check that LLL is there.

    Raises:
        ReportError: it is not.
    """
    if find_spec("flint") is None:
        raise ReportError(
            "attack 13 reduces lattices with python-flint, which is not installed; "
            "in the clone: pip install -e '.[attacks]'"
        )


def null_space(share: Share) -> Matrix:
    """Orthonormal [n, r]: what is below the widest gap in the lower half of the spectrum."""
    rows = share.w.astype(np.float64)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    half = values[: len(values) // 2]
    dimensions = int(np.argmax(half[1:] / np.maximum(half[:-1], 1e-9 * values[-1]))) + 1
    return np.asarray(vectors[:, :dimensions])


def integer_vectors(space: Matrix, block: int, random: np.random.Generator) -> Matrix:
    """Integer vectors z, with z / block in a space [n, r] up to roundings, that LLL finds: [count, n]."""
    n, r = space.shape
    taken = min(n, r + max(30, int(1.2 * r) + 20))
    chosen = random.choice(n, taken, replace=False)
    part = space[chosen]
    constraints = np.linalg.svd(part)[0][:, r:]  # [taken, taken - r]
    basis = np.rint(_DIGITS * np.hstack([np.eye(taken), _WEIGHT * constraints]))
    short = reduced(basis)[:, :taken] / _DIGITS
    carried = short @ np.linalg.pinv(part).T @ space.T
    whole = np.rint(carried)
    near = np.abs(carried - whole).max(axis=1) < _NEAR
    length = np.linalg.norm(whole, axis=1)
    return np.asarray(whole[near & (length > 0) & (length < _LONGEST * block)])


def reduced(basis: Matrix) -> Matrix:
    """An LLL-reduced basis of the lattice of the rows of a matrix of integers."""
    from flint import fmpz_mat

    found = fmpz_mat([[int(entry) for entry in row] for row in basis]).lll()
    return np.array([[int(entry) for entry in row] for row in found.tolist()], np.float64)


def sums(vectors: Matrix, block: int) -> Matrix:
    """Sums of vectors [count, n], each times a small integer, of norm h: [sums, n]."""
    count = len(vectors)
    if not count:
        return vectors
    most = 4 if count <= _FEW else 2
    factors = np.indices((2 * most + 1,) * count).reshape(count, -1).T - float(most)
    squares = ((factors @ (vectors @ vectors.T)) * factors).sum(axis=1)
    return np.asarray(factors[np.abs(squares - block**2) < 0.5] @ vectors)


def true_columns(vectors: Matrix, columns: Matrix) -> int:
    """How many of the secret columns [n, d] are among the vectors [count, n]."""
    if not len(vectors):
        return 0
    cosines = np.abs(vectors @ columns) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return int((cosines.max(axis=0) > _SAME).sum())
