"""How large answers get in a secret basis: each step of the proof by itself, and the bound under attack."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sliplm.arithmetic import likely, rotation
from sliplm.arithmetic.field import derive_key
from sliplm.arithmetic.fixedpoint import EDGE, ROOM, norm_bound, quantise_rows, row_alpha, scale_limit
from sliplm.shares.splitting import rotate_both

numbers = st.floats(-1, 1, width=32).map(lambda v: v if abs(v) > 2**-20 else 0.0)  # M's are levelled


def seeded(number: int) -> bytes:
    return number.to_bytes(32, "little")


@given(
    hnp.arrays(np.float64, 5, elements=st.floats(0, 2)), hnp.arrays(np.float64, 5, elements=st.floats(-3, 3))
)
def test_shuffled_and_signed_entries_are_no_worse_than_independent_ones(q: np.ndarray, v: np.ndarray) -> None:
    """E exp(y) of y = sum of v_i s_i q_order(i), over all signs and orders, is at most the product of the
    means of cosh(v_i q_l).
    """
    orders = np.array(list(itertools.permutations(range(5))))
    exact = np.cosh(v * q[orders]).prod(axis=1).mean()  # the signs' mean is a product
    assert exact <= np.cosh(np.outer(v, q)).mean(axis=1).prod() * (1 + 1e-9)


@given(st.integers(1, 200), st.integers(0, 3), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_unevenness_bounds_the_moments_of_every_row(m: int, number: int, part: float) -> None:
    kappa = likely.unevenness(seeded(number), m)
    rows = rotation.make("fast", seeded(number), m).apply_transpose(np.eye(m, dtype=np.float32))
    mu = part * 9 / 7 * math.sqrt(2 * math.log(2 * m / likely.CHANCE))
    moments = np.log(np.cosh(mu * math.sqrt(m) * rows.astype(np.float64)).mean(axis=1))
    assert (moments <= kappa * mu**2 / 2 + 1e-12).all()
    assert np.median(kappa) < 2


@given(st.integers(2, 400), st.floats(0, 1))
def test_the_cap_of_a_sphere(m: int, tau: float) -> None:
    """P(|u_1| >= tau) <= (1 - tau^2)^((m-1)/2), by integration over the angle."""
    angles = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(angles) ** (m - 2)
    beyond = np.trapezoid(np.where(angles >= math.asin(tau), density, 0), angles) / np.trapezoid(
        density, angles
    )
    assert beyond <= (1 - tau**2) ** ((m - 1) / 2) + 2e-3


@pytest.mark.parametrize("kind", ["fast", "haar"])
def test_the_rarer_the_wider(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a chance that can be seen: 200 bases, none of which the vectors know."""
    monkeypatch.setattr(likely, "CHANCE", 1 / 8)
    m = 64
    rng = np.random.default_rng(0)
    even, spikes = np.ones(m), np.repeat([1.0, 0.0], [4, m - 4])
    vectors = np.stack([np.eye(m)[0], even, np.sign(rng.standard_normal(m)), spikes, rng.standard_normal(m)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    beyond, largest = np.zeros(len(vectors)), 0.0
    for number in range(200):
        tau = likely.reach(kind, seeded(number), m)
        found = np.abs(rotation.make(kind, seeded(number), m).apply(vectors.astype(np.float32)))
        beyond += (found > tau).any(axis=1)
        largest = max(largest, float((found / tau).max()))
    assert (beyond / 200 <= 1 / 8).all()
    assert largest > 0.9  # the bound is not idle: they come near it


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=numbers))
def test_the_largest_singular_value_is_bounded(matrix: np.ndarray) -> None:
    true = float(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[0])
    assert likely.spectral_bound(matrix) >= true * (1 - 1e-5)


def test_and_not_by_much() -> None:
    matrix = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    assert likely.spectral_bound(matrix) < 1.1 * np.linalg.svd(matrix, compute_uv=False)[0]
    assert likely.spectral_bound(np.zeros((3, 4), np.float32)) == 0


@pytest.mark.parametrize("part", [0.3, 0.7, 0.9])
def test_what_is_seen_of_it_will_do_where_that_is_enough(part: float) -> None:
    matrix = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    true = float(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[0])
    assert part * true <= likely.spectral_bound(matrix, part * true) <= true * (1 + 1e-5)


@pytest.mark.parametrize(("kind", "m"), [("fast", 3072), ("haar", 1024)])
def test_answers_stay_within_the_edge_unless_the_input_knows_the_basis(kind: str, m: int) -> None:
    n, rng = 1024, np.random.default_rng(1)
    matrix = rng.standard_normal((m, n)).astype(np.float32)
    top = rng.standard_normal((2, n)).astype(np.float32)
    for _ in range(30):  # near the directions that answers are largest in
        top = top @ matrix.T @ matrix / np.float32(m)
    blind = np.concatenate([top, np.eye(n)[:2], np.ones((1, n)), np.sign(top), rng.standard_normal((4, n))])
    for number in range(2):
        seed = seeded(number)
        hidden = rotate_both(matrix, kind, seed)
        w, scale = quantise_rows(hidden, 12)
        norm = likely.likely_norm(hidden, w, scale, kind, derive_key(seed, "rotation out"))
        assert norm_bound(w) / norm > 1.2
        turned = rotation.make(kind, derive_key(seed, "rotation in"), n).apply(blind.astype(np.float32))
        aligned = w[np.argmax(np.square(hidden / scale[:, None]).sum(axis=1))][None]
        assert 0.2 * ROOM < largest_answer(w, turned, norm) < EDGE * ROOM
        assert largest_answer(w, aligned, norm) > ROOM  # whoever knows the basis overflows: the test can fail


def largest_answer(w: np.ndarray, rows: np.ndarray, norm: float) -> float:
    limit = scale_limit(norm, w.shape[1])
    rows = rows.astype(np.float32)
    integers = np.stack([np.rint(row_alpha(row, limit) * row.astype(np.float64)) for row in rows])
    return float(np.abs(integers @ w.T.astype(np.float64)).max())


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 7)])
def test_small_and_empty_matrices(shape: tuple[int, int]) -> None:
    """Where nothing concentrates, the norm bounds every input: the aligned one stays within the edge too."""
    for matrix in (np.ones(shape, np.float32), np.zeros(shape, np.float32)):
        hidden = rotate_both(matrix, "fast", seeded(0))
        w, scale = quantise_rows(hidden, 12)
        norm = likely.likely_norm(hidden, w, scale, "fast", seeded(0))
        limit = scale_limit(norm, shape[1])
        assert (
            np.linalg.norm(w.astype(np.float64), axis=1).max() * (limit + math.sqrt(shape[1]) / 2)
            <= EDGE * ROOM
        )
