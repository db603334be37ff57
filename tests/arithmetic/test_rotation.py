"""Secret rotations: orthogonal, invertible, mixing, a function of the key alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.errors import TypingError

from sliplm.arithmetic import rotation
from sliplm.arithmetic.field import new_key
from sliplm.errors import RecipeError

widths = st.one_of(st.integers(1, 200), st.sampled_from([256, 576, 960, 1000, 1536]))
kinds = st.sampled_from(["fast", "haar", "none"])


def dense(kind: str, key: bytes, n: int) -> np.ndarray:
    return rotation.make(kind, key, n).apply(np.eye(n, dtype=np.float32)).T  # columns: images of the basis


@given(kinds, widths)
def test_a_rotation_is_orthogonal_and_its_transpose_undoes_it(kind: str, n: int) -> None:
    turned = rotation.make(kind, new_key(), n)
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    y = turned.apply(x)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-4)
    assert np.allclose(turned.apply_transpose(y), x, atol=2e-5 * np.sqrt(n))
    assert turned.macs == rotation.macs(kind, n)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 576])
@pytest.mark.parametrize("kind", ["fast", "haar"])
def test_the_transpose_is_the_transpose(kind: str, n: int) -> None:
    key = new_key()
    matrix = dense(kind, key, n)
    back = rotation.make(kind, key, n).apply_transpose(np.eye(n, dtype=np.float32)).T
    assert np.allclose(matrix.T, back, atol=1e-5)
    assert np.allclose(matrix @ matrix.T, np.eye(n), atol=1e-4)


@pytest.mark.parametrize("n", [64, 100, 576, 960])
def test_every_coordinate_mixes_with_most_others(n: int) -> None:
    """About b^2/n >= 4 signed paths join any two coordinates; some cancel."""
    matrix = dense("fast", new_key(), n)
    assert (np.abs(matrix) > 1e-6).mean(axis=1).min() > 0.5
    assert (np.abs(matrix) > 1e-6).mean() > 0.7
    assert np.abs(matrix).max() < 0.8  # nowhere does a coordinate shine through


def test_a_rotation_is_a_function_of_its_key() -> None:
    key = new_key()
    x = np.ones((1, 96), np.float32)
    assert np.array_equal(rotation.make("fast", key, 96).apply(x), rotation.make("fast", key, 96).apply(x))
    assert not np.allclose(
        rotation.make("fast", key, 96).apply(x), rotation.make("fast", new_key(), 96).apply(x)
    )


def test_the_outermost_layer_is_secret() -> None:
    """Undoing the public Hadamard layer from outside must not bring the inner layers to light."""
    n = 64
    a, b = dense("fast", new_key(), n), dense("fast", new_key(), n)
    assert not np.allclose(np.sort(np.abs(a), axis=1), np.sort(np.abs(b), axis=1), atol=1e-3)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    turned = rotation.make("fast", new_key(), 300)
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    assert np.array_equal(turned.apply(x)[2:3], turned.apply(x[2:3]))


@given(widths, st.sampled_from([1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 15, 16, 17, 19, 24, 27, 48]))
def test_many_rows_have_the_same_bits_as_each_alone(n: int, rows: int) -> None:
    turned = rotation.make("fast", new_key(), n)
    x = np.random.default_rng(n).standard_normal((rows, n)).astype(np.float32)
    for turn in (turned.apply, turned.apply_transpose):
        alone = np.concatenate([turn(x[i : i + 1]) for i in range(rows)])
        memory = np.full(rows * n + 32, 7, np.float32)
        out = turn(x, memory[16:-16].reshape(rows, n))
        assert np.array_equal(out.view(np.uint32), alone.view(np.uint32))
        assert (memory[:16] == 7).all()
        assert (memory[-16:] == 7).all()


def test_an_output_with_gaps_is_refused() -> None:
    turned = rotation.make("fast", new_key(), 64)
    with pytest.raises(TypingError):
        turned.apply(np.zeros((20, 64), np.float32), np.zeros((20, 128), np.float32)[:, ::2])


def test_gaussians_are_standard_normal() -> None:
    values = rotation.gaussians(new_key(), 200_001)
    assert len(values) == 200_001
    assert abs(values.mean()) < 0.015
    assert abs(values.std() - 1) < 0.01
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.006


def test_haar_columns_are_uniform_in_sign_and_size() -> None:
    matrix = dense("haar", new_key(), 256)
    assert abs((matrix > 0).mean() - 0.5) < 0.03
    assert abs((matrix**4).mean() * 256**2 - 3) < 0.3  # fourth moment of a near-Gaussian entry


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(RecipeError, match="8192"):
        rotation.make("haar", new_key(), rotation.MAX_HAAR + 1)
    with pytest.raises(RecipeError, match="unknown rotation"):
        rotation.make("slow", new_key(), 8)


def test_a_rotation_hides_itself() -> None:
    assert "array" not in repr(rotation.make("fast", new_key(), 8))
    assert "array" not in repr(rotation.make("haar", new_key(), 8))
