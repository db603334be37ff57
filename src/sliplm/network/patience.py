"""Waiting awake for a moment before sleeping: to wake a sleeping processor costs more than most answers take.

Whoever waits looks again and again for at most SPIN nanoseconds, without the GIL, and yields the core to
whoever else could use it.  That is done only while it pays: `Patience` counts how the last waits ended, and
stops where answers take longer, where nothing comes, or where others need the core.
"""

from __future__ import annotations

import platform
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sliplm.arithmetic.jit import jit

SPIN: Final = 500_000  # nanoseconds awake in one wait, at most
NOTHING, CAME, AT_ONCE = 0, 1, 2  # how a wait that stays awake ends: in vain, well, or before it began
CROWDED: Final = -1  # others needed the core
_LONG_YIELD: Final = 50_000  # nanoseconds: whoever got our core computes, and will go on
_CREDIT: Final = 8  # waits awake that may be in vain: a miss costs two
_PAUSES: Final = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}
_POLLIN: Final = 1

_I32, _I64 = ir.IntType(32), ir.IntType(64)

Words = npt.NDArray[np.int64]


class Patience:
    """How long one connection's next wait may stay awake, learnt from its last ones."""

    def __init__(self) -> None:
        self._credit = _CREDIT

    def __repr__(self) -> str:
        return f"Patience({self._credit} of {_CREDIT})"

    @property
    def spin(self) -> int:
        """Nanoseconds that the next wait may stay awake."""
        return SPIN if self._credit > 0 else 0

    def judge(self, outcome: int) -> bool:
        """Learn from how a wait ended; whether something came."""
        if outcome == CAME:
            self._credit = min(_CREDIT, self._credit + 1)
        elif outcome == CROWDED:
            self._credit = 0
        elif outcome == NOTHING:
            self._credit = max(0, self._credit - 2)
        return outcome > 0

    def slept(self, since: float) -> None:
        """It came after a sleep that began at `since`, of time.monotonic(): would staying awake have paid?"""
        if self._credit < _CREDIT and (time.monotonic() - since) * 1e9 < SPIN:
            self._credit += 1


@jit
def readable(handle: Words, spin: int) -> int:
    """Wait awake for at most `spin` ns until a descriptor has something to read; how it ended.

    Args:
        handle: int64 [1], the descriptor as `pollfd`.
    """
    until = 0
    while True:
        if poll(handle.ctypes.data, 1, 0) != 0:
            return AT_ONCE if until == 0 else CAME
        until = relaxed(until, spin)
        if until <= 0:
            return until


@jit
def relaxed(until: int, spin: int) -> int:
    """One turn of a wait that stays awake until the moment `until`, 0 in its first turn.

    Returns: the moment; 0 once it has passed; CROWDED if the core was somebody else's for long.
    """
    before = nanoseconds()
    if until == 0:
        until = before + spin
    if before >= until:
        return 0
    for _ in range(8):
        pause()
    sched_yield()
    return CROWDED if nanoseconds() - before > _LONG_YIELD else until


def pollfd(descriptor: int) -> Words:
    """The structure that `readable` takes."""
    return np.array([descriptor | _POLLIN << 32], np.int64)


sched_yield = types.ExternalFunction("sched_yield", types.int32())
poll = types.ExternalFunction("poll", types.int32(types.uintp, types.uintp, types.int32))


@intrinsic  # type: ignore[untyped-decorator]
def nanoseconds(typing: Any) -> Any:
    """The monotonic clock."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        moment = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        first = builder.bitcast(moment, _I64.as_pointer())
        kind = ir.FunctionType(_I32, [_I32, _I64.as_pointer()])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(clock, [ir.Constant(_I32, time.CLOCK_MONOTONIC), first])
        seconds = builder.load(first)
        rest = builder.load(builder.gep(first, [ir.Constant(_I32, 1)]))
        return builder.add(builder.mul(seconds, ir.Constant(_I64, 10**9)), rest)

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def pause(typing: Any) -> Any:
    """Tell the processor that this loop waits, where it has a word for that."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if (found := _PAUSES.get(platform.machine())) is not None:
            name, values = found
            kind = ir.FunctionType(ir.VoidType(), [_I32] * len(values))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [ir.Constant(_I32, value) for value in values])
        return context.get_dummy_value()

    return types.void(), generate
