"""Which tile is fastest for a matrix on this card: measured once, and kept in the user's cache.

A tile is tested against known answers, extremes included, before it is timed or used (M18).  What is kept
is only which of the `candidates` won, so that a damaged or altered cache can cost speed and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from sliplm import durable, places
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Card, Lane
from sliplm.arithmetic.kernels.cuda.tiles import BANDS, Tile, candidates, multiplying
from sliplm.errors import CardError, PlaceError
from sliplm.reading import read_bounded

TUNING_LIMIT: Final = 20.0  # seconds of a process's start; what is left is measured at the next
_FORMAT: Final = 1
_REPEATS: Final = 7
_MAX_CACHE: Final = 1 << 20  # bytes of the file

logger = logging.getLogger(__name__)


class Product(Protocol):
    """What of a matrix is measured."""

    shape: tuple[int, int]
    width: int
    packed: bool
    aligned: bool

    def ask(self, lane: Lane, tile: Tile, x: int, out: int, rows: int) -> None:
        """out = w x."""

    def unpack(self, lane: Lane) -> None:
        """Make ready for a whole tile."""


class Choice(Protocol):
    """Names the tile of a matrix for a band of rows."""

    def __call__(self, matrix: Product, band: int) -> Tile:
        """Raises CardError if there is none."""


class Tuning:
    """The choices for one card.

    Args:
        build: makes a matrix that uses one tile whatever the rows, for the known answers.
        limit: seconds that measuring may take from now on.
    """

    def __init__(
        self,
        card: Card,
        build: Callable[[np.ndarray, Tile], kernels.Matrix],
        limit: float = TUNING_LIMIT,
    ) -> None:
        self._card, self._build = card, build
        self._until: float | None = None
        self._limit = limit
        self._exact: dict[tuple[Tile, int, bool, bool], bool] = {}
        self._file = _file(card)
        self._kept = _read(self._file)
        self._new = False

    def __call__(self, matrix: Product, band: int) -> Tile:
        """The tile for products of this matrix with up to `band` rows.  Raises CardError."""
        tiles = candidates(band, packed=matrix.packed, capability=self._card.device.capability)
        key = f"{matrix.shape[0]}x{matrix.width} {'packed' if matrix.packed else 'bytes'} {band}"
        kept = self._kept.get(key)
        for tile in tiles:
            if list(astuple(tile)) == kept and self._is_exact(tile, matrix, band):
                return tile
        if self._until is None:
            logger.info("measuring what is fastest on %s, once for each shape", self._card.device.name)
            self._until = time.monotonic() + self._limit
            self._compile(matrix)
        usable = [tile for tile in tiles[:1] if self._is_exact(tile, matrix, band)]
        if usable and time.monotonic() > self._until:
            return usable[0]
        usable = [tile for tile in tiles if self._is_exact(tile, matrix, band)]
        if not usable:
            raise CardError(f"{self._card.device.name} gives wrong products, or none, for {band} rows")
        times = {tile: self._milliseconds(matrix, tile, band) for tile in usable}
        best = min(times, key=lambda tile: times[tile])
        self._kept[key], self._new = list(astuple(best)), True
        return best

    def keep(self) -> None:
        """Write the new choices where the next process finds them, if there is such a place."""
        if self._new and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                durable.replace(self._file, json.dumps(self._kept, indent=1).encode(), lasting=False)
                self._new = False

    def _compile(self, matrix: Product) -> None:
        """All that may be tried for such matrices, several at a time."""
        packed, capability = matrix.packed, self._card.device.capability
        tiles = [tile for band in BANDS for tile in candidates(band, packed=packed, capability=capability)]
        programs = {each for tile in tiles for each in multiplying(tile, packed=packed)}
        self._card.compile_ahead(programs, aligned=matrix.aligned)

    def _is_exact(self, tile: Tile, matrix: Product, band: int) -> bool:
        """Does this tile's program, as compiled for such a matrix, give the known answers?"""
        key = tile, band, matrix.packed, matrix.aligned
        if key not in self._exact:
            self._exact[key] = self._gives_known_answers(*key)
        return self._exact[key]

    def _gives_known_answers(self, tile: Tile, band: int, packed: bool, aligned: bool) -> bool:
        w, x, wanted = _known(packed=packed, aligned=aligned)
        rows = min(band, len(x))
        try:
            answer = self._build(w, tile).product(x[:rows])
        except CardError as error:  # it does not fit this card, say
            logger.debug("%s is passed over: %s", tile, error)
            return False
        return np.array_equal(answer, wanted[:rows])

    def _milliseconds(self, matrix: Product, tile: Tile, band: int) -> float:
        """The median of a few runs, with the card's cache emptied before each."""
        lane = self._card.lanes[0]
        rows = min(band, lane.rows(matrix.shape))
        if matrix.packed and tile.whole:
            matrix.unpack(lane)
        spent = []
        for _ in range(_REPEATS):
            driver.call("cuMemsetD8Async", lane.limbs.address, 0, lane.limbs.size, lane.stream.handle)
            before = lane.stream.mark()
            matrix.ask(lane, tile, lane.x.address, lane.out.address, rows)
            spent.append(driver.elapsed(before, lane.stream.mark()))
        return sorted(spent)[_REPEATS // 2]


@cache
def _known(*, packed: bool, aligned: bool) -> tuple[kernels.Integers, Elements, Elements]:
    """Weights, 70 rows, and what they give: odd shapes, or multiples of 16, for which others are compiled."""
    m, n = (336, 1104) if aligned else (331, 1101)
    largest, dtype = (2047, np.int16) if packed else (127, np.int8)
    w, x = kernels.known_operands(m, n, 70, largest)
    return w.astype(dtype), x, kernels.known_answer(w, x)


def _file(card: Card) -> Path | None:
    """Where this card's choices are kept; None if there is no such place."""
    try:
        folder = places.cache() / "cuda"
    except PlaceError:
        return None
    name = re.sub(r"[^0-9A-Za-z.]+", "-", f"{card.device.name} {card.versions} tiles {_FORMAT}").strip("-")
    return folder / f"{name}.json"


def _read(file: Path | None) -> dict[str, list[int]]:
    """What was kept; nothing where it cannot be read."""
    if file is None:
        return {}
    try:
        found = json.loads(read_bounded(file, _MAX_CACHE))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
