"""What a split model does beyond its class: an adapter by the call, and plain words for what it cannot.

model.generate(..., adapter="fr")
model(..., adapter="fr")
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from sliplm.engines.modules import Closeable, derive
from sliplm.errors import InputError, SlipError

_UNSAID: Any = object()


def make_hybrid(model: PreTrainedModel) -> None:
    """Give a model that has its `slip` a class of its own, of the same name."""
    kind: Any = type(model)
    members = {"forward": _settling(_choosing(kind.forward))}
    if kind.can_generate():
        members["generate"] = _choosing(kind.generate)
    derive(model, _Hybrid, members)


def _choosing(method: Any) -> Any:
    """The method with an argument more, `adapter`: None or "base" for none, unsaid for what is chosen."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, adapter: str | None = _UNSAID, **kwargs: Any) -> Any:
        with self._adapter(adapter):
            return method(self, *args, **kwargs)

    return call


def _settling(method: Any) -> Any:
    """The method, after which no product on a card is left whose rounding nobody has judged."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            answer = method(self, *args, **kwargs)
        except BaseException:
            with contextlib.suppress(SlipError):  # the first error says more
                self.slip.settle()
            raise
        self.slip.settle()
        return answer

    return call


class _Hybrid(Closeable):
    """Before a model's own class."""

    def _adapter(self, name: str | None) -> AbstractContextManager[None]:
        return nullcontext() if name is _UNSAID else self.slip.adapter(name)

    def half(self) -> Self:
        """Cast what the vault computes itself; products stay in float32."""
        return self._cast(torch.float16)

    def float(self) -> Self:
        """Cast what the vault computes itself."""
        return self._cast(torch.float32)

    def _cast(self, dtype: torch.dtype) -> Self:
        module: Any = self
        nn.Module.to(module, dtype)
        return self

    def train(self, mode: bool = True) -> Self:
        """Refuse training: no party has the weights.

        Raises:
            InputError: mode is True.
        """
        if mode:
            raise InputError(
                "a split model cannot be trained, only evaluated: train the original, or an adapter to it, "
                "and split again"
            )
        module: Any = self
        nn.Module.train(module, mode)
        return self

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the embedding where the number of tokens is the model's.

        Raises:
            InputError: another number is asked for.
        """
        embedding = self.get_input_embeddings()  # type: ignore[attr-defined]
        multiple = args[0] if args else kwargs.get("pad_to_multiple_of")
        if new_num_tokens not in (None, embedding.num_embeddings) or multiple is not None:
            raise InputError(
                f"a split model keeps its {embedding.num_embeddings} tokens: call resize_token_embeddings "
                "on the original, save it and split again"
            )
        return embedding
