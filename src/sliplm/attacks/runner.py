"""Runs a campaign: each line searches at the smallest budget, the best of each cell go on to the next.

A run that is in the file already is not made again, so that an interrupted call continues.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

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
from sliplm.cluster.tasks import HERE, Executor, Pool

Report = Callable[[Run], None]


Made = tuple[bool, list[Run]]
"""Whether a job was finished before time was up, and its runs."""


class Task(NamedTuple):
    """A job, None for the victim's own score, with the runs of its line that are there already."""

    job: Job | None
    known: tuple[Run, ...]


def run(
    open_scene: Callable[[torch.device], Scene],
    plan: Plan,
    path: Path,
    report: Report,
    devices: Sequence[torch.device],
    executor: Executor = HERE,
) -> bool:
    """Run a plan; False if time was up before its end.

    Args:
        open_scene: makes the scene on a device; called in each of the processes.
        path: the file of runs, which is continued.
        report: called with each finished run.
        devices: one for each process; several on one GPU keep it busy with small models.
        executor: who runs the jobs: for this machine, processes of its own; else a device is one such as the
            first, in each process there.

    Raises: ClusterError, as `executor` does.
    """
    runs = Runs(path)
    schedule = Schedule(plan, runs)
    complete = True
    with ExitStack() as held:
        pool: Pool[Task, Made]
        if executor is HERE:
            pool = held.enter_context(_children(open_scene, plan, path, devices))
        else:
            opened = partial(_stage_of, open_scene, plan, devices[0])
            pool = held.enter_context(executor.pool(opened, carry_out))
        waiting: dict[Future[Made], Job | None] = {pool.submit(Task(None, tuple(runs.done.values()))): None}
        while True:
            while sum(map(bool, waiting.values())) < pool.width and (job := schedule.next()) is not None:
                known = tuple(run for run in runs.done.values() if run.line == job.line.place)
                waiting[pool.submit(Task(job, known))] = job
            if not waiting:
                break
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(done)
                finished, made = done.result()
                runs.reload()  # a child has written its own
                for each in made:
                    if each.key not in runs.done:
                        runs.add(each)
                    if job is not None:
                        report(each)
                if job is not None:
                    complete &= finished
                    schedule.done(job, finished=finished)
    return complete


def carry_out(stage: Stage, task: Task) -> Made:
    """In a process that has the stage."""
    made: list[Run] = []
    stage.runs.reload()  # the line's choice at a smaller budget may have been made elsewhere
    stage.runs.done.update((run.key, run) for run in task.known)
    if task.job is None:
        return stage.original(made.append), made
    return stage.carry_out(task.job, made.append), made


def _stage_of(
    open_scene: Callable[[torch.device], Scene], plan: Plan, device: torch.device, path: Path | None = None
) -> Stage:
    """In a process of a pool; without a path, who gave the job writes its runs.  Raises: as `Scene`."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # steps are recorded on the current device's stream
    return Stage(open_scene(device), Runs(path), plan)


# --- child processes -------------------------------------------------------------------------------------


class _Children(Pool[Task, Made]):
    """Processes of this machine, one for each device."""

    def __init__(self, pool: ProcessPoolExecutor, width: int) -> None:
        self._pool, self.width = pool, width

    def submit(self, task: Task, /) -> Future[Made]:
        return self._pool.submit(_in_child, task)


@contextmanager
def _children(
    open_scene: Callable[[torch.device], Scene], plan: Plan, path: Path, devices: Sequence[torch.device]
) -> Iterator[_Children]:
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(
        len(devices), context, _open_child, (free, partial(_stage_of, open_scene, plan, path=path))
    ) as pool:
        yield _Children(pool, len(devices))


_CHILD: dict[str, Any] = {}  # of a child process: its stage, and how it is opened


def _open_child(free: Queue[torch.device], opened: Callable[[torch.device], Stage]) -> None:
    end_with_parent()
    device = free.get()
    # not here: what fails in an initialiser breaks the pool, and nobody hears why
    _CHILD["open"] = lambda: opened(device)


def _in_child(task: Task) -> Made:
    """Raises: as `Scene`."""
    if "stage" not in _CHILD:
        _CHILD["stage"] = _CHILD["open"]()
    return carry_out(_CHILD["stage"], task)


class Stage:
    """A scene with its cases, and the runs that are made on it."""

    def __init__(self, scene: Scene, runs: Runs, plan: Plan) -> None:
        self.runs = runs
        self._scene, self._plan = scene, plan
        self._cases: dict[tuple[str, str, str], Case] = {}
        self._begun: tuple[tuple[object, ...], Start | None, int] = ((), None, 0)

    def original(self, report: Report) -> bool:
        """Score the victim itself, as attack 0: the attacker with all weights."""
        place = (0, "all weights", "", "", "")
        if (*place, 0.0, "", 0.0, 0) not in self.runs.done:
            text, victim = self._scene.text, self._scene.victim
            valid, test = score(victim, text.valid), score(victim, text.test)
            quality = test.perplexity, test.accuracy, valid.perplexity
            made = Run(place, 0.0, "", 0.0, 0, 0, 0, 0, *quality, 0.0, {})
            self.runs.add(made)
            report(made)
        return True

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
