"""A stream of bytes each way in memory that two processes share, without locks; SPEC's shared memory.

    offset      bytes  written by
         0          8  vault    sent: bytes that it has put into its ring since the beginning
         8          8  vault    taken: bytes that it has taken out of the worker's ring
        16          8  vault    asleep: what it waits for, AWAKE, FOR_BYTES or FOR_ROOM
       128         24  worker   the same
      4096       RING  vault    its ring: byte i of the stream is at i mod RING
    4096 + RING  RING  worker   its ring

The other side may write anything, anywhere and at any time.  So nothing is read twice: its counters are
copied once and checked before they are used, its bytes are copied to private memory before anybody looks
at them, and our own counters are kept in private memory: what stands in the shared page is for the other
side alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sliplm.arithmetic.jit import jit
from sliplm.network.patience import AT_ONCE, CAME, Words, relaxed

RING: Final = 1 << 20  # bytes; a power of two
SIZE: Final = 4096 + 2 * RING
AWAKE, FOR_BYTES, FOR_ROOM = 0, 1, 2
COUNT: Final = 2**32 - 1  # where bytes are counted; how the wait for them ended is in the bits above
SCRIBBLED: Final = -2  # the other side's counters are impossible

BELL: Final = 7  # of a side's private words: not 0 if the other side sleeps, and has reason to wake
_MINE, _THEIRS, _OUT, _IN, _SENT, _TAKEN, _END = range(7)  # the others: addresses, and streams so far
_AT_SENT, _AT_TAKEN, _AT_ASLEEP = 0, 8, 16
_FOREVER: Final = 2**63 - 1

Raw = npt.NDArray[np.uint8]


def side(address: int, *, vault: bool) -> Words:
    """The private words of one side of SIZE shared bytes at an address: int64 [8]."""
    lines, rings = (address, address + 128), (address + 4096, address + 4096 + RING)
    mine, theirs = (0, 1) if vault else (1, 0)
    return np.array([lines[mine], lines[theirs], rings[mine], rings[theirs], 0, 0, _FOREVER, 0], np.int64)


@cache
def prepare() -> None:
    """Compile everything here, so that no deadline pays for it."""
    area = np.zeros(SIZE + 8, np.uint8)
    address = -(-area.ctypes.data // 8) * 8
    vault, worker, out = side(address, vault=True), side(address, vault=False), np.empty(2, np.uint8)
    for body in (np.frombuffer(b"a", np.uint8), np.zeros(1, np.uint8)):
        put(vault, np.frombuffer(b"a", np.uint8), body, 0, 0)
        arrived(worker, 0)
        get(worker, out, 0)
    lie_down(worker, FOR_BYTES)
    sleeps(vault)
    get_up(worker)
    finish(worker)


@jit
def put(words: Words, header: Raw, body: Raw, done: int, spin: int) -> int:
    """Copy what there is room for of a frame whose first `done` bytes are sent; wait awake for room.

    Returns: bytes of the frame that are sent now, and above them how the wait ended; SCRIBBLED.
    """
    until = 0
    while True:
        used = words[_SENT] - load(words[_THEIRS] + _AT_TAKEN)
        if used < 0 or used > RING:
            return SCRIBBLED
        if used < RING:
            break
        until = relaxed(until, spin)
        if until <= 0:
            return done
    first = done
    last: int = min(len(header) + len(body), done + RING - used)
    if done < len(header):
        done = min(last, len(header))
        _write(words, header.ctypes.data + first, done - first)
    if done < last:
        _write(words, body.ctypes.data + done - len(header), last - done)
    store(words[_MINE] + _AT_SENT, words[_SENT])
    if load(words[_THEIRS] + _AT_ASLEEP) == FOR_BYTES:
        words[BELL] = 1
    return last | (AT_ONCE if until == 0 else CAME) << 32


@jit
def get(words: Words, out: Raw, spin: int) -> int:
    """Copy what is here into private memory, at most as much as `out` holds; wait awake for a first byte.

    Returns: bytes, and above them how the wait ended, AT_ONCE or CAME; NOTHING, CROWDED or SCRIBBLED.
    """
    until = 0
    while True:
        here = _here(words)
        if here != 0:
            break
        until = relaxed(until, spin)
        if until <= 0:
            return until
    if here < 0:
        return SCRIBBLED
    count = min(here, len(out))
    start = words[_TAKEN] & (RING - 1)
    straight = min(count, RING - start)
    copy(out.ctypes.data, words[_IN] + start, straight)
    copy(out.ctypes.data + straight, words[_IN], count - straight)
    words[_TAKEN] += count
    store(words[_MINE] + _AT_TAKEN, words[_TAKEN])
    if load(words[_THEIRS] + _AT_ASLEEP) == FOR_ROOM:
        words[BELL] = 1
    return count | (AT_ONCE if until == 0 else CAME) << 32


@jit
def arrived(words: Words, spin: int) -> int:
    """Wait awake for a first byte; how it ended, or SCRIBBLED."""
    until = 0
    while True:
        here = _here(words)
        if here != 0:
            if here < 0:
                return SCRIBBLED
            return AT_ONCE if until == 0 else CAME
        until = relaxed(until, spin)
        if until <= 0:
            return until


@jit
def lie_down(words: Words, reason: int) -> bool:
    """Say that we sleep, and for what; False if there is no reason any more, so that nobody would wake us."""
    store(words[_MINE] + _AT_ASLEEP, reason)
    if reason == FOR_BYTES:
        return _here(words) == 0
    full: bool = words[_SENT] - load(words[_THEIRS] + _AT_TAKEN) == RING
    return full


@jit
def sleeps(words: Words) -> bool:
    """Whether the other side says that it sleeps for bytes: its word, and no more depends on it."""
    asleep: bool = load(words[_THEIRS] + _AT_ASLEEP) == FOR_BYTES
    return asleep


@jit
def get_up(words: Words) -> None:
    """Say that we are awake."""
    store(words[_MINE] + _AT_ASLEEP, AWAKE)


@jit
def finish(words: Words) -> None:
    """The other side is gone: what it has sent up to now counts, and nothing after it."""
    if words[_END] == _FOREVER:
        words[_END] = load(words[_THEIRS] + _AT_SENT)


@jit
def _here(words: Words) -> int:
    """Bytes that have come and are not taken yet; negative if that cannot be."""
    here = min(load(words[_THEIRS] + _AT_SENT), words[_END]) - words[_TAKEN]
    return here if 0 <= here <= RING else SCRIBBLED


@jit
def _write(words: Words, source: int, count: int) -> None:
    start = words[_SENT] & (RING - 1)
    straight = min(count, RING - start)
    copy(words[_OUT] + start, source, straight)
    copy(words[_OUT], source + straight, count - straight)
    words[_SENT] += count


copy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))

_I64 = ir.IntType(64)


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, address: Any) -> Any:
    """The int64 at an address, read once; nothing that follows is done before it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, address: Any, value: Any) -> Any:
    """Write an int64 to an address, once all that went before is done and before all that follows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
