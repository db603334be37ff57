"""The transform and the split of release 0.2, which are BROKEN: controls of attacks 11 to 14, for nothing
else.

    Q = D2 P2 . T . D1 P1 . T . D0 P0

with secret signs D and permutations P, and public Walsh-Hadamard blocks T, like today's without the plane
rotations; and W_R = Q_out W_D Q_in^T with no diagonals.  Every entry of Q is a multiple of 1/h where blocks
of size h tile the width, and a column of W_D that is nearly zero shows the column of Q_in beside it.

An attack that must fail on the default must succeed here, or it has not been carried out well.  Randomness is
numpy's, so that a control gives the same result each time.  Nothing made here may protect anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.equilibration import equilibrated
from sliplm.arithmetic.field import derive_key, new_key
from sliplm.arithmetic.fixedpoint import Floats, quantise_rows
from sliplm.arithmetic.rotation import Fast, fast_block, make
from sliplm.shares.splitting import split_group, top_triplets

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

FORMER, ANGLES, DIAGONALS, DEFAULT, HAAR = "version 2", "angles alone", "diagonals alone", "default", "haar"
"""Splits by release 0.2; with one of the two mends; with both, as the product does; and the provable
reference, which has neither diagonals nor structure on the side of the inputs."""

_PRECISION = 12


class Former:
    """The fast transform of R^n of release 0.2."""

    def __init__(self, n: int, random: np.random.Generator) -> None:
        self.n, self.block = n, fast_block(n)
        self.orders = [random.permutation(n) for _ in range(3)]
        self._signs = [random.choice([-1.0, 1.0], n) for _ in range(3)]

    def apply(self, x: Matrix) -> Matrix:
        """Q x for x [n, columns]."""
        for layer, (order, signs) in enumerate(zip(self.orders, self._signs, strict=True)):
            x = signs[:, None] * x[order]
            if layer < 2:
                x = self._mixed(x)
        return x

    def _mixed(self, x: Matrix) -> Matrix:
        """T: strided blocks, then the last coordinates as a block where those do not reach them."""
        n, h = self.n, self.block
        x, tiled, mix = x.copy(), n // h * h, hadamard(h) / np.sqrt(h)
        x[:tiled] = (mix @ x[:tiled].reshape(h, -1)).reshape(tiled, -1)
        if tiled < n:
            x[n - h :] = mix @ x[n - h :]
        return x


def hadamard(h: int) -> Matrix:
    """The Walsh-Hadamard matrix in natural order, entries 1 and -1: [h, h], h a power of two."""
    matrix: Matrix = np.ones((1, 1))
    while len(matrix) < h:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def outer_blocks(order: npt.NDArray[np.integer], block: int) -> Labels:
    """The outer Hadamard block of each row of a transform whose outermost permutation is `order` [n]."""
    n = len(order)
    blocks = np.arange(n) % (n // block)
    if n % block:
        blocks[n - block :] = n // block
    return np.asarray(blocks[order])


@dataclass(frozen=True)
class Share:
    """What a split publishes of one matrix, and the secret that an attack looks for.

    Attributes:
        w: integers [m, n].  rank: removed.
        q_in: the secret transform of the inputs [n, n], for checking alone.
        blocks: of its rows, see `transform_as`.
    """

    w: npt.NDArray[np.integer]
    rank: int
    q_in: Matrix
    blocks: Labels


def split_as(kind: str, weight: Floats, rank: int, random: np.random.Generator) -> Share:
    """Split a matrix float32 [m, n] in one of the five ways.

    Args:
        random: of release 0.2's transforms; all others have keys of their own.
    """
    n = weight.shape[1]
    if kind == DEFAULT:
        made = split_group("study", weight, rank=rank, precision=_PRECISION, rotation="fast")
        q_in, blocks = fast_matrix(derive_key(made.secrets.seed, "rotation in"), n)
        return Share(made.w, rank, q_in, blocks)
    a, b = top_triplets(weight, rank)
    rest = weight - a @ b
    if kind == DIAGONALS:
        rest = equilibrated(rest).matrix
    q_in, blocks = transform_as(kind, n, random)
    hidden = _rows_turned(kind, rest @ q_in.T.astype(np.float32), random)
    return Share(quantise_rows(hidden, _PRECISION)[0], rank, q_in, blocks)


def transform_as(kind: str, n: int, random: np.random.Generator) -> tuple[Matrix, Labels]:
    """Q_in of one kind of split as a matrix [n, n], and the outer Hadamard block of each of its rows.

    Haar has none: blocks of the same sizes are drawn, to be compared with.
    """
    if kind in (FORMER, DIAGONALS):
        former = Former(n, random)
        return former.apply(np.eye(n)), outer_blocks(former.orders[2], former.block)
    if kind in (ANGLES, DEFAULT):
        return fast_matrix(new_key(), n)
    matrix = make("haar", new_key(), n).apply(np.eye(n, dtype=np.float32)).T
    return matrix.astype(np.float64), outer_blocks(random.permutation(n), fast_block(n))


def _rows_turned(kind: str, x: Floats, random: np.random.Generator) -> Floats:
    """Q_out x for x [m, n]."""
    if kind in (FORMER, DIAGONALS):
        return np.ascontiguousarray(Former(len(x), random).apply(x.astype(np.float64)), np.float32)
    # right singular vectors do not depend on Q_out: a Haar matrix of its many rows is not needed
    turned = make("fast", new_key(), len(x)).apply(np.ascontiguousarray(x.T))
    return np.ascontiguousarray(turned.T)


def fast_matrix(key: bytes, n: int) -> tuple[Matrix, Labels]:
    """Today's fast transform as a matrix [n, n], and the outer blocks of its rows."""
    fast = Fast(key, n)
    blocks = outer_blocks(fast.tables[0][-1], fast_block(n))
    return fast.apply(np.eye(n, dtype=np.float32)).T.astype(np.float64), blocks
