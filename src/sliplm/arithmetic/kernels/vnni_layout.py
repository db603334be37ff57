"""How the VNNI kernel lays out its operands, as LLVM code: packed weights, limbs of x, results as rows."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sliplm.arithmetic.kernels.llvm import (
    I8,
    SHORTS,
    SUMS,
    at,
    const,
    data,
    every,
    field,
    load,
    loop,
    shuffle,
    side_by_side,
    starts,
    store,
    transposed,
)

TOKENS = 16  # rows of x in a block, at most; 32-bit lanes
TALL = 4  # rows of w in a tall tile
STEP = 64  # columns that a tall tile reads at a time
BYTE_LIMBS, WORD_LIMBS = 4, 2
BYTE_BLOCK, WORD_BLOCK = 6, 8  # rows of w in a block: its sums, the limbs and one weight fit in 32 registers
PACKED = TALL * STEP * 3 // 2  # bytes of one step of a packed tile
WRAP = 0x7FFF8000  # the first x that signed limbs of 16 bits hold only as x - p


@intrinsic  # type: ignore[untyped-decorator]
def unpack(typing: Any, w: Any, w_start: Any, steps: Any, out: Any, start: Any) -> Any:
    """int16 out[start + 64 r steps :] = row r of the packed tile w[w_start :], uint8 [steps, PACKED]."""
    signature = types.void(w, types.intp, types.intp, out, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, target = (data(context, builder, signature, args, k) for k in (0, 3))
        tile = at(builder, weights, args[1])
        rows = starts(builder, target, args[4], builder.mul(args[2], const(STEP)), TALL)

        def body(step: Any, state: list[Any]) -> list[Any]:
            column, place = builder.mul(step, const(STEP)), builder.mul(step, const(PACKED))
            for r, row in enumerate(rows):
                for half, weight in zip((0, 32), unpacked(builder, tile, place, r), strict=True):
                    store(builder, weight, at(builder, row, builder.add(column, const(half))))
            return state

        loop(builder, args[2], 1, [], body)
        return context.get_dummy_value()

    return signature, code


def unpacked(builder: ir.IRBuilder, tile: Any, place: Any, row: int) -> tuple[Any, Any]:
    """64 weights of 12 bits of a row of the packed step at tile[place], as two vectors of int16.

    A step is int16 [4, 32], then int8 [4, 32].  The first hold a weight each in their upper 12 bits, and in
    their lower 4 those of the weight whose upper 8 bits are among the second.
    """
    upper = load(builder, at(builder, tile, builder.add(place, const(row * 64))), SHORTS)
    byte = load(builder, at(builder, tile, builder.add(place, const(256 + row * 32))), ir.VectorType(I8, 32))
    four = every(SHORTS, 4)
    second = builder.or_(
        builder.shl(builder.sext(byte, SHORTS), four), builder.and_(upper, every(SHORTS, 15))
    )
    return builder.ashr(upper, four), second


@intrinsic  # type: ignore[untyped-decorator]
def pack_bytes(typing: Any, x: Any, x_start: Any, x_stride: Any, packed: Any, start: Any) -> Any:
    """packed[start :] = 16 columns of 16 rows x[x_start + t x_stride :], as `block_bytes` takes them."""
    signature = types.void(x, types.intp, types.intp, packed, types.intp)

    def words(builder: ir.IRBuilder, columns: list[Any]) -> list[Any]:
        found = []
        for first in range(0, TOKENS, 4):
            for k in range(BYTE_LIMBS):
                limbs = [field(builder, column, 8 * k, 8) for column in columns[first : first + 4]]
                found.append(side_by_side(builder, limbs, 8))
        return found

    return signature, _packing(words)


@intrinsic  # type: ignore[untyped-decorator]
def pack_words(typing: Any, x: Any, x_start: Any, x_stride: Any, packed: Any, start: Any) -> Any:
    """packed[start :] = 16 columns of 16 rows x[x_start + t x_stride :], as `block_words` takes them."""
    signature = types.void(x, types.intp, types.intp, packed, types.intp)

    def words(builder: ir.IRBuilder, columns: list[Any]) -> list[Any]:
        found = []
        for first in range(0, TOKENS, 2):
            pair = [_wrapped(builder, column) for column in columns[first : first + 2]]
            found.append(side_by_side(builder, [field(builder, v, 0, 16) for v in pair], 16))
            rounded = [builder.add(v, every(SUMS, 0x8000)) for v in pair]
            found.append(side_by_side(builder, [field(builder, v, 16, 16) for v in rounded], 16))
        return found

    return signature, _packing(words)


def _packing(words: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source = data(context, builder, signature, args, 0)
        target = at(builder, data(context, builder, signature, args, 3), args[4])
        rows = [load(builder, row, SUMS) for row in starts(builder, source, args[1], args[2], TOKENS)]
        for i, word in enumerate(words(builder, transposed(builder, rows))):
            store(builder, word, at(builder, target, const(i * TOKENS)))
        return context.get_dummy_value()

    return code


def _putting(height: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def put(typing: Any, results: Any, start: Any, out: Any, out_start: Any, out_stride: Any) -> Any:
        """out[out_start + t out_stride + r] = results[start + 16 r + t] for r < height, of uint32 results."""
        signature = types.void(results, types.intp, out, types.intp, types.intp)

        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            results, target = (data(context, builder, signature, args, k) for k in (0, 2))
            source = at(builder, results, args[1])
            rows = [load(builder, at(builder, source, const(r * TOKENS)), SUMS) for r in range(8)]
            pairs = transposed(builder, rows)
            for t, place in enumerate(starts(builder, target, args[3], args[4], TOKENS)):
                lanes = range(t % 2 * 8, t % 2 * 8 + height)
                store(builder, shuffle(builder, pairs[t // 2], pairs[t // 2], lanes), place)
            return context.get_dummy_value()

        return signature, code

    return put


put_bytes, put_words = _putting(BYTE_BLOCK), _putting(WORD_BLOCK)


def _wrapped(builder: ir.IRBuilder, x: Any) -> Any:
    """x, or x - p modulo 2^32 where signed limbs of 16 bits cannot hold x."""
    large = builder.icmp_unsigned(">=", x, every(SUMS, WRAP))
    return builder.select(large, builder.add(x, every(SUMS, 5)), x)
