"""Attacks 12 to 14 at full size: do a share's public integers, or known columns, show the secret basis?

    python bench/basis.py [--part lattice|null|columns] [--width 576] [--splits 200] [--trials 20]

The matrices are gate and up of SmolLM2-135M, 576 columns wide: the first 512 of them, all, or with those of
the next layer beside them up to 640 and 1024.  Three kinds of split of the same matrices: as the default
does, with a Haar Q_in, and as release 0.2 did; of `null`, and of `lattice` at 640, also with one of the
default's two parts alone.

`lattice`  part of fresh splits whose smallest singular vector has p < 0.001, the least p, and how far the
           p-values are from uniform
`null`     with dead inputs: dimensions of the null space, integer vectors and true columns found there
`columns`  outer blocks peeled over GF(2), and what correlations of squares say, with known columns (0: with
           the rows of the share instead)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors import safe_open

from _common import console, finish, machine
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.attacks import a12_lattice, a13_null, a14_columns
from sliplm.attacks.a12_lattice import Shown
from sliplm.attacks.a13_null import Found
from sliplm.attacks.a14_columns import Known
from sliplm.attacks.former import DEFAULT, FORMER, HAAR
from sliplm.examples import smollm2

RANK = 16
WIDTHS = {"lattice": (512, 576, 640, 1024), "null": (512, 640), "columns": (512, 576, 640, 1024)}
LAYERS = range(2, 27)
MIDDLE = 14


def matrix(layer: int, width: int) -> Floats:
    """Gate and up of a layer, cut or lengthened to so many columns: float32 [3072, width]."""
    with safe_open(smollm2() / "model.safetensors", "np") as file:

        def both(number: int) -> Floats:
            names = (f"model.layers.{number}.mlp.{part}_proj.weight" for part in ("gate", "up"))
            return np.concatenate([file.get_tensor(name).astype(np.float32) for name in names])

        return np.ascontiguousarray(np.hstack([both(layer), both(layer + 1)])[:, :width])


def lattice(width: int, splits: int) -> Iterable[Shown]:
    """Attack 12; as many splits of each layer."""
    weights = [matrix(layer, width) for layer in LAYERS]
    kinds = a12_lattice.KINDS if width == 640 else (FORMER, DEFAULT, HAAR)
    return a12_lattice.study(weights, RANK, max(1, splits // len(LAYERS)), kinds)


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table that fits 80 columns."""
    for row in [columns, *rows]:
        console.print(f"{row[0]:>16}" + "".join(f"{each:>9}" for each in row[1:]), highlight=False)


def shown(found: Iterable[Shown]) -> list[dict[str, Any]]:
    """Attack 12's table, as it comes."""
    made = list(found)
    rows = [
        (s.kind, f"{s.width}", f"{s.splits}", f"{s.below:.1%}", f"{s.smallest:.2g}", f"{s.deviation:.1f}")
        for s in made
    ]
    show(("split", "columns", "splits", "p<0.001", "least p", "apart"), rows)
    return [asdict(each) for each in made]


def found(made: Iterable[Found]) -> list[dict[str, Any]]:
    """Attack 13's."""
    results = list(made)
    rows = [
        (
            f.kind,
            f"{f.width}",
            f"{f.dead}",
            f"{f.null}",
            f"{f.integers}",
            f"{f.columns} of {f.dead * f.splits}",
        )
        for f in results
    ]
    show(("split", "columns", "dead", "null", "whole", "found"), rows)
    return [asdict(each) for each in results]


def known(made: Iterable[Known]) -> list[dict[str, Any]]:
    """Attack 14's."""
    results = list(made)
    rows = [
        (
            k.kind, f"{k.width}", f"{k.known}", f"{k.peeled:.0%}", f"{k.told:.1f}", f"{k.overlap:.3f}",
            f"{k.blind:.1f}", f"{k.blind_most:.1f}",
        )
        for k in results
    ]  # fmt: skip
    show(("split", "columns", "known", "peeled", "told", "overlap", "blind", "most"), rows)
    return [asdict(each) for each in results]


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=tuple(WIDTHS), action="append")
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for part in given.part or WIDTHS:
        results[part] = []
        for width in given.width or WIDTHS[part]:
            if part == "lattice":
                results[part] += shown(lattice(width, given.splits))
            elif part == "null":
                results[part] += found(a13_null.study(matrix(MIDDLE, width), RANK, max(1, given.trials // 4)))
            else:
                results[part] += known(a14_columns.study(matrix(MIDDLE, width), RANK, given.trials))
    finish({"bench": "basis", "machine": machine(), "rank": RANK, **results})


if __name__ == "__main__":
    main()
