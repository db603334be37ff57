"""The one way in which sliplm compiles inner loops: numba, without the GIL, cached on disk.

Integer loops are exact whatever the compiler does.  Float loops keep IEEE order unless `fast_jit` is named:
it lets sums be
reassociated, which is allowed only where a float32 rounding is allowed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

_exact: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
_fast: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def jit(function: F) -> F:
    """Compile with integer and IEEE semantics kept."""
    compiled: F = _exact(function)
    return compiled


def fast_jit(function: F) -> F:
    """Compile with leave to reorder float sums (NaN and infinity keep their meaning)."""
    compiled: F = _fast(function)
    return compiled
