"""Where a share's matrices are multiplied: on this machine's processor, or on its cards."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Final

from sliplm.arithmetic import kernels
from sliplm.arithmetic.kernels.cuda import driver, layout
from sliplm.arithmetic.kernels.cuda.card import Card, card
from sliplm.arithmetic.kernels.cuda.matrix import CudaMatrix
from sliplm.arithmetic.kernels.cuda.tiles import Tile
from sliplm.arithmetic.kernels.cuda.tuning import Tuning
from sliplm.errors import CardError, InputError

MAX_CARDS: Final = 64
_SPARE: Final = 256 << 20  # bytes of each card for programs, and for what allocations are rounded up to
_CARD: Final = re.compile(r"cuda(?::(\d{1,2}))?")

logger = logging.getLogger(__name__)


def cards_named(device: str) -> list[int] | None:
    """The cards that a user's word names: None for "auto", none for "cpu", the first for "cuda".

    Raises InputError for any other word than these, "cuda:1" or "cuda:1,cuda:2", and for a card named twice.
    """
    if device == "auto":
        return None
    if device == "cpu":
        return []
    found = [_CARD.fullmatch(word.strip()) for word in device.split(",")]
    numbers = [int(match[1] or 0) for match in found if match is not None]
    if len(numbers) != len(found) or len(set(numbers)) != len(numbers) or max(numbers) >= MAX_CARDS:
        raise InputError(
            f"device {device!r} is none: say auto, cpu, cuda, cuda:1, or several cards as cuda:0,cuda:1"
        )
    return numbers


def lay_out(
    matrices: Sequence[kernels.Integers],
    device: str = "auto",
    threads: int | None = None,
) -> list[kernels.Matrix]:
    """Every matrix in the layout of the kernel that will multiply with it.

    Args:
        matrices: int8 or int16 [m, n] each, |w| <= 2047.
        device: "auto" takes the first card if there is one on which everything fits and is exact, and else
            warns and takes the processor; "cpu"; or the cards, as `cards_named`.
        threads: cores that one product on the processor may use; None for all.

    Raises: InputError for an unknown device; CardError for a named card that is missing, wrong or too small;
        KernelError as `kernels.prepare`.
    """
    named = cards_named(device)
    try:
        if named is None and driver.count():
            return _on_cards(matrices, [0])
    except CardError as error:
        logger.warning("the products are computed on the processor, not on the card: %s", error)
    if named:
        return _on_cards(matrices, named)
    return [kernels.prepare(w, threads=threads) for w in matrices]


def _on_cards(matrices: Sequence[kernels.Integers], numbers: Sequence[int]) -> list[kernels.Matrix]:
    cards = [card(number) for number in numbers]
    free = []
    for each in cards:
        with each.entered():
            free.append(each.device.free())
    sizes = [layout.size_of((w.shape[0], w.shape[1]), packed=layout.is_packed(w)) for w in matrices]
    unpacked = max(
        (2 * size // 3 for size, w in zip(sizes, matrices, strict=True) if layout.is_packed(w)), default=0
    )
    places = spread(sizes, [memory - unpacked - _SPARE for memory in free])
    logger.info("laying out %d matrices on %s", len(matrices), ", ".join(each.device.name for each in cards))
    tunings = [Tuning(each, partial(_by_one_tile, each)) for each in cards]
    laid = [CudaMatrix(cards[place], w, tunings[place]) for w, place in zip(matrices, places, strict=True)]
    for tuning in tunings:
        tuning.keep()
    return list(laid)


def _by_one_tile(card: Card, w: kernels.Integers, tile: Tile) -> kernels.Matrix:
    """A matrix that is multiplied by this tile whatever the rows."""
    return CudaMatrix(card, w, lambda matrix, band: tile)


def spread(sizes: Sequence[int], free: Sequence[int]) -> list[int]:
    """On which card each matrix goes: where most memory is left then.  Raises CardError if one fits nowhere.

    Args:
        sizes: bytes of each matrix; free: bytes of each card.
    """
    left, places = list(free), []
    for size in sizes:
        place = max(range(len(left)), key=lambda k: left[k])
        left[place] -= size
        if left[place] < 0:
            raise CardError(
                f"the share needs {sum(sizes) / 1e9:.1f} GB of the cards' memory and "
                f"{max(sum(free), 0) / 1e9:.1f} GB are free: name more cards, as in cuda:0,cuda:1, or cpu"
            )
        places.append(place)
    return places
