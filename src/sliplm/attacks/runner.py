"""Runs attacks line by line: a search at the smallest budget, then every budget with several seeds.

A run that is in the file already is not made again, so that an interrupted call continues.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sliplm.attacks import ATTACKS
from sliplm.attacks.case import Attack, Case
from sliplm.attacks.runs import Line, Run, Runs
from sliplm.attacks.scene import Scene
from sliplm.attacks.scoring import score
from sliplm.attacks.student import build_student
from sliplm.attacks.training import Training, train

Report = Callable[[Run], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        lines: in order of importance.
        budgets: parts of one query token per model parameter, ascending.
        seeds: runs at each budget with the choice found by seed 0.
        long_seeds: the same at the largest budget.
        deadline: time.time() after which no run is begun.
    """

    lines: tuple[Line, ...]
    budgets: tuple[float, ...]
    seeds: int
    long_seeds: int
    deadline: float = math.inf


def run(open_scene: Callable[[], Scene], plan: Plan, path: Path, report: Report, jobs: int = 1) -> bool:
    """Run a plan; False if time was up before its end.

    Args:
        open_scene: makes the scene; called in each of the processes.
        path: the file of runs, which is continued.
        report: called with each finished run.
        jobs: processes side by side, which a GPU needs to be busy with small models.
    """
    if jobs == 1:
        scene = open_scene()
        runs, cases = Runs(path), _Cases(scene)
        return all(
            _line(scene, cases, runs, plan, line, at, report)
            for at in range(len(plan.budgets))
            for line in plan.lines
        )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _open_child, (open_scene, path, plan)) as pool:
        for at in range(len(plan.budgets)):
            waiting = [pool.submit(_in_child, line, at) for line in plan.lines]
            complete = True
            for done in as_completed(waiting):
                finished, made = done.result()
                complete &= finished
                for each in made:
                    report(each)
            if not complete:
                return False
    return True


_CHILD: dict[str, Any] = {}  # of a child process: what its initialiser opened


def _open_child(open_scene: Callable[[], Scene], path: Path, plan: Plan) -> None:
    scene = open_scene()
    _CHILD.update(scene=scene, cases=_Cases(scene), runs=Runs(path), plan=plan)


def _in_child(line: Line, at: int) -> tuple[bool, list[Run]]:
    made: list[Run] = []
    runs: Runs = _CHILD["runs"]
    runs.reload()  # the line's choice at a smaller budget may have been made elsewhere
    finished = _line(_CHILD["scene"], _CHILD["cases"], runs, _CHILD["plan"], line, at, made.append)
    return finished, made


class _Cases:
    """Cases of a scene, made once."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._made: dict[tuple[str, str, str], Case] = {}

    def __call__(self, line: Line) -> Case:
        place = (line.recipe, line.placement.name, line.relative)
        if place not in self._made:
            self._made[place] = self._scene.case(line.recipe, line.placement, line.relative)
        return self._made[place]


def _attack(line: Line) -> Attack:
    return next(attack for attack in ATTACKS if attack.number == line.attack)


def _line(scene: Scene, cases: _Cases, runs: Runs, plan: Plan, line: Line, at: int, report: Report) -> bool:
    """All runs of a line at one budget; False if time is up."""
    budget = plan.budgets[at]
    before = runs.best(line, plan.budgets[at - 1]) if at else None
    if before is None:
        choices = _choices(scene, cases(line), line)
    else:  # a longer training wants a rate at most as high
        variant, rate = before
        choices = [(variant, rate), (variant, rate / 3)] if rate else [before]

    def once(variant: str, rate: float, seed: int) -> bool:
        if (*line.place, budget, variant, rate, seed) in runs.done:
            return True
        if time.time() > plan.deadline:
            return False
        made = _once(scene, cases(line), line, budget, variant, rate, seed)
        if made is not None:
            runs.add(made)
            report(made)
        return True

    if not all(once(variant, rate, 0) for variant, rate in choices):
        return False
    best = runs.best(line, budget)
    if best is None or not best[1]:  # without training, one seed is all
        return True
    seeds = plan.long_seeds if at == len(plan.budgets) - 1 else plan.seeds
    return all(once(*best, seed) for seed in range(1, seeds))


def _choices(scene: Scene, case: Case, line: Line) -> list[tuple[str, float]]:
    choices = []
    for variant in _attack(line).variants:
        start = _attack(line).start(case, scene.oracle, variant, 0)
        if start is not None:
            choices += [(variant, rate) for rate in start.rates or (0.0,)]
    return choices


def _once(
    scene: Scene, case: Case, line: Line, budget: float, variant: str, rate: float, seed: int
) -> Run | None:
    began = time.perf_counter()
    scene.oracle.forget()
    start = _attack(line).start(case, scene.oracle, variant, seed)
    if start is None:
        return None
    student = build_student(case, start, scene.device, seed)
    tokens = steps = 0
    if rate:
        window = scene.text.train.shape[1]
        tokens = max(1, round(budget * scene.parameters / window)) * window
        steps = train(student, scene, Training(line.access, tokens, rate, seed, start.hidden_layer))
    valid, test = score(student, scene.text.valid), score(student, scene.text.test)
    if scene.device.type == "cuda":
        torch.cuda.synchronize()
    return Run(
        line=line.place,
        budget=budget,
        variant=variant,
        rate=rate,
        seed=seed,
        tokens=tokens,
        asked=max(scene.oracle.asked, min(tokens, scene.text.train.numel())),
        steps=steps,
        perplexity=test.perplexity,
        accuracy=test.accuracy,
        valid_perplexity=valid.perplexity,
        seconds=time.perf_counter() - began,
        notes=start.notes,
    )
