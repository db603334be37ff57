"""Runs attacks line by line: search at the smallest budget, then every budget with several seeds.

A line is one attack on one recipe, placement and access. Results go to a JSON-lines file, one a run; a run
that is in the file already is not made again, so that an interrupted call continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sliplm.attacks.case import Attack, Case, Placement
from sliplm.attacks.scene import Scene
from sliplm.attacks.scoring import score
from sliplm.attacks.student import build_student
from sliplm.attacks.training import Access, Training, train


@dataclass(frozen=True)
class Line:
    """One attack on one case with one kind of access."""

    attack: Attack
    recipe: str
    placement: Placement
    access: Access
    relative: str = ""

    @property
    def place(self) -> tuple[str | int, ...]:
        """Names alone."""
        return (self.attack.number, self.recipe, self.placement.name, self.access, self.relative)


@dataclass(frozen=True)
class Run:
    """One training run, and what came of it.

    Attributes:
        line: `Line.place`.  budget: part of one query token per model parameter.
        tokens: seen in training.  asked: different ones.
    """

    line: tuple[str | int, ...]
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
    """The file of results."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done = {run.key: run for run in map(_from_json, lines)}

    def add(self, run: Run) -> None:
        """Keep one result, in memory and on disk."""
        self.done[run.key] = run
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")


class Runner:
    """Runs lines against a scene until the time is up.

    Args:
        deadline: time.monotonic() after which no run is begun.
        report: called with each finished run.
    """

    def __init__(
        self, scene: Scene, runs: Runs, *, deadline: float, report: Callable[[Run], None] | None = None
    ) -> None:
        self._scene, self._runs, self._deadline = scene, runs, deadline
        self._report = report or (lambda run: None)
        self._cases: dict[tuple[str, ...], Case] = {}

    def run(self, lines: Sequence[Line], budgets: Sequence[float], seeds: int) -> bool:
        """All lines at each budget, the smallest first; False if the time was up before the end."""
        return all(self._line(line, budgets, at, seeds) for at, line in product(range(len(budgets)), lines))

    def _line(self, line: Line, budgets: Sequence[float], at: int, seeds: int) -> bool:
        choices = [(variant, rate) for variant in line.attack.variants for rate in self._rates(line, variant)]
        if not choices:
            return True
        if at == 0:
            candidates = choices
        else:  # a longer training wants a rate at most as high
            variant, rate = self._best(line, budgets[at - 1])
            candidates = [(variant, rate), (variant, rate / 3)] if rate else [(variant, rate)]
        for variant, rate in candidates:
            if not self._once(line, budgets[at], variant, rate, 0):
                return False
        variant, rate = self._best(line, budgets[at])
        trained = rate > 0
        return all(
            self._once(line, budgets[at], variant, rate, seed) for seed in range(1, seeds if trained else 1)
        )

    def _rates(self, line: Line, variant: str) -> tuple[float, ...]:
        start = line.attack.start(self._case(line), self._scene.oracle, variant, 0)
        return () if start is None else start.rates or (0.0,)

    def _best(self, line: Line, budget: float) -> tuple[str, float]:
        """The choice with the lowest perplexity on the validation text, seed 0, of those that were run."""
        found = {
            (run.variant, run.rate): run.valid_perplexity for run in self._of(line, budget) if run.seed == 0
        }
        return min(found, key=lambda choice: found[choice])

    def _of(self, line: Line, budget: float) -> Iterator[Run]:
        return (run for run in self._runs.done.values() if (run.line, run.budget) == (line.place, budget))

    def _once(self, line: Line, budget: float, variant: str, rate: float, seed: int) -> bool:
        if (*line.place, budget, variant, rate, seed) in self._runs.done:
            return True
        if time.monotonic() > self._deadline:
            return False
        began = time.perf_counter()
        scene = self._scene
        scene.oracle.forget()
        start = line.attack.start(self._case(line), scene.oracle, variant, seed)
        if start is None:
            return True
        student = build_student(self._case(line), start, scene.device, seed)
        tokens, steps = 0, 0
        if rate:
            window = scene.text.train.shape[1]
            tokens = max(window, round(budget * scene.parameters / window) * window)
            steps = train(student, scene, Training(line.access, tokens, rate, seed, start.hidden_layer))
        valid, test = score(student, scene.text.valid), score(student, scene.text.test)
        run = Run(
            line.place,
            budget,
            variant,
            rate,
            seed,
            tokens,
            min(tokens, scene.text.train.numel()),
            steps,
            test.perplexity,
            test.accuracy,
            valid.perplexity,
            time.perf_counter() - began,
            start.notes,
        )
        self._runs.add(run)
        self._report(run)
        return True

    def _case(self, line: Line) -> Case:
        place = (line.recipe, line.placement.name, line.relative)
        if place not in self._cases:
            self._cases[place] = self._scene.case(line.recipe, line.placement, line.relative)
        return self._cases[place]


def _from_json(line: str) -> Run:
    fields = json.loads(line)
    return Run(**{**fields, "line": tuple(fields["line"])})
