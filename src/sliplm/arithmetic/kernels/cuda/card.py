"""One card: its programs, its staging memory, and the tiles that are fastest on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_uint64
from functools import cache
from typing import Final

from sliplm.arithmetic.kernels.cuda import compiling, driver
from sliplm.arithmetic.kernels.cuda.tiles import Program
from sliplm.errors import CardError

STAGE: Final = 16 << 20  # bytes of questions, or of answers, on their way at a time: a frame's
_FILL: Final = 4 * 64 << 17
_SCRATCH: Final = 8 << 20
_COMPILERS: Final = 8  # at a time, at the first start
_LEAST_CAPABILITY: Final = 80


class Lane:
    """What one chunk of rows needs on its way over the card and back; two of them overlap.

    Args:
        stage: bytes of questions, and of answers.
    """

    def __init__(self, stage: int = STAGE) -> None:
        self.stream = driver.Stream()
        self.inbox, self.outbox = driver.Pinned(stage), driver.Pinned(stage)
        self.x, self.out = driver.Memory(stage), driver.Memory(stage)
        self.limbs = driver.Memory(2 * stage + _FILL)  # as many bytes as x, filled up to whole blocks
        self.scratch = driver.Memory(_SCRATCH)

    def rows(self, shape: tuple[int, int]) -> int:
        """How many rows of a product it carries at a time."""
        return self.inbox.size // 4 // max(shape)


class Card:
    """A card of this process, entered by one thread at a time.

    Raises CardError if there is no such card, it is too old, or a library is missing.
    """

    def __init__(self, ordinal: int) -> None:
        self.device = driver.Device(ordinal)
        if self.device.capability < _LEAST_CAPABILITY:
            raise CardError(
                f"{self.device.name} is too old: capability 8.0 or later is needed (Ampere); run on the CPU"
            )
        self.versions = f"driver {driver.version()}, triton {compiling.triton()}"
        self._lock = threading.RLock()
        self._functions: dict[tuple[Program, bool], tuple[compiling.Compiled, driver.Function]] = {}
        self.whole_low: driver.Memory | None = None
        self.device.enter()
        self.lanes = (Lane(), Lane())

    def __repr__(self) -> str:
        return f"Card({self.device.ordinal}, {self.device.name})"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have it alone."""
        with self._lock:
            self.device.enter()
            yield

    def need_whole_low(self, size: int) -> None:
        """Have room for the unpacked low parts of the largest matrix."""
        if self.whole_low is None or self.whole_low.size < size:
            self.whole_low = None
            self.whole_low = driver.Memory(size)

    def compile_ahead(self, programs: Iterable[Program], *, aligned: bool) -> None:
        """Compile several programs at a time; one that does not compile says so when it is launched."""
        wanted = [each for each in programs if (each, aligned) not in self._functions]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            for each in [pool.submit(self._compiled, program, aligned) for program in wanted]:
                with contextlib.suppress(CardError):
                    each.result()

    def launch(
        self,
        program: Program,
        *,
        aligned: bool,
        grid: tuple[int, int],
        arguments: tuple[int, ...],
        lane: Lane,
    ) -> None:
        """Ask a lane for one program.  Raises CardError, also where its tile does not fit this card."""
        made, function = self._function(program, aligned)
        if made.scratch * grid[0] * grid[1] > lane.scratch.size:
            raise CardError(f"{program.name} needs more scratch memory than there is")
        values: list[c_uint64 | c_int] = [
            c_uint64(value) if pointer else c_int(value)
            for pointer, value in zip(made.parameters, arguments, strict=True)
        ]
        # what Triton adds to every program: memory of each block's own, and none to profile with
        function.launch(grid, [*values, c_uint64(lane.scratch.address), c_uint64(0)], lane.stream)

    def prepared(self, program: Program, *, aligned: bool) -> driver.Prepared:
        """A program without scratch memory, for one thread that asks for it often.  Raises CardError."""
        made, function = self._function(program, aligned)
        if made.scratch:
            raise CardError(f"{program.name} needs scratch memory")
        return driver.Prepared(function, made.parameters)

    def _function(self, program: Program, aligned: bool) -> tuple[compiling.Compiled, driver.Function]:
        found = self._functions.get((program, aligned))
        if found is None:
            made = self._compiled(program, aligned)
            if made.shared > self.device.shared_memory:
                raise CardError(f"{program.name} needs {made.shared} bytes of a block's memory on this card")
            function = driver.Function(made.binary, made.name, made.shared, made.warps)
            found = self._functions[program, aligned] = (made, function)
        return found

    def _compiled(self, program: Program, aligned: bool) -> compiling.Compiled:
        return compiling.compiled(program, aligned=aligned, capability=self.device.capability)


@cache
def card(ordinal: int) -> Card:
    """This process's card of that number.  Raises CardError."""
    return Card(ordinal)
