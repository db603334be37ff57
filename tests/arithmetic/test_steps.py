"""The compiled steps against the same steps one by one: integers in Python, floats in their order."""

from __future__ import annotations

import secrets
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sliplm.arithmetic import field, rotation, steps
from sliplm.arithmetic.field import P
from sliplm.arithmetic.fixedpoint import row_alpha
from sliplm.arithmetic.lowrank import add_low_rank

LIMIT, NOISE = 123456.7, 0.25


class Group(NamedTuple):
    """What a vault has of a group, and rows with their masks and a claim."""

    rotation_in: rotation.Rotation
    rotation_out: rotation.Rotation
    laid: steps.Laid
    d_in: np.ndarray
    scale: np.ndarray
    a: np.ndarray
    b: np.ndarray
    e: np.ndarray
    c: np.ndarray
    x: np.ndarray
    words: np.ndarray
    y: np.ndarray
    u: np.ndarray


def group(kind: str, m: int, n: int, rank: int, rows: int, seed: int, edge: int = P // 2) -> Group:
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def elements(*shape: int) -> np.ndarray:
        return rng.integers(0, P, shape).astype(np.uint32)

    d_in, scale = np.exp(floats(n)), np.exp(floats(m))
    q_in = rotation.make(kind, secrets.token_bytes(32), n, d_in)
    q_out = rotation.make(kind, secrets.token_bytes(32), m, np.exp(floats(m)) if seed % 2 else None)
    return Group(
        q_in, q_out, steps.laid_out(q_in, q_out, d_in, scale, edge), d_in, scale,
        floats(m, rank), floats(rank, n), elements(2, m), elements(2, n), floats(rows, n),
        elements(rows, n + seed % 3), elements(rows, m), elements(rows, m),
    )  # fmt: skip


def cuts(rows: int, seed: int) -> list[tuple[int, int]]:
    """Ranges that cover all rows, as cores share them."""
    middle = seed % (rows + 1)
    return [(0, middle), (middle, rows)]


SIZES = {
    "m": st.integers(1, 90), "n": st.integers(1, 90), "rank": st.integers(0, 5), "rows": st.integers(1, 40),
    "kind": st.sampled_from(["fast", "none"]), "seed": st.integers(0, 2**32 - 1),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(**SIZES)
@example(m=576, n=1536, rank=16, rows=1, kind="fast", seed=5)
@example(m=960, n=576, rank=16, rows=33, kind="fast", seed=4)
def test_ask_is_rotate_scale_and_mask(kind: str, m: int, n: int, rank: int, rows: int, seed: int) -> None:
    g = group(kind, m, n, rank, rows, seed)
    hidden, alpha = np.empty((rows, n), np.uint32), np.empty(rows)
    for first, last in cuts(rows, seed):
        assert steps.ask(*g.laid, LIMIT, g.x, g.words, hidden, alpha, first, last)
    z = g.rotation_in.apply(g.x)
    for i in range(rows):
        assert alpha[i] == row_alpha(z[i], LIMIT)
        rounded = np.rint(alpha[i] * z[i].astype(np.float64))
        pairs = zip(rounded, g.words[i, :n], strict=True)
        assert hidden[i].tolist() == [(int(v) + int(r)) % P for v, r in pairs]


@settings(max_examples=60, deadline=None)
@given(**SIZES)
@example(m=576, n=1536, rank=16, rows=1, kind="fast", seed=5)
@example(m=960, n=576, rank=16, rows=33, kind="fast", seed=4)
def test_ahead_and_opened_are_the_steps_one_by_one(
    kind: str, m: int, n: int, rank: int, rows: int, seed: int
) -> None:
    g = group(kind, m, n, rank, rows, seed)
    alpha = np.exp(np.random.default_rng(seed).standard_normal(rows))
    hidden, expected = g.words[:, :n].copy(), np.empty((rows, 2), np.uint64)
    out, losses = np.full((rows, m), np.nan, np.float32), np.full((rows, 2), np.nan)
    a_transposed = np.ascontiguousarray(g.a.T)
    for first, last in cuts(rows, seed):
        steps.ahead(
            *g.laid, a_transposed, g.b, g.c, g.e, g.x, hidden, alpha, out, expected, losses, first, last
        )  # fmt: skip
    low = np.zeros_like(out)
    add_low_rank(a_transposed, g.b, g.x, low, 0, 0, rows)
    assert np.array_equal(out, low)
    assert np.allclose(low, g.x @ g.b.T @ g.a.T, rtol=1e-3, atol=1e-3)
    for i in range(rows):
        products = [sum(int(a) * int(b) for a, b in zip(c, hidden[i], strict=True)) % P for c in g.c]
        assert expected[i].tolist() == products

    worst = [
        steps.opened(*g.laid, NOISE, g.y, g.u, alpha, out, losses, first, last)
        for first, last in cuts(rows, seed)
    ]
    centred = field.centre(field.residues(g.y.astype(np.int64) - g.u.astype(np.int64)))
    factors = g.scale.astype(np.float64)[None] * (1.0 / alpha)[:, None]
    unmasked = (centred.astype(np.float64) * factors).astype(np.float32)
    assert np.array_equal(out, low + g.rotation_out.apply_transpose(unmasked))
    inner = np.square((g.d_in * g.x).astype(np.float64))
    rest = inner.sum(axis=1) - inner.max(axis=1)
    with np.errstate(divide="ignore"):
        lost = np.where(rest > 0, np.sqrt(n / 12 / rest) / alpha, np.inf)
    assert np.allclose(losses[:, 1], lost, rtol=1e-4)
    answer = np.sqrt(np.square(out.astype(np.float64)).sum(axis=1))
    assert np.allclose(losses[:, 0], NOISE / (alpha * answer))
    assert max(worst) == losses.max()


@settings(max_examples=60, deadline=None)
@given(**SIZES, size=st.integers(-40, 40))
@example(m=576, n=1536, rank=16, rows=1, kind="fast", seed=5, size=0)
@example(m=960, n=576, rank=16, rows=33, kind="fast", seed=4, size=0)
def test_an_input_of_two_rows_is_a_rounding_and_its_exact_remainder(
    kind: str, m: int, n: int, rank: int, rows: int, seed: int, size: int
) -> None:
    """In exact rational numbers: both rows add up to z within half a step of the second."""
    g = group(kind, m, n, rank, rows, seed)
    x = np.ldexp(g.x, size).astype(np.float32)
    words = np.random.default_rng(seed).integers(0, P, (2 * rows, g.words.shape[1])).astype(np.uint32)
    hidden, alpha = np.empty((2 * rows, n), np.uint32), np.empty(2 * rows)
    for first, last in cuts(rows, seed):
        assert steps.ask(*g.laid, LIMIT, x, words, hidden, alpha, first, last)
    z = g.rotation_in.apply(x)
    whole, parts = field.centre(field.residues(hidden.astype(np.int64) - words[:, :n])).reshape(2, rows, n)
    for i in range(rows):
        coarse, fine = alpha[i], alpha[rows + i]
        assert np.log2(coarse) % 1 == 0 and coarse <= row_alpha(z[i], LIMIT) < 2 * coarse
        assert whole[i].tolist() == [int(v) for v in np.rint(coarse * z[i].astype(np.float64))]
        rest = [Fraction(coarse) * Fraction(float(v)) - int(w) for v, w in zip(z[i], whole[i], strict=True)]
        length = np.linalg.norm(np.array(rest, np.float64))
        assert fine / coarse == pytest.approx(LIMIT / length if length else LIMIT)
        step = Fraction(coarse) / Fraction(fine)
        left = [abs(r - int(p) * step) for r, p in zip(rest, parts[i], strict=True)]
        assert max(left) <= step * (Fraction(1, 2) + Fraction(1, 10**6))


@settings(max_examples=60, deadline=None)
@given(**SIZES)
@example(m=576, n=1536, rank=16, rows=1, kind="fast", seed=5)
@example(m=960, n=576, rank=16, rows=33, kind="fast", seed=4)
def test_both_products_of_an_input_are_added_before_they_are_turned_back(
    kind: str, m: int, n: int, rank: int, rows: int, seed: int
) -> None:
    g, rng = group(kind, m, n, rank, rows, seed), np.random.default_rng(seed)
    y, u, hidden = (rng.integers(0, P, (2 * rows, k)).astype(np.uint32) for k in (m, m, n))
    alpha, expected = np.exp(rng.standard_normal(2 * rows)), np.empty((2 * rows, 2), np.uint64)
    out, losses = np.empty((rows, m), np.float32), np.empty((rows, 2))
    kept = np.ascontiguousarray(g.a.T), g.b
    for first, last in cuts(rows, seed):
        steps.ahead(*g.laid, *kept, g.c, g.e, g.x, hidden, alpha, out, expected, losses, first, last)
    for row, found in zip(hidden, expected, strict=True):
        assert found.tolist() == [sum(int(a) * int(b) for a, b in zip(c, row, strict=True)) % P for c in g.c]
    low = out.copy()
    worst = [
        steps.opened(*g.laid, NOISE, y, u, alpha, out, losses, first, last)
        for first, last in cuts(rows, seed)
    ]
    products = field.centre(field.residues(y.astype(np.int64) - u.astype(np.int64))) * (1.0 / alpha)[:, None]
    unmasked = (g.scale.astype(np.float64) * (products[:rows] + products[rows:])).astype(np.float32)
    assert np.array_equal(out, low + g.rotation_out.apply_transpose(unmasked))
    one = np.empty((rows, 2))  # the losses are those of one row with the second alpha
    steps.ahead(*g.laid, *kept, g.c, g.e, g.x, hidden, alpha[rows:], low, expected, one, 0, rows)
    assert np.array_equal(losses[:, 1], one[:, 1])
    answer = np.sqrt(np.square(out.astype(np.float64)).sum(axis=1))
    assert np.allclose(losses[:, 0], NOISE / (alpha[rows:] * answer))
    assert max(worst) == losses.max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_no_message_of_what_is_not_finite(bad: float, place: int) -> None:
    g = group("fast", 30, 20, 2, 40, 1)
    hidden, alpha = np.empty((40, 20), np.uint32), np.empty(40)
    g.x[place, 7] = bad
    assert not steps.ask(*g.laid, LIMIT, g.x, g.words, hidden, alpha, 0, 40)
    assert steps.ask(*g.laid, LIMIT, g.x, g.words, hidden, alpha, place + 1, 40)
    hidden, alpha, words = np.empty((80, 20), np.uint32), np.empty(80), np.concatenate([g.words, g.words])
    assert not steps.ask(*g.laid, LIMIT, g.x, words, hidden, alpha, 0, 40)
    assert steps.ask(*g.laid, LIMIT, g.x, words, hidden, alpha, place + 1, 40)


def test_a_rotation_without_loops_takes_the_outer_parts_alone() -> None:
    """What the codec composes for `haar` is `ask` and `opened` where both can be had."""
    g = group("fast", 50, 40, 3, 20, 3)
    hidden, alpha = np.empty((20, 40), np.uint32), np.empty(20)
    assert steps.ask(*g.laid, LIMIT, g.x, g.words, hidden, alpha, 0, 20)
    again, scales = np.empty_like(hidden), np.empty_like(alpha)
    assert steps.mask(LIMIT, g.rotation_in.apply(g.x), 0, g.words, again, scales, 0, 20)
    assert np.array_equal(again, hidden) and np.array_equal(scales, alpha)
    low = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    out, losses, unmasked = low.copy(), np.zeros((20, 2)), np.empty_like(low)
    worst = steps.opened(*g.laid, NOISE, g.y, g.u, alpha, out, losses, 0, 20)
    steps.unmask(*g.laid, g.y, g.u, alpha, unmasked, 0, 0, 20)
    found, lost = low.copy(), np.zeros((20, 2))
    back = g.rotation_out.apply_transpose(unmasked)
    assert steps.finish(NOISE, back, 0, alpha, found, lost, 0, 20) == worst
    assert np.array_equal(found, out) and np.array_equal(lost, losses)


def test_without_loops_for_the_rotation_two_rows_are_the_same_too() -> None:
    g, rng = group("fast", 50, 40, 3, 20, 3), np.random.default_rng(1)
    words, y, u = (rng.integers(0, P, (40, k)).astype(np.uint32) for k in (40, 50, 50))
    hidden, alpha = np.empty((40, 40), np.uint32), np.empty(40)
    assert steps.ask(*g.laid, LIMIT, g.x, words, hidden, alpha, 0, 20)
    again, scales = np.empty_like(hidden), np.empty_like(alpha)
    assert steps.mask_both(LIMIT, g.rotation_in.apply(g.x), 0, words, again, scales, 0, 20)
    assert np.array_equal(again, hidden) and np.array_equal(scales, alpha)
    out, losses, unmasked = np.zeros((20, 50), np.float32), np.zeros((20, 2)), np.empty((20, 50), np.float32)
    steps.opened(*g.laid, NOISE, y, u, alpha, out, losses, 0, 20)
    steps.unmask_both(*g.laid, y, u, alpha, unmasked, 0, 0, 20)
    assert np.array_equal(g.rotation_out.apply_transpose(unmasked), out)


@pytest.mark.parametrize("size", [999, 1000, 1001, -1000, -1001, P // 2])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_product_beyond_the_edge_is_no_answer(size: int, place: int) -> None:
    g = group("fast", 30, 20, 2, 40, 1, edge=1000)
    y = g.u.copy()
    y[place, 29] = (int(g.u[place, 29]) + size) % P
    out, losses = np.zeros((40, 30), np.float32), np.zeros((40, 2))
    worst = steps.opened(*g.laid, NOISE, y, g.u, np.ones(40), out, losses, 0, 40)
    assert np.isnan(worst) == (abs(size) > 1000)
    assert steps.unmask(*g.laid, y, g.u, np.ones(40), out, 0, 0, 40) == (abs(size) <= 1000)
    for both in ([g.u, y], [y, g.u]):  # in the second row as in the first
        claim, u = np.concatenate(both), np.concatenate([g.u, g.u])
        worst = steps.opened(*g.laid, NOISE, claim, u, np.ones(80), out, losses, 0, 40)
        assert np.isnan(worst) == (abs(size) > 1000)


def test_what_is_laid_out_stays_hidden() -> None:
    assert "array" not in repr(group("fast", 9, 9, 1, 1, 0).laid)
