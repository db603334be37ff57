"""The card's kernels: what needs no card on a card of numpy's, and all of it again on a real one."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fakecard import FakeCard
from fakecard import cards as real_cards
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels import placing
from sliplm.arithmetic.kernels.cuda import card as cards
from sliplm.arithmetic.kernels.cuda import compiling, driver, layout
from sliplm.arithmetic.kernels.cuda.matrix import CudaMatrix
from sliplm.arithmetic.kernels.cuda.tiles import (
    BANDS,
    Tile,
    band_of,
    candidates,
    cutting,
    multiplying,
    unpacking,
)
from sliplm.arithmetic.kernels.cuda.tuning import Tuning
from sliplm.errors import CardError, InputError, KernelError

LARGEST = {np.int8: 127, np.int16: 2047}
SHAPES = [(1, 1), (9, 33), (17, 96), (16, 300), (40, 515), (3, 2000), (700, 20)]
ROWS = [1, 2, 4, 5, 8, 9, 16, 17, 33, 64, 65, 130]
on_a_card = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not real_cards(), reason="needs an NVIDIA card: `make test-gpu` on a machine with one"
    ),
]
TILES = sorted(
    {
        (tile, packed, band)
        for packed in (False, True)
        for band in BANDS
        for tile in candidates(band, packed=packed, capability=90)
    },
    key=lambda each: (astuple(each[0]), each[1:]),
)


def fixed(matrix: object, band: int, packed: bool = False) -> Tile:
    """The first tile of every band."""
    return candidates(band, packed=matrix.packed, capability=90)[0]  # type: ignore[attr-defined]


# --- layout, limbs and bounds ------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60)
def test_planes_hold_the_weights(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.int8, np.int16]))
    m, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 600))
    w = data.draw(hnp.arrays(dtype, (m, n), elements=st.integers(-LARGEST[dtype], LARGEST[dtype])))
    high, low = layout.planes(w)
    assert high.shape == (m, layout.width_of(n)) and high.dtype == np.int8
    if low is None:
        whole = high.astype(np.int64)
        assert dtype is np.int8
    else:
        assert low.dtype == np.uint8
        whole = 16 * high.astype(np.int64) + np.hstack([low & 15, low >> 4])
    assert np.array_equal(whole[:, :n], w) and not whole[:, n:].any()
    size = layout.size_of((m, n), packed=low is not None)
    assert size == high.nbytes + (0 if low is None else low.nbytes)


@given(st.integers(0, P - 1) | st.sampled_from([0, P - 1, 0x7F7F7F7F, 0x7F7F7F80, P // 2]))
def test_the_bytes_of_a_sum_are_balanced_limbs(x: int) -> None:
    """The identity behind `programs.cut`, in Python's integers."""
    value = (x + 5) % 2**32 if x > 0x7F7F7F7F else x
    word = ((value + 0x80808080) % 2**32) ^ 0x80808080
    limbs = [(word >> 8 * k & 255) - (256 if word >> 8 * k & 128 else 0) for k in range(4)]
    assert all(-128 <= limb <= 127 for limb in limbs)
    assert sum(limb << 8 * k for k, limb in enumerate(limbs)) == (x if x <= 0x7F7F7F7F else x - P)


LARGEST_SUM = (16 * 128 + 15) * 128 * layout.MAX_COLUMNS


@given(
    st.lists(
        st.integers(-LARGEST_SUM, LARGEST_SUM) | st.sampled_from([LARGEST_SUM, -LARGEST_SUM]),
        min_size=4,
        max_size=4,
    )
)
def test_folding_reaches_the_field_in_64_bits(sums: list[int]) -> None:
    """`programs._folded`, in Python's integers: within int64, and one correction each way is enough."""
    total = sum(value << 8 * k for k, value in enumerate(sums))
    assert abs(total) < 2**63
    value = (total & 0xFFFFFFFF) + 5 * (total >> 32)
    value = value + P if value < 0 else value
    value = value - P if value >= P else value
    assert value == total % P


def test_sums_of_one_limb_fit_32_bits() -> None:
    assert 128 * 128 * layout.MAX_COLUMNS < 2**31
    assert layout.MAX_COLUMNS % layout.ALIGN == 0


def test_what_is_too_large_for_the_kernels_is_refused() -> None:
    with pytest.raises(CardError, match="too large"):
        layout.size_of((5, layout.MAX_COLUMNS + 1), packed=False)
    with pytest.raises(CardError, match="too large"):
        layout.size_of((layout.MAX_OUTPUTS + 1, 5), packed=True)


@given(st.integers(1, 5000))
def test_every_number_of_rows_has_its_band(rows: int) -> None:
    band = band_of(rows)
    assert band in BANDS and (rows <= band or band == BANDS[-1])
    assert all(other < rows for other in BANDS if other < band)


def test_tiles_divide_every_width() -> None:
    for tile, packed, band in TILES:
        columns = 4 * tile.bk if tile.bn == 0 else tile.bk
        assert tile.bn == 0 or layout.ALIGN // (2 if packed and not tile.whole else 1) % columns == 0
        assert band > 1 or tile.rows_a_block in (1, 4)


# --- a card of numpy's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_products_of_every_number_of_rows(
    dtype: type, m: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layout, order of the programs, recordings and chunks."""
    card = FakeCard(monkeypatch)
    matrix = CudaMatrix(card, kernels.known_operands(m, n, 1, LARGEST[dtype])[0].astype(dtype), fixed)
    for rows in [*ROWS, *ROWS]:  # again: what was recorded
        w, x = kernels.known_operands(m, n, rows, LARGEST[dtype])
        answer = matrix.product(x)
        assert answer.dtype == np.uint32 and answer.flags.c_contiguous
        assert np.array_equal(answer, kernels.known_answer(w, x)), rows
    out = np.empty((3, m), np.uint32)
    assert matrix.product(x[:3], out) is out and np.array_equal(out, answer[:3])
    assert matrix.product(np.empty((0, n), np.uint32)).shape == (0, m)


@pytest.mark.parametrize(("tile", "packed", "band"), TILES)
def test_every_tile(tile: Tile, packed: bool, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dtype = min(band, 70), np.int16 if packed else np.int8
    w, x = kernels.known_operands(9, 700, rows, LARGEST[dtype])
    matrix = CudaMatrix(FakeCard(monkeypatch), w.astype(dtype), lambda matrix, band: tile)
    assert np.array_equal(matrix.product(x), kernels.known_answer(w, x))


def test_a_product_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(monkeypatch)
    matrix = CudaMatrix(card, np.ones((4, 4), np.int8), fixed)
    for _ in range(3):
        matrix.product(np.ones((1, 4), np.uint32))
    assert card.asked == ["cut", "few"] * 2  # once to load, once to record


def tuning(card: FakeCard, limit: float = 100.0) -> Tuning:
    def build(w: np.ndarray, tile: Tile) -> CudaMatrix:
        return CudaMatrix(card, w, lambda matrix, band: tile)

    return Tuning(card, build, limit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIPLM_CACHE", str(tmp_path))
    return tmp_path


def times(monkeypatch: pytest.MonkeyPatch, favourite: int) -> None:
    """The candidate in this place is the fastest of every band."""

    def milliseconds(self: Tuning, matrix: CudaMatrix, tile: Tile, band: int) -> float:
        return abs(candidates(band, packed=matrix.packed, capability=90).index(tile) - favourite)

    monkeypatch.setattr(Tuning, "_milliseconds", milliseconds)


def test_the_fastest_tile_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = FakeCard(monkeypatch, stage=1 << 22)
    caplog.set_level(logging.INFO)
    times(monkeypatch, 1)
    matrix = CudaMatrix(card, np.ones((8, 8), np.int8), fixed)
    first = tuning(card)
    found = [first(matrix, band) for band in (1, 16)]
    assert found == [candidates(band, packed=False, capability=90)[1] for band in (1, 16)]
    assert caplog.text.count("measuring what is fastest on Fake 1") == 1
    first.keep()
    times(monkeypatch, 2)  # would be chosen if it were measured again
    again = tuning(card)
    assert [again(matrix, band) for band in (1, 16)] == found
    assert caplog.text.count("measuring") == 1
    for file in (cache / "cuda").iterdir():
        file.write_text('{"8x256 bytes 1": [9, 9, 9, 9, 9, false, false], "x": ')
    assert tuning(card)(matrix, 1) == candidates(1, packed=False, capability=90)[2]
    for file in (cache / "cuda").iterdir():
        file.write_text('{"8x256 bytes 1": [9, 9, 9, 9, 9, false, false]}')  # no candidate
    assert tuning(card)(matrix, 1) == candidates(1, packed=False, capability=90)[2]


def test_a_tile_with_wrong_products_is_passed_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the cache names, and one that would be the fastest."""
    card = FakeCard(monkeypatch, stage=1 << 22)
    times(monkeypatch, 0)
    matrix = CudaMatrix(card, np.ones((8, 8), np.int8), fixed)
    first = tuning(card)
    tiles = candidates(1, packed=False, capability=90)
    assert first(matrix, 1) == tiles[0]
    first.keep()
    card.wrong = {(tiles[0].warps, tiles[0].stages)}
    chosen = tuning(card)(matrix, 1)
    assert (chosen.warps, chosen.stages) not in card.wrong
    card.wrong = {(tile.warps, tile.stages) for tile in tiles}
    with pytest.raises(CardError, match="wrong products"):
        tuning(card)(matrix, 1)


def test_measuring_ends_in_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(monkeypatch, stage=1 << 22)
    times(monkeypatch, 2)
    late = tuning(card, limit=-1.0)
    matrix = CudaMatrix(card, np.ones((8, 8), np.int8), fixed)
    assert late(matrix, 1) == candidates(1, packed=False, capability=90)[0]
    late.keep()
    assert not (cache / "cuda").exists()


# --- which device ------------------------------------------------------------------------------------------


def test_the_words_for_devices() -> None:
    assert placing.cards_named("auto") is None
    assert placing.cards_named("cpu") == []
    assert placing.cards_named("cuda") == [0]
    assert placing.cards_named("cuda:1, cuda:0") == [1, 0]
    for word in ("", "gpu", "cuda:", "cuda:x", "cuda:1,", "cuda:0,cuda", "cpu,cuda", "cuda:-1", "cuda:64"):
        with pytest.raises(InputError, match="say auto, cpu, cuda"):
            placing.cards_named(word)


def test_groups_are_spread_over_the_cards() -> None:
    assert placing.spread([5, 5, 5], [20, 8]) == [0, 0, 0]
    assert placing.spread([5, 5, 5, 5], [13, 11]) == [0, 1, 0, 1]
    places = placing.spread([4, 4, 4, 4], [9, 9])
    assert sorted(places) == [0, 0, 1, 1]
    with pytest.raises(CardError, match=r"needs 3\.0 GB .* 2\.0 GB are free: name more cards"):
        placing.spread([3 * 10**9], [2 * 10**9])
    with pytest.raises(CardError, match=r"0\.0 GB are free"):
        placing.spread([1], [-5])


def one(device: str) -> kernels.Matrix:
    return placing.lay_out([np.ones((4, 4), np.int8)], device)[0]


def test_without_a_card_the_processor_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "count", lambda: 0)
    with caplog.at_level(logging.WARNING):
        assert one("auto").kernel == kernels.choose()
        assert one("cpu").kernel == kernels.choose()
    assert not caplog.records


def test_a_driver_that_does_not_start_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Library:
        """One that finds that the kernel's part is another version."""

        def __getattr__(self, name: str) -> object:
            return Failing()

    class Failing:
        argtypes: object = None

        def __call__(self, *arguments: object) -> int:
            return 803

    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Library())
    driver._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert one("auto").kernel == kernels.choose()
    assert "driver does not start: error 803" in caplog.text
    with pytest.raises(CardError, match="does not start"):
        one("cuda")
    driver._library.cache_clear()


def test_a_card_that_fails_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(number: int) -> cards.Card:
        raise CardError("the card failed: unspecified launch failure")

    monkeypatch.setattr(driver, "count", lambda: 1)
    monkeypatch.setattr(placing, "card", broken)
    with caplog.at_level(logging.WARNING):
        assert one("auto").kernel == kernels.choose()
    assert "on the processor, not on the card: the card failed" in caplog.text
    for named in ("cuda", "cuda:0"):
        with pytest.raises(CardError, match="launch failure"):
            one(named)
    assert one("cpu").kernel == kernels.choose()


def test_wrong_products_and_too_little_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = FakeCard(monkeypatch, stage=1 << 22)
    wrong.wrong = {(warps, stages) for warps in range(9) for stages in range(9)}
    small = FakeCard(monkeypatch, free=1 << 20, stage=1 << 22)
    monkeypatch.setattr(driver, "count", lambda: 2)
    monkeypatch.setattr(placing, "card", lambda number: (wrong, small)[number])
    with caplog.at_level(logging.WARNING):
        assert one("auto").kernel == kernels.choose()
    assert "gives wrong products" in caplog.text
    with pytest.raises(CardError, match="name more cards"):
        one("cuda:1")


def test_a_share_on_two_cards(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [FakeCard(monkeypatch, free=(256 << 20) + room, stage=1 << 22) for room in (5_000, 9_000)]
    monkeypatch.setattr(placing, "card", lambda number: both[number])
    matrices = [np.full((16, 256), k, np.int8) for k in range(3)]
    laid = placing.lay_out(matrices, "cuda:0,cuda:1")
    assert [matrix.card for matrix in laid] == [both[1], both[0], both[1]]
    for k, matrix in enumerate(laid):
        assert np.array_equal(matrix.product(np.ones((1, 256), np.uint32)), np.full((1, 16), 256 * k))


def test_without_triton_there_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.triton.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(CardError, match="pip install triton"):
        compiling.triton()
    compiling.triton.cache_clear()


@pytest.mark.skipif(real_cards() > 0, reason="this machine has a card")
def test_a_missing_card_is_said_to_be_missing() -> None:
    with pytest.raises(CardError, match=r"no NVIDIA driver|no card 0"):
        cards.Card(0)
    with pytest.raises(KernelError):
        one("cuda")


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed here")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tile", [(4, 0, 128, 1, 2), (64, 16, 64, 4, 4), (64, 32, 64, 4, 3, False, True)])
def test_programs_compile_without_a_card(tile: tuple[int, ...], capability: int) -> None:
    for program in (cutting(1024), unpacking(1024), *multiplying(Tile(*tile), packed=True)):
        made = compiling.compiled(program, aligned=False, capability=capability)
        assert made.binary[:4] == b"\x7fELF" and made.name == program.name
        assert made.shared <= 99 << 10


# --- on a card ---------------------------------------------------------------------------------------------


class TestOnACard:
    pytestmark = on_a_card

    @pytest.mark.parametrize(("tile", "packed", "band"), TILES)
    @pytest.mark.parametrize(("m", "n"), [(331, 1101), (512, 4096)])
    def test_every_tile(self, tile: Tile, packed: bool, band: int, m: int, n: int) -> None:
        card = cards.card(0)
        if tile not in candidates(band, packed=packed, capability=card.device.capability):
            pytest.skip("not for this card")
        rows, dtype = min(band, 200), np.int16 if packed else np.int8
        w, x = kernels.known_operands(m, n, rows, LARGEST[dtype])
        matrix = CudaMatrix(card, w.astype(dtype), lambda matrix, band: tile)
        assert np.array_equal(matrix.product(x), kernels.known_answer(w, x))

    @given(st.data())
    @settings(max_examples=60)
    def test_a_matrix_equals_the_reference(self, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from([np.int8, np.int16]))
        m, n, rows = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 150), st.integers(1, 80)))
        largest = LARGEST[dtype]
        weights = st.integers(-largest, largest) | st.sampled_from([largest, -largest])
        w = data.draw(hnp.arrays(dtype, (m, n), elements=weights))
        x = data.draw(hnp.arrays(np.uint32, (rows, n), elements=st.integers(0, P - 1) | st.just(P - 1)))
        matrix = CudaMatrix(cards.card(0), w, fixed)
        assert np.array_equal(matrix.product(x), kernels.prepare(w, kernel="reference").product(x))

    @pytest.mark.parametrize("dtype", [np.int8, np.int16])
    @pytest.mark.parametrize("shape", [(12288, 4096), (4096, 11008), (2560, 9728), (8192, 28672)])
    def test_shapes_of_real_models(self, dtype: type, shape: tuple[int, int], cache: Path) -> None:
        """Every output, at every band of rows, with tiles as they are chosen."""
        generator = np.random.default_rng(7)
        w = generator.integers(-LARGEST[dtype], LARGEST[dtype] + 1, shape, dtype)
        matrix = placing.lay_out([w], "cuda")[0]
        assert matrix.kernel == "cuda"
        other = kernels.prepare(w)
        for rows in (1, 3, 8, 16, 40, 300):
            x = generator.integers(0, P, (rows, shape[1]), np.uint32)
            assert np.array_equal(matrix.product(x), other.product(x)), rows

    @pytest.mark.parametrize("dtype", [np.int8, np.int16])
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("rows", [1, 3, 16, 64, 70])
    def test_the_largest_sums(self, dtype: type, sign: int, rows: int) -> None:
        """Every limb and every weight at its end of the range, over as many columns as there may be."""
        w = np.full((20, layout.MAX_COLUMNS), sign * LARGEST[dtype], dtype)
        x = np.full((rows, layout.MAX_COLUMNS), 0x7F7F7F7F, np.uint32)
        x[::2] = 0x7F7F7F80  # limbs of -128, but for the lowest
        matrix = CudaMatrix(cards.card(0), w, fixed)
        assert np.array_equal(matrix.product(x), kernels.known_answer(w.astype(np.int64), x))

    def test_from_several_threads(self) -> None:
        w, x = kernels.known_operands(200, 900, 48, 2047)
        matrix = CudaMatrix(cards.card(0), w.astype(np.int16), fixed)
        want, wrong = kernels.known_answer(w, x), list[int]()

        def ask(k: int) -> None:
            for rows in range(1, 17):
                if not np.array_equal(matrix.product(x[k : k + rows]), want[k : k + rows]):
                    wrong.append(rows)

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(0, 32, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)

    def test_no_program_needs_a_c_compiler(self, cache: Path, tmp_path: Path) -> None:
        """A process that finds none, with nothing compiled before."""
        code = (
            "import numpy as np; from sliplm.arithmetic.kernels.placing import lay_out;"
            "w, x = np.ones((32, 64), np.int8), np.ones((1, 64), np.uint32);"
            "print(lay_out([w], 'cuda')[0].product(x).sum())"
        )
        nothing = {"PATH": str(tmp_path), "CC": "/nonexistent", "TRITON_CACHE_DIR": str(tmp_path / "t")}
        environment = os.environ | nothing
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.stdout.split()[-1:] == ["2048"], done.stderr


def lands(card: object, matrix: CudaMatrix, x: np.ndarray) -> np.ndarray:
    """`across`, from the card's memory to the card's memory."""
    m, rows = matrix.shape[0], len(x)
    there, out = driver.Memory(x.nbytes), driver.Memory(4 * rows * m)
    there.write(0, x)
    matrix.across(there.address, out.address, rows)
    got = driver.Pinned(4 * rows * m)
    driver.call("cuMemcpyDtoHAsync_v2", got.address, out.address, 4 * rows * m, None)
    matrix.card.lanes[0].stream.wait()
    return got.elements(rows, m).copy()


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("rows", [1, 5, 130, 200])
def test_from_memory_of_the_card_to_memory_of_the_card(
    monkeypatch: pytest.MonkeyPatch, dtype: type, rows: int
) -> None:
    """Also where it takes several chunks, of rows alike."""
    generator = np.random.default_rng(rows)
    w = generator.integers(-LARGEST[dtype], LARGEST[dtype], (40, 90), dtype, endpoint=True)
    x = generator.integers(0, P, (rows, 90), np.uint32)
    card = FakeCard(monkeypatch, stage=1 << 13)
    monkeypatch.setattr(card.lanes[0], "limbs", driver.Memory(1 << 16))
    matrix = CudaMatrix(
        card, w, lambda matrix, band: candidates(band, packed=dtype is np.int16, capability=90)[0]
    )
    assert np.array_equal(lands(card, matrix, x), kernels.prepare(w).product(x))


def test_pinned_memory_is_used_again_and_never_twice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCard(monkeypatch)
    rooms: driver.Rooms = {}
    first, second = (driver.pinned_elements(3, 4, rooms) for _ in range(2))
    first[:], second[:] = 1, 2
    part = first[1:]
    address = driver.pinned_address(first)
    assert driver.pinned_address(part) == address + 16 and not np.shares_memory(first, second)
    assert (
        driver.pinned_address(first[:, :2]) is None
        and driver.pinned_address(np.zeros((2, 2), np.uint32)) is None
    )
    del first
    third = driver.pinned_elements(3, 4, rooms)
    assert driver.pinned_address(third) != address and (part == 1).all()  # rows of it are still used
    del part
    fourth = driver.pinned_elements(3, 4, rooms)
    assert driver.pinned_address(fourth) == address and (second == 2).all()
