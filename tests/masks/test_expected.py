"""How many masks an expert of a mixture is dealt: enough for what it is expected to see, and for chance."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sliplm.masks.expected import planned, rows_for, tokens_for

uses = st.floats(1e-3, 1.0)


@given(st.integers(0, 10**7), uses)
def test_rows_and_tokens_are_each_others_answer(count: int, use: float) -> None:
    assert rows_for(count, use) <= count
    served = tokens_for(count, use)
    assert served >= count
    assert rows_for(served, use) <= count < rows_for(served + 1, use)


@given(st.integers(1, 10**6), st.integers(1, 10**6), uses)
def test_more_tokens_never_take_less(one: int, other: int, use: float) -> None:
    few, many = sorted((one, other))
    assert rows_for(few, use) <= rows_for(many, use)
    assert rows_for(few, use) <= rows_for(few, min(1.0, use + 0.1))


def test_chance_is_covered() -> None:
    """An expert that sees a token with the probability u does not run out: 4 deviations, 10^5 tries each."""
    random = np.random.default_rng(1)
    for tokens, use in ((64, 1 / 16), (1000, 1 / 32), (10_000, 0.5)):
        seen = random.binomial(tokens, use, 100_000)
        assert np.mean(seen > rows_for(tokens, use)) < 1e-3


def test_what_was_seen_takes_the_place_of_the_guess() -> None:
    even = [1.0, 0.25, 0.25, 0.25, 0.25]
    assert planned(even, [0] * 5) == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert planned([0.9], [0]) == [1.0]
    after = planned(even, [100_000, 60_000, 20_000, 20_000, 0])
    assert after[0] == 1.0
    for found, wanted in zip(after[1:], (0.6, 0.2, 0.2, 0.0), strict=True):
        assert abs(found - wanted) < 0.01
    only_experts = planned(even[1:], [60_000, 20_000, 20_000, 0])
    assert np.allclose(only_experts, after[1:], atol=0.01)
