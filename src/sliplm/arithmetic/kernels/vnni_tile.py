"""The inner tiles of the VNNI kernel, as LLVM code: rows of w times the limbs of x, all sums in registers.

    tall    4 rows of w times one x: columns lie in the lanes, which are added up at the end
    block   6 or 8 rows of w times 4, 8 or 16 x: of 16 lanes each x has its own neighbours, added up at the
            end; what is read of a row of w lies before each of them

Each for w of 8 bits (`bytes`) and of 12 (`words`): int16, or packed as `unpacked` reads it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sliplm.arithmetic.kernels.llvm import (
    CHARS,
    I32,
    I64,
    SHORTS,
    SUMS,
    WIDE,
    at,
    const,
    data,
    declare,
    every,
    load,
    loop,
    prefetch,
    shuffle,
    starts,
    store,
    zeros,
)
from sliplm.arithmetic.kernels.vnni_layout import (
    BYTE_BLOCK,
    BYTE_LIMBS,
    PACKED,
    STEP,
    TALL,
    TOKENS,
    WORD_BLOCK,
    WORD_LIMBS,
    unpacked,
)

BYTE_EXACT = 1 << 16  # columns that a lane of a block of bytes can sum: 255 * 127 * 2^16 < 2^31

_PAIRS = 16  # pairs of words that a lane sums before it is split: 2^16 + 2^15 + 16 * 2 * 2047 * 2^15 < 2^31
_AHEAD = 1 << 13  # bytes: memory is asked for this far ahead


@intrinsic  # type: ignore[untyped-decorator]
def tall_bytes(
    typing: Any, w: Any, w_start: Any, stride: Any, x: Any, x_start: Any, ahead: Any, sums: Any
) -> Any:
    """sums[r] = <w[w_start + r stride :], x> over `stride` columns, a multiple of 64, for int64 sums[TALL].

    w is int8, x the sum of its limbs uint8 x[x_start + l stride :] shifted left by 8 l.  From w[ahead :] on,
    as much of w is asked for as the tile reads.
    """
    signature = types.void(w, types.intp, types.intp, x, types.intp, types.intp, sums)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, limbs, out = (data(context, builder, signature, args, k) for k in (0, 3, 6))
        rows = starts(builder, weights, args[1], args[2], TALL)
        parts = starts(builder, limbs, args[4], args[2], BYTE_LIMBS)
        hints = builder.gep(weights, [args[5]])

        def body(column: Any, totals: list[Any]) -> list[Any]:
            xs = [load(builder, at(builder, part, column), CHARS) for part in parts]
            updated = []
            for r, row in enumerate(rows):
                weight = load(builder, at(builder, row, column), CHARS)
                offset = builder.mul(column, const(TALL))
                prefetch(builder, hints, builder.add(offset, const(r * STEP)))
                for k, limb in enumerate(xs):
                    updated.append(_dot_bytes(builder, totals[r * BYTE_LIMBS + k], limb, weight))
            return updated

        totals = loop(builder, args[2], STEP, zeros(TALL * BYTE_LIMBS), body)
        _put_sums(builder, [_joined_bytes(builder, totals[k : k + 4]) for k in range(0, len(totals), 4)], out)
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def tall_words(typing: Any, w: Any, w_start: Any, steps: Any, x: Any, x_start: Any, sums: Any) -> Any:
    """sums[r] = <row r of a packed tile, x> over steps > 0 of 64 columns, for int64 sums[TALL].

    w[w_start :] is uint8 [steps, PACKED] as `unpacked` reads it, x the sum of its limbs int16
    x[x_start + 64 l steps :] shifted left by 16 l.
    """
    signature = types.void(w, types.intp, types.intp, x, types.intp, sums)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, limbs, out = (data(context, builder, signature, args, k) for k in (0, 3, 5))
        tile = at(builder, weights, args[1])
        columns = builder.mul(args[2], const(STEP))
        parts = starts(builder, limbs, args[4], columns, WORD_LIMBS)

        def body(step: Any, totals: list[Any]) -> list[Any]:
            column, place = builder.mul(step, const(STEP)), builder.mul(step, const(PACKED))
            xs = [
                [
                    load(builder, at(builder, part, builder.add(column, const(half))), SHORTS)
                    for half in (0, 32)
                ]
                for part in parts
            ]
            for line in range(0, PACKED, 64):
                prefetch(builder, tile, builder.add(place, const(_AHEAD + line)))
            updated = []
            for r in range(TALL):
                halves = unpacked(builder, tile, place, r)
                for k, limb in enumerate(xs):
                    total = totals[r * WORD_LIMBS + k]
                    for weight, part in zip(halves, limb, strict=True):
                        total = _dot_words(builder, total, weight, part)
                    updated.append(total)
            return updated

        def chunk(first: Any, state: list[Any]) -> list[Any]:
            left = builder.sub(args[2], first)
            fits = builder.icmp_signed("<", left, const(_PAIRS // 2))
            count = builder.select(fits, left, const(_PAIRS // 2))
            sums_, high = state[: TALL * WORD_LIMBS], state[TALL * WORD_LIMBS :]
            sums_ = loop(
                builder, count, 1, sums_, lambda step, totals: body(builder.add(first, step), totals)
            )
            return _split(builder, sums_, high)

        state = loop(builder, args[2], _PAIRS // 2, zeros(TALL * (WORD_LIMBS + 1)), chunk)
        _put_sums(builder, _joined_words(builder, state, TALL), out)
        return context.get_dummy_value()

    return signature, code


def _blocks_of_bytes(tokens: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def block_bytes(
        typing: Any,
        w: Any,
        w_start: Any,
        stride: Any,
        x: Any,
        x_start: Any,
        ahead: Any,
        steps: Any,
        sums: Any,
    ) -> Any:
        """sums[r, t] += <w[w_start + r stride :], x of token t> over steps > 0 of 64 / tokens columns, for
        int64 sums[BYTE_BLOCK, tokens].

        w is int8; x[x_start :] is uint32 [steps, limbs, tokens, 16 / tokens]: in a word, a limb of each of
        four columns.  From w[ahead :] on, as much of w is asked for as the tile reads.
        """
        signature = types.void(w, types.intp, types.intp, x, types.intp, types.intp, types.intp, sums)

        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            weights, out = (data(context, builder, signature, args, k) for k in (0, 7))
            rows = starts(builder, weights, args[1], args[2], BYTE_BLOCK)
            hints = builder.gep(weights, [args[5]])
            packed = at(builder, data(context, builder, signature, args, 3), args[4])

            def body(step: Any, totals: list[Any]) -> list[Any]:
                xs = _limbs(builder, packed, step, BYTE_LIMBS)
                column = builder.mul(step, const(STEP // tokens))
                _ask_for(builder, hints, builder.mul(column, const(BYTE_BLOCK)), STEP // tokens * BYTE_BLOCK)
                updated = []
                for r, row in enumerate(rows):
                    weight = _for_all(builder, at(builder, row, column), tokens)
                    for k, limb in enumerate(xs):
                        updated.append(_dot_bytes(builder, totals[r * BYTE_LIMBS + k], limb, weight))
                return updated

            totals = loop(builder, args[6], 1, zeros(BYTE_BLOCK * BYTE_LIMBS), body)
            for r in range(BYTE_BLOCK):
                joined = _joined_bytes(builder, totals[r * BYTE_LIMBS : (r + 1) * BYTE_LIMBS])
                place = at(builder, out, const(r * tokens))
                before = load(builder, place, ir.VectorType(I64, tokens))
                store(builder, builder.add(before, _by_token(builder, joined, tokens)), place)
            return context.get_dummy_value()

        return signature, code

    return block_bytes


def _blocks_of_words(tokens: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def block_words(
        typing: Any, w: Any, stride: Any, x: Any, x_start: Any, source: Any, ahead: Any, sums: Any
    ) -> Any:
        """sums[r, t] = <w[r stride :], x of token t> over `stride` columns, a multiple of 64, for int64
        sums[WORD_BLOCK, tokens].

        w is int16; x[x_start :] is uint32 [steps, limbs, tokens, 16 / tokens], a step for 32 / tokens
        columns: in a word, a limb of each of two.  From source[ahead :] on, as much is asked for as `unpack`
        reads for the next block.
        """
        signature = types.void(w, types.intp, x, types.intp, source, types.intp, sums)

        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            weights, hints, out = (data(context, builder, signature, args, k) for k in (0, 4, 6))
            rows = starts(builder, weights, const(0), args[1], WORD_BLOCK)
            packed = at(builder, data(context, builder, signature, args, 2), args[3])
            hints = builder.gep(hints, [args[5]])
            count, columns = WORD_BLOCK * WORD_LIMBS, STEP // 2 // tokens
            read = columns * WORD_BLOCK * PACKED // STEP // TALL

            def body(step: Any, totals: list[Any]) -> list[Any]:
                xs = _limbs(builder, packed, step, WORD_LIMBS)
                _ask_for(builder, hints, builder.mul(step, const(read)), read)
                updated = []
                for r, row in enumerate(rows):
                    place = at(builder, row, builder.mul(step, const(columns)))
                    weight = _for_all(builder, place, tokens)
                    for k, limb in enumerate(xs):
                        updated.append(_dot_words(builder, totals[r * WORD_LIMBS + k], weight, limb))
                return updated

            steps = builder.udiv(args[1], const(columns))

            def chunk(first: Any, state: list[Any]) -> list[Any]:
                left = builder.sub(steps, first)
                fits = builder.icmp_signed("<", left, const(_PAIRS))
                sums_ = loop(
                    builder,
                    builder.select(fits, left, const(_PAIRS)),
                    1,
                    state[:count],
                    lambda step, totals: body(builder.add(first, step), totals),
                )
                return _split(builder, sums_, state[count:])

            state = loop(builder, steps, _PAIRS, zeros(count + WORD_BLOCK), chunk)
            for r, joined in enumerate(_joined_words(builder, state, WORD_BLOCK)):
                store(builder, _by_token(builder, joined, tokens), at(builder, out, const(r * tokens)))
            return context.get_dummy_value()

        return signature, code

    return block_words


block_bytes_4, block_bytes_8, block_bytes_16 = map(_blocks_of_bytes, (4, 8, 16))
block_words_4, block_words_8, block_words_16 = map(_blocks_of_words, (4, 8, 16))


def _for_all(builder: ir.IRBuilder, place: Any, tokens: int) -> Any:
    """As many weights as a step takes for each token: 64 / tokens bytes from there, once for each."""
    lanes = TOKENS // tokens
    words = load(builder, place, ir.VectorType(I32, lanes))
    return shuffle(builder, words, words, list(range(lanes)) * tokens)


def _by_token(builder: ir.IRBuilder, sums: Any, tokens: int) -> Any:
    """The sum of each token's neighbouring lanes, in 64 bits."""
    while (left := sums.type.count) > tokens:
        even, odd = (shuffle(builder, sums, sums, range(k, left, 2)) for k in (0, 1))
        sums = builder.add(even, odd)
    return sums


def _ask_for(builder: ir.IRBuilder, pointer: Any, index: Any, size: int) -> None:
    """Ask for so many bytes from a place on, as far as they begin a line of the cache, or nearly."""
    for line in range(0, size, 64):
        prefetch(builder, pointer, builder.add(index, const(line)))


def _limbs(builder: ir.IRBuilder, packed: Any, step: Any, limbs: int) -> list[Any]:
    place = builder.mul(step, const(limbs * TOKENS))
    return [
        load(builder, at(builder, packed, builder.add(place, const(k * TOKENS))), SUMS) for k in range(limbs)
    ]


def _dot_bytes(builder: ir.IRBuilder, total: Any, limb: Any, weights: Any) -> Any:
    kind = ir.FunctionType(SUMS, [SUMS, CHARS, CHARS])
    dot = declare(builder, "llvm.x86.avx512.vpdpbusd.512", kind)
    return builder.call(dot, [total, builder.bitcast(limb, CHARS), builder.bitcast(weights, CHARS)])


def _dot_words(builder: ir.IRBuilder, total: Any, weights: Any, limb: Any) -> Any:
    kind = ir.FunctionType(SUMS, [SUMS, SHORTS, SHORTS])
    dot = declare(builder, "llvm.x86.avx512.vpdpwssd.512", kind)
    return builder.call(dot, [total, builder.bitcast(weights, SHORTS), builder.bitcast(limb, SHORTS)])


def _split(builder: ir.IRBuilder, sums: list[Any], high: list[Any]) -> list[Any]:
    """Sums of both limbs cut down to 16 bits: what is above moves to the next limb, and on to `high`."""
    sixteen, mask = every(SUMS, 16), every(SUMS, 0xFFFF)
    kept, carried = [], []
    for r, top in enumerate(high):
        first, second = sums[2 * r], sums[2 * r + 1]
        second = builder.add(second, builder.ashr(first, sixteen))
        kept += [builder.and_(first, mask), builder.and_(second, mask)]
        carried.append(builder.add(top, builder.ashr(second, sixteen)))
    return kept + carried


def _joined_bytes(builder: ir.IRBuilder, totals: list[Any]) -> Any:
    """The sum of four limbs' sums in 64-bit lanes: each below 2^31 << 24."""
    joined = builder.sext(totals[0], WIDE)
    for k in range(1, BYTE_LIMBS):
        joined = builder.add(joined, builder.shl(builder.sext(totals[k], WIDE), every(WIDE, 8 * k)))
    return joined


def _joined_words(builder: ir.IRBuilder, state: list[Any], rows: int) -> list[Any]:
    """For each row what `_split` left, joined modulo p in 64-bit lanes: 2^32 = 5."""
    found = []
    for r, top in enumerate(state[rows * WORD_LIMBS :]):
        first, second = (builder.zext(state[r * WORD_LIMBS + k], WIDE) for k in range(WORD_LIMBS))
        low = builder.or_(first, builder.shl(second, every(WIDE, 16)))
        found.append(builder.add(low, builder.mul(builder.sext(top, WIDE), every(WIDE, 5))))
    return found


def _put_sums(builder: ir.IRBuilder, joined: list[Any], out: Any) -> None:
    add = declare(builder, "llvm.vector.reduce.add.v16i64", ir.FunctionType(I64, [WIDE]))
    for r, lanes in enumerate(joined):
        builder.store(builder.call(add, [lanes]), at(builder, out, const(r)))
