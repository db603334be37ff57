"""The product in Python integers: slow and obviously right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, P


class ReferenceMatrix:
    """w [m, n] as lists of Python integers."""

    kernel = "reference"

    def __init__(self, w: npt.NDArray[np.integer], threads: int = 1) -> None:
        self.shape = (w.shape[0], w.shape[1])
        self._rows: list[list[int]] = w.tolist()

    def product(self, x: Elements, out: Elements | None = None) -> Elements:
        """w x mod p for each row x: uint32 [rows, n] -> uint32 [rows, m], new or `out`."""
        out = np.empty((x.shape[0], self.shape[0]), np.uint32) if out is None else out
        for i, v in enumerate(x.tolist()):
            out[i] = [sum(a * b for a, b in zip(row, v, strict=True)) % P for row in self._rows]
        return out
