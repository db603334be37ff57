"""From runs to tables: per split, placement, access and budget the best attack beside the black-box line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sliplm.attacks.basing import BasisStudy
from sliplm.attacks.campaign import NONE
from sliplm.attacks.fitting import Study
from sliplm.attacks.runs import Place, Run
from sliplm.attacks.scoring import Interval, Score, interval, relative


@dataclass(frozen=True)
class Point:
    """One line at one budget, with the variant and rate that the validation text chose.

    Attributes:
        asked: different tokens asked of the victim, or read.
    """

    line: Place
    budget: float
    variant: str
    rate: float
    tokens: int
    asked: int
    perplexity: Interval
    accuracy: Interval
    accuracies: tuple[float, ...]
    valid_perplexity: float


@dataclass(frozen=True)
class Cell:
    """The strongest attack on a split beside the strongest attacker without a share.

    Attributes:
        relative_to_black: Rel.Black, accuracy restored over accuracy of the black-box line.
    """

    recipe: str
    placement: str
    access: str
    relative: str
    budget: float
    best: Point
    black: Point
    relative_to_black: Interval

    @property
    def spread(self) -> str:
        """The interval of Rel.Black in words."""
        if min(len(self.best.accuracies), len(self.black.accuracies)) < 2:
            return "one seed"
        return f"{self.relative_to_black.low:.2f} to {self.relative_to_black.high:.2f}"


def points(runs: Iterable[Run]) -> list[Point]:
    """One point for each line and budget, in the order of budgets."""
    groups: dict[tuple[Place, float], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.line, run.budget].append(run)
    return [_point(group) for _, group in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0]))]


def _point(runs: list[Run]) -> Point:
    chosen = min((run for run in runs if run.seed == 0), key=lambda run: run.valid_perplexity)
    seeds = [run for run in runs if (run.variant, run.rate) == (chosen.variant, chosen.rate)]
    return Point(
        chosen.line,
        chosen.budget,
        chosen.variant,
        chosen.rate,
        chosen.tokens,
        chosen.asked,
        interval([run.perplexity for run in seeds]),
        interval([run.accuracy for run in seeds]),
        tuple(run.accuracy for run in seeds),
        chosen.valid_perplexity,
    )


def cells(found: Iterable[Point]) -> list[Cell]:
    """The table of Rel.Black.  An attack is chosen by its validation perplexity, never by the test's."""
    groups: dict[tuple[str, str, str, float], dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in found:
        _, recipe, placement, access, kin = point.line
        groups[placement, access, kin, point.budget][recipe].append(point)
    table = []
    for (placement, access, kin, budget), recipes in sorted(groups.items()):
        if NONE not in recipes:
            continue
        black = min(recipes[NONE], key=lambda point: point.valid_perplexity)
        for recipe, candidates in sorted(recipes.items()):
            if recipe == NONE:
                continue
            best = min(candidates, key=lambda point: point.valid_perplexity)
            ratio = relative(best.accuracies, black.accuracies)
            table.append(Cell(recipe, placement, access, kin, budget, best, black, ratio))
    return table


@dataclass(frozen=True)
class Summary:
    """All that came of a campaign.

    Attributes:
        original: how good the victim is: the attacker with all weights.
    """

    original: Score | None
    points: list[Point]
    cells: list[Cell]


def summarise(runs: Collection[Run]) -> Summary:
    """Points and table of all runs."""
    attacks = [run for run in runs if run.line[0]]
    whole = next((run for run in runs if not run.line[0]), None)
    found = points(attacks)
    return Summary(None if whole is None else Score(whole.perplexity, whole.accuracy), found, cells(found))


def document(
    found: Summary, fitted: Study | None, based: BasisStudy | None = None, *, complete: bool
) -> dict[str, Any]:
    """For JSON, which has no infinity: such a number is null."""
    fit = None if fitted is None else asdict(fitted)
    basis = None if based is None else asdict(based)
    whole: dict[str, Any] = _finite({"complete": complete, **asdict(found), "fit": fit, "basis": basis})
    return whole


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
