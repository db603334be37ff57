"""Finds two messages under one mask in a worker's log."""

from __future__ import annotations

import numpy as np

from sliplm.arithmetic.field import Elements, P
from sliplm.arithmetic.fixedpoint import scale_limit


def bound(norm: float, n: int) -> int:
    """The largest entry that x_int can have in a group: |alpha z_j| <= alpha ||z||, and the rounding."""
    return int(scale_limit(norm, n)) + 1


def reused(messages: Elements, largest: int) -> list[tuple[int, int]]:
    """Pairs (i, j) of *different* messages, uint32 [rows, n], that differ by two inputs: |x_i - x_j| <= 2
    `largest` in every coordinate.

    Independent masks come that near with probability (4 largest / p)^n a pair.  Candidates are neighbours in
    the first coordinate.
    """
    window = 2 * largest
    first = messages[:, 0].astype(np.int64)
    order = np.argsort(first, kind="stable")
    ring = np.concatenate([first[order], first[order] + P])  # the field is a circle
    found = []
    for place, i in enumerate(order):
        for near in range(
            place + 1, place + int(np.searchsorted(ring[place:], ring[place] + window, "right"))
        ):
            j = order[near % len(order)]
            if i == j:
                break
            difference = (messages[i].astype(np.int64) - messages[j].astype(np.int64)) % P
            distance = np.minimum(difference, P - difference)
            if distance.max() <= window and distance.any():
                found.append((int(i), int(j)))
    return found
