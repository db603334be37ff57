"""Exact products with AVX-512 VNNI: x is cut into limbs small enough that 32-bit lanes cannot overflow.

    int8 w    x in four limbs of 8 bits, vpdpbusd (unsigned limb, signed weight); w stays where it is
    int16 w   x in two signed limbs of 16 bits, vpdpwssd; |w| <= 2047 is packed into 12 bits, in the order in
              which it is read

Very few rows of x are multiplied one by one with the rows of w (memory decides), more in blocks of 4, 8 and
16, packed so that every lane belongs to one x (arithmetic decides).  A product is one compiled call for each
kind of block, or one for each thread where that pays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, P
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.kernels.folding import fold
from sliplm.arithmetic.kernels.threads import in_parallel, pieces
from sliplm.arithmetic.kernels.vnni_layout import (
    BYTE_BLOCK,
    BYTE_LIMBS,
    PACKED,
    STEP,
    TALL,
    TOKENS,
    WORD_BLOCK,
    WORD_LIMBS,
    WRAP,
    pack_bytes,
    pack_words,
    put_bytes,
    put_words,
    unpack,
)
from sliplm.arithmetic.kernels.vnni_tile import (
    BYTE_EXACT,
    block_bytes_4,
    block_bytes_8,
    block_bytes_16,
    block_words_4,
    block_words_8,
    block_words_16,
    tall_bytes,
    tall_words,
)
from sliplm.errors import KernelError

Scalar = TypeVar("Scalar", bound=np.generic)
Weights = npt.NDArray[np.integer]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int16]
Sums = npt.NDArray[np.int64]
Loop = Callable[[Weights, Elements, Elements, int, int, int, int, int], None]
"""(w, x, out, tokens in a block, rows of x from and to, rows of w from and to)."""

_AHEAD = 1 << 14  # bytes: w is asked for at least this far ahead, and never inside the same tile
_CACHED = 1 << 19  # bytes of packed x at a time: half of a second-level cache
_BLOCKS = 8  # at a time: enough to read w seldom

_TOGETHER = 1 << 24  # bytes of packed weights that lie in one block of memory

_OFFSET = np.uint64(P << 31)  # a multiple of p above any -sum
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_FOLD = np.uint64(5)  # 2^32 = 5 mod p
_P = np.uint64(P)


@cache
def available() -> bool:
    """Has this processor the instructions?"""
    features: dict[str, bool] = llvm.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


class VnniMatrix:
    """w int8 or int16 [m, n], n < 2^19; int8 is copied only where its shape does not fit whole tiles.

    Raises KernelError where |w| > 2047.
    """

    kernel = "vnni"
    blocks: Sequence[tuple[int, int]] = ((TOKENS, 12), (8, 6), (4, 4), (1, 1))
    """Tokens of each kind of block, and how many of them make it worth filling up with zeros."""

    def __init__(self, w: Weights, threads: int = 1) -> None:
        self.shape, self._threads = (w.shape[0], w.shape[1]), threads
        self._w: Weights
        if w.dtype == np.int8:
            self._w, few, many = _whole(w), (_one_by_one_bytes, TALL), (_block_by_block_bytes, BYTE_BLOCK)
        else:
            self._w, few, many = _packed(w), (_one_by_one_words, TALL), (_block_by_block_words, WORD_BLOCK)
        self._loops: dict[int, tuple[Loop, int]] = {1: few, 4: many, 8: many, TOKENS: many}

    def product(self, x: Elements, out: Elements | None = None) -> Elements:
        """w x mod p for each row x: uint32 [rows, n] -> uint32 [rows, m], new or `out` (contiguous)."""
        rows, (m, n) = x.shape[0], self.shape
        if out is None:
            out = np.empty((rows, m), np.uint32)
        if x.shape[1] != n or out.shape != (rows, m):
            raise KernelError(f"{x.shape} and {out.shape} do not fit a matrix of {m} x {n}")
        x, first = _read_only(x), 0
        for tokens, enough in self.blocks:
            left = (rows - first) % tokens
            last = rows - left if left < enough else rows
            if last > first:
                self._multiply(tokens, x[first:last], out[first:last])
                first = last
        return out

    def _multiply(self, tokens: int, x: Elements, out: Elements) -> None:
        """In blocks of so many tokens: shared out by rows of x, where each thread has blocks enough; by rows
        of w elsewhere.
        """
        (m, n), rows, (loop, height) = self.shape, len(x), self._loops[tokens]
        threads = pieces(self._threads, m * n * -(-rows // tokens) * tokens, tokens)
        if threads == 1:
            loop(self._w, x, out, tokens, 0, rows, 0, m)
        elif rows >= 2 * threads * TOKENS:
            in_parallel(lambda a, b: loop(self._w, x, out, tokens, a, b, 0, m), rows, threads, tokens)
        else:
            in_parallel(lambda a, b: loop(self._w, x, out, tokens, 0, rows, a, b), m, threads, height)


def _whole(w: Weights) -> Weights:
    """w filled up with zeros to whole tiles."""
    shape = max(w.shape[0], BYTE_BLOCK), -(-w.shape[1] // STEP) * STEP
    if shape != w.shape or not w.flags.c_contiguous:
        filled = np.zeros(shape, w.dtype)
        filled[: w.shape[0], : w.shape[1]] = w
        w = filled
    return _read_only(w)


def _packed(w: Weights) -> Bytes:
    """w as uint8 [tiles of 4 rows, steps of 64 columns, PACKED], an even number of tiles."""
    tiles, steps = -(-w.shape[0] // WORD_BLOCK) * WORD_BLOCK // TALL, -(-w.shape[1] // STEP)
    packed = _ROOM.take(tiles * steps * PACKED).reshape(tiles, steps, PACKED)
    if not _pack_weights(_read_only(np.ascontiguousarray(w)), packed):
        raise KernelError("weights of more than 12 bits: the share was not made by sliplm")
    return _read_only(packed)


class _Room:
    """Memory for packed weights, many matrices side by side: numpy asks for huge pages for what is large, and
    a page walk for every 4 KB costs a tenth of reading them.
    """

    def __init__(self) -> None:
        self._lock, self._block, self._used = threading.Lock(), np.empty(0, np.uint8), 0

    def take(self, size: int) -> Bytes:
        """So many bytes, at a line of the cache."""
        with self._lock:
            if size + 64 > self._block.size - self._used:
                self._block, self._used = np.empty(max(_TOGETHER, size + 64), np.uint8), 0
            start = self._used + -(self._block.ctypes.data + self._used) % 64
            self._used = start + size
            return self._block[start : start + size]


_ROOM = _Room()


def _read_only(a: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """A plain array of one kind, whatever it was before, so that no kind of memory asks for a compilation."""
    view = np.asarray(a, order="C").view()
    view.flags.writeable = False
    return view


@jit
def _pack_weights(w: Weights, packed: Bytes) -> bool:
    good = True
    row = np.zeros(packed.shape[1] * STEP, np.int16)
    for i in range(packed.shape[0] * TALL):
        row[:] = 0
        if i < w.shape[0]:
            row[: w.shape[1]] = w[i]
        r = i % TALL
        for step in range(packed.shape[1]):
            tile, wide = packed[i // TALL, step], row[step * STEP :]
            for j in range(STEP // 2):
                a, b = wide[j], wide[j + STEP // 2]
                good &= (a <= 2047) & (a >= -2047) & (b <= 2047) & (b >= -2047)
                tile[r * 64 + 2 * j] = (a & 15) << 4 | (b & 15)
                tile[r * 64 + 2 * j + 1] = (a >> 4) & 255
                tile[TALL * 64 + r * 32 + j] = (b >> 4) & 255
    return good


@jit
def _one_by_one_bytes(
    w: Weights, x: Elements, out: Elements, tokens: int, start: int, end: int, first: int, last: int
) -> None:
    n = w.shape[1]
    limbs = byte_limbs(x[start:end], end - start, n)
    sums = np.empty(TALL, np.int64)
    for i in range(first, last, TALL):
        row = min(i, w.shape[0] - TALL)  # the last tile may overlap the one before it
        for r in range(end - start):
            tall_bytes(w, row * n, n, limbs, r * limbs[0].size, row * n + max(TALL * n, _AHEAD), sums)
            for k in range(min(TALL, out.shape[1] - row)):
                out[start + r, row + k] = _residue(sums[k])


@jit
def _one_by_one_words(
    w: Weights, x: Elements, out: Elements, tokens: int, start: int, end: int, first: int, last: int
) -> None:
    steps = w.shape[1]
    limbs = word_limbs(x[start:end], end - start, steps * STEP)
    sums = np.empty(TALL, np.int64)
    for row in range(first, last, TALL):
        for r in range(end - start):
            tall_words(w, row * (steps * PACKED // TALL), steps, limbs, r * limbs[0].size, sums)
            for k in range(min(TALL, out.shape[1] - row)):
                out[start + r, row + k] = _residue(sums[k])


@jit
def _block_by_block_bytes(
    w: Weights, x: Elements, out: Elements, tokens: int, start: int, end: int, first: int, last: int
) -> None:
    n = w.shape[1]
    size = BYTE_LIMBS * n * tokens // 4
    blocks = max(1, min(_BLOCKS, _CACHED // (4 * size)))
    packed = np.empty((blocks, size), np.uint32)
    sums, residues = np.empty(BYTE_BLOCK * TOKENS, np.int64), np.zeros(8 * TOKENS, np.uint32)
    for token in range(start, end, blocks * tokens):
        count = -(-(min(end, token + blocks * tokens) - token) // tokens)
        for b in range(count):
            if tokens == TOKENS:
                block = block_of(x, token + b * tokens, n)
                for j in range(0, n, TOKENS):
                    pack_bytes(block, j, n, packed, b * size + j * TOKENS)
            else:
                interleave(byte_limbs(x[token + b * tokens : token + (b + 1) * tokens], tokens, n), packed[b])
        for i in range(first, last, BYTE_BLOCK):
            row = min(i, w.shape[0] - BYTE_BLOCK)
            for b in range(count):
                sums[:] = 0
                for j in range(0, n, BYTE_EXACT):
                    ahead = row * n + j * BYTE_BLOCK + max(BYTE_BLOCK * n, _AHEAD)
                    steps = min(BYTE_EXACT, n - j) * tokens // STEP
                    _block_bytes(tokens, w, row * n + j, n, packed, b * size + j * tokens, ahead, steps, sums)
                fold(sums, residues, sums.size)
                where = token + b * tokens
                if tokens == TOKENS and where + TOKENS <= out.shape[0] and row + BYTE_BLOCK <= out.shape[1]:
                    put_bytes(residues, 0, out, where * out.shape[1] + row, out.shape[1])
                else:
                    put_part(residues, out, tokens, where, row, BYTE_BLOCK)


@jit
def _block_by_block_words(
    w: Weights, x: Elements, out: Elements, tokens: int, start: int, end: int, first: int, last: int
) -> None:
    steps = w.shape[1]
    n = steps * STEP
    size = WORD_LIMBS * n * tokens // 2
    blocks = max(1, min(_BLOCKS, _CACHED // (4 * size)))
    packed, strip = np.empty((blocks, size), np.uint32), np.empty((WORD_BLOCK, n), np.int16)
    sums, residues = np.empty(WORD_BLOCK * TOKENS, np.int64), np.zeros(8 * TOKENS, np.uint32)
    for token in range(start, end, blocks * tokens):
        count = -(-(min(end, token + blocks * tokens) - token) // tokens)
        for b in range(count):
            if tokens == TOKENS:
                block = block_of(x, token + b * tokens, n)
                for j in range(0, n, TOKENS):
                    pack_words(block, j, n, packed, b * size + j * TOKENS)
            else:
                interleave(word_limbs(x[token + b * tokens : token + (b + 1) * tokens], tokens, n), packed[b])
        for row in range(first, last, WORD_BLOCK):
            for half in range(0, WORD_BLOCK, TALL):
                unpack(w, (row + half) * (steps * PACKED // TALL), steps, strip, half * n)
            ahead = (row + WORD_BLOCK) * (steps * PACKED // TALL)
            for b in range(count):
                _block_words(tokens, strip, n, packed, b * size, w, ahead, sums)
                fold(sums, residues, WORD_BLOCK * tokens)
                where = token + b * tokens
                if tokens == TOKENS and where + TOKENS <= out.shape[0] and row + WORD_BLOCK <= out.shape[1]:
                    put_words(residues, 0, out, where * out.shape[1] + row, out.shape[1])
                else:
                    put_part(residues, out, tokens, where, row, WORD_BLOCK)


@jit
def _block_bytes(
    tokens: int, w: Weights, place: int, n: int, packed: Elements, x: int, ahead: int, steps: int, sums: Sums
) -> None:
    if tokens == 4:
        block_bytes_4(w, place, n, packed, x, ahead, steps, sums)
    elif tokens == 8:
        block_bytes_8(w, place, n, packed, x, ahead, steps, sums)
    else:
        block_bytes_16(w, place, n, packed, x, ahead, steps, sums)


@jit
def _block_words(
    tokens: int, strip: Weights, n: int, packed: Elements, x: int, w: Weights, ahead: int, sums: Sums
) -> None:
    if tokens == 4:
        block_words_4(strip, n, packed, x, w, ahead, sums)
    elif tokens == 8:
        block_words_8(strip, n, packed, x, w, ahead, sums)
    else:
        block_words_16(strip, n, packed, x, w, ahead, sums)


@jit
def byte_limbs(x: Elements, rows: int, n: int) -> Bytes:
    """uint8 [rows, 4, n] of as many rows of x, filled up with zeros."""
    limbs = np.zeros((rows, BYTE_LIMBS, n), np.uint8)
    for r in range(x.shape[0]):
        for limb in range(BYTE_LIMBS):
            shift = np.uint32(8 * limb)
            for j in range(x.shape[1]):
                limbs[r, limb, j] = x[r, j] >> shift
    return limbs


@jit
def word_limbs(x: Elements, rows: int, n: int) -> Words:
    """int16 [rows, 2, n] of as many rows of x, filled up with zeros."""
    limbs = np.zeros((rows, WORD_LIMBS, n), np.int16)
    for r in range(x.shape[0]):
        for j in range(x.shape[1]):
            v = x[r, j] + np.uint32(5 if x[r, j] >= WRAP else 0)
            limbs[r, 0, j] = v
            limbs[r, 1, j] = (v + np.uint32(0x8000)) >> np.uint32(16)
    return limbs


@jit
def interleave(limbs: npt.NDArray[np.integer], packed: Elements) -> None:
    """Limbs [tokens, limbs, n] as blocks of 4 and 8 tokens take them: 64 / tokens bytes of each in turn."""
    tokens, count = limbs.shape[:2]
    source = limbs.reshape(-1).view(np.uint64).reshape(tokens, count, -1)
    target, size = packed.view(np.uint64).reshape(-1, count, tokens, 8 // tokens), 8 // tokens
    for t in range(tokens):
        for limb in range(count):
            for step in range(target.shape[0]):
                for k in range(size):
                    target[step, limb, t, k] = source[t, limb, step * size + k]


@jit
def block_of(x: Elements, token: int, n: int) -> Elements:
    """16 rows of x, filled up with zeros where there are fewer, or fewer columns than n."""
    if token + TOKENS <= x.shape[0] and x.shape[1] == n:
        return x[token : token + TOKENS]
    filled = np.zeros((TOKENS, n), np.uint32)
    for t in range(min(TOKENS, x.shape[0] - token)):
        filled[t, : x.shape[1]] = x[token + t]
    return filled


@jit
def put_part(residues: Elements, out: Elements, tokens: int, token: int, row: int, height: int) -> None:
    """What `put` does for a block of so many tokens, as far as there are rows and columns."""
    for t in range(min(tokens, out.shape[0] - token)):
        for r in range(min(height, out.shape[1] - row)):
            out[token + t, row + r] = residues[r * tokens + t]


@jit
def _residue(total: np.int64) -> np.uint32:
    """total mod p for |total| < 2^62, that is n < 2^19, without a division."""
    v = np.uint64(total) + _OFFSET  # between 0 and 1.5 * 2^63
    v = (v & _LOW) + _FOLD * (v >> _HIGH)  # below 2^32 + 5 * 1.5 * 2^31 < 5 * 2^32
    v = (v & _LOW) + _FOLD * (v >> _HIGH)  # below 2^32 + 5 * 5 < 2 p
    return np.uint32(v - _P if v >= _P else v)
