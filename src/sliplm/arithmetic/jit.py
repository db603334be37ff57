"""The one way in which sliplm compiles inner loops: numba, without the GIL, cached where a disk allows it.

Integer loops are exact whatever the compiler does.  Float loops keep IEEE order unless `fast_jit` is named:
it lets sums be reassociated, which is allowed only where a float32 rounding is allowed anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_EXACT: Final = {"nogil": True, "error_model": "numpy"}
_FOLDERS: Final = "arithmetic", "network"  # whose compiled functions others call
_FAST: Final = _EXACT | {"fastmath": {"reassoc", "contract", "nsz"}}


def jit(function: F) -> F:
    """Compile with integer and IEEE semantics kept."""
    return _compiled(function, _EXACT)


def fast_jit(function: F) -> F:
    """Compile with leave to reorder float sums (NaN and infinity keep their meaning)."""
    return _compiled(function, _FAST)


def _compiled(function: F, options: dict[str, Any]) -> F:
    compiled: Any
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for its cache can be written: compiled anew in each process
        compiled = numba.njit(**options)(function)
    else:
        file = compiled._cache._cache_file
        file._source_stamp = file._source_stamp, _sources()
    return cast(F, compiled)


@cache
def _sources() -> bytes:
    """A hash of all that compiled code is made of.  numba looks for changes in a function's own file alone,
    and what it keeps holds the functions of other files too that it calls: after an upgrade old ones.
    """
    found, package = hashlib.sha256(), Path(__file__).parents[1]
    for folder in _FOLDERS:
        for path in sorted((package / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.digest()
