"""How many masks a number of tokens takes, where a group sees a part of them: an expert of a mixture.

A pool cannot know which experts a router will choose.  So each expert gets the rows that are expected, and a
reserve for chance and for routers that favour some:

    u'    part of the tokens that it is dealt for: twice what it would see if all saw as many, and what it has
          in fact seen once the pool has served tokens (256 tokens count as much as the guess)
    rows  N u' + 4 sqrt(N u' (1 - u')), at most N: four standard deviations for N independent tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

RESERVE: Final = 2.0  # times the even share: what an expert is dealt for while nothing is known of it
DEVIATIONS: Final = 4.0
_PRIOR: Final = 256.0  # tokens that the guess counts for


def rows_for(tokens: int, use: float) -> int:
    """Rows that so many tokens take of a group that sees the part `use` of them, chance included."""
    if use >= 1.0:
        return tokens
    mean = tokens * use
    return min(tokens, math.ceil(mean + DEVIATIONS * math.sqrt(mean * (1.0 - use))))


def tokens_for(rows: int, use: float) -> int:
    """The most tokens for which `rows_for` asks for no more than these rows."""
    if use >= 1.0:
        return rows
    least, most = rows, math.ceil((rows + 1) / use)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if rows_for(middle, use) <= rows else (least, middle - 1)
    return least


def planned(uses: Sequence[float], burnt: Sequence[int]) -> list[float]:
    """For what part of the tokens each group is dealt.

    Args:
        uses: what part each would see if all experts saw as many; 1 for a group that sees all.
        burnt: rows of each that were ever used.
    """
    served = sum(burnt) / sum(uses)
    return [
        1.0 if use >= 1.0 else min(1.0, (seen + _PRIOR * min(1.0, RESERVE * use)) / (served + _PRIOR))
        for use, seen in zip(uses, burnt, strict=True)
    ]
