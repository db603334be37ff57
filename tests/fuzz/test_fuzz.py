"""Every fuzz target: its seeds, its corpus, and some mutations of them.  `run.py` goes on for longer."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import Ledger, size
from run import TARGETS, seeds

Edit = tuple[int, int, bytes]


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """The data with pieces cut out and others put in."""
    for place, cut, put in edits:
        at = place % (len(data) + 1)
        data = data[:at] + put + data[at + cut :]
    return data


edit = st.tuples(st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=8))


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str, ledger: Ledger) -> None:
    """Only SlipError, as each target states; one that it does not expect fails here."""
    target: Callable[[bytes], None] = importlib.import_module(f"fuzz_{name}").target
    known = seeds(name)
    tries = unexpected = 0

    def attempt(data: bytes) -> None:
        nonlocal tries, unexpected
        tries += 1
        unexpected += 1
        target(data)
        unexpected -= 1

    @settings(max_examples=size(150, 5000))
    @given(st.sampled_from(range(len(known))), st.lists(edit, max_size=4), st.binary(max_size=64))
    def mutations(number: int, edits: list[Edit], end: bytes) -> None:
        attempt(edited(known[number], edits) + end)

    try:
        for data in known:
            attempt(data)
        mutations()
    finally:
        note = "seeds, corpus and mutations: only typed errors come out"
        ledger.record(f"any bytes: {name}", tries, tries - unexpected, unexpected, note)
