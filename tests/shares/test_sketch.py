"""Sketches: what they say of two models, with the error that the specification states."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.arithmetic.field import derive_key
from sliplm.engines.transformers.checkpoint import Checkpoint
from sliplm.examples import cache_dir, smollm2
from sliplm.shares import sketch as module
from sliplm.shares.sketch import KIN, NUMBERS, SAME, Likeness, Sketch, likeness, of_weights, sketch

Floats = npt.NDArray[np.float32]
KEY = bytes(range(32))


def key(number: int) -> bytes:
    return derive_key(KEY, f"test {number}")


def gaussian(seed: int, m: int = 96, n: int = 64) -> Floats:
    return np.random.default_rng(seed).standard_normal((m, n), dtype=np.float32)


def scaled(noise: Floats, like: Floats, size: float) -> Floats:
    return noise * np.float32(size * np.linalg.norm(like) / np.linalg.norm(noise))


def bfloat16(w: Floats) -> Floats:
    bits = w.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def model(seed: int, shapes: list[tuple[int, int]], prefix: str = "layer") -> list[tuple[str, Floats]]:
    return [(f"{prefix}.{i}", gaussian(1000 * seed + i, *shape)) for i, shape in enumerate(shapes)]


def compared(
    ours: list[tuple[str, Floats]], theirs: list[tuple[str, Floats]], under: bytes = KEY
) -> Likeness:
    return likeness(of_weights(ours, [under])[under], of_weights(theirs, [under])[under])


SHAPES = [(96, 64), (64, 96), (96, 64), (96, 64), (40, 300)]


def test_a_sketch_by_hand() -> None:
    """The definition, with the key stream taken byte by byte."""
    w = gaussian(0, 5, 7)
    places = module.keystream(derive_key(KEY, "sketch/5/7"), 0, 0, 3).view(np.uint8)[:35]
    expected = np.zeros(NUMBERS)
    for place, value in zip(places, w.reshape(-1), strict=True):
        expected[place % 128] += -float(value) if place >= 128 else float(value)
    found = sketch("g", w, KEY)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6, atol=1e-6)
    assert (found.name, found.shape, found.values.dtype) == ("g", (5, 7), np.float32)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(0, 50, 33)
    whole = sketch("g", w, KEY)
    monkeypatch.setattr(module, "_AT_ONCE", 64)
    assert np.array_equal(sketch("g", w, KEY).values, whole.values)
    turned = np.asfortranarray(w)
    assert np.array_equal(sketch("g", turned, KEY).values, whole.values)


def test_sketches_are_linear_and_keyed() -> None:
    a, b = gaussian(1), gaussian(2)
    one, two, both = (sketch("g", w, KEY).values for w in (a, b, a + b))
    np.testing.assert_allclose(both, one + two, atol=1e-3)
    other = sketch("g", a, key(1)).values
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.5
    assert "values" not in repr(sketch("g", a, KEY))


DIFFERENCES = {
    "dense": gaussian(0, 40, 50),
    "rank one": np.outer(gaussian(1, 40, 1), gaussian(2, 1, 50)).astype(np.float32),
    "one column": gaussian(3, 40, 50) * (np.arange(50) == 7).astype(np.float32),
    "heavy tails": (gaussian(4, 40, 50) ** 5).astype(np.float32),
    "constant": np.ones((40, 50), np.float32),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_norms_are_unbiased_with_the_stated_variance_whatever_the_matrix(kind: str) -> None:
    """|s|^2 has the mean |W|^2 and a variance of at most 2 |W|^4 / 128, over 2000 keys."""
    w, keys = DIFFERENCES[kind], 2000
    total = float(np.square(w, dtype=np.float64).sum())
    found = [float(np.square(sketch("g", w, key(i)).values, dtype=np.float64).sum()) for i in range(keys)]
    ratios = np.array(found) / total
    bound = 2 / NUMBERS
    assert abs(ratios.mean() - 1) < 5 * (bound / keys) ** 0.5
    assert ratios.var() < 1.25 * bound


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-3, 0.5), rank=st.sampled_from([1, 4, None]))
def test_the_distance_of_a_relative_is_that_of_its_weights(seed: int, size: float, rank: int | None) -> None:
    """Within a third: five and a half standard deviations of 1/16."""
    w, noise = gaussian(seed), gaussian(seed + 1)
    if rank is not None:
        noise = gaussian(seed + 2, 96, rank) @ gaussian(seed + 3, rank, 64)
    v = w + scaled(noise, w, size)
    true = float(np.linalg.norm(w / np.linalg.norm(w) - v / np.linalg.norm(v)))
    found = compared([("g", w)], [("g", v)], key(seed))
    assert found.close == 1
    assert found.distance == pytest.approx(true, rel=0.35)


def test_unrelated_matrices_are_far() -> None:
    """The cosine of 5000 pairs of sketches: mean 0, deviation 1/sqrt(128), and far from the threshold."""
    values = np.stack([sketch("g", gaussian(i, 24, 32), key(i % 3)).values for i in range(300)])
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(300) for j in range(i) if i % 3 == j % 3][:5000]
    cosines = np.array([unit[i] @ unit[j] for i, j in pairs])
    assert abs(cosines.mean()) < 0.01
    assert 0.8 < cosines.std() * NUMBERS**0.5 < 1.2
    assert np.abs(cosines).max() < 0.75 * KIN


def test_trained_matrices_are_no_relatives_of_each_other() -> None:
    """Thirty layers of a real model: as near to each other as two real models of one shape could be."""
    if not (cache_dir() / "SmolLM2-135M-Instruct-v1").exists():
        pytest.skip("SmolLM2 is not in the cache")
    checkpoint = Checkpoint(smollm2())
    names = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(30) for kind in "qo"]
    layers = {name: sketch(name, checkpoint.read(name), KEY) for name in names}
    odd = [one for i, one in enumerate(layers.values()) if i // 2 % 2]
    even = [one for i, one in enumerate(layers.values()) if not i // 2 % 2]
    found = likeness(odd, even)
    assert (found.compared, found.close) == (30, 0)
    assert likeness(odd, layers.values()).same


def test_what_is_found_and_what_is_not() -> None:
    mine = model(1, SHAPES)
    same = compared(mine, mine)
    assert (same.groups, same.compared, same.close, same.distance) == (5, 5, 5, 0.0)
    assert same.same
    rounded = compared(mine, [(name, bfloat16(w)) for name, w in mine])
    assert rounded.same
    assert rounded.distance is not None
    assert 0 < rounded.distance < SAME / 2
    for size, close in ((0.01, 5), (0.05, 5), (0.2, 5), (0.5, 5), (5.0, 0)):
        tuned = [(name, w + scaled(gaussian(i, *w.shape), w, size)) for i, (name, w) in enumerate(mine)]
        assert compared(mine, tuned).close == close
        assert not compared(mine, tuned).same
    unrelated = compared(mine, model(2, SHAPES))
    assert (unrelated.compared, unrelated.close) == (5, 0)
    assert unrelated.distance is not None
    assert 1.1 < unrelated.distance < 1.7
    assert "none of 5 comparable groups" in str(unrelated)


def test_names_order_and_scale_hide_nothing() -> None:
    mine = model(1, SHAPES)
    renamed = [(f"transformer.h.{i}", w) for i, (_, w) in enumerate(reversed(mine))]
    assert compared(mine, renamed).same
    swapped = list(zip([name for name, _ in mine], [mine[i][1] for i in (2, 1, 3, 0, 4)], strict=True))
    assert compared(mine, swapped).same
    assert compared(mine, [(name, 3 * w) for name, w in mine]).same
    assert compared(mine[:2], mine).close == 2
    some = compared(mine, [mine[0], *model(2, SHAPES)[1:]])
    assert (some.close, some.same) == (1, True)
    assert "1 of 5 groups are the same" in str(some)


def test_what_cannot_be_compared() -> None:
    mine = model(1, SHAPES)
    for other in ([], model(1, [(7, 9)]), [(name, np.zeros_like(w)) for name, w in mine]):
        found = compared(mine, other)
        assert (found.compared, found.close, found.distance, found.same) == (0, 0, None, False)
        assert "nothing can be said" in str(found)
    assert compared([("zero", np.zeros((96, 64), np.float32))], mine).compared == 0
    assert likeness([], [Sketch("g", 1, 1, np.ones(NUMBERS, np.float32))]).compared == 0


def test_weights_are_read_once_for_all_keys() -> None:
    reads: list[str] = []

    def weights() -> list[tuple[str, Floats]]:
        reads.append("once")
        return model(1, SHAPES)

    found = of_weights(weights(), [KEY, key(1), KEY])
    assert (len(reads), set(found)) == (1, {KEY, key(1)})
    assert [one.name for one in found[KEY]] == [name for name, _ in model(1, SHAPES)]
