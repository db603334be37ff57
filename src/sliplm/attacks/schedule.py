"""What a campaign runs, in which order, and which attacks it goes on with.

Successive halving: at the smallest budget every attack searches its variants and learning rates; only the
best of each cell (a split, a placement, a kind of access, a relative) are worth the next, larger budget.  The
best one of a cell, which its table shows, is repeated with other seeds.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import count

from sliplm.attacks.runs import Line, Runs

_Cell = tuple[str, str, str, str]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        lines: in order of importance.
        budgets: parts of one query token per model parameter, ascending.
        seeds: runs of each cell's best attack.
        keep: attacks of each cell that go on to the next budget.
        deadline: time.time() after which no run is begun.
        untrained: only score what attacks know before they train.
    """

    lines: tuple[Line, ...]
    budgets: tuple[float, ...]
    seeds: int
    keep: int = 2
    deadline: float = math.inf
    untrained: bool = False


@dataclass(frozen=True)
class Job:
    """One line at one budget: a search with seed 0, or (seeds > 1) the other seeds of what it chose.

    Attributes:
        before: the smaller budget whose choice it starts from, if any.
    """

    line: Line
    budget: float
    before: float | None
    seeds: int = 0


class Schedule:
    """Hands out jobs, small budgets first, and adds more as cells are finished."""

    def __init__(self, plan: Plan, runs: Runs) -> None:
        self._plan, self._runs = plan, runs
        self._heap: list[tuple[int, int, Job]] = []
        self._order = count()
        self._open: Counter[tuple[_Cell, float]] = Counter()
        self._lines: dict[tuple[_Cell, float], list[Line]] = defaultdict(list)
        for line in plan.lines:
            self._search(line, 0)

    def next(self) -> Job | None:
        """The next job, or None if there is none now."""
        return heapq.heappop(self._heap)[2] if self._heap else None

    def done(self, job: Job, *, finished: bool) -> None:
        """A job is over; what was not finished for want of time leads to no other."""
        if job.seeds or not finished:
            return
        cell = _cell(job.line), job.budget
        self._open[cell] -= 1
        if self._open[cell]:
            return
        at = self._plan.budgets.index(job.budget)
        best = self._ranked(self._lines[cell], job.budget)
        if best and self._plan.seeds > 1:
            again = Job(best[0], job.budget, job.before, seeds=self._plan.seeds)
            heapq.heappush(self._heap, (at, next(self._order), again))
        if at + 1 < len(self._plan.budgets):
            for line in best[: self._plan.keep]:
                self._search(line, at + 1)

    def _search(self, line: Line, at: int) -> None:
        budgets = self._plan.budgets
        job = Job(line, budgets[at], budgets[at - 1] if at else None)
        self._open[_cell(line), job.budget] += 1
        self._lines[_cell(line), job.budget].append(line)
        heapq.heappush(self._heap, (at, next(self._order), job))

    def _ranked(self, lines: list[Line], budget: float) -> list[Line]:
        """Those that apply, the best on the validation text first."""
        found = {line: self._runs.best_perplexity(line, budget) for line in lines}
        return sorted((line for line in lines if found[line] < math.inf), key=lambda line: found[line])


def _cell(line: Line) -> _Cell:
    return (line.recipe, line.placement.name, line.access, line.relative)
