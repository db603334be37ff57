"""Lines, runs, and the file that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sliplm.attacks.case import Placement
from sliplm.attacks.training import Access
from sliplm.errors import InputError

Place = tuple[int, str, str, str, str]  # attack, recipe, placement, access, relative


@dataclass(frozen=True)
class Line:
    """One attack on one case with one kind of access; `relative`: name of a public relative, if any."""

    attack: int
    recipe: str
    placement: Placement
    access: Access
    relative: str = ""

    @property
    def place(self) -> Place:
        """Names alone."""
        return (self.attack, self.recipe, self.placement.name, self.access, self.relative)


@dataclass(frozen=True)
class Run:
    """One training run, and what came of it.

    Attributes:
        line: `Line.place`.  budget: part of one query token per model parameter.
        tokens: seen in training.  asked: different ones.
        perplexity, accuracy: on the test text.  valid_perplexity: on that by which choices are made.
    """

    line: Place
    budget: float
    variant: str
    rate: float
    seed: int
    tokens: int
    asked: int
    steps: int
    perplexity: float
    accuracy: float
    valid_perplexity: float
    seconds: float
    notes: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a run."""
        return (*self.line, self.budget, self.variant, self.rate, self.seed)


class Runs:
    """All runs of a JSON-lines file, one a line; several processes may add to it.  None: in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.done: dict[tuple[Any, ...], Run] = {}
        self.reload()

    def reload(self) -> None:
        """Take up what others have added."""
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                fields = json.loads(line)
                run = Run(**{**fields, "line": tuple(fields["line"])})
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{self._path} holds a line that is no run: remove it ({line[:60]})"
                ) from error
            self.done[run.key] = run

    def add(self, run: Run) -> None:
        """Keep one run, in memory and on disk."""
        self.done[run.key] = run
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")  # one write: lines of several processes do not mix

    def of(self, line: Line, budget: float) -> Iterator[Run]:
        """The runs of a line at a budget."""
        return (run for run in self.done.values() if (run.line, run.budget) == (line.place, budget))

    def best(self, line: Line, budget: float) -> tuple[str, float] | None:
        """Variant and rate with the lowest perplexity on the validation text, by the runs of seed 0."""
        run = self._best(line, budget)
        return None if run is None else (run.variant, run.rate)

    def best_perplexity(self, line: Line, budget: float) -> float:
        """That perplexity; infinite if there is no run."""
        run = self._best(line, budget)
        return math.inf if run is None else run.valid_perplexity

    def _best(self, line: Line, budget: float) -> Run | None:
        found = [run for run in self.of(line, budget) if run.seed == 0]
        return min(found, key=lambda run: run.valid_perplexity) if found else None
