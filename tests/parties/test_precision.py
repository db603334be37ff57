"""What rounding an input to integers costs: little with outliers that the diagonal takes, else counted,
warned of once, refused where nothing is left.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from sliplm.arithmetic import kernels
from sliplm.arithmetic.fixedpoint import input_loss, norm_bound, scale_limit
from sliplm.errors import InputError, PrecisionError, SlipWarning
from sliplm.parties.codec import LOSSY, Asked, GroupCodec
from sliplm.shares.publicbase import split_base
from sliplm.shares.splitting import GroupSplit, split_group


def gaussian(m: int, n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((m, n)) / np.sqrt(n)).astype(np.float32)


def product(parts: GroupSplit, x: np.ndarray, finer: float = 1.0) -> tuple[np.ndarray, GroupCodec, Asked]:
    """The quantised product, with `finer` times the scale alpha, and what the codec knows of it."""
    codec = GroupCodec(parts.secrets)
    codec.limit *= finer
    out = np.empty((len(x), codec.m), np.float32)
    return out, codec, codec.here(x, out, kernels.prepare(parts.w).product)


def error(parts: GroupSplit, weight: np.ndarray, x: np.ndarray) -> float:
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    return float(np.linalg.norm(product(parts, x)[0] - exact) / np.linalg.norm(exact))


def split(weight: np.ndarray, precision: int, kind: str) -> GroupSplit:
    if kind == "base":
        return split_base("g", weight, precision)
    return split_group("g", weight, rank=8, precision=precision, rotation=kind)


@pytest.mark.parametrize("kind", ["fast", "haar", "base"])
@pytest.mark.parametrize("precision", [8, 12])
@pytest.mark.parametrize("factor", [100.0, 1000.0])
def test_outliers_that_the_weights_make_up_for_cost_nothing(kind: str, precision: int, factor: float) -> None:
    """Channels times f where they are made, over f where they are read; and rows that make the next ones."""
    weight, x = gaussian(160, 120), gaussian(8, 120, 1)
    usual = error(split(weight, precision, kind), weight, x)
    changed, outliers = weight.copy(), x.copy()
    changed[:, [3, 50, 51]] /= np.float32(factor)
    outliers[:, [3, 50, 51]] *= np.float32(factor)
    assert error(split(changed, precision, kind), changed, outliers) < 1.2 * usual
    changed[[7, 90]] *= np.float32(factor)  # its own outputs are the next layer's outliers
    exact = outliers.astype(np.float64) @ changed.T.astype(np.float64)
    out = product(split(changed, precision, kind), outliers)[0]
    wrong = np.linalg.norm(out - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert np.median(wrong) < 1.3 * usual  # row by row: the large ones take nothing from the others
    assert wrong.max() < 8 * usual  # some outputs are small, in a random basis; stolen bits cost `factor`


def test_an_ordinary_input_loses_next_to_nothing_and_is_not_counted() -> None:
    weight, x = gaussian(160, 576), gaussian(64, 576, 1)
    parts = split(weight, 12, "fast")
    out, codec, asked = product(parts, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codec.judge(asked) == 0
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert asked.losses.max() < 3e-4
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 1e-3


def test_the_expected_error_is_the_measured_one() -> None:
    """With a coarse input (few bits left) the rounding of x is all of the error."""
    weight, x = gaussian(400, 300), gaussian(64, 300, 1)
    parts = split(weight, 12, "fast")
    out = product(parts, x)[0]
    coarse, codec, asked = product(parts, x, 5e-4)  # far fewer bits than there is room for
    measured = np.linalg.norm(coarse - out, axis=1) / np.linalg.norm(out, axis=1)
    assert np.allclose(asked.losses[:, 0].mean(), measured.mean(), rtol=0.05)
    assert asked.losses[:, 0].min() > LOSSY
    with pytest.warns(SlipWarning, match="rows_lossy"):
        assert codec.judge(asked) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codec.judge(asked) == 64  # counted again, said once


def test_an_entry_of_a_hundred_thousand_times_the_rest_is_counted() -> None:
    weight, x = gaussian(160, 576), np.sign(gaussian(3, 576, 1))
    x[1, 100] = 1e5
    _, codec, asked = product(split(weight, 12, "fast"), x)
    with pytest.warns(SlipWarning, match="precision=8"):
        assert codec.judge(asked) == 1
    _, codec, asked = product(split(weight, 8, "fast"), x)  # the advice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codec.judge(asked) == 0


def test_an_answer_of_which_nothing_is_left_is_refused() -> None:
    """The plain split has no diagonal: what its dead column multiplies takes all bits of the rest."""
    weight, x = gaussian(160, 576), gaussian(3, 576, 1)
    weight[:, 100] = 0
    x[1, 100] = 1e8
    parts = split_group("g", weight, rank=8, precision=12, rotation="none")
    _, codec, asked = product(parts, x)
    with pytest.raises(PrecisionError, match="nothing of the rest"):
        codec.judge(asked)
    for kind in ("fast", "base"):  # here the column's factor is 0
        out, codec, asked = product(split(weight, 12, kind), x)
        assert codec.judge(asked) == 0
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        assert np.linalg.norm(out - exact) < 1e-3 * np.linalg.norm(exact)


def test_what_cannot_lose_anything_is_not_counted() -> None:
    one_hot = np.zeros((2, 64), np.float32)
    one_hot[0, 5] = 3  # nothing beside the largest entry
    one_hot[1, 5], one_hot[1, 6] = 1, 1e-9  # float32 loses that too
    for weight in (gaussian(40, 64), np.zeros((40, 64), np.float32)):
        _, codec, asked = product(split(weight, 12, "fast"), one_hot)
        assert codec.judge(asked) == 0
    _, codec, asked = product(split(gaussian(40, 64), 12, "fast"), np.zeros((2, 64), np.float32))
    assert not asked.losses.any()
    # of few outputs one may be small by chance
    narrow = split_group("g", gaussian(4, 64), rank=1, precision=12, rotation="fast")
    _, codec, asked = product(narrow, np.zeros((2, 64), np.float32))
    asked.losses, asked.worst = np.array([[0.9, 0.0], [0.9, np.inf]]), np.inf
    assert codec.judge(asked) == 0


@pytest.mark.parametrize("kind", ["fast", "haar", "none"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_product_near_the_end_of_the_field_is_refused_in_a_secret_basis(kind: str, rows: int) -> None:
    """Of an input that knows the basis, and a scale that lets it come there: M64."""
    parts = split(gaussian(60, 300), 12, kind)
    row = int(np.argmax(np.square(parts.w.astype(np.int64)).sum(axis=1)))
    aligned = parts.secrets.rotation_in().apply_transpose(parts.w[row : row + 1].astype(np.float32))
    aligned /= np.square(parts.secrets.d_in)  # D_in came along
    x = gaussian(rows, 300, 1)
    x[-1] = aligned / np.float32(np.linalg.norm(aligned))
    reaches = norm_bound(parts.w) / parts.secrets.norm  # of ROOM
    for size, refused in ((0.86, False), (0.89, kind != "none"), (0.99, kind != "none")):
        _, codec, asked = product(parts, x, size / reaches)
        if refused:
            with pytest.raises(PrecisionError, match="left the field"):
                codec.judge(asked)
        else:
            assert codec.judge(asked) == 0


def test_a_million_columns() -> None:
    """At 12 bits an input of 2^20 columns keeps under three bits: said; at 8 bits it keeps seven."""
    n = 2**20
    x = gaussian(1, n)
    ones = np.ones(n, np.float32)
    for precision, lossy in ((12, True), (8, False)):
        rms = (2 ** (precision - 1) - 1) / 5.3  # of a Gaussian row, whose largest entry is 5.3 of them
        norm = rms * np.sqrt(n)
        alpha = scale_limit(norm, n) / np.linalg.norm(x.astype(np.float64))
        loss = input_loss(x[0], ones, alpha)
        assert (loss > LOSSY) == lossy
    with pytest.raises(InputError, match="no room"):
        scale_limit(2047 / 5.3 * np.sqrt(8 * n), 8 * n)
