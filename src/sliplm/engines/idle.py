"""Torch's threads, kept off the cores that a worker on this machine computes on while a split model runs.

After each loop that torch spreads over its threads they spin, for milliseconds, so as to be quick at the next
one: between the small steps that a split model computes itself they would spin all the time.  So it computes
them on few threads.  The number is OpenMP's of the calling thread, not `torch.set_num_threads`, which is
every thread's: other models keep theirs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

MANY: Final = 64
"""Rows of an input from which attention and the like are worth half of the threads."""


def quietly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward` on few threads.  Who has chosen a number of threads himself keeps it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with few_threads(_rows(args, kwargs)):
            return method(self, *args, **kwargs)

    return call


@contextmanager
def few_threads(rows: int) -> Iterator[None]:
    """Have torch use few threads for what this thread computes in the block.

    Args:
        rows: of what is computed on: one thread below `MANY`, else half of them.
    """
    before = torch.get_num_threads()  # of this thread: it also has torch choose, before we do
    fewer = max(1, before // 2) if rows >= MANY else 1
    if _openmp is None or before not in _OWN_CHOICE or fewer == before:
        yield
        return
    _openmp.omp_set_num_threads(fewer)
    try:
        yield
    finally:
        if torch.get_num_threads() == fewer:  # else: somebody in the block wanted another number
            _openmp.omp_set_num_threads(before)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of a forward's input, where they can be told; else many."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    x = args[0] if args else next((value for value in named if value is not None), None)
    if not isinstance(x, Tensor) or not x.ndim:
        return MANY
    return x.numel() // x.shape[-1] if x.is_floating_point() and x.shape[-1] else x.numel()


def _find_openmp() -> Any:
    """The OpenMP library that torch uses, or None where it has none."""
    try:
        library = ctypes.CDLL(torch._C.__file__)  # what is asked of it is looked up in all that it loads
        library.omp_get_max_threads.restype = ctypes.c_int
        library.omp_set_num_threads.argtypes = (ctypes.c_int,)
        library.omp_set_num_threads.restype = None
        return library if library.omp_get_max_threads() == torch.get_num_threads() else None
    except (OSError, AttributeError):
        return None


def _own_choice() -> frozenset[int]:
    """How many threads torch takes where nobody says so: one for each processor, or for each core."""
    processors, cores = os.sched_getaffinity(0), set()
    for processor in processors:
        topology = Path(f"/sys/devices/system/cpu/cpu{processor}/topology")
        try:
            cores.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")))
        except OSError:
            cores.add((str(processor),))
    return frozenset((len(processors), len(cores)))


_openmp: Final = _find_openmp()
_OWN_CHOICE: Final = _own_choice()
