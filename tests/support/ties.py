"""Comparing greedy texts of two models whose logits differ by rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

TIE = 0.05
"""Every split draws fresh rotations, so its rounding differs a little: it may turn over the order of two
tokens whose logits, in the original, lie closer than this. At 12 bits it moves a logit of SmolLM2 by 0.013
(root mean square), so the difference of two rarely by three times as much. What comes after has nothing in
common."""


@torch.inference_mode()
def same_up_to_ties(
    plain: PreTrainedModel, prompt: torch.Tensor, mine: Sequence[int], theirs: Sequence[int]
) -> bool:
    """Whether the greedy continuation `mine` of `prompt` [1, tokens] equals the original's, `theirs`, or
    leaves it where the original itself hardly prefers its own token.
    """
    length = min(len(mine), len(theirs))
    first = next((i for i in range(length) if mine[i] != theirs[i]), None)
    if first is None:
        return len(mine) == len(theirs)
    so_far = torch.cat([prompt, torch.tensor([theirs[:first]], dtype=prompt.dtype)], dim=1)
    logits = plain(so_far).logits[0, -1]
    return float(logits[theirs[first]] - logits[mine[first]]) < TIE
