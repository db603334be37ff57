"""What runs on the card, in Triton: x cut into limbs, the products of the limbs, and the sum folded mod p.

    cut      x -> four balanced limbs of 8 bits each, x = l0 + 2^8 l1 + 2^16 l2 + 2^24 l3 mod p
    few      one row: dp4a on the ordinary cores, four weights and one limb's four columns at a time
    stack    more rows: the limbs of BN rows are 4 BN columns of one int8 product on the matrix units
    unpack   the packed low parts of w as bytes, for a product with very many rows

Bounds, for fewer than 2^17 columns: a limb and a weight's part are at most 128 each, so a sum of their
products stays below 2^31; 16 times one and a low part's stay below 2^36, and `_folded` takes that.
Only imported where a card is used; `plane` and `width` are multiples of 256 (`layout`).
"""

from __future__ import annotations

import triton
import triton.language as tl

P = tl.constexpr(4294967291)
FOLD = tl.constexpr(5)  # 2^32 mod p
LOW32 = tl.constexpr(0xFFFFFFFF)
LARGEST = tl.constexpr(0x7F7F7F7F)  # the largest number with four balanced limbs: above it stands x - p

EACH_128 = tl.constexpr(0x80808080)

POINTERS = {
    "x": "*i32", "limbs": "*i8", "words": "*i32", "low_words": "*i32", "limb_words": "*i32",
    "w": "*i8", "low": "*u8", "whole_low": "*i8", "out": "*i32",
}  # fmt: skip
"""Kinds of the pointers by their names; every other argument is an i32 or a constant."""


def divisible(names, *, aligned):
    """Those of a program's arguments that are multiples of 16; `plane` and `width` are so in every layout."""
    known = {"plane", "width", *POINTERS} | ({"m", "n"} if aligned else set())
    return known & set(names)


@triton.jit
def _folded(a, b, c, d):
    """a + 2^8 b + 2^16 c + 2^24 d mod p of int64 below 2^36: one step of folding, one correction each way."""
    total = a + (b << 8) + (c << 16) + (d << 24)  # below 2^61
    value = (total & LOW32) + FOLD * (total >> 32)  # above -2^32, below 2^32 + 2^32
    value = tl.where(value < 0, value + P, value)
    return tl.where(value >= P, value - P, value)


@triton.jit
def _element(value):
    """An int64 in 0..p as the 32 bits of an element."""
    return value.to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def cut(x, limbs, n, width, rows_a_block, BLOCK: tl.constexpr):
    """x [rows, n] -> limbs [rows / rows_a_block, 4, rows_a_block, width], zeros from column n on."""
    row = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row.to(tl.int64) * n + j, j < n, other=0).to(tl.uint32, bitcast=True)
    value = tl.where(value > LARGEST, value + FOLD, value)  # x - p, modulo 2^32
    # the bytes of value + 0x80808080 are the balanced limbs, 128 larger each
    limbs_of_it = (value + EACH_128) ^ EACH_128
    first = (row // rows_a_block * 4 * rows_a_block + row % rows_a_block).to(tl.int64) * width
    for k in tl.static_range(4):
        to = limbs + first + k * rows_a_block * width + j
        tl.store(to, (limbs_of_it >> 8 * k).to(tl.int8), j < width)


@triton.jit
def _dp4a(w, x, total):
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _quarters(words, ROWS: tl.constexpr, BK: tl.constexpr):
    """[ROWS, BK] -> four of [ROWS, BK / 4]: what one thread has loaded at once, word by word."""
    even, odd = tl.split(tl.reshape(words, (ROWS, BK // 4, 2, 2)))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _dots(words, x, plane, inside, a, b, c, d, ROWS: tl.constexpr, BK: tl.constexpr):
    """The sums of four limbs, with the products of these words of weights and the limbs' at x added."""
    w0, w1, w2, w3 = _quarters(words, ROWS, BK)
    x0, x1, x2, x3 = _quarters(tl.load(x, inside, other=0)[None, :], 1, BK)
    a = _dp4a(w3, x3, _dp4a(w2, x2, _dp4a(w1, x1, _dp4a(w0, x0, a))))
    x0, x1, x2, x3 = _quarters(tl.load(x + plane, inside, other=0)[None, :], 1, BK)
    b = _dp4a(w3, x3, _dp4a(w2, x2, _dp4a(w1, x1, _dp4a(w0, x0, b))))
    x0, x1, x2, x3 = _quarters(tl.load(x + 2 * plane, inside, other=0)[None, :], 1, BK)
    c = _dp4a(w3, x3, _dp4a(w2, x2, _dp4a(w1, x1, _dp4a(w0, x0, c))))
    x0, x1, x2, x3 = _quarters(tl.load(x + 3 * plane, inside, other=0)[None, :], 1, BK)
    d = _dp4a(w3, x3, _dp4a(w2, x2, _dp4a(w1, x1, _dp4a(w0, x0, d))))
    return a, b, c, d


@triton.jit
def few(
    words, low_words, limb_words, out, m, plane,
    PACKED: tl.constexpr, UNROLL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [m] = w x for words [m, plane], four weights each, low_words [m, plane / 2], limb_words [4, plane].

    Low parts: the first half's columns in the low nibbles, the second half's in the high ones.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    a = tl.zeros((BM, BK // 4), tl.int32)
    b, c, d = a, a, a
    la, lb, lc, ld = a, a, a, a
    half = plane // 2
    for start in tl.range(0, half, BK, loop_unroll_factor=UNROLL):
        k = start + tl.arange(0, BK)
        inside = k < half
        wanted = (rows[:, None] < m) & inside[None, :]
        at = rows[:, None].to(tl.int64) * plane + k[None, :]
        first = tl.load(words + at, wanted, other=0, eviction_policy="evict_first")
        second = tl.load(words + at + half, wanted, other=0, eviction_policy="evict_first")
        if PACKED:
            at = rows[:, None].to(tl.int64) * half + k[None, :]
            both = tl.load(low_words + at, wanted, other=0, eviction_policy="evict_first")
        x = limb_words + k
        a, b, c, d = _dots(first, x, plane, inside, a, b, c, d, BM, BK)
        a, b, c, d = _dots(second, x + half, plane, inside, a, b, c, d, BM, BK)
        if PACKED:
            early, late = both & 0x0F0F0F0F, (both >> 4) & 0x0F0F0F0F
            la, lb, lc, ld = _dots(early, x, plane, inside, la, lb, lc, ld, BM, BK)
            la, lb, lc, ld = _dots(late, x + half, plane, inside, la, lb, lc, ld, BM, BK)
    a, b, c, d = _total(a), _total(b), _total(c), _total(d)
    if PACKED:
        a = 16 * a + _total(la)
        b = 16 * b + _total(lb)
        c = 16 * c + _total(lc)
        d = 16 * d + _total(ld)
    tl.store(out + rows, _element(_folded(a, b, c, d)), rows < m)


@triton.jit
def _total(sums):
    return tl.sum(sums, 1).to(tl.int64)


@triton.jit
def stack(
    w, low, limbs, out, rows, m, width,
    PACKED: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, m] = w x for w [m, width] and limbs [rows / BN * 4 * BN, width].

    PACKED: w has low parts too, in `low` [m, width / 2].  ADD: out = 16 out + w x.  TMA: tiles are fetched by
    the card's copy engine.  Neighbours in the grid share tiles: GROUP tiles of w are swept at a time.
    """
    pid = tl.program_id(0)
    tall, wide = tl.cdiv(m, BM), tl.cdiv(rows, BN)
    first = pid // (GROUP * wide) * GROUP
    height = tl.minimum(tall - first, GROUP)
    bm = first + (pid % (GROUP * wide)) % height
    bn = (pid % (GROUP * wide)) // height
    sums = tl.zeros((BM, 4 * BN), tl.int32)
    if TMA:
        w_tiles = tl.make_tensor_descriptor(w, [m, width], [width, 1], [BM, BK])
        x_tiles = tl.make_tensor_descriptor(limbs, [wide * 4 * BN, width], [width, 1], [4 * BN, BK])
        for start in range(0, width, BK):
            x = x_tiles.load([bn * 4 * BN, start])
            sums = tl.dot(w_tiles.load([bm * BM, start]), x.T, sums, out_dtype=tl.int32)
        totals = sums.to(tl.int64)
    else:
        k = tl.arange(0, BK)
        row = ((bm * BM + tl.arange(0, BM)) % m).to(tl.int64)[:, None]
        column = (bn * 4 * BN + tl.arange(0, 4 * BN)).to(tl.int64)[None, :]
        w_at = w + row * width + k[None, :]
        x_at = limbs + column * width + k[:, None]
        if PACKED:
            lows = tl.zeros((BM, 4 * BN), tl.int32)
            half = width // 2
            low_at = low + row * half + k[None, :]
            for start in range(0, half, BK):
                both = tl.load(low_at + start)
                x = tl.load(x_at + start)
                sums = tl.dot(tl.load(w_at + start), x, sums, out_dtype=tl.int32)
                lows = tl.dot((both & 15).to(tl.int8), x, lows, out_dtype=tl.int32)
                x = tl.load(x_at + half + start)
                sums = tl.dot(tl.load(w_at + half + start), x, sums, out_dtype=tl.int32)
                lows = tl.dot((both >> 4).to(tl.int8), x, lows, out_dtype=tl.int32)
            totals = 16 * sums.to(tl.int64) + lows.to(tl.int64)
        else:
            for start in range(0, width, BK):
                sums = tl.dot(tl.load(w_at + start), tl.load(x_at + start), sums, out_dtype=tl.int32)
            totals = sums.to(tl.int64)
    # the limbs' sums stand side by side: [BM, 4, BN], and the last dimension is what `split` takes apart
    left, right = tl.split(tl.permute(tl.reshape(totals, (BM, 2, 2 * BN)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(left, (BM, 2, BN)), (0, 2, 1)))
    c, d = tl.split(tl.permute(tl.reshape(right, (BM, 2, BN)), (0, 2, 1)))
    value = _folded(a, b, c, d)
    i = bm * BM + tl.arange(0, BM)
    r = bn * BN + tl.arange(0, BN)
    wanted = (i[:, None] < m) & (r[None, :] < rows)
    to = out + r[None, :].to(tl.int64) * m + i[:, None]
    if ADD:
        before = tl.load(to, wanted, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        total = 16 * before + value
        value = (total & LOW32) + FOLD * (total >> 32)
        value = tl.where(value >= P, value - P, value)
    tl.store(to, _element(value), wanted)


@triton.jit
def unpack(low, whole_low, width, BLOCK: tl.constexpr):
    """low [m, width / 2] -> whole_low [m, width]: each nibble in a byte of its own."""
    half = width // 2
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = tl.load(low + row * half + j, j < half, other=0)
    tl.store(whole_low + row * width + j, (both & 15).to(tl.int8), j < half)
    tl.store(whole_low + row * width + half + j, (both >> 4).to(tl.int8), j < half)
