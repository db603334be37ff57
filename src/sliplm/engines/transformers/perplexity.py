"""Perplexity of a causal language model on a text, and how far one model's answers are from another's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sliplm.errors import InputError


def perplexity(model: PreTrainedModel, tokens: Tensor, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its window.

    The text is cut into windows that do not overlap, and each is read alone: comparable between models that
    share a tokenizer, and a little above what a sliding context would give.

    Args:
        model: a causal language model, split or not.
        tokens: int64 [count].
        window: tokens read at once, at least 2; a last window of a single token is left out.

    Raises:
        InputError: there is no token to predict.
    """
    if tokens.ndim != 1 or len(tokens) < 2 or window < 2:
        raise InputError(f"perplexity takes tokens [count], two at least, and not {list(tokens.shape)}")
    loss, count = 0.0, 0
    for part in torch.split(tokens, window):
        if len(part) < 2:
            continue
        with torch.inference_mode():
            logits = model(input_ids=part[None], use_cache=False).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits.float(), part[1:], reduction="sum").item()
        count += len(part) - 1
    mean = loss / count
    return math.exp(mean) if mean < 700 else math.inf  # beyond what a float holds


def divergence(model: PreTrainedModel, original: PreTrainedModel, tokens: Tensor, window: int = 512) -> float:
    """Mean Kullback-Leibler divergence per token of a model's next-token distribution from the original's.

    What a cut, rounded or split model loses, in nats.  The text is cut into windows as for `perplexity`.

    Args:
        model, original: causal language models with one vocabulary, split or not.
        tokens: int64 [count].
        window: tokens read at once.

    Raises:
        InputError: there is no token.
    """
    if tokens.ndim != 1 or not len(tokens) or window < 1:
        raise InputError(f"divergence takes tokens [count], one at least, and not {list(tokens.shape)}")
    total = 0.0
    for part in torch.split(tokens, window):
        with torch.inference_mode():
            found, truth = (
                torch.log_softmax(m(input_ids=part[None], use_cache=False).logits[0].double(), -1)
                for m in (model, original)
            )
            total += float(torch.nn.functional.kl_div(found, truth, log_target=True, reduction="sum"))
    return total / len(tokens)
