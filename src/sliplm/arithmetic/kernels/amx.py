"""Exact products with AMX, which multiplies tiles of 16 x 64 bytes.

x is cut into four limbs of 8 bits.  Weights of 8 bits are multiplied as they are, two tiles at a time; those
of 12 as a tile of their upper 8 bits and one of their lower 4.  Few rows of x are left to VNNI (memory
decides).
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Final

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.kernels import vnni
from sliplm.arithmetic.kernels.amx_tile import EXACT, PAIR, ROWS, configure, part, release, two_by_two, whole
from sliplm.arithmetic.kernels.folding import fold, join
from sliplm.arithmetic.kernels.vnni import VnniMatrix, Weights, block_of, put_part
from sliplm.arithmetic.kernels.vnni_layout import (
    BYTE_LIMBS,
    PACKED,
    STEP,
    TALL,
    TOKENS,
    pack_bytes,
    put_words,
)

Totals = npt.NDArray[np.int64]

_CACHED = 1 << 20  # bytes of packed x at a time: half of a second-level cache
_BLOCKS = 16  # at a time
_SHAPES: Final = np.zeros(64, np.uint8)  # of all eight tiles, as the processor reads them
_SHAPES[0] = 1
_SHAPES[16:32:2], _SHAPES[48:56] = STEP, ROWS
_SHAPES.flags.writeable = False

_ARCH_PRCTL, _ASK, _TILE_DATA = 158, 0x1023, 18  # system call, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


@cache
def available() -> bool:
    """Has this processor the instructions, and does the system let this process use them?"""
    features: dict[str, bool] = llvm.get_host_cpu_features()
    if not all(features.get(name, False) for name in ("amx-tile", "amx-int8")) or not vnni.available():
        return False
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    refused: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK, _TILE_DATA)
    return not refused


class AmxMatrix(VnniMatrix):
    """w as `VnniMatrix` has it."""

    kernel = "amx"
    blocks = ((TOKENS, 5), (4, 4), (1, 1))

    def __init__(self, w: Weights, threads: int = 1) -> None:
        super().__init__(w, threads)
        self._loops[TOKENS] = (_many_bytes, 2 * ROWS) if w.dtype == np.int8 else (_many_words, ROWS)


@jit
def _many_bytes(
    w: Weights, x: Elements, out: Elements, tokens: int, start: int, end: int, first: int, last: int
) -> None:
    n, height = w.shape[1], 2 * ROWS
    packed, strip = _packed(n), np.empty(n * height, np.int8)
    sums, totals = np.empty(4 * PAIR, np.int32), np.empty((2, TOKENS * ROWS), np.int64)
    residues = np.empty(TOKENS * height, np.uint32)
    configure(_SHAPES)
    for token in range(start, end, packed.shape[0] * TOKENS):
        count = _pack(x, token, min(end, token + packed.shape[0] * TOKENS), n, packed)
        for row in range(first, last, height):
            for r in range(min(height, w.shape[0] - row)):
                whole(w, (row + r) * n, n // STEP, strip, r // ROWS * n * ROWS + r % ROWS * STEP)
            for b in range(count):
                totals[:] = 0
                for j in range(0, n, EXACT):
                    steps = min(EXACT, n - j) // STEP
                    for k in range(2):
                        at = b * packed.shape[1] + j * TOKENS + 2 * k * TOKENS
                        two_by_two(strip, j * ROWS, n * ROWS, packed, at, steps, sums, 2 * k * PAIR)
                    for a in range(2):
                        join(sums, a * PAIR, (2 + a) * PAIR, 0, totals[a])
                _put(totals.reshape(-1), residues, out, token + b * TOKENS, row, height)
    release()


@jit
def _many_words(
    w: Weights, x: Elements, out: Elements, tokens: int, start: int, end: int, first: int, last: int
) -> None:
    steps = w.shape[1]
    n = steps * STEP
    packed, strip = _packed(n), np.empty(2 * n * ROWS, np.int8)
    sums, totals = np.empty(4 * PAIR, np.int32), np.empty(TOKENS * ROWS, np.int64)
    residues = np.empty(TOKENS * ROWS, np.uint32)
    configure(_SHAPES)
    for token in range(start, end, packed.shape[0] * TOKENS):
        count = _pack(x, token, min(end, token + packed.shape[0] * TOKENS), n, packed)
        for row in range(first, last, ROWS):
            for r in range(0, min(ROWS, w.shape[0] * TALL - row), TALL):
                part(w, (row + r) * (steps * PACKED // TALL), steps, strip, r * STEP, n * ROWS)
            for b in range(count):
                totals[:] = 0
                for j in range(0, n, EXACT):
                    many = min(EXACT, n - j) // STEP
                    for k in range(2):
                        at = b * packed.shape[1] + j * TOKENS + 2 * k * TOKENS
                        two_by_two(strip, j * ROWS, n * ROWS, packed, at, many, sums, 2 * k * PAIR)
                    join(sums, 0, 2 * PAIR, 4, totals)
                    join(sums, PAIR, 3 * PAIR, 0, totals)
                _put(totals, residues, out, token + b * TOKENS, row, ROWS)
    release()


@jit
def _packed(n: int) -> Elements:
    """Memory for as many packed blocks of x as are multiplied at a time."""
    size = BYTE_LIMBS * n * TOKENS // 4
    return np.empty((max(1, min(_BLOCKS, _CACHED // (4 * size))), size), np.uint32)


@jit
def _pack(x: Elements, token: int, end: int, n: int, packed: Elements) -> int:
    """Blocks of x from a token on; how many."""
    count = -(-(end - token) // TOKENS)
    for b in range(count):
        block = block_of(x, token + b * TOKENS, n)
        for j in range(0, n, TOKENS):
            pack_bytes(block, j, n, packed, b * packed.shape[1] + j * TOKENS)
    return count


@jit
def _put(totals: Totals, residues: Elements, out: Elements, token: int, row: int, height: int) -> None:
    """Totals [height, 16 x] mod p into out."""
    fold(totals, residues, totals.size)
    for r in range(0, height, 8):
        if token + TOKENS <= out.shape[0] and row + r + 8 <= out.shape[1]:
            put_words(residues, r * TOKENS, out, token * out.shape[1] + row + r, out.shape[1])
        else:
            put_part(residues[r * TOKENS :], out, TOKENS, token, row + r, 8)
