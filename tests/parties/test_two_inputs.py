"""`inputs=2`: what rounding leaves of an input travels as a second row, masked and checked like the first."""

from __future__ import annotations

import operator
import warnings
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P
from sliplm.arithmetic.fixedpoint import ROOM
from sliplm.arithmetic.lowrank import add_low_rank
from sliplm.errors import InputError, PrecisionError, SlipWarning, VerificationError
from sliplm.parties.codec import GroupCodec
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.protocol.frames import ELEMENT
from sliplm.shares.splitting import GroupSplit
from test_precision import gaussian, split
from test_vault import Logging, Repeating, Rogue, Shares, add, folder, group, inputs, serving, shares  # noqa: F401


def product(parts: GroupSplit, x: np.ndarray, rows: int) -> tuple[np.ndarray, int]:
    """The quantised product with so many rows for each input, and how many lost precision."""
    codec = GroupCodec(parts.secrets)
    out = np.empty((len(x), codec.m), np.float32)
    return out, codec.judge(codec.here(x, out, kernels.prepare(parts.w).product, inputs=rows))


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


# --- the arithmetic ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(8, 40), n=st.integers(8, 60), rows=st.integers(1, 5), seed=st.integers(0, 2**31),
    kind=st.sampled_from(["fast", "haar", "base"]), precision=st.sampled_from([4, 8, 12]),
    outlier=st.sampled_from([1.0, 1e3, 1e6]),
)  # fmt: skip
def test_the_product_is_the_plain_formula_in_rational_numbers(
    m: int, n: int, rows: int, seed: int, kind: str, precision: int, outlier: float
) -> None:
    """Bit for bit; and both rows of x~, put together, are the input to a part of the finer step."""
    parts = split(gaussian(m, n, seed), precision, kind)
    secrets, x = parts.secrets, gaussian(rows, n, seed + 1)
    x[0, seed % n] *= np.float32(outlier)
    out = np.empty((rows, m), np.float32)
    multiply = kernels.prepare(parts.w).product
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlipWarning)
        asked = GroupCodec(secrets).here(x, out, multiply, inputs=2)
    z, limit = secrets.rotation_in().apply(x), ROOM / secrets.norm - np.sqrt(n) / 2
    unmasked = np.empty_like(out)
    for i in range(rows):
        coarse, fine = asked.alpha[i], asked.alpha[rows + i]
        sizes = [coarse * Fraction(float(v)) for v in z[i]]
        whole = [round(v) for v in sizes]  # ties to even, as rint
        rest = [float(v - w) for v, w in zip(sizes, whole, strict=True)]
        assert all(Fraction(r) == v - w for r, v, w in zip(rest, sizes, whole, strict=True)), "no bit is lost"
        finer = [int(v) for v in np.rint(fine / coarse * np.array(rest))]
        for integers in (whole, finer):
            assert np.linalg.norm(np.array(integers, np.float64)) <= limit + np.sqrt(n) / 2
        pairs = [[sum(map(operator.mul, w, row)) for row in (whole, finer)] for w in parts.w.tolist()]
        assert max(map(abs, chain(*pairs))) <= P // 2
        for j, (first, second) in enumerate(pairs):
            both = np.float64(first) * (1 / coarse) + np.float64(second) * (1 / fine)
            unmasked[i, j] = np.float32(np.float64(secrets.scale[j]) * both)
    expected = np.zeros_like(out)
    add_low_rank(np.ascontiguousarray(secrets.a.T), secrets.b, x, expected, 0, 0, rows)
    expected += secrets.rotation_out().apply_transpose(unmasked)
    assert np.array_equal(out, expected)


def exactly(parts: GroupSplit, x: np.ndarray) -> np.ndarray:
    """The product of the same integers w with the input as it was turned, in float64."""
    secrets = parts.secrets
    z = secrets.rotation_in().apply(x).astype(np.float64)
    turned = (z @ parts.w.T.astype(np.float64)) * secrets.scale
    back = secrets.rotation_out().apply_transpose(np.eye(secrets.m, dtype=np.float32)).astype(np.float64)
    return turned @ back + x.astype(np.float64) @ secrets.b.T.astype(np.float64) @ secrets.a.T.astype(
        np.float64
    )


@pytest.mark.parametrize("kind", ["fast", "haar", "none"])
def test_rounding_an_input_costs_a_hundredth_of_what_it_did(kind: str) -> None:
    parts, x = split(gaussian(300, 576), 8 if kind == "none" else 12, kind), gaussian(16, 576, 1)
    exact = exactly(parts, x)
    one, two = (distance(product(parts, x, rows)[0], exact) for rows in (1, 2))
    assert one > 1e-6
    assert two < max(one / 100, 1e-6)  # which is float32's


@pytest.mark.parametrize("kind", ["fast", "haar"])
def test_an_entry_of_a_million_times_the_rest_leaves_the_rest_its_bits(kind: str) -> None:
    """Nothing makes up for it: its column is as large as the others."""
    parts, x = split(gaussian(160, 576), 12, kind), gaussian(3, 576, 1) * np.float32(np.sqrt(576))
    usual = np.linalg.norm(exactly(parts, x)[1])  # what the rest of the input gives
    x[1, 100] = 1e6
    exact = exactly(parts, x)[1]
    with pytest.warns(SlipWarning, match="inputs=2"):
        one, lossy = product(parts, x, 1)
    assert lossy == 1
    assert np.linalg.norm(one[1] - exact) > usual / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two, lossy = product(parts, x, 2)
    assert lossy == 0
    assert np.linalg.norm(two[1] - exact) < usual / 20  # float32 of an answer of some 40,000 times that


def test_what_one_row_refuses_two_answer() -> None:
    weight, x = gaussian(160, 576), gaussian(3, 576, 1)
    weight[:, 100] = 0
    x[1, 100] = 1e6
    parts = split(weight, 12, "none")
    with pytest.raises(PrecisionError, match=r"nothing of the rest.*inputs=2"):
        product(parts, x, 1)
    out, lossy = product(parts, x, 2)
    assert lossy == 0
    assert distance(out[1], x[1].astype(np.float64) @ weight.T.astype(np.float64)) < 1e-3
    x[1, 100] = 1e13  # more than two rows hold: said without the advice that was taken
    with pytest.raises(PrecisionError, match=r"depends; split again"):
        product(parts, x, 2)


def test_what_has_no_remainder_loses_nothing() -> None:
    """Zeros, and inputs that are whole after the scale: their second row is zero, and is not counted."""
    parts, x = split(gaussian(40, 64), 12, "none"), np.zeros((3, 64), np.float32)
    x[1, 5], x[2, 7] = 3, 2.0**-30
    codec = GroupCodec(parts.secrets)
    out = np.empty((3, 40), np.float32)
    asked = codec.here(x, out, kernels.prepare(parts.w).product, inputs=2)
    assert not asked.hidden[3:].any()
    assert np.isfinite(asked.alpha).all()
    assert codec.judge(asked) == 0
    assert asked.losses[:, 0].max() < 1e-6


# --- through a socket --------------------------------------------------------------------------------


def test_products_equal_the_quantised_model_exactly(shares: Shares, tmp_path: Path) -> None:
    """Every group, one row and many, masked and through a socket; each row was sent as two."""
    local, worker = LocalProducts(*shares, inputs=2), Logging(shares[1])
    with (
        serving(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=4, inputs=2)) as vault,
    ):
        sent = 0
        for name, secrets in shares[0].groups.items():
            for rows in (1, 3, 40):
                x = inputs(shares, name, rows)
                assert np.array_equal(vault.product(name, x), local.product(name, x))
                assert worker.messages[-1][1].shape == (2 * rows, secrets.n)
                sent += 2 * rows * (secrets.n + secrets.m) * ELEMENT
        asked = [(name, inputs(shares, name, 2)) for name in shares[0].groups]
        for y, (name, x) in zip(vault.products(asked), asked, strict=True):
            assert np.array_equal(y, local.product(name, x))
        counted = vault.counters
        assert counted.rows == 2 * (1 + 3 + 40 + 2) * len(asked)
        sent += sum(4 * (s.n + s.m) * ELEMENT for s in shares[0].groups.values())
        assert counted.bytes_sent + counted.bytes_received == sent
        with pytest.raises(InputError, match="NaN"):
            vault.product(asked[0][0], np.full_like(asked[0][1], np.nan))


def test_one_row_is_as_it_was(shares: Shares, group: str) -> None:
    x = inputs(shares, group, 5)
    one, two = LocalProducts(*shares), LocalProducts(*shares, inputs=2)
    assert np.array_equal(one.product(group, x), LocalProducts(*shares, inputs=1).product(group, x))
    assert not np.array_equal(one.product(group, x), two.product(group, x))
    assert distance(one.product(group, x), two.product(group, x)) < 1e-2


def test_what_exceeds_a_frame_is_cut(shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never between an input and its remainder; where they fit no frame together, that is said."""
    widest = ELEMENT * max(max(s.m, s.n) for s in shares[0].groups.values())
    local, asked = LocalProducts(*shares, inputs=2), [(n, inputs(shares, n, 20)) for n in shares[0].groups]
    for frame, fits in ((8 * widest, True), (3 * widest, True), (widest, False)):
        monkeypatch.setattr("sliplm.protocol.side.FRAME_BYTES", frame)
        worker = Logging(shares[1])
        with (
            serving(worker, tmp_path / str(frame)) as address,
            Vault(shares[0], Terms([address], shares[1], ahead=0, inputs=2)) as vault,
        ):
            if not fits:
                name = max(asked, key=lambda one: max(one[1].shape[1], shares[0].groups[one[0]].m))[0]
                for rows in (1, 20):
                    with pytest.raises(InputError, match="inputs=1"):
                        vault.product(name, inputs(shares, name, rows))
                continue
            for y, (name, x) in zip(vault.products(asked), asked, strict=True):
                assert np.array_equal(y, local.product(name, x))
            for name, x in asked:
                assert np.array_equal(vault.product(name, x), local.product(name, x))
            assert all(len(message) % 2 == 0 for _, message in worker.messages)


def test_masks_are_taken_and_dealt_for_both_rows(shares: Shares, group: str, tmp_path: Path) -> None:
    """`ahead` and `deal` speak of inputs: none is dealt late."""
    with (
        serving(Logging(shares[1]), tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=8, inputs=2)) as vault,
    ):
        assert vault.wait_dealt(60)
        vault.product(group, inputs(shares, group, 8))
        vault.deal(20, [group])
        vault.product(group, inputs(shares, group, 20))
        vault.deal(5)
        assert vault.counters.rows_dealt_late == 0
        assert vault.counters.rows == 56


def test_padding_fills_up_what_is_sent(shares: Shares, group: str, tmp_path: Path) -> None:
    worker, local = Logging(shares[1]), LocalProducts(*shares, inputs=2)
    with (
        serving(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0, inputs=2, pad_to=4)) as vault,
    ):
        for rows in (2, 3, 4, 5):
            x = inputs(shares, group, rows)
            assert np.array_equal(vault.product(group, x), local.product(group, x))
    assert [len(message) for _, message in worker.messages] == [8, 8, 8, 16]


@pytest.mark.parametrize("place", [(0, 0), (3, 0), (5, -1)])
def test_a_wrong_answer_in_one_of_both_rows_is_caught(
    shares: Shares, group: str, place: tuple[int, int], tmp_path: Path
) -> None:
    """Of 3 inputs, 6 rows: in a first one, in second ones.  The next worker gets the same bytes (M8)."""
    bad, good = Rogue(shares[1], add(1, place)), Logging(shares[1])
    with serving(bad, tmp_path / "a") as first, serving(good, tmp_path / "b") as second:
        with Vault(shares[0], Terms([first, second], shares[1], ahead=0, inputs=2)) as vault:
            x, local = inputs(shares, group, 3), LocalProducts(*shares, inputs=2)
            assert np.array_equal(vault.product(group, x), local.product(group, x))
            assert list(vault.quarantined) == [first]
            assert vault._codecs[0]._challenges.number == 1
    assert np.array_equal(bad.messages[0][1], good.messages[0][1])


def test_nothing_of_a_wrong_answer_is_used(shares: Shares, group: str, tmp_path: Path) -> None:
    with serving(Rogue(shares[1], add(1, (1, 0))), tmp_path / "a") as address:
        with Vault(shares[0], Terms([address], shares[1], ahead=0, inputs=2)) as vault:
            with pytest.raises(VerificationError, match="is wrong"):
                vault.product(group, inputs(shares, group, 1))


def test_computed_here_is_the_same_product(shares: Shares, group: str, tmp_path: Path) -> None:
    local, x = LocalProducts(*shares, inputs=2), inputs(shares, group, 3)
    with serving(Rogue(shares[1], add(1, (4, 2))), tmp_path / "a") as address:
        terms = Terms([address], shares[1], ahead=0, inputs=2, fallback="here")
        with Vault(shares[0], terms) as vault:
            assert np.array_equal(vault.product(group, x), local.product(group, x))
            assert vault.counters.rows_here == 6


@pytest.mark.parametrize("bad", [0, 3, -1, True, 2.0, "2", None])
def test_other_numbers_of_rows_are_refused(shares: Shares, bad: object) -> None:
    with pytest.raises(InputError, match="1 or 2"):
        Terms(["unix:/x"], shares[1], inputs=bad)
    with pytest.raises(InputError, match="1 or 2"):
        LocalProducts(*shares, inputs=bad)
