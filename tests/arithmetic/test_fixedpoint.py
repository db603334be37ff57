"""Fixed point: the rounding, and the bound that rules out overflow, at its edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sliplm.arithmetic import fixedpoint
from sliplm.arithmetic.field import P
from sliplm.errors import InputError

floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 20)), elements=floats),
    st.integers(4, 12),
)
def test_quantised_rows_are_within_half_a_step(w: np.ndarray, precision: int) -> None:
    integers, scale = fixedpoint.quantise_rows(w, precision)
    assert integers.dtype == (np.int8 if precision <= 8 else np.int16)
    assert np.abs(integers.astype(int)).max() <= 2 ** (precision - 1) - 1
    error = np.abs(w.astype(np.float64) - integers.astype(np.float64) * scale[:, None].astype(np.float64))
    usable = np.abs(w).max(axis=1) > 1e-30
    assert (error[usable] <= 0.5001 * scale[usable][:, None]).all()


def test_a_row_of_zeros_or_of_dust_has_a_scale() -> None:
    w = np.zeros((3, 4), np.float32)
    w[1] = np.float32(1e-44)
    integers, scale = fixedpoint.quantise_rows(w, 12)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert not integers.any()


@given(
    hnp.arrays(np.int16, st.tuples(st.integers(1, 8), st.integers(1, 20)), elements=st.integers(-2047, 2047))
)
def test_the_norm_bounds_every_row(w: np.ndarray) -> None:
    bound = fixedpoint.norm_bound(w)
    assert bound >= 1
    assert all(math.sqrt(sum(int(v) ** 2 for v in row)) <= bound for row in w)


@given(st.data())
def test_no_product_leaves_the_centred_range(data: st.DataObject) -> None:
    """The bound at its edge: inputs parallel to a row of the matrix, any size from dust to 1e30."""
    n = data.draw(st.integers(1, 64))
    w = data.draw(hnp.arrays(np.int16, (3, n), elements=st.integers(-2047, 2047)))
    size = data.draw(st.sampled_from([1e-40, 1e-20, 1.0, 1e10, 1e30]))
    parallel = data.draw(st.booleans())
    noise = data.draw(hnp.arrays(np.float32, n, elements=st.floats(-1, 1, width=32)))
    x = ((w[0] if parallel else noise).astype(np.float64) * size / 2048).astype(np.float32)
    limit = fixedpoint.scale_limit(fixedpoint.norm_bound(w), n)
    alpha = fixedpoint.row_alpha(x, limit)
    residues = [int(fixedpoint.to_field(v, alpha)) for v in x]
    integers = [v - P if v > P // 2 else v for v in residues]
    for row in w.tolist():
        assert abs(sum(a * b for a, b in zip(row, integers, strict=True))) <= (P - 1) // 2
    for value, integer in zip(x.tolist(), integers, strict=True):
        assert abs(alpha * value - integer) <= 0.5 + 1e-6 * abs(integer)


def test_special_inputs_have_their_alpha() -> None:
    assert fixedpoint.row_alpha(np.zeros(4, np.float32), 100.0) == 1.0
    for bad in (np.nan, np.inf, -np.inf):
        assert math.isnan(fixedpoint.row_alpha(np.array([1, bad, 2], np.float32), 100.0))
    huge = np.full(4, 3e38, np.float32)  # its square does not fit float32
    assert 0 < fixedpoint.row_alpha(huge, 100.0) < 1e-36


def test_a_matrix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(InputError, match="precision"):
        fixedpoint.scale_limit(2047 * math.sqrt(2.0**22), 2**22)
