"""Exact products on a card.

Up to 16 rows: pinned memory in, one recorded launch, pinned memory out, one wait; the card's programs read
and write the pinned memory themselves.  More rows go in chunks over two lanes, so that the copies of one and
the products of the other overlap.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.kernels.cuda import driver, layout
from sliplm.arithmetic.kernels.cuda.card import Card, Lane
from sliplm.arithmetic.kernels.cuda.tiles import (
    BANDS,
    RECORDED,
    Program,
    Tile,
    band_of,
    cutting,
    multiplying,
    unpacking,
)
from sliplm.arithmetic.kernels.cuda.tuning import Choice
from sliplm.errors import CardError

_BLOCK: Final = 1024  # elements that a block of `cut` and `unpack` takes
_SMALL_BLOCK: Final = 256  # where there are few of them
_LAYOUT_ROWS: Final = 128  # laid out at a time, in the processor's cache
_STEP: Final = 64  # rows: chunks are whole blocks


class CudaMatrix:
    """w int8, or int16 with |w| <= 2047, [m, n] on one card.

    Args:
        choice: which tile serves how many rows, known or measured now.

    Attributes:
        card: where it lies.

    Raises CardError: it does not fit, or no tile of the card gives the known answers.
    """

    kernel = "cuda"

    def __init__(self, card: Card, w: npt.NDArray[np.integer], choice: Choice) -> None:
        (m, n), self.packed = w.shape, layout.is_packed(w)
        size = layout.size_of((m, n), packed=self.packed)
        self.shape, self.width, self.aligned = (m, n), layout.width_of(n), m % 16 == 0 and n % 16 == 0
        self.card, self._recordings = card, dict[int, driver.Recording]()
        self._rooms: driver.Rooms = {}
        with card.entered():
            self._w = driver.Memory(m * self.width)
            self._low = driver.Memory(size - self._w.size)
            for first in range(0, m, _LAYOUT_ROWS):
                high, low = layout.planes(w[first : first + _LAYOUT_ROWS])
                self._w.write(first * self.width, high)
                if low is not None:
                    self._low.write(first * self.width // 2, low)
            if self.packed:
                card.need_whole_low(m * self.width)
            self._tiles = {band: choice(self, band) for band in BANDS}

    def product(self, x: Elements, out: Elements | None = None) -> Elements:
        """w x mod p for each row x: uint32 [rows, n] -> uint32 [rows, m], into `out`.  Raises CardError."""
        if out is None:
            out = np.empty((x.shape[0], self.shape[0]), np.uint32)
        if len(x):
            with self.card.entered():
                if len(x) <= RECORDED <= self.card.lanes[0].rows(self.shape):
                    self._recorded(x, out)
                else:
                    self._in_chunks(x, out)
        return out

    def room(self, rows: int) -> Elements:
        """Room for w x of so many rows, which a card reads without a copy: uint32 [rows, m].

        Raises CardError.
        """
        with self.card.entered():
            return driver.pinned_elements(rows, self.shape[0], self._rooms)

    def across(self, x: int, out: int, rows: int) -> None:
        """w x mod p for rows x, from one address on the card to another: uint32 [rows, n], [rows, m].  Waits.

        Raises CardError.
        """
        (m, n), lane = self.shape, self.card.lanes[0]
        with self.card.entered():
            most = lane.limbs.size // (4 * self.width)
            most = max(1, most // _STEP * _STEP or most)
            even = -(-rows // -(-rows // most))  # no short last chunk
            step = min(most, -(-even // _STEP) * _STEP)
            tile = self._tiles[band_of(min(step, rows))]
            if self.packed and tile.whole:
                self.unpack(lane)
            for first in range(0, rows, step):
                self.ask(lane, tile, x + 4 * first * n, out + 4 * first * m, min(step, rows - first))
            lane.stream.wait()

    def _recorded(self, x: Elements, out: Elements) -> None:
        (m, n), lane, band = self.shape, self.card.lanes[0], band_of(len(x))
        lane.inbox.elements(len(x), n)[:] = x
        recording = self._recordings.get(band)
        if recording is None:
            tile = self._tiles[band]
            self.ask(lane, tile, lane.inbox.address, lane.outbox.address, band)  # loads what it needs
            lane.stream.wait()
            lane.stream.record()
            self.ask(lane, tile, lane.inbox.address, lane.outbox.address, band)
            recording = self._recordings[band] = lane.stream.recorded()
        recording.launch(lane.stream)
        lane.stream.wait()
        out[:] = lane.outbox.elements(len(x), m)

    def _in_chunks(self, x: Elements, out: Elements) -> None:
        (m, n), lanes = self.shape, self.card.lanes
        tile = self._tiles[band_of(len(x))]
        if self.packed and tile.whole:
            self.unpack(lanes[0])
            lanes[0].stream.wait()
        most = lanes[0].rows((m, n))
        step = max(1, most // _STEP * _STEP or most)
        starts = range(0, len(x), step)
        for i, first in enumerate(starts):
            lane, rows = lanes[i % 2], min(step, len(x) - first)
            if i >= 2:
                _collect(lane, out[first - 2 * step : first - step])
            lane.inbox.elements(rows, n)[:] = x[first : first + rows]
            driver.call(
                "cuMemcpyHtoDAsync_v2", lane.x.address, lane.inbox.address, 4 * rows * n, lane.stream.handle
            )
            self.ask(lane, tile, lane.x.address, lane.out.address, rows)
            driver.call(
                "cuMemcpyDtoHAsync_v2",
                lane.outbox.address,
                lane.out.address,
                4 * rows * m,
                lane.stream.handle,
            )
        for i, first in list(enumerate(starts))[-2:]:
            _collect(lanes[i % 2], out[first : first + step])

    def enqueue(self, lane: Lane, x: int, out: int, rows: int) -> None:
        """Ask a lane for out = w x by the tile for so many rows.  Raises CardError."""
        tile = self._tiles[band_of(rows)]
        if self.packed and tile.whole:
            self.unpack(lane)
        self.ask(lane, tile, x, out, rows)

    def ask(self, lane: Lane, tile: Tile, x: int, out: int, rows: int) -> None:
        """Ask a lane for out [rows, m] = w x for x [rows, n], at these addresses, by this tile.

        A packed matrix must have been unpacked where the tile is a whole one.  Raises CardError.
        """
        (m, n), width = self.shape, self.width
        blocks = -(-rows // tile.rows_a_block)
        if 4 * blocks * tile.rows_a_block * width > lane.limbs.size:
            raise CardError(f"{rows} rows of {n} columns are too many at a time")
        block = _SMALL_BLOCK if rows <= RECORDED else _BLOCK
        self._launch(
            lane, cutting(block), (rows, -(-width // block)),
            (x, lane.limbs.address, n, width, tile.rows_a_block),
        )  # fmt: skip
        first, *second = multiplying(tile, packed=self.packed)
        tall = -(-m // tile.bm)
        if tile.bn == 0:
            self._launch(
                lane, first, (tall, 1),
                (self._w.address, self._low.address, lane.limbs.address, out, m, width // 4),
            )  # fmt: skip
            return
        rest = (self._low.address, lane.limbs.address, out, rows, m, width)
        self._launch(lane, first, (tall * blocks, 1), (self._w.address, *rest))
        if second and self.card.whole_low is not None:
            self._launch(lane, second[0], (tall * blocks, 1), (self.card.whole_low.address, *rest))

    def unpack(self, lane: Lane) -> None:
        """Unpack the low parts for products of many rows; other matrices' are gone then."""
        whole = self.card.whole_low
        if whole is not None:
            self._launch(
                lane, unpacking(_BLOCK), (self.shape[0], -(-self.width // 2 // _BLOCK)),
                (self._low.address, whole.address, self.width),
            )  # fmt: skip

    def _launch(
        self, lane: Lane, program: Program, grid: tuple[int, int], arguments: tuple[int, ...]
    ) -> None:
        self.card.launch(program, aligned=self.aligned, grid=grid, arguments=arguments, lane=lane)


def _collect(lane: Lane, out: Elements) -> None:
    """Wait for a lane's chunk, and take its answers."""
    lane.stream.wait()
    out[:] = lane.outbox.elements(*out.shape)
