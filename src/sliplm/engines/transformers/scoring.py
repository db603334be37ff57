"""How likely a text is to a model, token by token: what `echo` with `logprobs` asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel

from sliplm.engines.transformers.drawing import Token, told

_ROWS: Final = 128  # logits of so many tokens are in memory at a time


def score(
    model: PreTrainedModel,
    prompt: Sequence[int],
    top: int,
    adapter: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Token]:
    """Every token of a prompt but the first, with its probability after those before it.

    Any thread may call it; a model that answers others in a `Batch` lends itself by that one's `turn`.

    Args:
        prompt: token ids, at least one.
        top: how many of the likeliest tokens are told with each.
        stop: asked now and then whether anybody still wants it; what is known by then is returned.
        turn: in whose block nobody else computes with the model; one for each part of the prompt.

    Raises: what a product raises.
    """
    slip: Any = getattr(model, "slip", None)
    cache, found = DynamicCache(config=model.config), []
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode(), nullcontext() if slip is None else slip.adapter(adapter):
        for first in range(0, len(prompt) - 1, _ROWS):
            if stop():
                break
            part = ids[:, first : min(first + _ROWS, len(prompt) - 1)]
            with turn():
                logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0].float()
            found += [told(row, prompt[first + i + 1], top) for i, row in enumerate(logits)]
    return found
