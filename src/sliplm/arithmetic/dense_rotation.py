"""The secret rotations of `rotation` for many rows on a card, by PyTorch, and how even they are.

The same operations in the same order, in float32; the tables come from the key on the processor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sliplm.arithmetic.dense import AT_ONCE, Vector, given, slices, taken
from sliplm.arithmetic.likely import Moments
from sliplm.arithmetic.rotation import Fast, Haar, make


class Tables(NamedTuple):
    """`rotation.Tables` on a device; `other` is the second coordinate of each pair of G."""

    order: Tensor
    signs: Tensor
    order_back: Tensor
    signs_back: Tensor
    turns: Tensor
    other: Tensor
    block: int


def tables(turn: Fast, device: torch.device) -> Tables:
    """Those of a fast rotation."""
    order, signs, back, signs_back, turns, distance, block = turn.tables
    half = turn.n // 2
    other = np.arange(half) + distance
    other[other >= 2 * half] -= half
    return Tables(
        taken(order, device, torch.int64),
        taken(signs, device),
        taken(back, device, torch.int64),
        taken(signs_back, device),
        taken(turns, device),
        taken(other, device, torch.int64),
        block,
    )


def rotated(x: Tensor, kind: str, key_out: bytes, key_in: bytes) -> Tensor:
    """Q_out X Q_in^T (SPEC split step 2): float32 [m, n], contiguous; x is spent."""
    m, n = x.shape
    rotate_rows(x, kind, key_in, n)
    turned = x.T.contiguous()
    del x
    rotate_rows(turned, kind, key_out, m)
    return turned.T.contiguous()


def rotate_rows(x: Tensor, kind: str, key: bytes, n: int) -> None:
    """Q v in the place of each row v of x."""
    turn = make(kind, key, n)
    if isinstance(turn, Fast):
        each = tables(turn, x.device)
        for _, part in slices(x):
            part.copy_(forth(part, each))
    elif isinstance(turn, Haar):
        matrix = taken(turn.apply(np.eye(n, dtype=np.float32)), x.device, torch.float64)
        for _, part in slices(x):
            part.copy_(part.double() @ matrix)


def forth(x: Tensor, by: Tables) -> Tensor:
    """Q v for each row v of x, float32: new."""
    x = x[:, by.order[0]] * by.signs[0]
    for layer in range(1, len(by.order)):
        tiled = x.shape[1] // by.block * by.block
        _hadamard(x[:, :tiled], by.block)
        if tiled < x.shape[1]:
            _hadamard(x[:, -by.block :], by.block)
        x = x[:, by.order[layer]] * by.signs[layer]
        if layer == 1:
            _turn(x, by.other, *by.turns)
    return x


def back(x: Tensor, by: Tables) -> Tensor:
    """Q^T v for each row v of x, float32: new."""
    last = len(by.order) - 1
    x = x[:, by.order_back[last]] * by.signs_back[last]
    for layer in range(last - 1, -1, -1):
        tiled = x.shape[1] // by.block * by.block
        if tiled < x.shape[1]:
            _hadamard(x[:, -by.block :], by.block)
        _hadamard(x[:, :tiled], by.block)
        if layer == 1:
            aa, ab, ba, bb = by.turns
            _turn(x, by.other, aa, ba, ab, bb)
        x = x[:, by.order_back[layer]] * by.signs_back[layer]
    return x


def unevenness(key: bytes, m: int, device: torch.device) -> Vector:
    """As `likely.unevenness`."""
    asked, by = Moments(m), tables(Fast(key, m), device)
    table, points = taken(asked.table, device), taken(asked.points, device)
    found, step = np.empty(m), max(1, AT_ONCE // m)
    for start in range(0, m, step):
        rows = min(step, m - start)
        ones = torch.zeros((rows, m), dtype=torch.float32, device=device)
        ones[:, start : start + rows].fill_diagonal_(1)
        places = (back(ones, by).abs_().double() * asked.bins).long().clamp_(max=asked.count - 1)
        counts = torch.zeros((rows, asked.count), dtype=torch.int32, device=device)
        counts.scatter_add_(1, places, torch.ones_like(places, dtype=torch.int32))
        moments = torch.log(counts[:, :-1].double() @ table / m)
        kappa = (2 * moments[:, 1:] / points[:-1] ** 2).amax(1)
        kappa[counts[:, -1] > 0] = torch.inf
        found[start : start + rows] = given(kappa)
    return np.maximum(found, asked.least)


def _hadamard(x: Tensor, block: int) -> None:
    """Transforms of interleaved blocks, without their norm, in place."""
    rows, n = x.shape
    width = n // block
    while width < n:
        pairs = x.view(rows, -1, 2, width)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        total = a + b
        torch.sub(a, b, out=b)
        a.copy_(total)
        width *= 2


def _turn(x: Tensor, other: Tensor, aa: Tensor, ab: Tensor, ba: Tensor, bb: Tensor) -> None:
    """Coordinate j of the first half and `other[j]` by the matrix (aa, ab; ba, bb), in place."""
    half = len(other)
    first, second = x[:, :half].clone(), x[:, other]
    x[:, :half] = aa * first + ab * second
    x[:, other] = ba * first + bb * second
