"""One group split: both parts together are the weight; each step as the specification has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm.arithmetic.field import accepts, challenge_products
from sliplm.errors import CheckpointError, RecipeError
from sliplm.shares import splitting as module
from sliplm.shares.splitting import CHALLENGE_SETS, CHALLENGES, direction_error, split_group, top_triplets


def weights(m: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(min(m, n)) / 5)
    u = np.linalg.qr(rng.standard_normal((m, len(decay))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(decay))))[0]
    return ((u * decay) @ v.T + 0.01 * rng.standard_normal((m, n))).astype(np.float32)


@pytest.mark.parametrize("rotation", ["fast", "none"])
@pytest.mark.parametrize(("factor", "row"), [(1e-30, 0), (1, 1e15), (1, 1e20), (1, 3e37), (1, 3e38)])
def test_sizes_whose_squares_leave_float32_hide_as_much(factor: float, row: float, rotation: str) -> None:
    weight = weights(24, 40) * np.float32(factor)
    if row:
        weight[3] = row
    with np.errstate(all="raise", under="ignore"):
        parts = split_group("g", weight, rank=4, precision=12, rotation=rotation)
    b = parts.secrets.b / np.linalg.norm(parts.secrets.b, axis=1, keepdims=True)
    assert np.allclose(b @ b.T, np.eye(4), atol=1e-5)
    assert parts.error < 1e-3 and parts.svd_error < 1e-5
    left = np.linalg.svd(
        weight.astype(np.float64) - parts.secrets.a.astype(np.float64) @ parts.secrets.b, compute_uv=False
    )
    true = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    assert left[0] < 1.01 * true[4] + 1e-6 * true[0]


def test_values_that_no_product_can_hold_are_refused_with_their_size() -> None:
    weight = np.sign(weights(24, 40)) * np.float32(3.4e38)  # the rest is larger than the weight somewhere
    with pytest.raises(CheckpointError, match=r"g: its largest values, near 3e[+]38, leave float32"):
        split_group("g", weight, rank=4, precision=12, rotation="fast")


@given(st.integers(1, 70), st.integers(1, 70), st.data())
@settings(max_examples=60)
def test_both_parts_together_are_the_weight(m: int, n: int, data: st.DataObject) -> None:
    weight = weights(m, n)
    rank = data.draw(st.integers(0, min(m, n, 8)))
    precision = data.draw(st.integers(4, 12))
    kind = data.draw(st.sampled_from(["fast", "haar", "none"]))
    parts = split_group("g", weight, rank=rank, precision=precision, rotation=kind)
    secrets = parts.secrets
    hidden = parts.w.astype(np.float32) * secrets.scale[:, None]
    half = secrets.rotation_in().apply_transpose(np.ascontiguousarray(hidden))  # rows times Q_in
    rest = secrets.rotation_out().apply_transpose(np.ascontiguousarray(half.T)).T
    rebuilt = secrets.a @ secrets.b + rest
    step = float(secrets.scale.max())
    assert np.abs(rebuilt - weight).max() <= step * np.sqrt(m * n) + 1e-5
    assert np.linalg.norm(rebuilt - weight) <= 0.6 * step * np.sqrt(m * n) + 1e-5


@pytest.mark.parametrize(("m", "n"), [(50, 30), (30, 50), (40, 40)])
def test_the_triplets_are_those_of_the_svd(m: int, n: int) -> None:
    weight = weights(m, n)
    a, b = top_triplets(weight, 7)
    u, s, v = np.linalg.svd(weight.astype(np.float64))
    assert np.allclose(a @ b, (u[:, :7] * s[:7]) @ v[:7], atol=1e-5)
    assert np.allclose(b @ b.T, np.eye(7), atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(50, 30), (30, 50)])
def test_of_dead_columns_the_triplets_hold_nothing(m: int, n: int) -> None:
    weight = weights(m, n)
    weight[:, 3], weight[:, 8] = 0, weight[:, 8] * 1e-9
    a, b = top_triplets(weight, 7)
    assert not b[:, [3, 8]].any()
    rest = weight - a @ b
    assert np.array_equal(rest[:, [3, 8]], weight[:, [3, 8]])


def test_the_randomised_decomposition_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(300, 200)
    best = np.linalg.norm(weight - np.linalg.multi_dot(top_triplets(weight, 16)))
    monkeypatch.setattr(module, "EXACT_SVD", 10)
    a, b = top_triplets(weight, 16)
    assert a.shape == (300, 16)
    assert np.allclose(b @ b.T, np.eye(16), atol=1e-4)
    assert np.linalg.norm(weight - a @ b) <= 1.005 * best
    randomised = direction_error(weight, a, b)
    monkeypatch.undo()
    exact = direction_error(weight, *top_triplets(weight, 16))
    assert exact < 1e-5 < randomised < 0.1


def test_the_residual_has_no_visible_null_space() -> None:
    """Without a rotation the removed directions are an exact hole in the residual; with one no hole is
    where it was.
    """
    weight = weights(64, 48)
    _, b = top_triplets(weight, 8)

    def leak(kind: str) -> float:
        parts = split_group("g", weight, rank=8, precision=12, rotation=kind)
        seen = parts.w * parts.secrets.scale[:, None]
        return float(np.linalg.norm(seen @ b.T) / np.linalg.norm(seen))

    assert leak("none") < 1e-2
    assert leak("fast") > 0.2
    assert leak("haar") > 0.2


def test_challenges_belong_to_the_share() -> None:
    parts = split_group("g", weights(20, 30), rank=2, precision=12, rotation="fast")
    sets = [(parts.secrets.challenges(i), parts.secrets.challenge_products(i)) for i in range(CHALLENGE_SETS)]
    assert parts.secrets.c.shape == (CHALLENGE_SETS * CHALLENGES, 30)
    assert len({row.tobytes() for e, _ in sets for row in e}) == CHALLENGE_SETS * CHALLENGES
    x = np.array([[1] + [0] * 29], np.uint32)
    y = np.mod(parts.w[:, :1].T.astype(np.int64), 4294967291).astype(np.uint32)
    for e, c in sets:
        assert e.shape == (2, 20)
        assert np.array_equal(c, challenge_products(e, parts.w))
        assert accepts(e, c, x, y)
        assert not accepts(e, c, x, np.roll(y, 1))


def test_two_splits_of_one_weight_share_no_secret() -> None:
    weight = weights(32, 32)
    one, two = (split_group("g", weight, rank=2, precision=12, rotation="fast") for _ in range(2))
    assert one.secrets.seed != two.secrets.seed
    assert not np.array_equal(one.w, two.w)


def test_bad_weights_and_ranks_are_refused() -> None:
    weight = weights(8, 6)
    with pytest.raises(RecipeError, match="rank 7"):
        split_group("g", weight, rank=7, precision=12, rotation="fast")
    weight[3, 2] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        split_group("g", weight, rank=2, precision=12, rotation="fast")


def test_zero_weights_split() -> None:
    parts = split_group("g", np.zeros((8, 6), np.float32), rank=2, precision=12, rotation="fast")
    assert not parts.w.any()
    assert parts.error == 0


def test_secrets_hide_themselves() -> None:
    parts = split_group("g", weights(8, 6), rank=2, precision=12, rotation="fast")
    for text in (repr(parts.secrets), repr(parts), str(parts.secrets)):
        assert "array" not in text
        assert parts.secrets.seed.hex() not in text
