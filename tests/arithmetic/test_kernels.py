"""Every kernel, bit for bit, against Python integers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sliplm import forks
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels import amx, vnni
from sliplm.arithmetic.kernels.threads import _pool, default_threads, in_parallel
from sliplm.errors import KernelError

FAST = [
    pytest.param("amx", marks=pytest.mark.skipif(not amx.available(), reason="the processor has no AMX")),
    pytest.param(
        "vnni", marks=pytest.mark.skipif(not vnni.available(), reason="the processor has no AVX-512 VNNI")
    ),
    "portable",
]
LARGEST = {np.int8: 127, np.int16: 2047}


@pytest.mark.parametrize("kernel", FAST)
@given(st.data())
@settings(max_examples=60)
def test_a_kernel_equals_the_reference(kernel: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.int8, np.int16]))
    m, n, rows = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 150)), data.draw(st.integers(1, 40))
    weights = st.one_of(
        st.integers(-LARGEST[dtype], LARGEST[dtype]), st.sampled_from([LARGEST[dtype], -LARGEST[dtype]])
    )
    w = data.draw(hnp.arrays(dtype, (m, n), elements=weights))
    x = data.draw(hnp.arrays(np.uint32, (rows, n), elements=st.one_of(st.integers(0, P - 1), st.just(P - 1))))
    answer = kernels.prepare(w, kernel=kernel, threads=2).product(x)
    assert answer.dtype == np.uint32
    assert answer.flags.c_contiguous
    assert np.array_equal(answer, kernels.prepare(w, kernel="reference").product(x))


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize(
    ("m", "n", "rows"),
    [
        (1030, 576, 1),
        (515, 4096, 70),
        (5, 20_000, 3),
        (3, 65, 2),
        (4099, 64, 300),
        (1, 576, 16),
        (7, 513, 15),
        (9, 1025, 17),
        (100, 600, 33),
        (13, 8300, 27),
        (31, 70_000, 11),
        (3072, 576, 8),
        (1030, 1536, 5),
        (517, 4097, 7),
        (257, 11_008, 64),
    ],
)
def test_large_shapes_and_worst_cases(kernel: str, dtype: type, m: int, n: int, rows: int) -> None:
    """Many threads, several cache blocks, tails of every kind, and sums as large as they get."""
    w, x = kernels.known_operands(m, n, rows, LARGEST[dtype])
    answer = kernels.prepare(w.astype(dtype), kernel=kernel).product(x)
    assert np.array_equal(answer, kernels.known_answer(w, x))


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("rows", [*range(1, 35), 63, 64, 65, 75, 80, 128, 139])
def test_every_number_of_rows(kernel: str, dtype: type, rows: int) -> None:
    """Blocks of 4, 8 and 16, full and filled up, single rows, and several groups of blocks."""
    w, x = kernels.known_operands(25, 640, rows, LARGEST[dtype])
    answer = kernels.prepare(w.astype(dtype), kernel=kernel, threads=3).product(x)
    assert answer.flags.c_contiguous
    assert np.array_equal(answer, kernels.known_answer(w, x))


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("rows", [3, 4, 8, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums(kernel: str, dtype: type, rows: int, sign: int) -> None:
    """Every limb at its largest and every weight of one sign, beyond what a 32-bit lane can sum."""
    w = np.full((9, 66_000), sign * LARGEST[dtype], dtype)
    x = np.full((rows, 66_000), (1022 << 22) + (1 << 22) - 1, np.uint32)
    x[0] = P - 1
    answer = kernels.prepare(w, kernel=kernel).product(x)
    assert np.array_equal(answer, kernels.known_answer(w.astype(np.int64), x))


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("rows", [2, 4, 8, 16])
def test_operands_of_every_kind_of_memory(kernel: str, rows: int, tmp_path: Path) -> None:
    w, x = kernels.known_operands(10, 128, rows, 2047)
    np.save(tmp_path / "w.npy", w.astype(np.int16))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    received = np.frombuffer(x.tobytes(), np.uint32).reshape(x.shape)
    for w_kind in (mapped, np.asfortranarray(mapped), mapped[::-1]):
        for x_kind in (x, received, np.asfortranarray(x)):
            answer = kernels.prepare(w_kind, kernel=kernel).product(x_kind)
            assert np.array_equal(answer, kernels.known_answer(w_kind.astype(np.int64), x))
    assert x.flags.writeable


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("rows", [1, 5, 7, 16, 27])
@pytest.mark.parametrize(("m", "n"), [(24, 128), (25, 100)])
def test_a_product_is_written_where_it_is_wanted_and_nowhere_else(
    kernel: str, dtype: type, rows: int, m: int, n: int
) -> None:
    w, x = kernels.known_operands(m, n, rows, LARGEST[dtype])
    memory = np.full(rows * m + 14, 77, np.uint32)
    out = memory[7:-7].reshape(rows, m)
    answer = kernels.prepare(w.astype(dtype), kernel=kernel, threads=2).product(x, out)
    assert np.shares_memory(answer, out)
    assert np.array_equal(out, kernels.known_answer(w, x))
    assert (memory[:7] == 77).all()
    assert (memory[-7:] == 77).all()


@pytest.mark.skipif(not vnni.available(), reason="the processor has no AVX-512 VNNI")
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
@given(st.data())
@settings(max_examples=25)
def test_every_kind_of_block_for_any_number_of_rows(tokens: int, data: st.DataObject) -> None:
    """Also where another kind would be chosen: several blocks at a time, the last filled up."""
    dtype = data.draw(st.sampled_from([np.int8, np.int16]))
    m, n, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300)), data.draw(st.integers(1, 20))
    w, x = kernels.known_operands(m, n, rows, LARGEST[dtype])
    matrix = vnni.VnniMatrix(w.astype(dtype), 2)
    matrix.blocks = ((tokens, 1),)
    assert np.array_equal(matrix.product(x), kernels.known_answer(w, x))


@pytest.mark.skipif(not vnni.available(), reason="the processor has no AVX-512 VNNI")
@pytest.mark.parametrize("weight", [2048, -2048, 32767])
@pytest.mark.parametrize("place", [(0, 0), (4, 33), (4, 69)])
def test_weights_beyond_12_bits_are_refused(weight: int, place: tuple[int, int]) -> None:
    w = np.zeros((5, 70), np.int16)
    w[place] = weight
    with pytest.raises(KernelError, match="12 bits"):
        kernels.prepare(w, kernel="vnni")


@pytest.mark.skipif(not vnni.available(), reason="the processor has no AVX-512 VNNI")
@pytest.mark.parametrize("rows", [1, 16])
def test_operands_that_do_not_fit_are_refused_before_any_memory_is_touched(rows: int) -> None:
    matrix = kernels.prepare(np.ones((6, 64), np.int16), kernel="vnni")
    with pytest.raises(KernelError, match="do not fit"):
        matrix.product(np.zeros((rows, 63), np.uint32))
    with pytest.raises(KernelError, match="do not fit"):
        matrix.product(np.zeros((rows, 64), np.uint32), np.zeros((rows, 5), np.uint32))


@pytest.mark.parametrize(
    ("count", "threads", "step"), [(1, 2, 1), (9, 2, 4), (100, 3, 7), (64, 2, 16), (0, 2, 1)]
)
def test_work_is_shared_out_whole_and_once(count: int, threads: int, step: int) -> None:
    ranges: list[tuple[int, int]] = []
    in_parallel(lambda first, last: ranges.append((first, last)), count, threads, step)
    assert [place for first, last in sorted(ranges) for place in range(first, last)] == list(range(count))
    assert all(first % step == 0 for first, _ in ranges)


def test_helpers_who_are_busy_are_not_waited_for() -> None:
    pool, over = _pool(forks.token()), threading.Event()
    busy = [pool.submit(over.wait, 60) for _ in range(default_threads())]
    try:
        ranges: list[tuple[int, int]] = []
        in_parallel(lambda first, last: ranges.append((first, last)), 40, 2)
        assert sum(last - first for first, last in ranges) == 40
        assert not any(each.done() for each in busy)
    finally:
        over.set()


def test_an_error_in_any_part_reaches_the_caller() -> None:
    def part(first: int, last: int) -> None:
        if last == 40:
            raise KernelError("the last part")

    for _ in range(20):
        with pytest.raises(KernelError, match="last part"):
            in_parallel(part, 40, 2)


EDGES = [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, 0x80000000, P - 0x8001, P - 1]


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize("n", [1, 512, 513, 1100])
def test_elements_at_the_edges_of_their_limbs(kernel: str, rows: int, n: int) -> None:
    """Where signed limbs of 16 bits turn over, times the largest weights of either sign."""
    for x in EDGES:
        elements = np.full((rows, n), x, np.uint32)
        for w in (np.full((9, n), 2047, np.int16), np.full((9, n), -2047, np.int16)):
            answer = kernels.prepare(w, kernel=kernel).product(elements)
            assert np.array_equal(answer, kernels.known_answer(w.astype(np.int64), elements))


def test_the_known_answer_is_right() -> None:
    w, x = kernels.known_operands(7, 50, 4, 2047)
    assert np.array_equal(
        kernels.known_answer(w, x), kernels.prepare(w.astype(np.int16), kernel="reference").product(x)
    )


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
def test_no_rows_give_no_rows(kernel: str) -> None:
    w = np.ones((6, 10), np.int8)
    assert kernels.prepare(w, kernel=kernel).product(np.empty((0, 10), np.uint32)).shape == (0, 6)


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
def test_every_kernel_passes_its_self_test(kernel: str) -> None:
    assert kernels.self_test(kernel)


@pytest.fixture
def fresh_choice() -> object:
    kernels.choose.cache_clear()
    kernels.self_test.cache_clear()
    yield None
    kernels.choose.cache_clear()
    kernels.self_test.cache_clear()


class Saturating(kernels.portable.PortableMatrix):
    """What some machines do: sums that stop at the largest 32-bit number."""

    def product(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return np.minimum(super().product(x, out), np.uint32(2**31 - 1))


def test_a_kernel_that_is_wrong_here_is_passed_over(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("amx", "vnni"):
        monkeypatch.setitem(kernels._KERNELS, name, (lambda: True, Saturating))
        assert not kernels.self_test(name)
    assert kernels.choose() == "portable"
    with pytest.raises(KernelError, match="wrong products"):
        kernels.prepare(np.ones((4, 4), np.int8), kernel="vnni")


class Slow(kernels.portable.PortableMatrix):
    """Right, and in no hurry."""

    def product(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        time.sleep(0.2)
        return super().product(x, out)


@pytest.mark.parametrize(("slow", "other"), [("amx", "vnni"), ("vnni", "amx")])
def test_of_two_right_kernels_the_faster_is_taken(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, slow: str, other: str
) -> None:
    monkeypatch.setitem(kernels._KERNELS, slow, (lambda: True, Slow))
    monkeypatch.setitem(kernels._KERNELS, other, (lambda: True, kernels.portable.PortableMatrix))
    assert kernels.choose() == other


@pytest.mark.skipif(not vnni.available(), reason="its tiles are emulated with AVX-512 VNNI")
def test_the_amx_kernel_on_emulated_tiles(tmp_path: Path) -> None:
    """Its layout and loops, in a process that keeps its compiled code apart from that of real tiles."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "amx_emulated.py")],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "right\n"


def test_without_any_right_kernel_there_is_an_error(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(kernels._KERNELS):
        monkeypatch.setitem(kernels._KERNELS, name, (lambda: True, Saturating))
    with pytest.raises(KernelError, match="no kernel"):
        kernels.prepare(np.ones((4, 4), np.int8))


def test_an_unknown_or_missing_kernel_is_named(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="unknown kernel 'gpu'"):
        kernels.prepare(np.ones((4, 4), np.int8), kernel="gpu")
    monkeypatch.setitem(kernels._KERNELS, "vnni", (lambda: False, vnni.VnniMatrix))
    with pytest.raises(KernelError, match="processor"):
        kernels.prepare(np.ones((4, 4), np.int8), kernel="vnni")
