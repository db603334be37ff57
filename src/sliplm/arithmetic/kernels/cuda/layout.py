"""How a matrix lies in a card's memory, and what it takes.

Columns are filled up with zeros to `width`, a multiple of 256.  Weights of 8 bits are one plane of bytes.
Those of 9 to 12 bits are 16 high + low: a plane of signed high parts, and half a byte of low part for each
weight, the first half of the columns in the low nibbles and the second half in the high ones, so that a
program takes both apart with a mask and a shift and moves nothing.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from sliplm.errors import CardError

ALIGN: Final = 256
MAX_COLUMNS: Final = (1 << 17) - ALIGN  # 128 * 128 * n < 2^31: a sum of a limb's products fits 32 bits
MAX_OUTPUTS: Final = 1 << 22  # a row of answers fits the staging memory


def width_of(n: int) -> int:
    """Columns in memory."""
    return -(-n // ALIGN) * ALIGN


def size_of(shape: tuple[int, int], *, packed: bool) -> int:
    """Bytes of a matrix on a card.  Raises CardError where it is too large for the kernels."""
    m, n = shape
    if n > MAX_COLUMNS or m > MAX_OUTPUTS:
        raise CardError(
            f"a matrix of {m} x {n} is too large for the card's kernels ({MAX_OUTPUTS} x {MAX_COLUMNS} at "
            "most): serve it on the CPU"
        )
    return m * width_of(n) * (3 if packed else 2) // 2


def is_packed(w: npt.NDArray[np.integer]) -> bool:
    """Whether its weights have low parts of their own."""
    return w.dtype != np.int8


def planes(w: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8] | None]:
    """Rows of weights as the card holds them: int8 [m, width], and uint8 [m, width / 2] if they are packed.

    Args:
        w: int8, or int16 with |w| <= 2047, [m, n].
    """
    m, n = w.shape
    width = width_of(n)
    high = np.zeros((m, width), np.int8)
    if not is_packed(w):
        high[:, :n] = w
        return high, None
    high[:, :n] = w >> 4
    low = np.zeros((m, width), np.uint8)
    low[:, :n] = w & 15
    both: npt.NDArray[np.uint8] = low[:, : width // 2] | (low[:, width // 2 :] << np.uint8(4))
    return high, both
