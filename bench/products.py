"""Multiply-adds a second of each exact kernel beside torch's products, by rows, shape and threads.

python bench/products.py [--rows 1,4,16,64,512] [--seconds 0.25]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from _common import finish, machine, median, seconds
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels.threads import default_threads

SHAPES = ((960, 576), (3072, 576), (576, 1536), (4096, 4096))
KINDS = ((np.int8, 127, 8), (np.int16, 2047, 12))
FAST = ("amx", "vnni", "portable")
COLD = 64 << 20  # bytes that one round reads at least, so that weights come from memory as in a model


def measure(m: int, n: int, rows: int, threads: int, limit: float) -> list[dict[str, Any]]:
    """Every kernel and torch's two types, medians of rounds in turn over as many matrices as fill COLD."""
    torch.set_num_threads(threads)
    copies = max(1, COLD // (m * n))
    runs: dict[tuple[str, int], list[Any]] = {}
    for dtype, largest, bits in KINDS:
        w, x = kernels.known_operands(m, n, rows, largest)
        for name in (name for name in FAST if _right(name)):
            if name != "portable" or copies * m * n * rows < 1 << 32:
                matrices = [
                    kernels.prepare(w.astype(dtype), threads=threads, kernel=name) for _ in range(copies)
                ]
                runs[name, bits] = [lambda a=a, x=x: a.product(x) for a in matrices]
    for kind in (torch.float32, torch.bfloat16):
        many = [torch.from_numpy(w.astype(np.float32)).to(kind) for _ in range(copies)]
        v = torch.from_numpy((x / P).astype(np.float32)).to(kind)
        runs[str(kind).removeprefix("torch."), 0] = [
            lambda a=a, v=v: torch.nn.functional.linear(v, a) for a in many
        ]
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    spent = 0.0
    while spent < limit * len(runs) or len(times["float32", 0]) < 3:
        for key, calls in runs.items():
            times[key].append(seconds(lambda calls=calls: [call() for call in calls]))  # type: ignore[misc]
            spent += times[key][-1]
    gmacs = {key: m * n * rows * copies / median(found) / 1e9 for key, found in times.items()}
    return [
        {
            "m": m,
            "n": n,
            "rows": rows,
            "threads": threads,
            "kernel": name,
            "bits": bits,
            "gmacs": round(speed, 1),
            "of_float32": round(speed / gmacs["float32", 0], 2),
            "of_bfloat16": round(speed / gmacs["bfloat16", 0], 2),
        }
        for (name, bits), speed in gmacs.items()
        if bits
    ]


def _right(name: str) -> bool:
    return kernels._KERNELS[name][0]() and kernels.self_test(name)


def show(found: list[dict[str, Any]]) -> None:
    """A line for each kernel."""
    for line in found:
        shape = f"{line['m']} x {line['n']}"
        print(
            f"{shape:>12} {line['rows']:5d} rows {line['threads']:2d} thr {line['bits']:3d} bits "
            f"{line['kernel']:>8} {line['gmacs']:7.1f} G {line['of_float32']:5.2f} f32 "
            f"{line['of_bfloat16']:5.2f} bf16",
            flush=True,
        )


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,4,16,64,512")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each kernel of a case")
    asked = parser.parse_args()
    head = machine()
    results = []
    for threads in sorted({1, min(2, default_threads())}):
        for m, n in SHAPES:
            for rows in map(int, asked.rows.split(",")):
                found = measure(m, n, rows, threads, asked.seconds)
                show(found)
                results += found
    finish({"bench": "products", "machine": head, "results": results})


if __name__ == "__main__":
    main()
