"""The vault's steps on a card, against the processor's: in Triton's interpreter, and on a real card."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from fakecard import FakeCard
from interpretedcard import KINDS, InterpretedCard, fetched, open_card
from sliplm.arithmetic import field, rotation, steps
from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels.cuda import driver, vault_layout, vault_steps
from sliplm.arithmetic.kernels.cuda.vault_layout import Laid
from sliplm.arithmetic.kernels.cuda.vault_steps import Asked, CardRows, Desk
from sliplm.errors import CardError

SHAPES = [(1, 1), (5, 3), (16, 32), (33, 48), (96, 80), (130, 257)]
REAL = [(12288, 4096), (4096, 11008), (22016, 4096), (6144, 2560), (2560, 9728)]
LIMIT, NOISE = 1.5e5, 3.0


@pytest.fixture(params=KINDS)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return open_card(request.param, monkeypatch)


class Scene:
    """A group's secrets and a message's numbers, for both kinds of steps."""

    def __init__(self, card: Any, m: int, n: int, rank: int, kind: str, rows: int) -> None:
        self.generator = np.random.default_rng(m + n)
        normal, elements = self.generator.standard_normal, self.generator.integers
        self.m, self.n, self.rows = m, n, rows
        self.d_in, self.d_out = (np.exp2(normal(k) / 2).astype(np.float32) for k in (n, m))
        key = bytes(range(32))
        self.into = rotation.make(kind, field.derive_key(key, "in"), n, self.d_in)
        self.out = rotation.make(kind, field.derive_key(key, "out"), m, self.d_out)
        self.scale = np.exp2(normal(m)).astype(np.float32)
        self.a, self.b = normal((m, rank)).astype(np.float32), normal((rank, n)).astype(np.float32)
        self.x = normal((rows, n)).astype(np.float32)
        self.words = elements(0, P, (rows, n + 3), np.uint32)
        self.c, self.e = elements(0, P, (2, n), np.uint32), elements(0, P, (2, m), np.uint32)
        self.u = elements(0, P, (rows, m), np.uint32)
        self.product = elements(-(2**30), 2**30, (rows, m))
        self.y = ((self.u.astype(np.int64) + self.product) % P).astype(np.uint32)
        self.laid = Laid(card, self.into, self.out, self.d_in, self.scale, self.a, self.b, LIMIT, NOISE)
        self.steps = steps.laid_out(self.into, self.out, self.d_in, self.scale, P // 2)
        self.desk, self.card = Desk(card), card
        self.there = self.laid.put(self.c)
        self.desk.begin(0)

    def on_card(self, array: np.ndarray, kind: str = "float32") -> CardRows:
        memory = driver.Memory(array.nbytes)
        memory.write(0, array)
        self.laid._held.append(memory)
        return CardRows(self.card, 0, memory.address, *array.shape, kind)

    def check(self, laid: Laid) -> None:
        claims, pads = self.desk.claims(self.y, self.y.nbytes), self.desk.pads([self.u[:1], self.u[1:]])
        self.desk.brought()
        self.desk.check(laid, len(self.y), claims, pads, laid.put(self.e))

    def fetched(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return fetched(self.card, address, shape, dtype)


def scene_of(card: Any, m: int, n: int, *, rank: int = 3, kind: str = "fast", rows: int = 2) -> Scene:
    return Scene(card, m, n, rank, kind, rows)


def shapes(card: Any) -> list[tuple[int, int]]:
    return SHAPES if isinstance(card, InterpretedCard) else SHAPES + REAL


def test_masks_are_those_of_the_processor(card: Any) -> None:
    """Of a batch's key, from any row on."""
    desk, key = Desk(card), bytes(range(100, 132))
    desk.begin(0)
    for n, first, rows in ((1, 0, 1), (13, 5, 3), (1000, 2**30, 2)):
        words = desk.made([(key, 70000, first, rows), (key[::-1], 70000, 9, 2)], n)
        want = field.uniform_words(key, 70000, first, rows, n)
        want = np.concatenate([want, field.uniform_words(key[::-1], 70000, 9, 2, n)])
        assert np.array_equal(fetched(card, words.address, want.shape, np.uint32), want)


def test_the_standard_vectors_of_aes(card: Any) -> None:
    """NIST SP 800-38A, F.5.5: AES-256 in counter mode."""
    desk = Desk(card)
    desk.begin(0)
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    words = vault_steps.driver.Memory(64)
    desk._program(vault_steps.Program("masked", (("BLOCK", 16),), 4))(
        (1, 1),
        (desk._round_keys(key), words.address, 2, 0xF0F1F2F3, 0xF4F5F6F7, 0xF8F9FAFB, 0xFCFDFEFF),
        0,
    )
    made = fetched(card, words.address, (32,), np.uint8)
    assert bytes(made ^ np.frombuffer(plain, np.uint8)) == cipher


def test_a_mask_with_a_word_that_is_no_element_is_told(card: Any) -> None:
    scene = scene_of(card, 8, 48)
    for place, found in ((47, Asked.REJECTED), (48, Asked.READY)):
        words = scene.words.copy()
        words[1, place] = P
        scene.desk.ask(scene.laid, scene.on_card(scene.x), scene.desk.given(words), send=True)
        assert scene.desk.asked(2) is found


@pytest.mark.parametrize("kind", ["fast", "none"])
def test_a_message_is_that_of_the_processor_but_for_rounding(card: Any, kind: str) -> None:
    """Within one of the processor's integers: floats before the rounding are summed in another order."""
    for m, n in shapes(card):
        scene = scene_of(card, m, n, kind=kind)
        x = scene.on_card(scene.x)
        scene.desk.ask(scene.laid, x, scene.desk.given(scene.words), send=True)
        scene.desk.wait()
        hidden = np.empty((2, n), np.uint32)
        assert scene.desk.asked(2) is Asked.READY
        scene.desk.sent(hidden)
        expected, alpha = np.empty((2, n), np.uint32), np.empty(2)
        assert steps.ask(*scene.steps, LIMIT, scene.x, scene.words, expected, alpha, 0, 2)
        difference = field.centre(((hidden.astype(np.int64) - expected) % P).astype(np.uint32))
        assert np.abs(difference).max() <= 1, (m, n)
        assert (np.abs(difference) > 0).mean() < 0.1, (m, n)
        got = scene.fetched(scene.desk.memory("alpha", 0), (2,), np.float64)
        np.testing.assert_allclose(got, alpha, rtol=1e-6)
        assert np.array_equal(scene.fetched(scene.desk.memory("hidden", 0), (2, n), np.uint32), hidden)


def test_a_row_of_zeros_shows_its_mask_and_what_is_not_finite_is_told(card: Any) -> None:
    scene = scene_of(card, 8, 48)
    scene.x[0], hidden = 0, np.empty((2, 48), np.uint32)
    scene.desk.ask(scene.laid, scene.on_card(scene.x), scene.desk.given(scene.words), send=True)
    scene.desk.wait()
    assert scene.desk.asked(2) is Asked.READY
    scene.desk.sent(hidden)
    assert np.array_equal(hidden[0], scene.words[0, :48])
    for bad in (np.nan, np.inf, -np.inf):
        scene.x[1, 7] = bad
        scene.desk.ask(scene.laid, scene.on_card(scene.x), scene.desk.given(scene.words), send=True)
        scene.desk.wait()
        assert scene.desk.asked(2) is Asked.NOT_FINITE


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_the_check_is_exact(card: Any, rows: int) -> None:
    """Sums of elements, with the largest ones among them: as field's own, bit for bit."""
    for m, n in shapes(card):
        scene = scene_of(card, m, n, rows=rows)
        scene.e[0], scene.c[1], scene.y[-1], scene.words[0] = P - 1, P - 1, P - 1, P - 1
        scene.there = scene.laid.put(scene.c)
        x = scene.on_card(scene.x)
        scene.desk.ask(scene.laid, x, scene.desk.given(scene.words), send=True)
        scene.desk.expect(scene.laid, x, scene.there)
        scene.check(scene.laid)
        scene.desk.wait()
        hidden = scene.fetched(scene.desk.memory("hidden", 0), (rows, n), np.uint32)
        sums = np.empty((rows, 2), np.uint64)
        field.expect(scene.c, hidden, sums, 0, rows)
        found = scene.desk._integers("expected", 4 * rows).reshape(rows, 2, 2)
        assert [[(int(lo) + (int(hi) << 32)) % P for lo, hi in row] for row in found] == sums.tolist()
        pieces = -(-m // vault_layout.PIECE)
        records = scene.desk._integers("records", 6 * rows * pieces).reshape(rows, pieces, 6)
        field.expect(scene.e, scene.y, sums, 0, rows)
        got = records[:, :, :4].sum(1).reshape(rows, 2, 2)
        assert [[(int(lo) + (int(hi) << 32)) % P for lo, hi in row] for row in got] == sums.tolist()
        plain = scene.fetched(scene.desk.memory("plain", 0), (rows, m), np.int32)
        want = field.centre(((scene.y.astype(np.int64) - scene.u) % P).astype(np.uint32))
        assert np.array_equal(plain, want)
        assert not scene.desk.verdict(rows, m)[0]  # of numbers that have nothing to do with each other
        assert scene.desk.verdict(rows, m)[1] == np.abs(want).max()


def test_few_rows_lose_their_masks_on_the_way_to_the_card(card: Any) -> None:
    scene = scene_of(card, 33, 48)
    scene.y[0, :2], scene.u[0, :2] = (0, P - 1), (P - 1, 0)
    want = field.centre(((scene.y.astype(np.int64) - scene.u) % P).astype(np.uint32))
    assert scene.desk.unmasked(scene.y, scene.u) == np.abs(want).max()
    scene.desk.wait()
    assert np.array_equal(scene.fetched(scene.desk.memory("plain", 0), (2, 33), np.int32), want)


def test_the_verdict() -> None:
    """A right answer passes, and not one that differs in a challenge's sum, or has an entry that is none."""
    right = vault_steps._verdict
    expected = np.array([[5, 1, 7, 0]], np.int64)
    records = np.array([[[4, 0, 7, 0, 9, 3], [6, 0, 0, 0, 1, 8]]], np.int64)  # 2^32 is 5 mod p
    assert right(records, expected) == (True, 8)
    for place, value in (((0, 0, 0), 5), ((0, 1, 2), 1), ((0, 1, 4), P), ((0, 0, 1), 1)):
        other = records.copy()
        other[place] = value
        assert not right(other, expected)[0]


@pytest.mark.parametrize("kind", ["fast", "none"])
@pytest.mark.parametrize("rows", [1, 17])
def test_an_answer_is_that_of_the_processor_but_for_rounding(card: Any, kind: str, rows: int) -> None:
    for m, n in shapes(card):
        scene = scene_of(card, m, n, kind=kind, rows=rows)
        x, desk, laid = scene.on_card(scene.x), scene.desk, scene.laid
        out = scene.on_card(np.full((rows, m), np.nan, np.float32))
        desk.ask(laid, x, scene.desk.given(scene.words), send=True)
        desk.low_rank(laid, x, laid.a, laid.b, laid.rank, 0, m, add=False)
        desk.expect(laid, x, scene.there)
        scene.check(laid)
        desk.opened(laid, out)
        desk.wait()
        got = scene.fetched(out.address, (rows, m), np.float32)
        want, alpha, losses = np.zeros((rows, m), np.float32), np.empty(rows), np.empty((rows, 2))
        hidden, expected = np.empty((rows, n), np.uint32), np.empty((rows, 2), np.uint64)
        steps.ask(*scene.steps, LIMIT, scene.x, scene.words, hidden, alpha, 0, rows)
        kept = np.ascontiguousarray(scene.a.T), scene.b
        steps.ahead(
            *scene.steps, *kept, scene.c, scene.e, scene.x, hidden, alpha, want, expected, losses, 0, rows
        )
        steps.opened(*scene.steps, NOISE, scene.y, scene.u, alpha, want, losses, 0, rows)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
        np.testing.assert_allclose(desk.losses(rows), losses, rtol=1e-4)


def test_half_precision_is_that_of_float32_rounded(card: Any) -> None:
    torch = pytest.importorskip("torch")
    m, n = 33, 48
    for kind in ("bfloat16", "float16"):
        dtype = getattr(torch, kind)
        outs = []
        half = torch.from_numpy(scene_of(card, m, n).x).to(dtype)
        for name, x in ((kind, half.view(torch.int16).numpy()), ("float32", half.float().numpy())):
            scene = scene_of(card, m, n)
            rows, size = scene.on_card(x, name), np.int16 if name == kind else np.float32
            out = scene.on_card(np.zeros((2, m), size), name)
            scene.desk.ask(scene.laid, rows, scene.desk.given(scene.words), send=True)
            scene.desk.low_rank(scene.laid, rows, scene.laid.a, scene.laid.b, 3, 0, m, add=False)
            scene.desk.expect(scene.laid, rows, scene.there)
            scene.check(scene.laid)
            scene.desk.opened(scene.laid, out)
            scene.desk.wait()
            outs.append(torch.from_numpy(scene.fetched(out.address, (2, m), size)))
        got, want = outs[0].view(dtype), outs[1].to(dtype)
        if kind == "bfloat16" and isinstance(card, InterpretedCard):  # which cuts where a card rounds
            assert torch.allclose(got, want, rtol=2**-7)
        else:
            assert torch.equal(got, want)


def test_an_adapter_is_added_to_its_outputs_alone(card: Any) -> None:
    scene = scene_of(card, 40, 48, rank=0)
    x, desk, laid = scene.on_card(scene.x), scene.desk, scene.laid
    a, b = np.ones((2, 16), np.float32), scene.generator.standard_normal((2, 48)).astype(np.float32)
    desk.low_rank(laid, x, laid.a, laid.b, 0, 0, 40, add=False)
    for _ in range(2):
        desk.low_rank(laid, x, laid.put(a), laid.put(b), 2, 16, 16, add=True)
    low = scene.fetched(desk.memory("low", 0), (2, 40), np.float32)
    want = np.zeros((2, 40), np.float32)
    want[:, 16:32] = 2 * (scene.x @ b.T).sum(1, keepdims=True)
    np.testing.assert_allclose(low, want, atol=1e-4)


def test_a_row_of_which_nothing_is_left_is_nothing(card: Any) -> None:
    """M51, where the host learns of it only with the next wait: none of its numbers can be used meanwhile."""
    scene = scene_of(card, 32, 48)
    scene.x[1] = 0
    scene.x[1, 0], scene.x[1, 1] = 1e4, 1e-3
    scene.y[:] = scene.u  # an answer of zeros
    ones = np.ones(48, np.float32)
    laid = Laid(card, scene.into, scene.out, ones, scene.scale, scene.a * 0, scene.b, 30, 9)
    scene.y[0, 0] = (int(scene.u[0, 0]) + 2**30) % P
    scene.y[1, 0] = (int(scene.u[1, 0]) + 1) % P
    x, out = scene.on_card(scene.x), scene.on_card(np.zeros((2, 32), np.float32))
    scene.desk.ask(laid, x, scene.desk.given(scene.words), send=True)
    scene.desk.low_rank(laid, x, laid.a, laid.b, 3, 0, 32, add=False)
    scene.desk.expect(laid, x, scene.there)
    scene.check(laid)
    scene.desk.opened(laid, out)
    scene.desk.wait()
    got = scene.fetched(out.address, (2, 32), np.float32)
    losses = scene.desk.losses(2)
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all(), losses
    assert (losses[1] > 0.5).all()


def test_activations_lie_in_parts() -> None:
    rows = CardRows(None, 0, 1000, 10, 7, "bfloat16")  # type: ignore[arg-type]
    part = rows[3:20]
    assert (part.address, part.rows, part.shape, part.size, part.nbytes) == (1042, 7, (7, 7), 49, 196)


def test_haar_has_no_program() -> None:
    with pytest.raises(CardError, match="haar"):
        vault_layout.forth(rotation.make("haar", bytes(32), 8))


def test_what_is_laid_out_for_a_card_stays_hidden() -> None:
    turned = rotation.make("fast", bytes(32), 8)
    for found in (vault_layout.forth(turned), vault_layout.back(turned)):
        assert repr(found) == str(found) == "Turned(8, hidden)"


def test_a_thread_keeps_no_secrets_of_a_group_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is quick with is forgotten with the group: a closed vault's secrets leave the card."""
    card: Any = FakeCard(monkeypatch)
    monkeypatch.setattr(card, "prepared", lambda program, *, aligned: lambda *asked: None, raising=False)
    monkeypatch.setattr(driver, "call", lambda *_: None)
    scene = scene_of(card, 8, 48)
    desk, gone = scene.desk, weakref.ref(scene.laid)
    desk.ask(scene.laid, scene.on_card(scene.x), desk.given(scene.words), send=True)
    del scene
    gc.collect()
    assert gone() is None


def test_a_copy_to_a_card_is_there_before_any_stream_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a copy of ordinary memory the driver may return before the card has it; PyTorch's other streams
    do not wait for the rest, and of a key that is not there they would make other masks than were dealt.
    """
    asked: list[str] = []
    monkeypatch.setattr(driver, "call", lambda name, *_: asked.append(name))
    memory = object.__new__(driver.Memory)
    memory.address, memory.size = 4096, 64
    memory.write(0, np.zeros(16, np.uint32))
    assert asked == ["cuMemcpyHtoD_v2", "cuStreamSynchronize"]
