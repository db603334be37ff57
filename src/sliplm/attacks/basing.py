"""The studies of attacks 12 to 14 on matrices of the user's own model, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.rotation import fast_block
from sliplm.attacks import a12_lattice, a13_null, a14_columns
from sliplm.attacks.a12_lattice import Shown
from sliplm.attacks.a13_null import Found
from sliplm.attacks.a14_columns import Known
from sliplm.attacks.former import DEFAULT, FORMER, HAAR
from sliplm.engines.source import stack
from sliplm.engines.transformers.plan import make_plan
from sliplm.errors import InputError
from sliplm.shares.recipe import Recipe

_WIDEST, _TALLEST = 1024, 4096  # beyond, a split takes seconds
_SPLITS, _REPEATS, _TRIALS = 40, 2, 5


@dataclass(frozen=True)
class BasisStudy:
    """All three studies on one matrix.

    Attributes:
        group: whose first rows and columns it is.
        lattice, null, columns: of attacks 12, 13 and 14.
    """

    group: str
    lattice: tuple[Shown, ...]
    null: tuple[Found, ...]
    columns: tuple[Known, ...]


def basis_study(model_dir: Path, out: Path, progress: Callable[[str], None]) -> BasisStudy:
    """Run the studies, or read them from `out/basis.json` if they were run.

    Args:
        progress: called with each line's split.

    Raises:
        InputError: the file in the folder is no study.
        ReportError: python-flint is not installed.
        CheckpointError: as `split`.
    """
    file = out / "basis.json"
    if file.exists():
        return _read(file)
    a13_null.need_flint()
    name, weight = _matrix(model_dir)
    n = weight.shape[1]
    rank = min(Recipe().rank, n // 8)
    dead = tuple(count for count in a13_null.DEAD if count <= n // 16)
    known = tuple(count for count in a14_columns.KNOWN if count <= n // 2)

    def each(lines: Iterator[Any], number: int) -> tuple[Any, ...]:
        made = []
        for line in lines:
            made.append(line)
            progress(f"{number} on {line.kind}")
        return tuple(made)

    found = BasisStudy(
        name,
        each(a12_lattice.study([weight], rank, _SPLITS, (FORMER, DEFAULT, HAAR)), 12),
        each(a13_null.study(weight, rank, _REPEATS, dead), 13),
        each(a14_columns.study(weight, rank, _TRIALS, known), 14),
    )
    file.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def _matrix(model_dir: Path) -> tuple[str, Floats]:
    """A group of the middle of the model with the most rows for each column, cut to a width that blocks tile.

    The head's many rows would only cost time.
    """
    plan = make_plan(model_dir, Recipe(rank=0))
    groups = [group for group, _ in plan.split if group.rows <= 16 * group.columns]
    groups = groups or [group for group, _ in plan.split]
    most = max(group.rows / group.columns for group in groups)
    alike = [group for group in groups if group.rows / group.columns == most]
    group = alike[len(alike) // 2]
    n = min(group.columns, _WIDEST)
    while n % fast_block(n):
        n -= 1
    return group.name, np.ascontiguousarray(stack(plan.read, group)[:_TALLEST, :n], np.float32)


def _read(file: Path) -> BasisStudy:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return BasisStudy(
            fields["group"],
            tuple(Shown(**line) for line in fields["lattice"]),
            tuple(Found(**line) for line in fields["null"]),
            tuple(Known(**line) for line in fields["columns"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is no study of attacks 12 to 14: remove it") from error
