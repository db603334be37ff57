"""What runs on the vault's card, in Triton: its steps for one group of a message, as in `arithmetic.steps`.

    ask       steps 1 and 2, a block for each row: rotate, scale, mask
    project   B x;  low_rank   A (B x), while the worker computes
    expect    <c, x~>, and what rounding costs the input
    check     step 4's sums over y~, and the mask off, in pieces of a row
    opened    step 5, a block for each row: back to the true basis, A (B x) added

A rotation is three gathers (`_mixed`), of one entry, or in the middle of two, each times a factor, with a
Walsh-Hadamard transform (`_hadamard`) between.  Integers have the bits of the processor's steps; floats are
summed in another order.  Only imported where a card is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

P = tl.constexpr(4294967291)
HALF = tl.constexpr(2147483645)  # (p - 1) / 2
LOW32 = tl.constexpr(0xFFFFFFFF)
ROUNDING = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: added to a float64 it leaves an integer
LOST = tl.constexpr(0.5)

POINTERS = {
    "x": "*i8", "out": "*i8", "words": "*i32", "hidden": "*i32", "sent": "*i32", "alpha": "*fp64",
    "flags": "*i32", "work": "*fp32", "orders": "*i32", "factors": "*fp32", "numbers": "*fp64",
    "sums": "*fp32", "low": "*fp32", "c": "*i32", "e": "*i32", "expected": "*i64",
    "d_in": "*fp32", "losses": "*fp64", "said": "*fp64", "y": "*i32", "u": "*i32", "plain": "*i32",
    "records": "*i64", "scale": "*fp64", "a": "*fp32", "b": "*fp32",
}  # fmt: skip
"""Kinds of the pointers by their names; every other argument is an i32 or a constant."""


def divisible(names, *, aligned):
    """Those of a program's arguments that are multiples of 16 where activations and matrices are."""
    return {"m", "n", "place", "wide", *POINTERS} & set(names) if aligned else set()


@triton.jit
def _typed(pointer, KIND: tl.constexpr):
    """A pointer to activations: float32, bfloat16 or float16."""
    if KIND == 0:
        typed = pointer.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        typed = pointer.to(tl.pointer_type(tl.bfloat16))
    else:
        typed = pointer.to(tl.pointer_type(tl.float16))
    return typed


@triton.jit
def _hadamard(v, H: tl.constexpr, W: tl.constexpr, LEVELS: tl.constexpr):
    """Walsh-Hadamard transforms of the W columns of v [H, W], without their norm: H = 2^LEVELS.

    Each level adds neighbours and puts the sums before the differences; after all of them every entry is
    back in its place.
    """
    for _ in tl.static_range(LEVELS):
        pairs = tl.permute(tl.reshape(v, (H // 2, 2, W)), (0, 2, 1))
        first, second = tl.split(pairs)
        both = tl.permute(tl.join(first + second, first - second), (2, 0, 1))
        v = tl.reshape(both, (H, W))
    return v


@triton.jit
def _mixed(source, orders, factors, at, wanted, N: tl.constexpr, LAYER: tl.constexpr):
    """Entries `at` of a secret layer: of one entry of the source each, in the middle of two."""
    first = 0 if LAYER == 0 else (N if LAYER == 1 else 3 * N)
    found = tl.load(source + tl.load(orders + first + at, wanted, other=0), wanted, other=0.0)
    v = found.to(tl.float32) * tl.load(factors + first + at, wanted, other=0.0)
    if LAYER == 1:
        other = tl.load(source + tl.load(orders + 2 * N + at, wanted, other=0), wanted, other=0.0)
        v += other.to(tl.float32) * tl.load(factors + 2 * N + at, wanted, other=0.0)
    return v


@triton.jit
def _unmasked(plain, inverse, orders, factors, scale, at, wanted):
    """The same of the first layer on the way back, of products without their mask: scaled on the way."""
    product = tl.load(plain + tl.load(orders + at, wanted, other=0), wanted, other=0)
    v = (product.to(tl.float64) * (tl.load(scale + at, wanted, other=0.0) * inverse)).to(tl.float32)
    return v * tl.load(factors + at, wanted, other=0.0)


@triton.jit
def _forth(
    source, to, orders, factors,
    N: tl.constexpr, H: tl.constexpr, LEVELS: tl.constexpr, W: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """A secret layer and the blocks behind it: the strided ones, then the last one, which overlaps them."""
    G: tl.constexpr = N // H  # noqa: N806
    i = tl.arange(0, H)
    for start in range(0, G, W):
        j = start + tl.arange(0, W)
        at = i[:, None] * G + j[None, :]
        wanted = (j < G)[None, :] & (i >= 0)[:, None]
        v = _mixed(source, orders, factors, at, wanted, N, LAYER)
        tl.store(to + at, _hadamard(v, H, W, LEVELS), wanted)
    if N % H:
        at = G * H + i
        tl.store(to + at, _mixed(source, orders, factors, at, at < N, N, LAYER), at < N)
        tl.debug_barrier()
        last = tl.reshape(tl.load(to + N - H + i), (H, 1))
        tl.debug_barrier()
        tl.store(to + N - H + i, tl.reshape(_hadamard(last, H, 1, LEVELS), (H,)))
    tl.debug_barrier()


@triton.jit
def _back_blocks(
    source, to, orders, factors, scale, inverse,
    N: tl.constexpr, H: tl.constexpr, LEVELS: tl.constexpr, W: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """The same on the way back: the last block comes before the strided ones."""
    G: tl.constexpr = N // H  # noqa: N806
    i = tl.arange(0, H)
    if N % H:
        end = N - H + i
        if LAYER == 0:
            last = _unmasked(source, inverse, orders, factors, scale, end, end < N)
        else:
            last = _mixed(source, orders, factors, end, end < N, N, LAYER)
        tl.store(to + end, tl.reshape(_hadamard(tl.reshape(last, (H, 1)), H, 1, LEVELS), (H,)))
        tl.debug_barrier()
    for start in range(0, G, W):
        j = start + tl.arange(0, W)
        at = i[:, None] * G + j[None, :]
        inside = (j < G)[None, :] & (i >= 0)[:, None]
        wanted = inside
        if N % H:
            wanted = inside & (at < N - H)
        if LAYER == 0:
            v = _unmasked(source, inverse, orders, factors, scale, at, wanted)
        else:
            v = _mixed(source, orders, factors, at, wanted, N, LAYER)
        if N % H:
            v = tl.where(wanted, v, tl.load(to + at, inside & (at >= N - H), other=0.0))
            tl.debug_barrier()
        tl.store(to + at, _hadamard(v, H, W, LEVELS), inside)
    tl.debug_barrier()


@triton.jit
def ask(
    x, words, hidden, sent, alpha, flags, work, orders, factors, numbers, stride,
    KIND: tl.constexpr, FAST: tl.constexpr, N: tl.constexpr, H: tl.constexpr, LEVELS: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x~ = round(alpha Q_in D_in x) + r mod p of each row, into `hidden` and `sent`; alpha; in `flags` 1
    where the row is finite, and 2 more where a word of r is no element, so that nothing of it is a message.

    numbers: the limit of alpha times the norm.  stride: of the rows of `words`, whose first N are r.
    """
    row = tl.program_id(0).to(tl.int64)
    x = _typed(x, KIND) + row * N
    here = work + row * 2 * N
    there = here + N
    if FAST:
        _forth(x, here, orders, factors, N, H, LEVELS, W, 0)
        _forth(here, there, orders, factors, N, H, LEVELS, W, 1)
    square = tl.full((), 0.0, tl.float64)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if FAST:
            z = _mixed(there, orders, factors, at, at < N, N, 2)
        else:
            z = _mixed(x, orders, factors, at, at < N, N, 0)
        tl.store(here + at, z, at < N)
        wide = z.to(tl.float64)
        square += tl.sum(wide * wide, 0)
    scale = tl.where(square == 0.0, 1.0, tl.load(numbers) / tl.sqrt(square))
    finite = square < float("inf")
    tl.store(alpha + row, scale)
    largest = tl.full((), 0, tl.int64)
    scale = tl.where(finite, scale, 0.0)
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(here + at, at < N, other=0.0)
        z = tl.where(finite, z, 0.0)
        rounded = ((scale * z.to(tl.float64) + ROUNDING) - ROUNDING).to(tl.int64)
        r = tl.load(words + row * stride + at, at < N, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        largest = tl.maximum(largest, tl.max(r, 0))
        value = tl.where(rounded < 0, rounded + P, rounded) + r
        value = tl.where(value >= P, value - P, value).to(tl.uint32).to(tl.int32, bitcast=True)
        tl.store(hidden + row * N + at, value, at < N)
        tl.store(sent + row * N + at, value, at < N)
    tl.store(flags + row, finite.to(tl.int32) + 2 * (largest >= P).to(tl.int32))


@triton.jit
def project(
    x, b, sums, rows, rank, KIND: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    """sums [rows, rank] = B x for b [rank, N]: R rows and one row of B for each block."""
    i = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.program_id(1)
    x = _typed(x, KIND)
    total = tl.zeros((R, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wanted = (i < rows)[:, None] & (at < N)[None, :]
        v = tl.load(x + i.to(tl.int64)[:, None] * N + at[None, :], wanted, other=0.0).to(tl.float32)
        total += v * tl.load(b + k.to(tl.int64) * N + at, at < N, other=0.0)[None, :]
    tl.store(sums + i * rank + k, tl.sum(total, 1), i < rows)


@triton.jit
def low_rank(
    sums, a, low, rows, m, place, wide,
    ADD: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """low [rows, m] from column `place` on = A times the sums, for a [RANK, wide], the transpose of A; ADD:
    added.
    """
    i = tl.program_id(0) * R + tl.arange(0, R)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((R, BLOCK), tl.float32)
    for k in range(0, RANK):
        factor = tl.load(sums + i * RANK + k, i < rows, other=0.0)
        total += factor[:, None] * tl.load(a + k * wide + at, at < wide, other=0.0)[None, :]
    wanted = (i < rows)[:, None] & (at < wide)[None, :]
    to = low + i.to(tl.int64)[:, None] * m + place + at[None, :]
    if ADD:
        total += tl.load(to, wanted, other=0.0)
    tl.store(to, total, wanted)


@triton.jit
def _products(left, right):
    """The sums of the low and of the high halves of products of elements, int64 below 2^32 times a block."""
    product = left.to(tl.uint32, bitcast=True).to(tl.uint64) * right.to(tl.uint32, bitcast=True).to(tl.uint64)
    low = (product & LOW32).to(tl.int64)
    high = (product >> 32).to(tl.int64)
    return tl.sum(low, 0), tl.sum(high, 0)


@triton.jit
def expect(
    x, hidden, c, d_in, alpha, expected, losses,
    KIND: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """expected [rows, 2, 2]: the low and high sums of <c, x~>; and what rounding costs the input, into
    losses [rows, 2], second column.
    """
    row = tl.program_id(0).to(tl.int64)
    x = _typed(x, KIND) + row * N
    zero = tl.full((), 0, tl.int64)
    low0, high0, low1, high1 = zero, zero, zero, zero
    total = tl.full((), 0.0, tl.float64)
    peak = total
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        element = tl.load(hidden + row * N + at, at < N, other=0)
        low, high = _products(element, tl.load(c + at, at < N, other=0))
        low0 += low
        high0 += high
        low, high = _products(element, tl.load(c + N + at, at < N, other=0))
        low1 += low
        high1 += high
        v = tl.load(x + at, at < N, other=0.0).to(tl.float32) * tl.load(d_in + at, at < N, other=0.0)
        square = v.to(tl.float64) * v.to(tl.float64)
        total += tl.sum(square, 0)
        peak = tl.maximum(peak, tl.max(square, 0))
    tl.store(expected + row * 4, low0)
    tl.store(expected + row * 4 + 1, high0)
    tl.store(expected + row * 4 + 2, low1)
    tl.store(expected + row * 4 + 3, high1)
    rest = total - peak
    loss = tl.sqrt(N / 12 / tl.where(rest > 0, rest, 1.0)) / tl.load(alpha + row)
    loss = tl.where(rest > 0, loss, float("inf"))
    tl.store(losses + row * 2 + 1, tl.where(peak == 0, 0.0, loss))


@triton.jit
def check(y, u, e, plain, records, m, pieces, BLOCK: tl.constexpr):
    """plain [rows, m] = centre(y - u); records [rows, pieces, 6]: of BLOCK entries the low and high sums of
    <e, y> for two challenges, the largest entry, and the largest size without the mask.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    claim = tl.load(y + row * m + at, at < m, other=0)
    low0, high0 = _products(claim, tl.load(e + at, at < m, other=0))
    low1, high1 = _products(claim, tl.load(e + m + at, at < m, other=0))
    element = claim.to(tl.uint32, bitcast=True).to(tl.int64)
    pad = tl.load(u + row * m + at, at < m, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    difference = element - pad
    difference = tl.where(difference > HALF, difference - P, difference)
    difference = tl.where(difference < -HALF, difference + P, difference)
    tl.store(plain + row * m + at, difference.to(tl.int32), at < m)
    to = records + (row * pieces + piece) * 6
    tl.store(to, low0)
    tl.store(to + 1, high0)
    tl.store(to + 2, low1)
    tl.store(to + 3, high1)
    tl.store(to + 4, tl.max(element, 0))
    tl.store(to + 5, tl.max(tl.abs(difference), 0))


@triton.jit
def opened(
    plain, low, out, alpha, losses, said, work, orders, factors, scale, numbers,
    KIND: tl.constexpr, FAST: tl.constexpr, FEW: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    LEVELS: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = D_out Q_out^T (s * plain / alpha) + low for each row of N outputs, and what rounding has cost it
    into said [rows, 2], beside what is in the second column of losses.  A row of which nothing is left
    becomes NaN.

    scale: s in the order of the first layer.  numbers: the limit, the noise.  FEW: so few outputs that one
    may be small by chance.
    """
    row = tl.program_id(0).to(tl.int64)
    plain += row * N
    low += row * N
    out = _typed(out, KIND) + row * N
    here = work + row * 2 * N
    there = here + N
    inverse = 1.0 / tl.load(alpha + row)
    if FAST:
        _back_blocks(plain, here, orders, factors, scale, inverse, N, H, LEVELS, W, 0)
        _back_blocks(here, there, orders, factors, scale, inverse, N, H, LEVELS, W, 1)
    square = tl.full((), 0.0, tl.float64)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if FAST:
            v = _mixed(there, orders, factors, at, at < N, N, 2)
        else:
            v = _unmasked(plain, inverse, orders, factors, scale, at, at < N)
        v = tl.load(low + at, at < N, other=0.0) + v
        tl.store(out + at, v.to(out.dtype.element_ty), at < N)
        wide = v.to(tl.float64)
        square += tl.sum(wide * wide, 0)
    loss = tl.load(numbers + 1) * inverse / tl.sqrt(tl.where(square > 0, square, 1.0))
    loss = tl.where(square > 0, loss, 0.0)
    before = tl.load(losses + row * 2 + 1)
    tl.store(said + row * 2, loss)
    tl.store(said + row * 2 + 1, before)
    if not FEW:  # noqa: SIM102 -- known when it is compiled
        if (loss > LOST) & (before > LOST):
            tl.debug_barrier()
            for start in range(0, N, BLOCK):
                at = start + tl.arange(0, BLOCK)
                nothing = tl.full((BLOCK,), float("nan"), tl.float32)
                tl.store(out + at, nothing.to(out.dtype.element_ty), at < N)
