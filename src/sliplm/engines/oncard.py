"""A split layer's product where its input lies on a card: by the vault's programs there, or, where the source
or the group has none (a Haar basis; the reference in one process), on the processor with a copy each way.
"""

from __future__ import annotations

import threading
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from sliplm.arithmetic.kernels.cuda.card import Card, card
from sliplm.arithmetic.kernels.cuda.vault_steps import CardRows
from sliplm.parties.adapters import Chosen, chosen

_KINDS: Final = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class CardProducts(Protocol):
    """Who multiplies what lies on a card: the vault."""

    @property
    def pads_to(self) -> int:
        """Of how many the rows of a message are a multiple."""

    def works_on_card(self, group: str, card: Card) -> bool:
        """As `Vault.works_on_card`."""

    def product_on_card(self, group: str, x: CardRows, out: CardRows) -> None:
        """As `Vault.product_on_card`."""


class Held(threading.local):
    """This thread's product at hand: its input, what of the input is told from outside, and who waits."""

    x: Tensor | None = None
    version: int = 0
    adapter: Chosen | None = None
    waiting: int = 0
    product: Tensor | None = None


class OnCard:
    """One group's product for inputs on cards, computed once per input and handed out once to each member.

    An input is recognised as the very tensor without a write that PyTorch has counted.  (Its numbers are not
    compared, as they are on the processor: the host would wait for the card.)
    """

    def __init__(self, name: str, members: int) -> None:
        self._name, self._everyone = name, (1 << members) - 1
        self._held = Held()
        self._programs: bool | None = None  # whether the source has some for this group

    def product(self, source: Any, index: int, x: Tensor, rows: int) -> Tensor:
        """W x for all members, [rows of x, rows]: in x's type, or float32 for float64.

        Args:
            x: floating point [..., n] on a card.  rows: of all members.

        Raises: as `Vault.product`.
        """
        held, bit = self._held, 1 << index
        if self._everyone == bit:
            return self._compute(source, x, rows)
        product, held.product = held.product, None  # an error must leave nothing behind
        if not (
            product is not None
            and held.waiting & bit
            and held.x is x
            and held.version == _version(x)
            and held.adapter is chosen()
        ):
            held.x, held.version, held.adapter, held.waiting = x, _version(x), chosen(), self._everyone
            product = self._compute(source, x, rows)
        held.waiting ^= bit
        if held.waiting:
            held.product = product
        else:
            held.x = None
        return product

    def _compute(self, source: Any, x: Tensor, rows: int) -> Tensor:
        values = x.detach().reshape(-1, x.shape[-1])
        if values.dtype not in _KINDS:
            values = values.to(torch.float32)
        if self._programs is None:
            here = card(values.get_device())
            self._programs = hasattr(source, "works_on_card") and source.works_on_card(self._name, here)
        if self._programs:
            return self._by_programs(source, values, rows)
        host: np.ndarray[Any, Any] = values.to("cpu", torch.float32).numpy()
        y = torch.from_numpy(source.product(self._name, host))
        return y.to(x.device, values.dtype)

    def _by_programs(self, source: CardProducts, values: Tensor, rows: int) -> Tensor:
        count = len(values)
        if count > 1 and (missing := -count % source.pads_to):
            values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        values = values.contiguous()
        out = values.new_empty((len(values), rows))
        device: int = values.get_device()
        at, stream = card(device), _stream(device)
        kind = _KINDS[values.dtype]
        source.product_on_card(
            self._name,
            CardRows(at, stream, values.data_ptr(), len(values), values.shape[1], kind),
            CardRows(at, stream, out.data_ptr(), len(values), rows, kind),
        )
        return out[:count]


def _version(x: Tensor) -> int:
    """How often x was written to; 0 where PyTorch does not count."""
    return 0 if x.is_inference() else x._version


def _stream(device: int) -> int:
    """PyTorch's current stream, as the driver knows it."""
    found: int = torch._C._cuda_getCurrentRawStream(device)
    return found
