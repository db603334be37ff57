"""A group split by PyTorch on a device: as good as by numpy, and as exact.  On the processor here, and where
there is a card, on it too.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sliplm
from fakecard import cards
from sliplm.arithmetic import dense, dense_rotation, likely
from sliplm.arithmetic.equilibration import localisation
from sliplm.arithmetic.field import accepts, challenge_products
from sliplm.arithmetic.fixedpoint import norm_bound, quantise_rows
from sliplm.arithmetic.rotation import Fast
from sliplm.errors import CardError, CheckpointError, InputError, RecipeError, SlipWarning
from sliplm.shares import oncard, splitting
from sliplm.shares.publicbase import split_difference
from sliplm.shares.splitter import FEW, Splitter
from sliplm.shares.splitting import CHALLENGE_SETS, GroupSplit, direction_error

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(
                not cards() or not torch.cuda.is_available(),
                reason="needs an NVIDIA card and PyTorch for CUDA: `make test-gpu` on a machine with both",
            ),
        ],
    ),
]
on_devices = pytest.mark.parametrize("device", [*DEVICES])


def weights(m: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(min(m, n)) / 5)
    u = np.linalg.qr(rng.standard_normal((m, len(decay))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(decay))))[0]
    return ((u * decay) @ v.T + 0.01 * rng.standard_normal((m, n))).astype(np.float32)


def split(
    weight: np.ndarray, device: str = "cpu", rank: int = 4, precision: int = 12, rotation: str = "fast"
):
    return oncard.split_group(
        "g", weight, rank=rank, precision=precision, rotation=rotation, device=torch.device(device)
    )


def here(weight: np.ndarray, rank: int = 4, precision: int = 12, rotation: str = "fast") -> GroupSplit:
    return splitting.split_group("g", weight, rank=rank, precision=precision, rotation=rotation)


def rebuilt(parts: GroupSplit) -> np.ndarray:
    """A B + D_out Q_out^T (s w) Q_in D_in, by the vault's own rotations."""
    secrets = parts.secrets
    hidden = parts.w.astype(np.float32) * secrets.scale[:, None]
    half = secrets.rotation_in().apply_transpose(np.ascontiguousarray(hidden))
    rest = secrets.rotation_out().apply_transpose(np.ascontiguousarray(half.T)).T
    return secrets.a @ secrets.b + rest


@on_devices
@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 100, 577])
def test_rows_turn_as_on_the_processor(n: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "AT_ONCE", 4 * n)  # in several slices
    turn = Fast(bytes(32), n)
    by = dense_rotation.tables(turn, torch.device(device))
    x = np.random.default_rng(n).standard_normal((11, n)).astype(np.float32)
    for theirs, ours in ((dense_rotation.forth, turn.apply), (dense_rotation.back, turn.apply_transpose)):
        assert np.allclose(theirs(dense.taken(x, by.signs.device), by).cpu().numpy(), ours(x), atol=1e-5)
    for kind in ("fast", "haar", "none"):
        weight = np.random.default_rng(n).standard_normal((7, n)).astype(np.float32)
        turned = dense_rotation.rotated(dense.taken(weight, by.signs.device), kind, bytes(32), b"1" * 32)
        inner = splitting.make_rotation(kind, b"1" * 32, n).apply(weight)
        outer = splitting.make_rotation(kind, bytes(32), 7).apply(np.ascontiguousarray(inner.T)).T
        assert np.allclose(turned.cpu().numpy(), outer, atol=1e-5)


@on_devices
def test_rows_of_a_rotation_are_as_even_as_on_the_processor(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for m in (1, 5, 64, 700):
        monkeypatch.setattr(dense_rotation, "AT_ONCE", 100 * m)
        found = dense_rotation.unevenness(bytes(32), m, torch.device(device))
        assert np.allclose(found, likely.unevenness(bytes(32), m), rtol=1e-3)


@given(st.integers(1, 70), st.integers(1, 70), st.data())
@settings(max_examples=40)
def test_both_parts_together_are_the_weight(m: int, n: int, data: st.DataObject) -> None:
    weight = weights(m, n)
    rank = data.draw(st.integers(0, min(m, n, 8)))
    precision = data.draw(st.integers(4, 12))
    kind = data.draw(st.sampled_from(["fast", "haar", "none"]))
    parts = split(weight, "cpu", rank, precision, kind)
    assert parts.w.dtype == (np.int8 if precision <= 8 else np.int16) and parts.w.flags.c_contiguous
    assert np.abs(parts.w.astype(int)).max(initial=0) <= 2 ** (precision - 1) - 1
    step = float(parts.secrets.scale.max())
    wrong = rebuilt(parts) - weight
    assert np.abs(wrong).max() <= step * np.sqrt(m * n) + 1e-5
    assert np.linalg.norm(wrong) <= 0.6 * step * np.sqrt(m * n) + 1e-5


@on_devices
@pytest.mark.parametrize(("m", "n"), [(150, 100), (100, 150), (128, 128)])
@pytest.mark.parametrize("rotation", ["fast", "haar", "none"])
def test_a_split_is_as_good_as_the_processors(m: int, n: int, rotation: str, device: str) -> None:
    weight = weights(m, n)
    parts, usual = split(weight, device, 8, 8, rotation), here(weight, 8, 8, rotation)
    ours, theirs = parts.secrets, usual.secrets
    assert np.allclose(ours.a @ ours.b, theirs.a @ theirs.b, atol=1e-5)
    assert np.allclose(ours.b @ ours.b.T, np.eye(8), atol=1e-5)
    assert np.allclose(np.linalg.svd(ours.b @ theirs.b.T, compute_uv=False), 1, atol=1e-5)
    assert np.allclose(ours.d_out, theirs.d_out, rtol=1e-4) and np.allclose(ours.d_in, theirs.d_in, rtol=1e-4)
    assert parts.svd_error < 1e-5
    assert parts.localisation == pytest.approx(usual.localisation, abs=0.02)
    assert parts.error == pytest.approx(usual.error, rel=0.1)
    assert ours.noise == pytest.approx(theirs.noise, rel=0.05)
    assert ours.norm == pytest.approx(theirs.norm, rel=0.5)
    lost = [float(np.linalg.norm(rebuilt(one) - weight)) for one in (parts, usual)]
    assert lost[0] == pytest.approx(lost[1], rel=0.1)


@on_devices
@pytest.mark.parametrize("spread", [0, 4])
def test_one_matrix_has_the_processors_integers_and_room(spread: int, device: str) -> None:
    rng = np.random.default_rng(spread)
    hidden = rng.standard_normal((200, 300)).astype(np.float32)
    hidden[:, 0] *= np.float32(np.exp(spread))
    w, scale = quantise_rows(hidden, 8)
    x = dense.taken(hidden, torch.device(device))
    found = dense.in_integers(x, 8)
    assert np.array_equal(found.scale, scale) and np.abs(found.w.astype(int) - w).max() <= 1
    norm = oncard._norm(x, found, "fast", bytes(32))
    assert norm == pytest.approx(likely.likely_norm(hidden, w, scale, "fast", bytes(32)), rel=1e-3)
    assert oncard._norm(x, found, "none", bytes(32)) == pytest.approx(norm_bound(w), rel=1e-3)


@on_devices
def test_the_challenges_are_those_of_the_integers(device: str) -> None:
    parts = split(weights(20, 30), device, 2)
    x = np.array([[1] + [0] * 29], np.uint32)
    y = np.mod(parts.w[:, :1].T.astype(np.int64), 4294967291).astype(np.uint32)
    for number in range(CHALLENGE_SETS):
        e, c = parts.secrets.challenges(number), parts.secrets.challenge_products(number)
        assert np.array_equal(c, challenge_products(e, parts.w))
        assert accepts(e, c, x, y) and not accepts(e, c, x, np.roll(y, 1))
    again = split(weights(20, 30), device, 2)
    assert again.secrets.seed != parts.secrets.seed and not np.array_equal(again.w, parts.w)


@on_devices
@pytest.mark.parametrize("rotation", ["fast", "none"])
@pytest.mark.parametrize(("factor", "row"), [(1e-30, 0), (1, 1e15), (1, 1e20), (1, 3e37), (1, 3e38)])
def test_sizes_whose_squares_leave_float32_hide_as_much(
    factor: float, row: float, rotation: str, device: str
) -> None:
    weight = weights(24, 40) * np.float32(factor)
    if row:
        weight[3] = row
    parts = split(weight, device, rotation=rotation)
    b = parts.secrets.b / np.linalg.norm(parts.secrets.b, axis=1, keepdims=True)
    assert np.allclose(b @ b.T, np.eye(4), atol=1e-5)
    assert parts.error < 1e-3 and parts.svd_error < 1e-5
    left = np.linalg.svd(weight.astype(float) - parts.secrets.a.astype(float) @ parts.secrets.b)[1]
    true = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    assert left[0] < 1.01 * true[4] + 1e-6 * true[0]


@on_devices
@pytest.mark.parametrize(("m", "n"), [(50, 30), (30, 50)])
def test_dead_rows_and_columns_are_kept_out_and_filled(m: int, n: int, device: str) -> None:
    weight = weights(m, n)
    weight[:, 3], weight[:, 8], weight[5] = 0, weight[:, 8] * 1e-9, 0
    parts, usual = split(weight, device, 7), here(weight, 7)
    assert not parts.secrets.b[:, [3, 8]].any()
    for ours, theirs in (
        (parts.secrets.d_out, usual.secrets.d_out),
        (parts.secrets.d_in, usual.secrets.d_in),
    ):
        assert np.array_equal(ours == 0, theirs == 0)
        assert np.allclose(ours, theirs, rtol=1e-4)
    assert parts.secrets.d_in[3] == 0 and parts.secrets.d_out[5] == 0
    assert not rebuilt(parts)[:, 3].any()
    level = dense.taken(weight, torch.device(device))
    dense.equilibrate(level)
    filled = level.cpu().numpy()
    assert 0.5 < np.linalg.norm(filled[5]) / np.sqrt(n) < 2
    assert dense.localisation(level, 0) == pytest.approx(localisation(filled, 0), abs=1e-3)


@on_devices
def test_the_randomised_decomposition_is_nearly_as_good(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(300, 200)
    best = np.linalg.norm(weight - np.linalg.multi_dot(splitting.top_triplets(weight, 16)))
    monkeypatch.setattr(splitting, "EXACT_SVD", 10)
    a, b = oncard.top_triplets(weight, 16, torch.device(device))
    assert np.allclose(b @ b.T, np.eye(16), atol=1e-4)
    assert np.linalg.norm(weight - a @ b) <= 1.005 * best
    assert direction_error(weight, a, b) < 0.1
    assert split(weight, device).localisation == 0


@on_devices
def test_slices_make_no_difference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, whole = weights(60, 90), split(weights(60, 90), device)
    for module in (dense, dense_rotation):
        monkeypatch.setattr(module, "AT_ONCE", 700)
    parts = split(weight, device)
    assert np.allclose(parts.secrets.a @ parts.secrets.b, whole.secrets.a @ whole.secrets.b, atol=1e-6)
    assert np.allclose(rebuilt(parts), weight, atol=0.01)


@on_devices
def test_bad_weights_are_refused_and_zeros_split(device: str) -> None:
    weight = weights(8, 6)
    with pytest.raises(RecipeError, match="rank 7"):
        split(weight, device, 7)
    with pytest.raises(CheckpointError, match=r"g: its largest values, near 3e[+]38, leave float32"):
        split(np.sign(weights(24, 40)) * np.float32(3.4e38), device)
    weight[3, 2] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        split(weight, device)
    parts = split(np.zeros((8, 6), np.float32), device, 2)
    assert not parts.w.any() and parts.error == 0 and parts.svd_error == 0


@pytest.mark.parametrize("step", ["forth", "squared", "triplets"])
def test_what_a_card_spoils_is_not_written(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(60, 90)
    split(weight)
    if step == "forth":
        monkeypatch.setattr(dense_rotation, "forth", lambda x, by: x)
    elif step == "squared":
        plain = dense.in_integers
        monkeypatch.setattr(
            dense, "in_integers", lambda x, bits: (found := plain(x, bits))._replace(w=np.roll(found.w, 1, 0))
        )
    else:
        monkeypatch.setattr(dense, "subtract", lambda x, a, b: None)
    with pytest.raises(CardError, match="what it made of g does not give its products"):
        split(weight)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=60)
def test_no_honest_split_is_taken_for_spoilt(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    spread = data.draw(st.sampled_from([0, 1, 10, 30]))
    rows, columns = (np.exp2(rng.uniform(-spread, spread, k)) for k in (m, n))
    weight = (rng.standard_normal((m, n)) * rows[:, None] * columns).astype(np.float32)
    weight *= np.float32(2.0 ** data.draw(st.integers(-60, 60)))
    weight[rng.random((m, n)) < data.draw(st.sampled_from([0, 0.5, 0.97]))] = 0
    kind = data.draw(st.sampled_from(["fast", "haar", "none"]))
    split(weight, "cpu", min(m, n, data.draw(st.integers(0, 4))), data.draw(st.integers(4, 12)), kind)


@on_devices
@pytest.mark.parametrize(("m", "n"), [(50, 30), (30, 50), (4, 4)])
def test_squared_singular_values_are_the_processors(m: int, n: int, device: str) -> None:
    weight = weights(m, n)
    found = oncard.squared_values(weight, torch.device(device))
    assert np.allclose(found, splitting.squared_values(weight), rtol=1e-6, atol=1e-9)


# --- who chooses -----------------------------------------------------------------------------------------


def test_words_that_are_no_device_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    for word in ("gpu", "cuda:x", "", "cuda:0,cuda:0"):
        with pytest.raises(InputError, match="say auto, cpu, cuda"):
            sliplm.split(tmp_path / "none", tmp_path / "out", device=word)
    with pytest.raises(InputError, match="a split uses one card"):
        Splitter("cuda:0,cuda:1")
    with pytest.raises(CardError, match=r"no card|build without CUDA"):
        sliplm.split(tmp_path / "none", tmp_path / "out", device="cuda:63")


def on(device: str, *, insists: bool) -> Splitter:
    splitter = Splitter("cpu")
    splitter._card, splitter._insists = torch.device(device), insists
    return splitter


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "cpu has too little memory free for g"),
        (RuntimeError("cusolver error: 7\nmore"), r"cpu failed on g \(cusolver error: 7\)"),
    ],
)
def test_a_card_that_fails_is_an_error_or_a_warning(
    failure: RuntimeError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    weight = np.random.default_rng(0).standard_normal((4, FEW // 4)).astype(np.float32)
    monkeypatch.setattr(oncard, "split_group", fail)
    with pytest.raises(CardError, match=said):
        on("cpu", insists=True).split_group("g", weight, rank=1, precision=8, rotation="none")
    splitter = on("cpu", insists=False)
    with pytest.warns(SlipWarning, match=f"{said}; it is split on the processor"):
        parts = splitter.split_group("g", weight, rank=1, precision=8, rotation="none")
    assert parts.error < 0.01
    with warnings.catch_warnings():  # small ones are not worth a card
        warnings.simplefilter("error")
        splitter.split_group("g", weight[:, :100].copy(), rank=1, precision=8, rotation="none")


def test_of_a_fine_tune_the_difference_is_decomposed_there() -> None:
    base, change = weights(40, 60), weights(40, 60, 1)
    parts, _ = split_difference(
        "g", base + change, base, rank=5, precision=12, splitter=on("cpu", insists=True)
    )
    usual, _ = split_difference("g", base + change, base, rank=5, precision=12)
    assert np.array_equal(parts.w, usual.w)
    assert np.allclose(parts.secrets.a @ parts.secrets.b, usual.secrets.a @ usual.secrets.b, atol=1e-5)


@on_devices
def test_a_model_that_was_split_there_computes_what_it_did(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 24)).eval(), torch.randn(3, 48)
    if device == "cpu":
        monkeypatch.setattr("sliplm.engines.torch.convert.Splitter", lambda word: on(word, insists=True))
    sliplm.split_module(module, x, tmp_path, sliplm.Recipe(rank=4), device=device)
    with (
        sliplm.open_module(
            nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 24)).eval(), tmp_path, ahead=0
        ) as opened,
        torch.no_grad(),
    ):
        assert torch.allclose(opened(x), module(x), atol=1e-2)
