"""Tasks, and who carries them out: here one after the other, on a cluster many at once (`onray`).

A task takes plain data and gives one value.  It draws no key of a mask, gives no number, seals nothing and
writes no file: who hands the tasks out does, once for each value.  So a task that is carried out again,
because its machine died, can neither deal under a key twice nor mix the seeds of two tries: of each try all
is taken or nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)


class Pool(Protocol[T_contra, R]):
    """Carries out tasks of one kind.

    Attributes:
        width: how many at once.
    """

    width: int

    def submit(self, task: T_contra, /) -> Future[R]:
        """Begin a task.  The future raises what the task did; ClusterError where it was lost for good."""


class Executor(Protocol):
    """Where tasks are carried out."""

    def pool(
        self, prepare: Callable[[], S], function: Callable[[S, T], R]
    ) -> AbstractContextManager[Pool[T, R]]:
        """A pool for tasks of `function`.

        Args:
            prepare: makes what all tasks need, once in each process that carries some out.
            function: (what was prepared, task) -> value.
        """


class Here:
    """This process: a task is done when `submit` returns."""

    @contextmanager
    def pool(self, prepare: Callable[[], S], function: Callable[[S, T], R]) -> Iterator[Pool[T, R]]:
        yield _Here(prepare(), function)


class _Here(Pool[T, R]):
    width = 1

    def __init__(self, prepared: S, function: Callable[[S, T], R]) -> None:
        self._run: Callable[[T], R] = lambda task: function(prepared, task)

    def submit(self, task: T, /) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(self._run(task))
        except Exception as error:
            future.set_exception(error)
        return future


HERE = Here()


def in_order(pool: Pool[T, R], tasks: Iterable[T]) -> Iterator[R]:
    """The values of tasks in their order; no more tasks are drawn than the pool carries out at once.

    Raises: what a task raised, in its turn.
    """
    begun: deque[Future[R]] = deque()
    for task in tasks:
        begun.append(pool.submit(task))
        if len(begun) >= pool.width:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
