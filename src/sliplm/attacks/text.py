"""The text of a campaign, cut into windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sliplm.errors import InputError


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
