"""Diagonals that level a matrix: W is between them, all norms are equal, and nothing dead shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm.arithmetic.equilibration import column_factors, divided, equilibrated, localisation


def gaussian(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)


def between(level: object) -> np.ndarray:
    matrix, d_out, d_in = level  # type: ignore[misc]
    return d_out[:, None].astype(np.float64) * matrix * d_in


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.floats(-25, 25), st.floats(0, 5))
@settings(max_examples=60)
def test_the_weight_is_between_its_diagonals(m: int, n: int, seed: int, size: float, spread: float) -> None:
    random = np.random.default_rng(seed)
    w = gaussian(m, n, seed) * np.float32(10**size)
    w *= (10 ** (spread * random.standard_normal(m) / 2)).astype(np.float32)[:, None]
    w *= (10 ** (spread * random.standard_normal(n) / 2)).astype(np.float32)
    level = equilibrated(w)
    assert np.allclose(between(level), w, rtol=1e-5, atol=0)
    assert np.allclose(np.linalg.norm(level.matrix, axis=0), np.sqrt(m), rtol=1e-4)
    assert all(np.isfinite(part).all() for part in level)


def test_rows_and_columns_have_equal_norms() -> None:
    w = gaussian(80, 60)
    w[3] *= 1000
    w[:, 7] *= 1e-4
    level = equilibrated(w)
    assert np.allclose(np.linalg.norm(level.matrix, axis=0), np.sqrt(80), rtol=1e-4)
    assert np.allclose(np.linalg.norm(level.matrix, axis=1), np.sqrt(60), rtol=0.02)
    assert 0.5 < np.sqrt(np.square(level.d_in).mean()) < 2  # D_in leaves inputs about as they are


@pytest.mark.parametrize("factor", [0.0, 1e-40])
def test_dead_rows_and_columns_leave_no_null_space(factor: float) -> None:
    w = gaussian(96, 64)
    w[[5, 9]] *= np.float32(factor)
    w[:, [2, 40, 41]] *= np.float32(factor)
    level = equilibrated(w)
    assert set(np.flatnonzero(level.d_out == 0)) == {5, 9}
    assert set(np.flatnonzero(level.d_in == 0)) == {2, 40, 41}
    values = np.linalg.svd(level.matrix, compute_uv=False)
    assert values[-1] > 0.05 * values[0]  # with a dead column it is 0
    assert np.linalg.svd(w, compute_uv=False)[-1] < 1e-6
    assert np.allclose(between(level)[:, 3], np.where(level.d_out > 0, w[:, 3], 0), rtol=1e-5)
    assert not np.array_equal(level.matrix[5], equilibrated(w).matrix[5])  # another fill each time


def test_zeros_stay_zeros() -> None:
    level = equilibrated(np.zeros((4, 3), np.float32))
    assert not any(part.any() for part in level)
    assert not column_factors(np.zeros((4, 3), np.float32)).any()


def test_a_small_column_is_a_singular_vector_of_its_own_until_it_is_levelled() -> None:
    w = gaussian(300, 120)
    w[:, 17] *= 0.01
    assert localisation(w, 0) > 0.99
    assert localisation(equilibrated(w).matrix, 0) < 0.6
    assert localisation(np.ascontiguousarray(w.T), 0) > 0.99  # of a wide matrix it is the rows


def test_of_a_matrix_in_clear_only_far_columns_are_levelled() -> None:
    w = gaussian(200, 21)
    w[:, 4] = 0
    w[:, 5] *= 1000
    w[:, 6] /= 1000
    w[:, 7] *= 3
    factors = column_factors(w)
    assert factors[4] == 0
    assert 800 < factors[5] < 1250
    assert 0.0008 < factors[6] < 0.00125
    assert np.all(np.delete(factors, [4, 5, 6]) == 1)
    assert not divided(w, factors)[:, 4].any()
    w[11] *= 1000  # a row has a scale of its own where nothing mixes it with others
    assert np.allclose(column_factors(w), factors, rtol=0.1)


def test_column_factors_are_sums_in_one_order() -> None:
    """Plain Python, number by number: no machine's vectors change a bit."""
    w = gaussian(9, 5)
    w[:, 1] *= 100
    w[:, 3] /= 100
    rows, columns = [1.0] * 9, [1.0] * 5
    for _ in range(16):
        norms = []
        for row in w.tolist():
            total = 0.0
            for value, factor in zip(row, columns, strict=True):
                total += (value * (1 / factor)) ** 2
            norms.append(math.sqrt(total / 5))
        close = all(abs(norm - row) <= 0.01 * row for norm, row in zip(norms, rows, strict=True))
        rows, sums = norms, [0.0] * 5
        for row, norm in zip(w.tolist(), rows, strict=True):
            for j, value in enumerate(row):
                sums[j] += (value * (1 / norm)) ** 2
        columns = [math.sqrt(total / 9) for total in sums]
        if close:
            break
    size = math.sqrt(math.fsum(column * column for column in columns) / 5)
    factors = [np.float32(column / size) for column in columns]
    level = [factor / sorted(factors)[2] for factor in factors]
    assert column_factors(w).tolist() == [1.0 if 1 / 16 <= x <= 16 else float(x) for x in level]
