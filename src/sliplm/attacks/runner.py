"""Runs a campaign: each line searches at the smallest budget, the best of each cell go on to the next.

A run that is in the file already is not made again, so that an interrupted call continues.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from sliplm.attacks import ATTACKS
from sliplm.attacks.case import Attack, Case, Start
from sliplm.attacks.children import end_with_parent
from sliplm.attacks.runs import Line, Run, Runs
from sliplm.attacks.scene import Scene
from sliplm.attacks.schedule import Job, Plan, Schedule
from sliplm.attacks.scoring import score
from sliplm.attacks.student import build_student
from sliplm.attacks.training import Training, train

Report = Callable[[Run], None]


def run(
    open_scene: Callable[[torch.device], Scene],
    plan: Plan,
    path: Path,
    report: Report,
    devices: Sequence[torch.device],
) -> bool:
    """Run a plan; False if time was up before its end.

    Args:
        open_scene: makes the scene on a device; called in each of the processes.
        path: the file of runs, which is continued.
        report: called with each finished run.
        devices: one for each process; several on one GPU keep it busy with small models.
    """
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    runs = Runs(path)
    schedule = Schedule(plan, runs)
    complete = True
    with ProcessPoolExecutor(len(devices), context, _open_child, (free, open_scene, path, plan)) as pool:
        whole = pool.submit(_original_in_child)
        waiting: dict[Future[tuple[bool, list[Run]]], Job] = {}
        while True:
            while len(waiting) < len(devices) and (job := schedule.next()) is not None:
                waiting[pool.submit(_in_child, job)] = job
            if not waiting:
                break
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(done)
                finished, made = done.result()
                complete &= finished
                for each in made:
                    report(each)
                runs.reload()
                schedule.done(job, finished=finished)
        whole.result()
    return complete


_CHILD: dict[str, Any] = {}  # of a child process: its stage, and how it is opened


def _open_child(
    free: Queue[torch.device], open_scene: Callable[[torch.device], Scene], path: Path, plan: Plan
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = free.get()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # steps are recorded on the current device's stream
    # not here: what fails in an initialiser breaks the pool, and nobody hears why
    _CHILD["open"] = lambda: _Stage(open_scene(device), Runs(path), plan)


def _stage() -> _Stage:
    """Raises: as `Scene`."""
    if "stage" not in _CHILD:
        _CHILD["stage"] = _CHILD["open"]()
    stage: _Stage = _CHILD["stage"]
    return stage


def _original_in_child() -> None:
    _stage().original()


def _in_child(job: Job) -> tuple[bool, list[Run]]:
    made: list[Run] = []
    stage = _stage()
    stage.runs.reload()  # the line's choice at a smaller budget may have been made elsewhere
    return stage.carry_out(job, made.append), made


class _Stage:
    """A scene with its cases, and the runs that are made on it."""

    def __init__(self, scene: Scene, runs: Runs, plan: Plan) -> None:
        self.runs = runs
        self._scene, self._plan = scene, plan
        self._cases: dict[tuple[str, str, str], Case] = {}
        self._begun: tuple[tuple[object, ...], Start | None, int] = ((), None, 0)

    def original(self) -> None:
        """Score the victim itself, as attack 0: the attacker with all weights."""
        place = (0, "all weights", "", "", "")
        if (*place, 0.0, "", 0.0, 0) not in self.runs.done:
            text, victim = self._scene.text, self._scene.victim
            valid, test = score(victim, text.valid), score(victim, text.test)
            quality = test.perplexity, test.accuracy, valid.perplexity
            self.runs.add(Run(place, 0.0, "", 0.0, 0, 0, 0, 0, *quality, 0.0, {}))

    def carry_out(self, job: Job, report: Report) -> bool:
        """A search, or the other seeds of what it chose; False if time is up."""

        def once(variant: str, rate: float, seed: int) -> bool:
            if (*job.line.place, job.budget, variant, rate, seed) in self.runs.done:
                return True
            if time.time() > self._plan.deadline:
                return False
            made = self._once(job.line, job.budget, variant, rate, seed)
            if made is not None:
                self.runs.add(made)
                report(made)
            return True

        if time.time() > self._plan.deadline:
            return False
        if not job.seeds:
            return all(once(variant, rate, 0) for variant, rate in self._choices(job))
        best = self.runs.best(job.line, job.budget)
        if best is None or not best[1]:  # without training, one seed is all
            return True
        return all(once(*best, seed) for seed in range(1, job.seeds))

    def _choices(self, job: Job) -> list[tuple[str, float]]:
        before = None if job.before is None else self.runs.best(job.line, job.before)
        if before is not None:  # a longer training wants a rate at most as high
            variant, rate = before
            return [(variant, rate), (variant, rate / 3)] if rate else [before]
        choices = []
        for variant in _attack(job.line).variants:
            start, _ = self._start(job.line, variant, 0)
            if start is not None:
                rates = (0.0,) if self._plan.untrained else start.rates or (0.0,)
                choices += [(variant, rate) for rate in rates]
        return choices

    def _case(self, line: Line) -> Case:
        place = (line.recipe, line.placement.name, line.relative)
        if place not in self._cases:
            self._cases[place] = self._scene.case(line.recipe, line.placement, line.relative)
        return self._cases[place]

    def _start(self, line: Line, variant: str, seed: int) -> tuple[Start | None, int]:
        """How an attack begins, and what it has asked for that; the last one is kept, for its next rate."""
        key = (line.place, variant, seed)
        if self._begun[0] != key:
            oracle = self._scene.oracle
            oracle.forget()
            start = _attack(line).start(self._case(line), oracle, variant, seed)
            self._begun = (key, start, oracle.asked)
        return self._begun[1:]

    def _once(self, line: Line, budget: float, variant: str, rate: float, seed: int) -> Run | None:
        began = time.perf_counter()
        scene = self._scene
        start, asked = self._start(line, variant, seed)
        if start is None:
            return None
        student = build_student(self._case(line), start, scene.device, seed)
        tokens = steps = 0
        if rate:
            window = scene.text.train.shape[1]
            tokens = max(1, round(budget * scene.parameters / window)) * window
            steps = train(student, scene, Training(line.access, tokens, rate, seed, start.hidden_layer))
            if scene.device.type == "cuda":
                torch.cuda.empty_cache()  # other processes want it
        valid, test = score(student, scene.text.valid), score(student, scene.text.test)
        return Run(
            line=line.place,
            budget=budget,
            variant=variant,
            rate=rate,
            seed=seed,
            tokens=tokens,
            asked=max(asked, min(tokens, scene.text.train.numel())),
            steps=steps,
            perplexity=test.perplexity,
            accuracy=test.accuracy,
            valid_perplexity=valid.perplexity,
            seconds=time.perf_counter() - began,
            notes=start.notes,
        )


def _attack(line: Line) -> Attack:
    return next(attack for attack in ATTACKS if attack.number == line.attack)
