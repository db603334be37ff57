"""Splitting one product over the cores: one thread pool a process, which sleeps between products."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Final

from sliplm import forks

_WORTH: Final = 1 << 22  # multiply-adds of one row, 300 to 500 us; a hand-over costs 60 to 100 us
_EACH: Final = 2  # parts for each thread: whoever comes late, or is held up, takes fewer


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pool(process: bytes) -> ThreadPoolExecutor:
    """The pool of the process with this token: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(max(1, default_threads() - 1), thread_name_prefix="sliplm-kernel")


def pieces(threads: int, macs: int, tokens: int = 1) -> int:
    """Over how many of `threads` a product of so many multiply-adds is best shared out.

    Args:
        tokens: rows of x that are multiplied together: of 16, three times as many take as long.
    """
    return max(1, min(threads, macs // (_WORTH * (1 + tokens // 8))))


def in_parallel(part: Callable[[int, int], None], count: int, threads: int, step: int = 1) -> None:
    """Call part(first, last) over ranges that cover 0..count, cut at multiples of `step`, at most `threads`
    at once; helpers who have not woken when all is taken are not waited for.

    `part` must release the GIL, and the ranges must write to different places.
    """
    pieces = min(_EACH * threads, count // step)
    if threads == 1 or pieces <= 1:
        part(0, count)
        return
    cuts = [count * i // pieces // step * step for i in range(pieces)] + [count]
    left = iter(list(pairwise(cuts)))  # one step of a list's iterator is not cut in two by another thread

    def take() -> None:
        for first, last in left:
            part(first, last)

    pool = _pool(forks.token())
    helpers = [pool.submit(take) for _ in range(1, min(threads, pieces))]
    take()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
