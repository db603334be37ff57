"""Where groups are split: on the processor by numpy, or on a card by PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.kernels.placing import cards_named
from sliplm.errors import CardError, InputError, SlipWarning
from sliplm.shares import splitting
from sliplm.shares.splitting import GroupSplit

if TYPE_CHECKING:
    import torch

FEW: Final = 1 << 18
"""Weights of a matrix below which "auto" takes the processor: a card would mostly wait for it."""

T = TypeVar("T")


class Splitter:
    """What a split asks for each group, in one process.

    A card holds the group's secrets meanwhile, and is trusted like the processor.

    Args:
        device: "auto" takes the first card if PyTorch has one, and else, or for a group that it cannot split,
            the processor, with a warning where there is a card; "cpu"; "cuda", "cuda:1" insist.

    Raises: InputError for another word; CardError for a named card that is missing.
    """

    def __init__(self, device: str = "auto") -> None:
        named = cards_named(device)
        if named is not None and len(named) > 1:
            raise InputError(f"device {device!r}: a split uses one card; say auto, cpu, cuda or cuda:1")
        self._insists = named is not None
        self._card = None if named == [] else _card(None if named is None else named[0])

    def __repr__(self) -> str:
        return f"Splitter({'cpu' if self._card is None else self._card})"

    def split_group(
        self, name: str, weight: Floats, *, rank: int, precision: int, rotation: str
    ) -> GroupSplit:
        """As `splitting.split_group`; and CardError of a named card that fails or is too small."""

        def there(card: torch.device) -> GroupSplit:
            from sliplm.shares import oncard

            return oncard.split_group(
                name, weight, rank=rank, precision=precision, rotation=rotation, device=card
            )

        def here() -> GroupSplit:
            return splitting.split_group(name, weight, rank=rank, precision=precision, rotation=rotation)

        return self._placed(name, weight, there, here)

    def top_triplets(self, name: str, weight: Floats, rank: int) -> tuple[Floats, Floats]:
        """As `splitting.top_triplets`; and CardError as above."""

        def there(card: torch.device) -> tuple[Floats, Floats]:
            from sliplm.shares import oncard

            return oncard.top_triplets(weight, rank, card)

        return self._placed(name, weight, there, lambda: splitting.top_triplets(weight, rank))

    def squared_values(self, name: str, weight: Floats) -> npt.NDArray[np.float64]:
        """As `splitting.squared_values`; and CardError as above."""

        def there(card: torch.device) -> npt.NDArray[np.float64]:
            from sliplm.shares import oncard

            return oncard.squared_values(weight, card)

        return self._placed(name, weight, there, lambda: splitting.squared_values(weight))

    def _placed(
        self, name: str, weight: Floats, there: Callable[[torch.device], T], here: Callable[[], T]
    ) -> T:
        card = self._card
        if card is None or (weight.size < FEW and not self._insists):
            return here()
        import torch

        try:
            return there(card)
        except torch.OutOfMemoryError:
            said = f"{card} has too little memory free for {name}"
        except (RuntimeError, CardError) as error:  # whatever PyTorch, its libraries and the driver say
            words = str(error).partition("\n")[0] or type(error).__name__
            said = f"{card} failed on {name} ({words})"
            self._card = card if self._insists else None
        if self._insists:
            raise CardError(f"{said}; free it, name another card, or split with device cpu")
        warnings.warn(f"{said}; it is split on the processor", SlipWarning, stacklevel=3)
        torch.cuda.empty_cache()  # not before: an error at hand keeps its tensors
        return here()


def _card(number: int | None) -> torch.device | None:
    """The card of a number; of None, the first if there is one.  Raises CardError."""
    import torch

    if not torch.cuda.is_available():
        if number is None:
            return None
        why = (
            "PyTorch sees no NVIDIA card on this machine"
            if torch.version.cuda
            else f"PyTorch {torch.__version__} is a build without CUDA, so it uses no card: install another"
        )
        raise CardError(f"{why}; or split with device cpu")
    if (number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise CardError(f"there is no card {number}: this process sees {count} (counted from 0)")
    return torch.device("cuda", number or 0)
