"""Secret orthogonal transforms that hide the basis of a share (SPEC split step 2 and section 5).

`fast`  Q = D2 P2 . H . G D1 P1 . H . D0 P0: secret signs D, permutations P and plane rotations G around two
        public Walsh-Hadamard layers, n log n.  The outermost layer is secret, so that no public factor can
        be peeled off the share; the angles of G are real numbers, so that no entry lies on a lattice.
`haar`  Q uniform over the orthogonal group: the provable reference, n^2.
`none`  the identity: the papers' plain split, for comparison.

Each takes a diagonal S along, Q S, at no cost: `fast` and `haar` multiply by it where they multiply anyway.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import derive_key, keystream
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.lanes import LANES, from_lines, hadamard_lines, move_lines, to_lines, turn_lines
from sliplm.errors import RecipeError

Floats = npt.NDArray[np.float32]
Orders = npt.NDArray[np.int32]
Tables = tuple[Orders, Floats, Orders, Floats, Floats, int, int]
"""Order and signs of each layer, the same for the way back, the entries of G's matrices, distance of the
first of a pair from the second, block size."""

MAX_HAAR = 8192  # columns; a wider Haar matrix costs the vault more than the layer itself
_FEW = 3  # rows below which each is turned alone
_LAYERS = 3  # secret layers of the fast transform; a Hadamard layer lies between each two


class Rotation(Protocol):
    """The map Q S of R^n: Q orthogonal, S diagonal (1 unless `make` was given one)."""

    n: int
    macs: int  # multiply-adds for one vector, additions counted as such

    def apply(self, x: Floats, out: Floats | None = None) -> Floats:
        """Q S v for each row v of x: float32 [rows, n], new or `out` (contiguous, not x)."""

    def apply_transpose(self, x: Floats, out: Floats | None = None) -> Floats:
        """S Q^T v for each row v of x: float32 [rows, n], new or `out`."""


def make(kind: str, key: bytes, n: int, scale: Floats | None = None) -> Rotation:
    """The transform of R^n that a secret key stands for, behind a diagonal S.

    Args:
        scale: the diagonal of S, float32 [n]; None for 1.

    Raises: RecipeError for an unknown kind, or a Haar transform wider than MAX_HAAR.
    """
    if kind == "fast":
        return Fast(key, n, scale)
    if kind == "haar":
        return Haar(key, n, scale)
    if kind == "none":
        return Identity(n, scale)
    raise RecipeError(f"unknown rotation {kind!r}: choose fast, haar or none")


def macs(kind: str, n: int) -> int:
    """Multiply-adds of one application to one vector of n entries; an addition counts as one."""
    if kind == "fast":
        block = fast_block(n)
        in_blocks = n // block * block + (block if n % block else 0)  # the last block may overlap
        return n * _LAYERS + 4 * (n // 2) + (_LAYERS - 1) * in_blocks * (block.bit_length() - 1)
    return n * n if kind == "haar" else 0


def fast_block(n: int) -> int:
    """Size of a Hadamard block: the smallest power of two b with b^2 >= 16 n, at most n.

    About b^2 / n signed paths then join each two coordinates through the two Hadamard layers.
    """
    block = 1 << max(0, math.ceil(math.log2(16 * n) / 2))
    while block > n:
        block //= 2
    return block


class Identity:
    """No rotation: the diagonal alone, float32 [n]."""

    def __init__(self, n: int, scale: Floats | None = None) -> None:
        self.n, self.macs = n, 0
        self.diagonal = np.ones(n, np.float32) if scale is None else scale

    def __repr__(self) -> str:
        return f"Identity(n={self.n})"

    def apply(self, x: Floats, out: Floats | None = None) -> Floats:
        return np.multiply(x, self.diagonal, out=out)

    def apply_transpose(self, x: Floats, out: Floats | None = None) -> Floats:
        return self.apply(x, out)


class Fast:
    """Signs, permutations, plane rotations and Walsh-Hadamard blocks.  `tables` is what the compiled loops
    take.
    """

    def __init__(self, key: bytes, n: int, scale: Floats | None = None) -> None:
        self.n, self.macs = n, macs("fast", n)
        block = fast_block(n)
        order = np.stack([_permutation(derive_key(key, f"permutation {i}"), n) for i in range(_LAYERS)])
        signs = np.stack([_signs(derive_key(key, f"signs {i}"), n) for i in range(_LAYERS)])
        norm = np.float32(1 / math.sqrt(block))  # the Hadamard blocks are computed without it
        tiled = n // block * block
        signs[0, :tiled] *= norm
        if n % block:
            signs[1:][order[1:] >= n - block] *= norm  # that of the overlapping last block
        if scale is not None:
            signs[0] *= scale[order[0]]
        inverse = np.argsort(order, axis=1).astype(np.int32)
        distance = _distance(n, block)
        turns = _turns(derive_key(key, "angles"), n)
        turns[:2, : min(tiled, n // 2)] *= norm
        turns[2:][:, (np.arange(n // 2) + distance - n // 2) % max(1, n // 2) + n // 2 < tiled] *= norm
        signs_back = np.take_along_axis(signs, inverse, axis=1)
        self.tables: Tables = (order, signs, inverse, signs_back, turns, distance, block)

    def __repr__(self) -> str:
        return f"Fast(n={self.n})"

    def apply(self, x: Floats, out: Floats | None = None) -> Floats:
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty_like(x) if out is None else out
        rotate_rows(x, out, self.tables)
        return out

    def apply_transpose(self, x: Floats, out: Floats | None = None) -> Floats:
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty_like(x) if out is None else out
        rotate_rows_back(x, out, self.tables)
        return out


class Haar:
    """A dense orthogonal matrix, uniform in law: QR of a Gaussian matrix with the signs of R's diagonal
    taken out.
    """

    def __init__(self, key: bytes, n: int, scale: Floats | None = None) -> None:
        if n > MAX_HAAR:
            raise RecipeError(
                f"rotation 'haar' over {n} coordinates is refused above {MAX_HAAR}: "
                "give this group rotation='fast' or placement='vault' by a rule"
            )
        self.n, self.macs = n, n * n
        q, r = np.linalg.qr(gaussians(derive_key(key, "haar"), n * n).reshape(n, n))
        self._matrix = np.ascontiguousarray((q * np.sign(np.diag(r))).astype(np.float32))
        if scale is not None:
            self._matrix *= scale

    def __repr__(self) -> str:
        return f"Haar(n={self.n})"

    def apply(self, x: Floats, out: Floats | None = None) -> Floats:
        return np.matmul(x, self._matrix.T, out=out)

    def apply_transpose(self, x: Floats, out: Floats | None = None) -> Floats:
        return np.matmul(x, self._matrix, out=out)


# --- secrets from a key ----------------------------------------------------------------------------------


def gaussians(key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Independent standard normal float64 [count] from the key stream (Box-Muller on 53-bit uniforms)."""
    pairs = -(-count // 2)
    uniform = uniforms(key, 2 * pairs).reshape(2, pairs)
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def uniforms(key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Independent uniform float64 [count] strictly between 0 and 1, of 53 bits each, from the key stream."""
    words = keystream(key, 0, 0, -(-count // 2)).view(np.uint64)[:count]
    uniform: npt.NDArray[np.float64] = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def _permutation(key: bytes, n: int) -> npt.NDArray[np.int32]:
    # sorting 64-bit random keys: a tie, the only departure from uniform, has probability below n^2 2^-65
    words = keystream(key, 0, 0, -(-n // 2)).view(np.uint64)[:n]
    return np.argsort(words, kind="stable").astype(np.int32)


def _signs(key: bytes, n: int) -> Floats:
    bits = np.unpackbits(keystream(key, 0, 0, -(-n // 128)).view(np.uint8))[:n]
    return np.where(bits == 1, np.float32(1), np.float32(-1))


def _distance(n: int, block: int) -> int:
    """Of the first coordinate of each pair of G from its second, so that Hadamard blocks have no pair whole.

    A pair within a block would leave that block's part of a column with the length that it had.
    """
    half, blocks = n // 2, n // block
    return half + 1 if half > 1 and half % blocks == 0 else half


def _turns(key: bytes, n: int) -> Floats:
    """Matrices of n // 2 plane rotations by uniform angles, row by row: float32 [4, n // 2]."""
    angle = 2 * np.pi * uniforms(key, n // 2)
    return np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]).astype(np.float32)


# --- compiled loops --------------------------------------------------------------------------------------


@jit
def _hadamard_blocks(x: Floats, block: int, count: int) -> None:
    """Walsh-Hadamard transforms, without their norm, of `count` interleaved blocks in place.

    Block j is {x[j], x[j + count], ...}: every inner loop runs over neighbours.  Two levels at a time.
    """
    width, left = count, block
    while left >= 4:
        for start in range(0, block * count, 4 * width):
            a, b = x[start : start + width], x[start + width : start + 2 * width]
            c, d = x[start + 2 * width : start + 3 * width], x[start + 3 * width : start + 4 * width]
            for j in range(width):
                ab, a_b, cd, c_d = a[j] + b[j], a[j] - b[j], c[j] + d[j], c[j] - d[j]
                a[j], b[j], c[j], d[j] = ab + cd, a_b + c_d, ab - cd, a_b - c_d
        width, left = 4 * width, left // 4
    if left == 2:
        a, b = x[:width], x[width : 2 * width]
        for j in range(width):
            a[j], b[j] = a[j] + b[j], a[j] - b[j]


@jit
def _turn_pairs(x: Floats, turns: Floats, distance: int) -> None:
    """The plane rotations G in place.

    Coordinate j of the first half turns with j + distance, or where that leaves the second half, from its
    front on.  An odd last coordinate stays.
    """
    half = turns.shape[1]
    for start, end, to in ((0, 2 * half - distance, distance), (2 * half - distance, half, distance - half)):
        for j in range(start, end):
            a, b = x[j], x[j + to]
            x[j], x[j + to] = turns[0, j] * a + turns[1, j] * b, turns[2, j] * a + turns[3, j] * b


@jit
def _turn_pairs_back(x: Floats, turns: Floats, distance: int) -> None:
    """The transpose of `_turn_pairs`."""
    half = turns.shape[1]
    for start, end, to in ((0, 2 * half - distance, distance), (2 * half - distance, half, distance - half)):
        for j in range(start, end):
            a, b = x[j], x[j + to]
            x[j], x[j + to] = turns[0, j] * a + turns[2, j] * b, turns[1, j] * a + turns[3, j] * b


@jit
def fast_rotate(x: Floats, out: Floats, work: Floats, tables: Tables) -> None:
    """out = Q S x for one vector; `work` is scratch of the same length."""
    order, signs, _, _, turns, distance, block = tables
    n = x.size
    for j in range(n):
        out[j] = signs[0, j] * x[order[0, j]]
    for layer in range(1, order.shape[0]):
        _hadamard_blocks(out, block, n // block)
        if n % block:
            _hadamard_blocks(out[n - block :], block, 1)
        work[:] = out
        for j in range(n):
            out[j] = signs[layer, j] * work[order[layer, j]]
        if layer == 1:
            _turn_pairs(out, turns, distance)


@jit
def fast_rotate_back(x: Floats, out: Floats, work: Floats, tables: Tables) -> None:
    """out = S Q^T x for one vector; `work` is scratch of the same length."""
    _, _, inverse, signs, turns, distance, block = tables
    n = x.size
    last = inverse.shape[0] - 1
    for j in range(n):
        out[j] = signs[last, j] * x[inverse[last, j]]
    for layer in range(last - 1, -1, -1):
        if n % block:
            _hadamard_blocks(out[n - block :], block, 1)
        _hadamard_blocks(out, block, n // block)
        if layer == 1:
            _turn_pairs_back(out, turns, distance)
        work[:] = out
        for j in range(n):
            out[j] = signs[layer, j] * work[inverse[layer, j]]


@jit
def rotate_rows(x: Floats, out: Floats, tables: Tables) -> None:
    """out = Q S v for each row v of x."""
    rows, n = x.shape
    alone = rows % LANES if rows % LANES < _FEW else 0
    order, signs, _, _, turns, distance, block = tables
    size = n * LANES if rows > alone else n
    here, there = np.empty(size, np.float32), np.empty(size, np.float32)
    for i in range(0, rows - alone, LANES):
        to_lines(x, i, here)
        move_lines(here, there, order[0], signs[0])
        for layer in range(1, order.shape[0]):
            hadamard_lines(there, 0, block, n // block)
            if n % block:
                hadamard_lines(there, n - block, block, 1)
            here, there = there, here
            move_lines(here, there, order[layer], signs[layer])
            if layer == 1:
                turn_lines(there, turns[0], turns[1], turns[2], turns[3], distance)
        from_lines(there, out, i)
    for i in range(rows - alone, rows):
        fast_rotate(x[i], out[i], here[:n], tables)


@jit
def rotate_rows_back(x: Floats, out: Floats, tables: Tables) -> None:
    """out = S Q^T v for each row v of x."""
    rows, n = x.shape
    alone = rows % LANES if rows % LANES < _FEW else 0
    _, _, inverse, signs, turns, distance, block = tables
    size = n * LANES if rows > alone else n
    here, there = np.empty(size, np.float32), np.empty(size, np.float32)
    last = inverse.shape[0] - 1
    for i in range(0, rows - alone, LANES):
        to_lines(x, i, here)
        move_lines(here, there, inverse[last], signs[last])
        for layer in range(last - 1, -1, -1):
            if n % block:
                hadamard_lines(there, n - block, block, 1)
            hadamard_lines(there, 0, block, n // block)
            if layer == 1:
                turn_lines(there, turns[0], turns[2], turns[1], turns[3], distance)
            here, there = there, here
            move_lines(here, there, inverse[layer], signs[layer])
        from_lines(there, out, i)
    for i in range(rows - alone, rows):
        fast_rotate_back(x[i], out[i], here[:n], tables)
