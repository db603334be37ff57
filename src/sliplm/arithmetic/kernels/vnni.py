"""Exact products with AVX-512 VNNI: x is cut into limbs small enough that 32-bit lanes cannot overflow.

    int8 w    x in four limbs of 8 bits,   vpdpbusd (unsigned limb, signed weight)
    int16 w   x in three limbs of 11 bits, vpdpwssd (|w| <= 2047, so a product stays below 2^22)

Few rows of x are multiplied one by one with the rows of w (memory decides), many in blocks of 16, packed so
that every lane has an x of its own (arithmetic decides).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, P
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.kernels.threads import in_parallel
from sliplm.arithmetic.kernels.vnni_tile import BYTES, TALL, TOKENS, WORDS, block, pack, put, tall

Scalar = TypeVar("Scalar", bound=np.generic)

_CHUNK = 8192  # columns summed in the lanes of a tall tile: 2 * 2047 * 2047 * (8192 / 32) < 2^31
_ALIGN = 64  # columns of one step of the wider tall tile
_AHEAD = 1 << 14  # elements: w is asked for at least this far ahead, and never inside the same tile
_FEW_ROWS = 10  # rows of x up to which tall tiles beat a block filled up with zeros
_PACK_WORDS = 1 << 17  # of packed x at a time: half of a second-level cache
_PACK_BLOCKS = 4  # at a time: enough to read w seldom
_SMALL = 1 << 19  # multiply-adds below which a second thread costs more than it gains

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
    """w int8 or int16 [m, n], n < 2^19; copied only where its shape does not fit whole tiles."""

    kernel = "vnni"

    def __init__(self, w: npt.NDArray[np.integer], threads: int = 1) -> None:
        m, n = w.shape
        self.shape, self._threads = (m, n), threads
        self._form = BYTES if w.dtype == np.int8 else WORDS
        rows, columns = max(m, self._form.height), -(-n // _ALIGN) * _ALIGN
        if (rows, columns) != (m, n) or not w.flags.c_contiguous:
            padded = np.zeros((rows, columns), w.dtype)
            padded[:m, :n] = w
            w = padded
        self._w = _read_only(w)

    def product(self, x: Elements) -> Elements:
        """w x mod p for each row x: uint32 [rows, n] -> uint32 [rows, m]."""
        rows, (height, width) = x.shape[0], self._w.shape
        few = rows % TOKENS if rows % TOKENS <= _FEW_ROWS else 0
        many = -(-(rows - few) // TOKENS) * TOKENS
        x = _read_only(_padded(x, many + few, width))
        out = np.empty((many + few, height), np.uint32)
        block_words = width // self._form.step * self._form.limbs * TOKENS
        group = TOKENS * min(_PACK_BLOCKS, max(1, _PACK_WORDS // block_words))
        for start in range(0, many, group):
            end = min(start + group, many)
            self._many_rows(x[start:end], out[start:end])
        if few:
            self._few_rows(x[many:], out[many:])
        return np.ascontiguousarray(out[:rows, : self.shape[0]])

    def _few_rows(self, x: Elements, out: Elements) -> None:
        limbs = np.empty((x.shape[0], self._form.limbs, x.shape[1]), np.dtype(f"u{self._w.itemsize}"))
        _cut(x, self._form.limb_bits, limbs)
        self._in_parallel(lambda first, last: _tall_rows(self._w, limbs, out, first, last), x.shape[0], TALL)

    def _many_rows(self, x: Elements, out: Elements) -> None:
        form = self._form
        packed = np.empty((x.shape[0] // TOKENS, x.shape[1] // form.step, form.limbs, TOKENS), np.uint32)
        _pack(self._w, x, packed)
        self._in_parallel(
            lambda first, last: _block_rows(self._w, packed, form.height, form.exact, out, first, last),
            x.shape[0],
            form.height,
        )

    def _in_parallel(self, part: Callable[[int, int], None], rows: int, step: int) -> None:
        threads = self._threads if self._w.size * rows >= _SMALL else 1
        in_parallel(part, self._w.shape[0], threads, step)


def _padded(x: Elements, rows: int, columns: int) -> Elements:
    """x, copied only to fill it up with zeros or to make it contiguous."""
    if x.shape == (rows, columns):
        return np.ascontiguousarray(x)
    padded = np.zeros((rows, columns), np.uint32)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def _read_only(a: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """A plain array of one kind, whatever it was before, so that no kind of memory asks for a compilation."""
    view = np.asarray(a).view()
    view.flags.writeable = False
    return view


@jit
def _cut(x: Elements, bits: int, limbs: npt.NDArray[np.unsignedinteger]) -> None:
    mask = np.uint32((1 << bits) - 1)
    for r in range(x.shape[0]):
        for limb in range(limbs.shape[1]):
            shift = np.uint32(bits * limb)
            for j in range(x.shape[1]):
                limbs[r, limb, j] = (x[r, j] >> shift) & mask


@jit
def _pack(w: npt.NDArray[np.integer], x: Elements, packed: npt.NDArray[np.uint32]) -> None:
    n = x.shape[1]
    words = packed[0].size // n
    for r in range(0, x.shape[0], TOKENS):
        for j in range(0, n, TOKENS):
            pack(w, x, r * n + j, n, packed, (r // TOKENS * n + j) * words)


@jit
def _tall_rows(
    w: npt.NDArray[np.integer],
    limbs: npt.NDArray[np.unsignedinteger],
    out: Elements,
    first: int,
    last: int,
) -> None:
    n = w.shape[1]
    sums = np.empty(TALL, np.int64)
    for i in range(first, last, TALL):
        row = min(i, w.shape[0] - TALL)  # the last tile may overlap the one before it
        for r in range(limbs.shape[0]):
            sums[:] = 0
            for j in range(0, n, _CHUNK):
                start = r * limbs[0].size + j
                ahead = row * n + j * TALL + max(TALL * n, _AHEAD)
                tall(w, row * n + j, n, limbs, start, ahead, min(_CHUNK, n - j), sums)
            for k in range(TALL):
                out[r, row + k] = _residue(sums[k])


@jit
def _block_rows(
    w: npt.NDArray[np.integer],
    packed: npt.NDArray[np.uint32],
    height: int,
    exact: int,
    out: Elements,
    first: int,
    last: int,
) -> None:
    n = w.shape[1]
    step, words = n // packed.shape[1], packed[0].size // n
    sums, residues = np.empty(height * TOKENS, np.int64), np.empty(height * TOKENS, np.uint32)
    for i in range(first, last, height):
        row = min(i, w.shape[0] - height)  # the last tile may overlap the one before it
        for b in range(packed.shape[0]):
            sums[:] = 0
            for j in range(0, n, exact):
                start = (b * n + j) * words
                ahead = row * n + j * height + max(height * n, _AHEAD)
                block(w, row * n + j, n, packed, start, ahead, min(exact, n - j) // step, sums)
            for k in range(sums.size):
                residues[k] = _residue(sums[k])
            put(w, residues, out, b * TOKENS * out.shape[1] + row, out.shape[1])


@jit
def _residue(total: np.int64) -> np.uint32:
    """total mod p for |total| < 2^62, that is n < 2^19, without a division."""
    v = np.uint64(total) + _OFFSET  # between 0 and 1.5 * 2^63
    v = (v & _LOW) + _FOLD * (v >> _HIGH)  # below 2^32 + 5 * 1.5 * 2^31 < 5 * 2^32
    v = (v & _LOW) + _FOLD * (v >> _HIGH)  # below 2^32 + 5 * 5 < 2 p
    return np.uint32(v - _P if v >= _P else v)
