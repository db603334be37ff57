"""Z_p against Python integers, uniform sampling, and the soundness of the check."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sliplm.arithmetic import field
from sliplm.arithmetic.field import P

elements = st.integers(0, P - 1)
edges = st.sampled_from([0, 1, P - 1, P // 2, P // 2 + 1, 2**31, 2**31 - 1, 2**16])
element = st.one_of(elements, edges)


def vector(n: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint32, n, elements=element)


def test_p_is_the_largest_32_bit_prime() -> None:
    def prime(n: int) -> bool:
        return all(n % d for d in range(2, math.isqrt(n) + 1))

    assert prime(P)
    assert not any(prime(n) for n in range(P + 1, 2**32))


@given(element)
def test_centre_and_residues_are_inverse(value: int) -> None:
    one = np.array([value], np.uint32)
    centred = field.centre(one)
    assert abs(int(centred[0])) <= (P - 1) // 2
    assert field.residues(centred)[0] == value


@given(element, element)
def test_add_and_subtract(a: int, b: int) -> None:
    assert int(field.add_mod(np.uint64(a), np.uint64(b))) == (a + b) % P
    difference = int(field.sub_centred(np.uint32(a), np.uint32(b)))
    assert difference % P == (a - b) % P
    assert abs(difference) <= (P - 1) // 2


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(vector(n), vector(n))))
def test_dot_is_exact(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert int(field.dot(a, b)) == sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) % P


def test_dot_of_extremes_does_not_overflow() -> None:
    n = 200_000
    full = np.full(n, P - 1, np.uint32)
    assert int(field.dot(full, full)) == n % P


@pytest.mark.parametrize(("dtype", "largest"), [(np.int8, 127), (np.int16, 2047)])
def test_challenge_products_are_exact(dtype: type, largest: int) -> None:
    m, n = 70_000, 3  # more rows than one partial sum holds
    e = np.full((2, m), P - 1, np.uint32)
    e[1, ::2] = 12345
    w = np.full((m, n), largest, dtype)
    w[:, 1] = -largest
    w[::3, 2] = 0
    expected = [
        [sum(int(a) * int(b) for a, b in zip(row, w[:, j], strict=True)) % P for j in range(n)] for row in e
    ]
    assert field.challenge_products(e, w).tolist() == expected


@given(st.integers(0, 2**63), st.integers(1, 40), st.integers(1, 30))
def test_a_row_of_the_key_stream_depends_on_its_number_alone(stream: int, n: int, rows: int) -> None:
    key = bytes(range(32))
    together = field.uniform_rows(key, stream, 5, rows, n)
    for i in range(rows):
        assert np.array_equal(together[i], field.uniform_rows(key, stream, 5 + i, 1, n)[0])
    assert int(together.max()) < P


def test_words_above_p_are_rejected_in_order() -> None:
    words = np.arange(12, dtype=np.uint32).reshape(1, 12)
    words[0, 2], words[0, 4] = P, 2**32 - 1
    assert field._drop_rejected(words, 6)
    assert words[0, :6].tolist() == [0, 1, 3, 5, 6, 7]
    spoiled = np.full((1, 12), P, np.uint32)
    assert not field._drop_rejected(spoiled, 6)


def test_uniform_rows_are_uniform_by_bytes() -> None:
    words = np.ascontiguousarray(field.uniform_rows(field.new_key(), 1, 0, 64, 4096))
    counts = np.bincount(words.view(np.uint8).ravel(), minlength=256)
    expected = words.nbytes / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 255 + 8 * math.sqrt(2 * 255)  # eight standard deviations


def test_different_streams_keys_and_rows_differ() -> None:
    key = field.new_key()
    a = field.uniform_rows(key, 1, 0, 2, 64)
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a, field.uniform_rows(key, 2, 0, 2, 64))
    assert not np.array_equal(a, field.uniform_rows(field.new_key(), 1, 0, 2, 64))


@given(st.data())
def test_the_check_accepts_right_products_and_no_wrong_one(data: st.DataObject) -> None:
    m, n, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    w = data.draw(hnp.arrays(np.int16, (m, n), elements=st.integers(-2047, 2047)))
    x = data.draw(hnp.arrays(np.uint32, (rows, n), elements=element))
    e = np.ascontiguousarray(field.uniform_rows(field.new_key(), 0, 0, 2, m))
    c = field.challenge_products(e, w)
    y = np.array(
        [[sum(int(a) * int(b) for a, b in zip(r, v, strict=True)) % P for r in w] for v in x], np.uint32
    )
    assert field.accepts(e, c, x, y)
    i, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, m - 1))
    wrong = y.copy()
    wrong[i, j] = (int(y[i, j]) + data.draw(st.one_of(st.just(1), st.just(2**31), st.integers(1, P - 1)))) % P
    assert not field.accepts(e, c, x, wrong)


def test_a_right_product_that_is_no_canonical_element_is_refused() -> None:
    w = np.array([[1]], np.int16)
    e = np.array([[3], [5]], np.uint32)
    c = field.challenge_products(e, w)
    x = np.array([[2]], np.uint32)
    assert field.accepts(e, c, x, np.array([[2]], np.uint32))
    assert not field.accepts(e, c, x, np.array([[2 + P]], np.uint64).astype(np.uint32) * 0 + np.uint32(P))
    one = np.array([[0]], np.uint32)
    assert not field.accepts(e, c, one, np.array([[P]], np.uint32))  # p stands for 0, but is not 0
