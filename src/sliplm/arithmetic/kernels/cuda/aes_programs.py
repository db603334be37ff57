"""AES-256 in counter mode on a card, in Triton: a batch's r is made there of its key (SPEC section 6).

    stretch   the key's round keys
    masked    the key stream of some rows

Bits are sliced: a word holds one bit of each byte of two blocks, and the S-box is Boyar and Peralta's circuit
of gates, so that neither an address nor a branch depends on the key or on what it makes.  Only imported where
a card is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(14)

POINTERS = {"key": "*i32", "schedule": "*i32", "round_keys": "*i32", "words": "*i32"}
"""Kinds of the pointers by their names; every other argument is an i32 or a constant."""


def divisible(names, *, aligned):
    """Those of a program's arguments that are multiples of 16."""
    return set(POINTERS) & set(names) if aligned else set()


@triton.jit
def _swapped(x, y, low: tl.constexpr, high: tl.constexpr, by: tl.constexpr):
    return (x & low) | ((y & low) << by), ((x & high) >> by) | (y & high)


@triton.jit
def _sliced(a, b, c, d, e, f, g, h):
    """Bytes of eight words -> their bits in eight words; the way back is the same."""
    a, b = _swapped(a, b, 0x55555555, 0xAAAAAAAA, 1)
    c, d = _swapped(c, d, 0x55555555, 0xAAAAAAAA, 1)
    e, f = _swapped(e, f, 0x55555555, 0xAAAAAAAA, 1)
    g, h = _swapped(g, h, 0x55555555, 0xAAAAAAAA, 1)
    a, c = _swapped(a, c, 0x33333333, 0xCCCCCCCC, 2)
    b, d = _swapped(b, d, 0x33333333, 0xCCCCCCCC, 2)
    e, g = _swapped(e, g, 0x33333333, 0xCCCCCCCC, 2)
    f, h = _swapped(f, h, 0x33333333, 0xCCCCCCCC, 2)
    a, e = _swapped(a, e, 0x0F0F0F0F, 0xF0F0F0F0, 4)
    b, f = _swapped(b, f, 0x0F0F0F0F, 0xF0F0F0F0, 4)
    c, g = _swapped(c, g, 0x0F0F0F0F, 0xF0F0F0F0, 4)
    d, h = _swapped(d, h, 0x0F0F0F0F, 0xF0F0F0F0, 4)
    return a, b, c, d, e, f, g, h


@triton.jit
def _substituted(x7, x6, x5, x4, x3, x2, x1, x0):  # noqa: PLR0915 -- a circuit
    """The S-box of every byte; the bits come and go from the lowest on."""
    y14 = x3 ^ x5
    y13 = x0 ^ x6
    y9 = x0 ^ x3
    y8 = x0 ^ x5
    t0 = x1 ^ x2
    y1 = t0 ^ x7
    y4 = y1 ^ x3
    y12 = y13 ^ y14
    y2 = y1 ^ x0
    y5 = y1 ^ x6
    y3 = y5 ^ y8
    t1 = x4 ^ y12
    y15 = t1 ^ x5
    y20 = t1 ^ x1
    y6 = y15 ^ x7
    y10 = y15 ^ t0
    y11 = y20 ^ y9
    y7 = x7 ^ y11
    y17 = y10 ^ y11
    y19 = y10 ^ y8
    y16 = t0 ^ y11
    y21 = y13 ^ y16
    y18 = x0 ^ y16
    t2 = y12 & y15
    t3 = y3 & y6
    t4 = t3 ^ t2
    t5 = y4 & x7
    t6 = t5 ^ t2
    t7 = y13 & y16
    t8 = y5 & y1
    t9 = t8 ^ t7
    t10 = y2 & y7
    t11 = t10 ^ t7
    t12 = y9 & y11
    t13 = y14 & y17
    t14 = t13 ^ t12
    t15 = y8 & y10
    t16 = t15 ^ t12
    t17 = t4 ^ t14
    t18 = t6 ^ t16
    t19 = t9 ^ t14
    t20 = t11 ^ t16
    t21 = t17 ^ y20
    t22 = t18 ^ y19
    t23 = t19 ^ y21
    t24 = t20 ^ y18
    t25 = t21 ^ t22
    t26 = t21 & t23
    t27 = t24 ^ t26
    t28 = t25 & t27
    t29 = t28 ^ t22
    t30 = t23 ^ t24
    t31 = t22 ^ t26
    t32 = t31 & t30
    t33 = t32 ^ t24
    t34 = t23 ^ t33
    t35 = t27 ^ t33
    t36 = t24 & t35
    t37 = t36 ^ t34
    t38 = t27 ^ t36
    t39 = t29 & t38
    t40 = t25 ^ t39
    t41 = t40 ^ t37
    t42 = t29 ^ t33
    t43 = t29 ^ t40
    t44 = t33 ^ t37
    t45 = t42 ^ t41
    z0 = t44 & y15
    z1 = t37 & y6
    z2 = t33 & x7
    z3 = t43 & y16
    z4 = t40 & y1
    z5 = t29 & y7
    z6 = t42 & y11
    z7 = t45 & y17
    z8 = t41 & y10
    z9 = t44 & y12
    z10 = t37 & y3
    z11 = t33 & y4
    z12 = t43 & y13
    z13 = t40 & y5
    z14 = t29 & y2
    z15 = t42 & y9
    z16 = t45 & y14
    z17 = t41 & y8
    t46 = z15 ^ z16
    t47 = z10 ^ z11
    t48 = z5 ^ z13
    t49 = z9 ^ z10
    t50 = z2 ^ z12
    t51 = z2 ^ z5
    t52 = z7 ^ z8
    t53 = z0 ^ z3
    t54 = z6 ^ z7
    t55 = z16 ^ z17
    t56 = z12 ^ t48
    t57 = t50 ^ t53
    t58 = z4 ^ t46
    t59 = z3 ^ t54
    t60 = t46 ^ t57
    t61 = z14 ^ t57
    t62 = t52 ^ t58
    t63 = t49 ^ t58
    t64 = z4 ^ t59
    t65 = t61 ^ t62
    t66 = z1 ^ t63
    s0 = t59 ^ t63
    s6 = t56 ^ t62 ^ 0xFFFFFFFF
    s7 = t48 ^ t60 ^ 0xFFFFFFFF
    t67 = t64 ^ t65
    s3 = t53 ^ t66
    s4 = t51 ^ t66
    s5 = t47 ^ t65
    s1 = t64 ^ s3 ^ 0xFFFFFFFF
    s2 = t55 ^ t67 ^ 0xFFFFFFFF
    return s7, s6, s5, s4, s3, s2, s1, s0


@triton.jit
def _shifted(q):
    """ShiftRows, of one bit's word."""
    return (
        (q & 0x000000FF)
        | ((q & 0x0000FC00) >> 2) | ((q & 0x00000300) << 6)
        | ((q & 0x00F00000) >> 4) | ((q & 0x000F0000) << 4)
        | ((q & 0xC0000000) >> 6) | ((q & 0x3F000000) << 2)
    )  # fmt: skip


@triton.jit
def _turned(q):
    return (q >> 8) | (q << 24)


@triton.jit
def _halves(q):
    return (q >> 16) | (q << 16)


@triton.jit
def _mixed(a, b, c, d, e, f, g, h):
    """MixColumns."""
    ra, rb, rc, rd = _turned(a), _turned(b), _turned(c), _turned(d)
    re, rf, rg, rh = _turned(e), _turned(f), _turned(g), _turned(h)
    over = h ^ rh
    return (
        over ^ ra ^ _halves(a ^ ra),
        a ^ ra ^ over ^ rb ^ _halves(b ^ rb),
        b ^ rb ^ rc ^ _halves(c ^ rc),
        c ^ rc ^ over ^ rd ^ _halves(d ^ rd),
        d ^ rd ^ over ^ re ^ _halves(e ^ re),
        e ^ re ^ rf ^ _halves(f ^ rf),
        f ^ rf ^ rg ^ _halves(g ^ rg),
        g ^ rg ^ rh ^ _halves(h ^ rh),
    )


@triton.jit
def _loaded(at):
    return tl.load(at).to(tl.uint32, bitcast=True)


@triton.jit
def _substituted_word(word):
    zero = word ^ word
    a, b, c, d, e, f, g, h = _sliced(word, zero, zero, zero, zero, zero, zero, zero)
    a, b, c, d, e, f, g, h = _substituted(a, b, c, d, e, f, g, h)
    a, b, c, d, e, f, g, h = _sliced(a, b, c, d, e, f, g, h)
    return a


@triton.jit
def stretch(key, schedule, round_keys):
    """key [8] -> round_keys [15, 8], sliced; schedule [60] is room."""
    for i in tl.static_range(8):
        tl.store(schedule + i, tl.load(key + i))
    for i in range(8, 60):
        tl.debug_barrier()
        word = _loaded(schedule + i - 1)
        # of words whose bytes are little-endian the rotation by a byte goes right
        first = _substituted_word((word >> 8) | (word << 24)) ^ (tl.full((), 1, tl.uint32) << (i // 8 - 1))
        middle = _substituted_word(word)
        word = tl.where(i % 8 == 0, first, tl.where(i % 8 == 4, middle, word))
        tl.store(schedule + i, (word ^ _loaded(schedule + i - 8)).to(tl.int32, bitcast=True))
    for i in range(15):
        tl.debug_barrier()
        w0, w1 = _loaded(schedule + 4 * i), _loaded(schedule + 4 * i + 1)
        w2, w3 = _loaded(schedule + 4 * i + 2), _loaded(schedule + 4 * i + 3)
        a, b, c, d, e, f, g, h = _sliced(w0, w0, w1, w1, w2, w2, w3, w3)
        to = round_keys + 8 * i
        tl.store(to, a.to(tl.int32, bitcast=True))
        tl.store(to + 1, b.to(tl.int32, bitcast=True))
        tl.store(to + 2, c.to(tl.int32, bitcast=True))
        tl.store(to + 3, d.to(tl.int32, bitcast=True))
        tl.store(to + 4, e.to(tl.int32, bitcast=True))
        tl.store(to + 5, f.to(tl.int32, bitcast=True))
        tl.store(to + 6, g.to(tl.int32, bitcast=True))
        tl.store(to + 7, h.to(tl.int32, bitcast=True))


@triton.jit
def _backwards(word):
    """The bytes of a word in the other order: counters are big-endian."""
    return (word >> 24) | ((word >> 8) & 0xFF00) | ((word << 8) & 0xFF0000) | (word << 24)


@triton.jit
def _keyed(a, b, c, d, e, f, g, h, at):
    return (
        a ^ _loaded(at), b ^ _loaded(at + 1), c ^ _loaded(at + 2), d ^ _loaded(at + 3),
        e ^ _loaded(at + 4), f ^ _loaded(at + 5), g ^ _loaded(at + 6), h ^ _loaded(at + 7),
    )  # fmt: skip


@triton.jit
def masked(
    round_keys, words, count, stream_high, stream_low, first_high, first_low, BLOCK: tl.constexpr
):  # fmt: skip
    """words [count, 4]: the key stream's blocks from `first` on, two for each lane; numbers in halves."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = (lane * 0).to(tl.uint32)
    begin = ((zero + first_high.to(tl.uint32)).to(tl.uint64) << 32) + (zero + first_low.to(tl.uint32))
    number = begin + (2 * lane).to(tl.uint64)
    after = number + 1
    a = zero + _backwards(stream_high.to(tl.uint32))
    c = zero + _backwards(stream_low.to(tl.uint32))
    b, d = a, c
    e, f = _backwards((number >> 32).to(tl.uint32)), _backwards((after >> 32).to(tl.uint32))
    g, h = _backwards((number & 0xFFFFFFFF).to(tl.uint32)), _backwards((after & 0xFFFFFFFF).to(tl.uint32))
    a, b, c, d, e, f, g, h = _sliced(a, b, c, d, e, f, g, h)
    a, b, c, d, e, f, g, h = _keyed(a, b, c, d, e, f, g, h, round_keys)
    for i in range(1, ROUNDS):
        a, b, c, d, e, f, g, h = _substituted(a, b, c, d, e, f, g, h)
        a, b, c, d = _shifted(a), _shifted(b), _shifted(c), _shifted(d)
        e, f, g, h = _shifted(e), _shifted(f), _shifted(g), _shifted(h)
        a, b, c, d, e, f, g, h = _mixed(a, b, c, d, e, f, g, h)
        a, b, c, d, e, f, g, h = _keyed(a, b, c, d, e, f, g, h, round_keys + 8 * i)
    a, b, c, d, e, f, g, h = _substituted(a, b, c, d, e, f, g, h)
    a, b, c, d = _shifted(a), _shifted(b), _shifted(c), _shifted(d)
    e, f, g, h = _shifted(e), _shifted(f), _shifted(g), _shifted(h)
    a, b, c, d, e, f, g, h = _keyed(a, b, c, d, e, f, g, h, round_keys + 8 * ROUNDS)
    a, b, c, d, e, f, g, h = _sliced(a, b, c, d, e, f, g, h)
    to, inside, next_inside = words + 8 * lane.to(tl.int64), 2 * lane < count, 2 * lane + 1 < count
    tl.store(to, a.to(tl.int32, bitcast=True), inside)
    tl.store(to + 1, c.to(tl.int32, bitcast=True), inside)
    tl.store(to + 2, e.to(tl.int32, bitcast=True), inside)
    tl.store(to + 3, g.to(tl.int32, bitcast=True), inside)
    tl.store(to + 4, b.to(tl.int32, bitcast=True), next_inside)
    tl.store(to + 5, d.to(tl.int32, bitcast=True), next_inside)
    tl.store(to + 6, f.to(tl.int32, bitcast=True), next_inside)
    tl.store(to + 7, h.to(tl.int32, bitcast=True), next_inside)
