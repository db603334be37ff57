"""The next token of each request of a batch: greedy or drawn, each with a generator of its own.

A request's tokens depend on its own logits and its own seed, and on nobody's beside it in the batch.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

GREEDY: Final = 1e-3
"""Temperatures below it draw what the likeliest token is, but for rounding: they are taken as 0."""


class Token(NamedTuple):
    """A token, the natural logarithm of its probability, and the likeliest ones with theirs, likeliest first.

    Probabilities are the model's own, before temperature and top_p.  `logprob` is NaN where nobody asked.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Drawing:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: of the likeliest tokens so many that their probabilities sum up to it, and no others.
        seed: equal seeds draw equal tokens from equal logits; None draws one.
        top: how many of the likeliest tokens are told with each; None tells no probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top: int | None = None
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.manual_seed(secrets.randbits(63) if self.seed is None else self.seed % 2**63)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing told but the token."""
        return self.temperature < GREEDY and self.top is None

    def next(self, logits: Tensor) -> Token:
        """The next token.

        Args:
            logits: float32 [vocabulary].
        """
        number = int(logits.argmax()) if self.temperature < GREEDY else self._drawn(logits)
        return Token(number, float("nan"), ()) if self.top is None else told(logits, number, self.top)

    def _drawn(self, logits: Tensor) -> int:
        chances = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1.0:
            sizes, order = chances.sort(descending=True)
            kept = sizes.cumsum(-1) - sizes < self.top_p
            kept[0] = True  # however small top_p is as a float32
            return int(order[torch.multinomial(sizes * kept, 1, generator=self.generator)])
        return int(torch.multinomial(chances, 1, generator=self.generator))


def told(logits: Tensor, number: int, top: int) -> Token:
    """A token with its probability, and those of the `top` likeliest.

    Args:
        logits: float32 [vocabulary].
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Token(number, float(logprobs[number]), tuple(pairs))
