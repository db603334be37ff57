"""Exact products y = w x mod p of small integers w with field elements x.

    reference   Python integers: slow, obviously right; what every other kernel is compared with
    portable    float64 BLAS and 64-bit integer loops: any machine
    vnni        x86 with AVX-512 VNNI: 8- and 16-bit dot products
    amx         x86 with AMX as well: tiles of 8-bit products for many rows

Those of NVIDIA's cards are in `cuda`, and `placing` puts a share's matrices on either.

`prepare` takes the fastest kernel that is right here (M18).  Each is tested against known answers, worst
cases included, before its first use, because some machines' integer kernels saturate and return wrong sums;
where both amx and vnni pass, the one that a short trial finds faster is used from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, P
from sliplm.arithmetic.kernels import amx, portable, reference, vnni
from sliplm.arithmetic.kernels.threads import default_threads
from sliplm.errors import KernelError

Integers = npt.NDArray[np.integer]


class Matrix(Protocol):
    """A share's matrix in the layout of its kernel."""

    shape: tuple[int, int]
    kernel: str

    def product(self, x: Elements, out: Elements | None = None) -> Elements:
        """w x mod p for each row x: uint32 [rows, n] -> uint32 [rows, m], C-contiguous, exact.

        Args:
            out: where the product is written instead of into new memory; contiguous, not x.
        """


_KERNELS: dict[str, tuple[Callable[[], bool], Callable[[Integers, int], Matrix]]] = {
    "amx": (amx.available, amx.AmxMatrix),
    "vnni": (vnni.available, vnni.VnniMatrix),
    "portable": (lambda: True, portable.PortableMatrix),
    "reference": (lambda: True, reference.ReferenceMatrix),
}

_RANKS: Final = (("amx", "vnni"), ("portable",), ("reference",))  # none is asked where one before it is right
_TRIAL: Final = (256, 512, 64)  # m, n and rows of the product that is timed
_TRIALS: Final = 4


def prepare(w: Integers, *, threads: int | None = None, kernel: str | None = None) -> Matrix:
    """Lay out the integers w (int8 or int16, |w| <= 2047, [m, n]) for the fastest kernel that is exact on
    this machine.

    Args:
        threads: cores that one product may use; None for all that the process may use.
        kernel: insist on one kernel by name.

    Raises: KernelError when the named kernel, or every kernel, is missing or wrong on this machine.
    """
    name = kernel or choose()
    if kernel is not None:
        _require(kernel)
    return _KERNELS[name][1](w, threads or default_threads())


@cache
def choose() -> str:
    """The name of the fastest kernel that passes its self-test here.

    Raises: KernelError when none does.
    """
    for names in _RANKS:
        right = [name for name in names if _KERNELS[name][0]() and self_test(name)]
        if right:
            return right[0] if len(right) == 1 else _fastest(right)
    raise KernelError(
        "no kernel computes exact products on this machine; "
        "report its processor and the versions of numba and numpy"
    )


def _fastest(names: list[str]) -> str:
    """Which multiplies 64 rows fastest on one thread, at the best of a few trials: milliseconds in all."""
    w, x = known_operands(*_TRIAL, 2047)
    matrices = {name: _KERNELS[name][1](w.astype(np.int16), 1) for name in names}
    best = dict.fromkeys(names, float("inf"))
    for _ in range(_TRIALS):
        for name, matrix in matrices.items():
            started = time.perf_counter()
            matrix.product(x)
            best[name] = min(best[name], time.perf_counter() - started)
    return min(names, key=lambda name: best[name])


@cache
def self_test(name: str) -> bool:
    """Does the kernel give the known answers?  Extremes of both operands, odd shapes, one row and many: every
    kind of block that a kernel has.
    """
    build = _KERNELS[name][1]
    for dtype, largest in ((np.int8, 127), (np.int16, 2047)):
        for m, n, rows in ((1, 1, 1), (9, 33, 1), (17, 96, 5), (16, 8256, 2), (16, 8256, 4), (17, 1100, 27)):
            w, x = known_operands(m, n, rows, largest)
            try:
                answer = build(w.astype(dtype), 2).product(x)
            except Exception:  # whatever a broken machine raises, the next kernel is tried
                return False
            if not np.array_equal(answer, known_answer(w, x)):
                return False
    return True


def known_operands(m: int, n: int, rows: int, largest: int) -> tuple[npt.NDArray[np.int64], Elements]:
    """Public test operands that reach every extreme: w int64 [m, n] and x uint32 [rows, n]."""
    i, j = np.meshgrid(np.arange(m), np.arange(n), indexing="ij")
    w = (i * 7919 + j * j * 104729 + i * j) % (2 * largest + 1) - largest
    w[0], w[-1] = largest, -largest
    r, j = np.meshgrid(np.arange(rows), np.arange(n), indexing="ij")
    x = (r * 2654435761 + j * 2246822519 + r * j * 3266489917) % P
    x[0] = P - 1
    return w.astype(np.int64), x.astype(np.uint32)


def known_answer(w: npt.NDArray[np.int64], x: Elements) -> Elements:
    """w x mod p with no sum above 2^63: x in halves of 16 bits, n below 2^35."""
    low, high = (x & 0xFFFF).astype(np.int64), (x >> 16).astype(np.int64)
    exact: Elements = np.mod(np.mod(high @ w.T, P) * 65536 + low @ w.T, P).astype(np.uint32)
    return exact


def _require(name: str) -> None:
    if name not in _KERNELS:
        raise KernelError(f"unknown kernel {name!r}: choose one of {', '.join(_KERNELS)}")
    if not _KERNELS[name][0]():
        raise KernelError(
            f"kernel {name!r} needs a processor that this machine does not have; leave the choice to sliplm"
        )
    if not self_test(name):
        raise KernelError(f"kernel {name!r} gives wrong products on this machine; leave the choice to sliplm")
