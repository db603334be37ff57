"""The products of a vault, as one operation that torch.compile does not look into.

What a layer raises would end vLLM's engine, and with it every request.  So nothing is raised here: rows that
cannot be had are NaN, in this layer and, since nothing is asked for such rows, in all that follow.  Their
requests end with an error (`scheduling`).
"""

from __future__ import annotations

import itertools
import logging
import weakref
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available

from sliplm.errors import PrecisionError, SlipError

if TYPE_CHECKING:  # it loads numba, and vLLM's workers do not start where that is loaded
    from sliplm.parties.vault import Vault

Floats = NDArray[np.float32]

logger = logging.getLogger(__name__)

_known: Final[weakref.WeakValueDictionary[int, Products]] = weakref.WeakValueDictionary()
_numbers: Final = itertools.count()


class Products:
    """Whoever multiplies for one model.

    vLLM tries a model out on thousands of rows of dummies, to see what memory it takes, before it serves.
    They are answered with zeros: no exchange, and no mask is burnt for them.

    Attributes:
        number: by which the operation finds it.
        vault: set once the model is loaded.
    """

    vault: Vault

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._dummies = True
        self._lost = ""
        self._held: tuple[str, Floats, Floats] | None = None
        _known[self.number] = self

    def of(self, group: str, x: Tensor, rows: int, several: bool) -> Tensor:
        """W x for each row, without bias: [..., n] -> [..., m] in x's type, computed in float32 (SPEC steps 1
        to 5).  Rows that are not finite, and those whose product cannot be had, are NaN.

        Args:
            several: more than one layer asks for it, with equal inputs: the second is handed what the first
                was.
        """
        if is_forward_context_available():  # the head's products come after it, and belong to what came last
            self._dummies = get_forward_context().attn_metadata is None
        shape = (*x.shape[:-1], rows)
        if self._dummies or 0 in shape:
            return x.new_zeros(shape)
        values: Floats = x.to(torch.float32).contiguous().numpy().reshape(-1, x.shape[-1])
        if several and (held := self._held) and held[0] == group and np.array_equal(held[1], values):
            return torch.from_numpy(held[2]).reshape(shape).to(x.dtype, copy=True)
        sound = np.isfinite(values).all(axis=1)
        if sound.all():
            y = self._ask(group, values, rows)
        else:
            y = np.full((len(values), rows), np.nan, np.float32)
            if sound.any():
                y[sound] = self._ask(group, values[sound], rows)
        self._held = (group, values.copy(), y.copy()) if several else None
        return torch.from_numpy(y).reshape(shape).to(x.dtype)

    def _ask(self, group: str, x: Floats, rows: int) -> Floats:
        """The product; a row that cannot be computed is found by halves, and alone is NaN."""
        try:
            y = self.vault.product(group, x)
        except PrecisionError as error:
            if len(x) > 1:
                half = len(x) // 2
                return np.concatenate([self._ask(group, x[:half], rows), self._ask(group, x[half:], rows)])
            self._lose(group, str(error))
        except SlipError as error:
            self._lose(group, str(error))
        except Exception:
            logger.exception("requests fail, at group %s", group)
        else:
            self._lost = ""
            return y
        return np.full((len(x), rows), np.nan, np.float32)

    def _lose(self, group: str, why: str) -> None:
        """Say so, once as long as it lasts."""
        if why != self._lost:
            logger.error("requests fail, at group %s: %s", group, why)
        self._lost = why


def _product(x: Tensor, number: int, group: str, rows: int, several: bool) -> Tensor:
    return _known[number].of(group, x, rows, several)


def _shape(x: Tensor, number: int, group: str, rows: int, several: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


torch.library.define("sliplm::product", "(Tensor x, int number, str group, int rows, bool several) -> Tensor")
torch.library.impl("sliplm::product", "cpu", _product)
torch.library.register_fake("sliplm::product", _shape)

product: Final = torch.ops.sliplm.product
