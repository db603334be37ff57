"""The text of a campaign, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sliplm.errors import InputError

_PART = 1 << 20  # characters: whole books at once take a hundred times their size, and one core


@dataclass(frozen=True)
class Text:
    """Windows of tokens, int64 [windows, length], that have no window in common.

    Attributes:
        train: what the attacker asks and trains on.  valid: for his searches.  test: for the tables.
    """

    train: Tensor
    valid: Tensor
    test: Tensor

    @classmethod
    def of(cls, tokens: Tensor, window: int, held_out: int) -> Text:
        """Cut tokens [count] into windows; the last `held_out` are the test's, as many before them the
        validation's.

        Raises:
            InputError: the text is too short to train on.
        """
        windows = tokens[: len(tokens) // window * window].reshape(-1, window)
        if len(windows) < 4 * held_out:
            raise InputError(
                f"the text has {len(tokens)} tokens; an attack wants {4 * held_out * window} at least: "
                "give a longer text"
            )
        return cls(windows[: -2 * held_out], windows[-2 * held_out : -held_out], windows[-held_out:])


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The text's tokens, int64 [tokens], without special ones; parts of whole lines on all cores."""
    found = tokenizer(list(_parts(text)) or [""], add_special_tokens=False)["input_ids"]
    return torch.cat([torch.tensor(part, dtype=torch.int64) for part in found])


def _parts(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PART) + 1 or len(text)
        yield text[start:end]
        start = end
