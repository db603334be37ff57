"""Multiply-adds a second of each exact kernel on one core, and how often they are those of float32 BLAS.

python bench/products.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from _common import finish, machine, median, seconds
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P

ROWS = 64


def measure(m: int, n: int, dtype: type, largest: int) -> dict[str, Any]:
    """Both fast kernels and float32 on one core, medians of rounds in turn."""
    w, x = kernels.known_operands(m, n, ROWS, largest)
    floats = torch.from_numpy(w.astype(np.float32)), torch.from_numpy((x / P).astype(np.float32))
    names = [name for name in ("vnni", "portable") if name == kernels.choose() or name == "portable"]
    matrices = {name: kernels.prepare(w.astype(dtype), threads=1, kernel=name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in [*names, "float32"]}
    for _ in range(9):
        for name, matrix in matrices.items():
            times[name].append(seconds(lambda matrix=matrix: matrix.product(x)))  # type: ignore[misc]
        times["float32"].append(seconds(lambda: floats[1] @ floats[0].T))
    speed = {f"{name}_gmacs": m * n * ROWS / median(spent) / 1e9 for name, spent in times.items()}
    return {"m": m, "n": n, "bits": 8 if largest == 127 else 12, **{k: round(v, 1) for k, v in speed.items()}}


def main() -> None:
    """Measure and end with one JSON line."""
    torch.set_num_threads(1)
    shapes = ((3072, 576), (4096, 4096))
    results = [measure(m, n, *kind) for m, n in shapes for kind in ((np.int16, 2047), (np.int8, 127))]
    finish({"bench": "products", "machine": machine(), "rows": ROWS, "results": results})


if __name__ == "__main__":
    main()
