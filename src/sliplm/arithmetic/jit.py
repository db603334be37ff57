"""The one way in which sliplm compiles inner loops: numba, without the GIL, cached where a disk allows it.

Integer loops are exact whatever the compiler does.  Float loops keep IEEE order unless `fast_jit` is named:
it lets sums be
reassociated, which is allowed only where a float32 rounding is allowed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

_EXACT: Final = {"nogil": True, "error_model": "numpy"}
_FAST: Final = _EXACT | {"fastmath": {"reassoc", "contract", "nsz"}}


def jit(function: F) -> F:
    """Compile with integer and IEEE semantics kept."""
    return _compiled(function, _EXACT)


def fast_jit(function: F) -> F:
    """Compile with leave to reorder float sums (NaN and infinity keep their meaning)."""
    return _compiled(function, _FAST)


def _compiled(function: F, options: dict[str, Any]) -> F:
    compiled: F
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for its cache can be written: compiled anew in each process
        compiled = numba.njit(**options)(function)
    return compiled
