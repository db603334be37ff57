"""How good a restored model is, and how good that is against an attacker without a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from scipy.stats import t as student_t
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sliplm.attacks.device import autocast


@dataclass(frozen=True)
class Score:
    """Quality on a held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the next token.
        accuracy: how often the most likely token is the text's next one.
    """

    perplexity: float
    accuracy: float


def score(model: PreTrainedModel, windows: Tensor, batch: int = 8) -> Score:
    """Score a model on windows of tokens, int64 [windows, length]."""
    loss = right = count = 0.0
    for part in torch.split(windows.to(model.device), batch):
        with torch.no_grad(), autocast(model.device):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        wanted = part[:, 1:].flatten()
        loss += cross_entropy(logits, wanted, reduction="sum").item()
        right += (logits.argmax(-1) == wanted).sum().item()
        count += len(wanted)
    average = loss / count
    return Score(math.exp(average) if average < 700 else math.inf, right / count)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; without spread to go by, low and high are the mean."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean over seeds."""
    centre = mean(values)
    if len(values) < 2:
        return Interval(centre, centre, centre)
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(centre, centre - half, centre + half)


def relative(restored: Sequence[float], black: Sequence[float]) -> Interval:
    """Rel.Black: mean accuracy restored over mean accuracy of the black-box line; its interval is by the
    delta method (both lines' seeds are independent), and only the mean where one of them has one seed.
    """
    top, bottom = interval(restored), interval(black)
    if not bottom.mean:
        return Interval(math.inf, math.inf, math.inf)
    ratio = top.mean / bottom.mean
    if min(len(restored), len(black)) < 2:
        return Interval(ratio, ratio, ratio)
    spread = math.hypot(
        (top.high - top.mean) / max(top.mean, 1e-12), (bottom.high - bottom.mean) / bottom.mean
    )
    return Interval(ratio, ratio * (1 - spread), ratio * (1 + spread))
