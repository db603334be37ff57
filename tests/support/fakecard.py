"""A card without a card: its programs as numpy does what they promise, its memory in this process."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Lane
from sliplm.arithmetic.kernels.cuda.tiles import Program
from sliplm.errors import CardError


def cards() -> int:
    """How many real cards the tests may use."""
    try:
        return driver.count()
    except CardError:
        return 0


def at(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """What lies there."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class FakeMemory:
    """Of a card or pinned; filled with what was there before, as memory is."""

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size + 64, 0xA5, np.uint8)
        self.address, self.size = self._bytes.ctypes.data + -self._bytes.ctypes.data % 16, size

    def write(self, offset: int, array: np.ndarray) -> None:
        if offset + array.nbytes > self.size:
            raise CardError("does not fit")
        at(self.address + offset, (array.nbytes,), np.uint8)[:] = array.reshape(-1).view(np.uint8)

    @staticmethod
    def fill(address: int, value: int, size: int) -> None:
        at(address, (size,), np.uint8)[:] = value

    def elements(self, rows: int, columns: int) -> np.ndarray:
        assert 4 * rows * columns <= self.size
        return at(self.address, (rows, columns), np.uint32)


class FakeStream:
    """Does at once what it is asked, or remembers it."""

    handle = None
    remembered: list[Callable[[], None]] | None = None

    def wait(self) -> None: ...

    def mark(self) -> None: ...

    def do(self, work: Callable[[], None]) -> None:
        if self.remembered is None:
            work()
        else:
            self.remembered.append(work)

    def record(self) -> None:
        self.remembered = []

    def recorded(self) -> FakeRecording:
        recording, self.remembered = FakeRecording(self.remembered or []), None
        return recording


class FakeRecording:
    def __init__(self, work: list[Callable[[], None]]) -> None:
        self._work = work

    def launch(self, stream: FakeStream) -> None:
        for each in self._work:
            each()


class FakeDevice:
    name, ordinal, capability, shared_memory = "Fake 1", 0, 90, 1 << 20

    def __init__(self, free: int = 1 << 30) -> None:
        self._free = free

    def enter(self) -> None: ...

    def free(self) -> int:
        return self._free


class FakeCard:
    """As `Card`; `asked` counts programs, and a tile in `wrong` gives wrong products."""

    versions = "driver 1, triton 1"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int = 1 << 30, stage: int = 1 << 16) -> None:
        monkeypatch.setattr(driver, "Memory", FakeMemory)
        monkeypatch.setattr(driver, "Pinned", FakeMemory)
        monkeypatch.setattr(driver, "Stream", FakeStream)
        monkeypatch.setattr(driver, "call", self._copy)
        monkeypatch.setattr(driver, "elapsed", lambda before, after: 1.0)
        self.device, self.whole_low, self.asked = FakeDevice(free), None, []
        self.wrong: set[tuple[int, int]] = set()  # (warps, stages) of `stack`, or (warps, UNROLL) of `few`
        self.lanes = (Lane(stage), Lane(stage))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def need_whole_low(self, size: int) -> None:
        if self.whole_low is None or self.whole_low.size < size:
            self.whole_low = FakeMemory(size)

    def compile_ahead(self, programs: Iterable[Program], *, aligned: bool) -> None: ...

    def launch(
        self, program: Program, *,
        aligned: bool, grid: tuple[int, int], arguments: tuple[int, ...], lane: Any,
    ) -> None:  # fmt: skip
        self.asked.append(program.name)
        constants = dict(program.constants)
        key = program.warps, constants.get("UNROLL", program.stages)
        lane.stream.do(lambda: self._run(program.name, constants, grid, arguments, key))

    def _copy(self, name: str, to: int, source: int, size: int, *rest: Any) -> None:
        if name == "cuMemsetD8Async":
            return
        assert name in {"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"}
        ctypes.memmove(to, source, size)

    def _run(self, program: str, c: Mapping[str, int], grid: Any, arguments: Any, key: Any) -> None:
        if program == "cut":
            cut(*arguments, rows=grid[0], covered=grid[1] * c["BLOCK"])
        elif program == "unpack":
            unpack(*arguments, m=grid[0])
        else:
            out = (few if program == "few" else stack)(*arguments, **c)
            if key in self.wrong:
                out[-1, -1] ^= 1


def cut(x: int, limbs: int, n: int, width: int, bn: int, *, rows: int, covered: int) -> None:
    """As `programs.cut`: repeated division, with the remainder nearest to zero."""
    assert width <= covered
    value = at(x, (rows, n), np.uint32).astype(np.int64)
    value = np.where(value > 0x7F7F7F7F, value - P, value)
    to = at(limbs, (-(-rows // bn), 4, bn, width), np.int8)
    for k in range(4):
        limb = (value + 128) % 256 - 128
        value = (value - limb) // 256
        for r in range(rows):
            to[r // bn, k, r % bn] = np.pad(limb[r], (0, width - n))
    assert not value.any()


def unpack(low: int, whole: int, width: int, *, m: int) -> None:
    both = at(low, (m, width // 2), np.uint8)
    at(whole, (m, width), np.int8)[:] = np.hstack([both & 15, both >> 4])


def few(
    words: int, low: int, limbs: int, out: int, m: int, plane: int,
    *, PACKED: bool, UNROLL: int, BM: int, BK: int,
) -> np.ndarray:  # fmt: skip
    w = weights(words, low, m, 4 * plane, packed=PACKED)
    return joined(out, w, at(limbs, (1, 4, 1, 4 * plane), np.int8), 1)


def stack(
    w: int, low: int, limbs: int, out: int, rows: int, m: int, width: int,
    *, PACKED: bool, ADD: bool, TMA: bool, BM: int, BN: int, BK: int, GROUP: int,
) -> np.ndarray:  # fmt: skip
    assert width % BK == 0 and (width // 2 % BK == 0 or not PACKED)
    before = at(out, (rows, m), np.uint32).astype(np.int64) * 16 if ADD else 0
    blocks = at(limbs, (-(-rows // BN), 4, BN, width), np.int8)
    return joined(out, weights(w, low, m, width, packed=PACKED), blocks, rows, before)


def weights(w: int, low: int, m: int, width: int, *, packed: bool) -> np.ndarray:
    high = at(w, (m, width), np.int8).astype(np.int64)
    if not packed:
        return high
    both = at(low, (m, width // 2), np.uint8).astype(np.int64)
    return 16 * high + np.hstack([both & 15, both >> 4])


def joined(out: int, w: np.ndarray, blocks: np.ndarray, rows: int, before: Any = 0) -> np.ndarray:
    x = blocks.astype(np.int64).transpose(0, 2, 1, 3).reshape(-1, 4, w.shape[1])[:rows]
    sums = x @ w.T  # [rows, 4, m]
    to = at(out, (rows, len(w)), np.uint32)
    to[:] = (before + sum(sums[:, k] << 8 * k for k in range(4))) % P
    return to
