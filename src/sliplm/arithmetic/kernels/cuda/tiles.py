"""Shapes of the tiles in which a card works, for each band of rows: what may be tried, and nothing else."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Tile:
    """How one product is cut up on the card.

    Attributes:
        bm, bn, bk: rows of w, rows of x, and columns that a block takes at a time; bn 0: program `few`, with
            bk in words of four columns.
        warps, stages: of a block; how many steps' tiles are on their way at a time, or a loop's are unrolled.
        tma: tiles are fetched by the card's copy engine (from capability 9.0 on).
        whole: a packed matrix is unpacked first, and its two planes are multiplied one after the other.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False
    whole: bool = False

    @property
    def rows_a_block(self) -> int:
        """Of x, in the order of the limbs."""
        return self.bn or 1


@dataclass(frozen=True)
class Program:
    """One of `programs`, with all that it is compiled for but the card and the matrix's alignment.

    Attributes:
        constants: names and values, in the program's order.
        warps, stages: as a tile's.
    """

    name: str
    constants: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 1


BANDS: Final = (1, 4, 8, 16, 64, 1024)
"""Numbers of rows up to which one choice of a tile holds, and for which it is measured; the last is for more
too."""

RECORDED: Final = 16
"""Rows up to which a product is one recorded launch."""

_GROUP: Final = 8  # tiles of w that neighbouring blocks share
_Cut = tuple[int, int, int, int]  # bm, bk, warps, stages: bn is the band's
_ONE: Final[tuple[_Cut, ...]] = (
    (4, 128, 1, 1),
    (4, 128, 1, 2),
    (8, 128, 1, 1),
    (2, 128, 1, 2),
    (8, 128, 1, 2),
)
_PACKED_ONE: Final[tuple[_Cut, ...]] = ((2, 128, 1, 1), (4, 128, 1, 1), (2, 128, 1, 2), (4, 128, 1, 2))
_DEEP: Final[tuple[_Cut, ...]] = ((32, 256, 4, 6), (16, 256, 4, 8), (64, 256, 4, 4))
_PACKED_DEEP: Final[tuple[_Cut, ...]] = ((32, 128, 4, 5),)
_NARROW: Final[tuple[_Cut, ...]] = ((64, 128, 4, 4), (32, 128, 4, 4), (32, 256, 2, 4), *_DEEP)
_PACKED_NARROW: Final[tuple[_Cut, ...]] = (
    (64, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (32, 64, 4, 4), (16, 128, 4, 4), *_PACKED_DEEP,
)  # fmt: skip
_MIDDLE: Final[tuple[_Cut, ...]] = ((64, 128, 4, 4), (32, 128, 4, 4), (64, 64, 4, 4))
_PACKED_MIDDLE: Final[tuple[_Cut, ...]] = ((64, 128, 8, 3), (64, 64, 4, 3), (32, 128, 4, 3), (32, 64, 4, 4))
_MANY: Final = (
    Tile(256, 32, 128, 8, 4, tma=True, whole=True),
    Tile(128, 64, 128, 8, 4, tma=True, whole=True),
    Tile(128, 64, 128, 8, 3, whole=True),
    Tile(64, 32, 64, 4, 3, whole=True),
)


def band_of(rows: int) -> int:
    """The band's largest number of rows."""
    return BANDS[min(bisect_left(BANDS, rows), len(BANDS) - 1)]


def candidates(band: int, *, packed: bool, capability: int) -> tuple[Tile, ...]:
    """What may serve this band, the likeliest first; the last is small enough for every card."""
    if band == 1:
        one, deep = (_PACKED_ONE, _PACKED_DEEP) if packed else (_ONE, _DEEP)
        return _tiles(0, one) + _tiles(4, deep)
    if band < BANDS[-1]:
        narrow, middle = (_PACKED_NARROW, _PACKED_MIDDLE) if packed else (_NARROW, _MIDDLE)
        bn, cuts = (band, narrow) if band <= RECORDED else (32, middle)
        return _tiles(bn, cuts)
    return tuple(tile for tile in _MANY if capability >= 90 or not tile.tma)


def _tiles(bn: int, cuts: tuple[_Cut, ...]) -> tuple[Tile, ...]:
    return tuple(Tile(bm, bn, bk, warps, stages) for bm, bk, warps, stages in cuts)


def cutting(block: int) -> Program:
    """Cuts x, so many elements at a time."""
    return Program("cut", (("BLOCK", block),))


def unpacking(block: int) -> Program:
    """Unpacks low parts, so many bytes at a time."""
    return Program("unpack", (("BLOCK", block),))


def multiplying(tile: Tile, *, packed: bool) -> tuple[Program, ...]:
    """What a product by this tile takes, after x was cut; the second program is for the low parts."""
    if tile.bn == 0:
        constants = (("PACKED", packed), ("UNROLL", tile.stages), ("BM", tile.bm), ("BK", tile.bk))
        return (Program("few", constants, tile.warps),)
    sizes = (("BM", tile.bm), ("BN", tile.bn), ("BK", tile.bk), ("GROUP", _GROUP))
    both = packed and tile.whole
    kinds = [(packed and not tile.whole, False)] + [(False, True)] * both
    return tuple(
        Program(
            "stack", (("PACKED", fused), ("ADD", add), ("TMA", tile.tma), *sizes), tile.warps, tile.stages
        )
        for fused, add in kinds
    )
