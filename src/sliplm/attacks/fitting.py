"""The study of attack 11 on a matrix of the user's own model, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sliplm.attacks.a11_fit import CLOSE, GIVEN, RANKS, Matrix, Trial, signs_to_guess, study, without_top
from sliplm.engines.source import stack
from sliplm.engines.transformers.plan import make_plan
from sliplm.errors import InputError
from sliplm.shares.recipe import Recipe

TRIALS = (len(RANKS) + 1) * len(CLOSE) + len(GIVEN)
_LARGEST = 512  # a trial takes seconds there


@dataclass(frozen=True)
class Study:
    """All trials on one matrix.

    Attributes:
        group: whose upper left corner it is.
        width: of the whole matrix.  guess: `signs_to_guess` of it at the default rank.
    """

    group: str
    width: int
    guess: int
    trials: tuple[Trial, ...]


def fit_study(model_dir: Path, out: Path, progress: Callable[[int], None]) -> Study:
    """Run the study, or read it from `out/fit.json` if it was run.

    Args:
        progress: called with the number of trials done, of `TRIALS`.

    Raises:
        InputError: the file in the folder is no study.
        CheckpointError: as `split`.
    """
    file = out / "fit.json"
    if file.exists():
        return _read(file)
    name, weight = _matrix(model_dir)
    n = min(_LARGEST, 1 << (len(weight).bit_length() - 1))
    trials = []
    for trial in study(weight, n):
        trials.append(trial)
        progress(len(trials))
    found = Study(name, len(weight), signs_to_guess(without_top(weight, Recipe().rank)), tuple(trials))
    file.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def _matrix(model_dir: Path) -> tuple[str, Matrix]:
    """A group of the middle of the model that is as square as any, cut to a square."""
    plan = make_plan(model_dir, Recipe(rank=0))
    groups = sorted((group for group, _ in plan.split), key=lambda g: abs(np.log(g.rows / g.columns)))
    alike = [g for g in groups if (g.rows, g.columns) == (groups[0].rows, groups[0].columns)]
    group = alike[len(alike) // 2]
    weight = stack(plan.read, group).astype(np.float64)
    n = min(weight.shape)
    return group.name, weight[:n, :n]


def _read(file: Path) -> Study:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Study(**{**fields, "trials": tuple(Trial(**trial) for trial in fields["trials"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is no study of attack 11: remove it") from error
