"""A group's secrets in a card's memory, as the vault's programs take them.

Laid         they, and which program is whose
forth, back  a rotation with its diagonal: three gathers, each with its factors
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Card
from sliplm.arithmetic.kernels.cuda.tiles import Program
from sliplm.arithmetic.rotation import Fast, Identity, Rotation
from sliplm.errors import CardError

PIECE: Final = 2048  # entries of an answer that a block of `check` takes
OUTPUTS: Final = 256  # that a block of `low_rank` takes
_BLOCK: Final = 4096  # entries of a row that a block takes at a time
_AT_ONCE: Final = 8192  # entries of a tile of Hadamard blocks
_FEW: Final = 16  # outputs below which one may be small by chance


class Laid:
    """A group's secrets in a card's memory.

    Args:
        a, b: the kept part, float32 [m, k] and [k, n].  scale: s, float32 [m].
        limit, noise: of alpha times a row's norm; of rounding in an answer, times alpha.

    Raises: CardError where a rotation has no program, or the card is full.
    """

    def __init__(
        self, card: Card, rotation_in: Rotation, rotation_out: Rotation, d_in: Floats, scale: Floats,
        a: Floats, b: Floats, limit: float, noise: float,
    ) -> None:  # fmt: skip
        there, home = forth(rotation_in), back(rotation_out)
        self.card, self.n, self.m, self.rank = card, rotation_in.n, rotation_out.n, len(b)
        self.sizes_in, self.sizes_out = there.sizes, home.sizes
        self.aligned = self.n % 16 == 0 and self.m % 16 == 0
        self._held: list[driver.Memory] = []
        with card.entered():
            self.orders_in, self.factors_in = self.put(there.orders), self.put(there.factors)
            self.orders_out, self.factors_out = self.put(home.orders), self.put(home.factors)
            self.scale = self.put(scale.astype(np.float64)[home.orders[0]])
            self.numbers = self.put(np.array([limit, noise], np.float64))
            self.d_in, self.a, self.b = self.put(d_in), self.put(a.T), self.put(b)

    def __repr__(self) -> str:
        return f"Laid({self.m} x {self.n} on {self.card!r}, hidden)"

    def put(self, array: npt.NDArray[np.generic]) -> int:
        """Its address in the card's memory, as long as this object lives; for who has entered the card."""
        array = np.ascontiguousarray(array)
        memory = driver.Memory(max(16, array.nbytes))
        memory.write(0, array)
        self._held.append(memory)
        return memory.address

    def program(self, step: str, kind: int, many: int, rank: int) -> Program:
        """The program of a step for this group.

        Args:
            kind: of the activations; of `low_rank` whether it adds.  many: rows of a block.
        """
        several = ("R", many)
        if step == "ask":
            constants = (*self.sizes_in.constants(kind), ("BLOCK", _BLOCK))
            return Program(step, constants, _warps(self.sizes_in))
        if step == "opened":
            first, second, *others = self.sizes_out.constants(kind)
            constants = (first, second, ("FEW", self.m < _FEW), *others, ("BLOCK", _BLOCK))
            return Program(step, constants, _warps(self.sizes_out))
        if step == "expect":
            return Program(step, (("KIND", kind), ("N", self.n), ("BLOCK", _BLOCK)), 8)
        if step == "project":
            block = ("BLOCK", 512 if many > 1 else 2048)
            return Program(step, (("KIND", kind), ("N", self.n), several, block), 8)
        if step == "low_rank":
            return Program(step, (("ADD", kind), ("RANK", rank), several, ("BLOCK", OUTPUTS)), 4)
        return Program(step, (("BLOCK", PIECE),), 8)


class Sizes(NamedTuple):
    """What of a rotation a program is compiled for."""

    fast: bool
    n: int
    block: int

    def constants(self, kind: int) -> tuple[tuple[str, int], ...]:
        """In the programs' order, but for BLOCK."""
        wide = max(1, min(_AT_ONCE // self.block, 1 << (max(1, self.n // self.block) - 1).bit_length()))
        levels = self.block.bit_length() - 1
        return (("KIND", kind), ("FAST", self.fast), ("N", self.n), ("H", self.block), ("LEVELS", levels),
                ("W", wide))  # fmt: skip


class Turned(NamedTuple):
    """A rotation with its diagonal, one way, as the programs take it.

    Attributes:
        orders, factors: int32 and float32 [4, n]: of each secret layer where an entry comes from and what it
            is multiplied by; the one in the middle has two.
    """

    sizes: Sizes
    orders: npt.NDArray[np.int32]
    factors: Floats

    def __repr__(self) -> str:
        return f"Turned({self.sizes.n}, hidden)"


def forth(rotation: Rotation) -> Turned:
    """Q D.  Raises CardError for a rotation that has no program."""
    if isinstance(rotation, Identity):
        return _identity(rotation)
    order, signs, _, _, turns, distance, block = _tables(rotation)
    partner, own, other = _pairs(turns, distance, rotation.n)
    orders = np.stack([order[0], order[1], order[1][partner], order[2]])
    factors = np.stack([signs[0], own * signs[1], other * signs[1][partner], signs[2]])
    return Turned(Sizes(True, rotation.n, block), orders, factors.astype(np.float32))


def back(rotation: Rotation) -> Turned:
    """D Q^T.  Raises CardError for a rotation that has no program."""
    if isinstance(rotation, Identity):
        return _identity(rotation)
    _, _, inverse, signs, turns, distance, block = _tables(rotation)
    partner, own, other = _pairs(turns[[0, 2, 1, 3]], distance, rotation.n)
    middle = inverse[1]
    orders = np.stack([inverse[2], middle, partner[middle], inverse[0]])
    factors = np.stack([signs[2], signs[1] * own[middle], signs[1] * other[middle], signs[0]])
    return Turned(Sizes(True, rotation.n, block), orders.astype(np.int32), factors.astype(np.float32))


# --- their parts -----------------------------------------------------------------------------------------


def _tables(rotation: Rotation) -> tuple[npt.NDArray[np.int32], Floats, npt.NDArray[np.int32], Floats,
                                         Floats, int, int]:  # fmt: skip
    if not isinstance(rotation, Fast):
        raise CardError("rotations of kind haar are turned on the processor only")
    return rotation.tables


def _identity(rotation: Identity) -> Turned:
    n = rotation.n
    orders = np.zeros((4, n), np.int32)
    orders[0] = np.arange(n)
    factors = np.zeros((4, n), np.float32)
    factors[0] = rotation.diagonal
    return Turned(Sizes(False, n, 1), orders, factors)


def _pairs(turns: Floats, distance: int, n: int) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Of each coordinate that the plane rotations turn: its partner, its own factor and the partner's."""
    half = n // 2
    partner, own, other = np.arange(n), np.ones(n, np.float32), np.zeros(n, np.float32)
    first = np.arange(half)
    second = np.where(first + distance < 2 * half, first + distance, first + distance - half)
    partner[first], partner[second] = second, first
    own[first], other[first], other[second], own[second] = turns
    return partner, own, other


def _warps(sizes: Sizes) -> int:
    return 16 if sizes.n > _BLOCK // 2 else 4
