"""The inner tile of the AMX kernel, as LLVM code: two tiles of w times two limbs of 16 x, sums in four tiles.

A tile of the processor is 16 rows of 64 bytes.  Of w, it holds 64 columns of 16 rows; of x, a limb of 64
columns of 16 x, four columns in a word, which is how `pack_bytes` leaves them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sliplm.arithmetic.kernels.llvm import (
    CHARS,
    I8,
    SHORTS,
    at,
    const,
    data,
    declare,
    every,
    load,
    loop,
    store,
)
from sliplm.arithmetic.kernels.vnni_layout import BYTE_LIMBS, PACKED, STEP, TALL, TOKENS

ROWS = 16  # of w in a tile
TILE = ROWS * STEP  # bytes
PAIR = 2 * ROWS * TOKENS  # sums of a tile of w times two limbs
EXACT = 1 << 16  # columns that a tile can sum: 255 * 128 * 2^16 < 2^31

_CHARS = ir.VectorType(I8, 32)
_VOID = ir.VoidType()
_POINTER = I8.as_pointer()


@intrinsic  # type: ignore[untyped-decorator]
def configure(typing: Any, shapes: Any) -> Any:
    """Give the tiles of this thread the shapes that uint8 shapes[64] says (palette 1 of the processor)."""
    signature = types.void(shapes)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = builder.bitcast(data(context, builder, signature, args, 0), _POINTER)
        _call(builder, "llvm.x86.ldtilecfg", [place])
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def release(typing: Any) -> Any:
    """Leave the tiles: a thread that has none is cheaper to switch to and from."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic  # type: ignore[untyped-decorator]
def two_by_two(
    typing: Any, w: Any, w_start: Any, other: Any, x: Any, x_start: Any, steps: Any, sums: Any, start: Any
) -> Any:
    """sums[start :], int32 [2 of w, 2 limbs, 16 rows, 16 x] = products over steps > 0 of 64 columns.

    The tiles of w are int8 w[w_start :] and w[w_start + other :], each [steps, 16, 64]; x[x_start :] is
    uint32 [steps, 16, limbs, 16], of which the first two limbs are read.
    """
    signature = types.void(w, types.intp, types.intp, x, types.intp, types.intp, sums, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, limbs, out = (data(context, builder, signature, args, k) for k in (0, 3, 6))
        first = at(builder, weights, args[1])
        second = at(builder, first, args[2])
        packed, target = at(builder, limbs, args[4]), at(builder, out, args[7])
        for k in range(4):
            _call(builder, "llvm.x86.tilezero", [_tile(k)])

        def body(step: Any, state: list[Any]) -> list[Any]:
            column, place = builder.mul(step, const(TILE)), builder.mul(step, const(16 * BYTE_LIMBS * TOKENS))
            for k, tile in ((4, first), (5, second)):
                _load(builder, k, at(builder, tile, column), STEP)
            for k in range(2):
                words = at(builder, packed, builder.add(place, const(k * TOKENS)))
                _load(builder, 6 + k, words, 4 * BYTE_LIMBS * TOKENS)
            for a in range(2):
                for k in range(2):  # signed w, unsigned x
                    _call(builder, "llvm.x86.tdpbsud", [_tile(2 * a + k), _tile(4 + a), _tile(6 + k)])
            return state

        loop(builder, args[5], 1, [], body)
        for k in range(4):
            place = builder.bitcast(at(builder, target, const(k * ROWS * TOKENS)), _POINTER)
            _call(builder, "llvm.x86.tilestored64", [_tile(k), place, const(4 * TOKENS)])
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def whole(typing: Any, w: Any, w_start: Any, steps: Any, out: Any, start: Any) -> Any:
    """A row of int8 w[w_start :] for `two_by_two`: 64 columns go to out[start :], a step every TILE bytes."""
    signature = types.void(w, types.intp, types.intp, out, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, target = (data(context, builder, signature, args, k) for k in (0, 3))
        row, tile = at(builder, weights, args[1]), at(builder, target, args[4])

        def body(step: Any, state: list[Any]) -> list[Any]:
            line = load(builder, at(builder, row, builder.mul(step, const(STEP))), CHARS)
            store(builder, line, at(builder, tile, builder.mul(step, const(TILE))))
            return state

        loop(builder, args[2], 1, [], body)
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def part(typing: Any, w: Any, w_start: Any, steps: Any, out: Any, start: Any, other: Any) -> Any:
    """Rows of a packed tile of w, uint8 [steps, PACKED] from w[w_start :], in bytes for `two_by_two`.

    The upper 8 bits of each weight go to int8 out[start + 64 r :], the lower 4 to
    out[start + other + 64 r :], a step every TILE bytes.
    """
    signature = types.void(w, types.intp, types.intp, out, types.intp, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, target = (data(context, builder, signature, args, k) for k in (0, 3))
        tile, upper = at(builder, weights, args[1]), at(builder, target, args[4])
        lower = at(builder, upper, args[5])

        def body(step: Any, state: list[Any]) -> list[Any]:
            place, column = builder.mul(step, const(PACKED)), builder.mul(step, const(TILE))
            for r in range(TALL):
                word = load(builder, at(builder, tile, builder.add(place, const(64 * r))), SHORTS)
                byte = load(builder, at(builder, tile, builder.add(place, const(64 * TALL + 32 * r))), _CHARS)
                four, eight, mask = (every(SHORTS, k) for k in (4, 8, 15))
                halves = (
                    (upper, 0, builder.lshr(word, eight)),
                    (lower, 0, builder.and_(builder.lshr(word, four), mask)),
                    (lower, 32, builder.and_(word, mask)),
                )
                for pointer, half, value in halves:
                    where = builder.add(column, const(64 * r + half))
                    store(builder, builder.trunc(value, _CHARS), at(builder, pointer, where))
                store(builder, byte, at(builder, upper, builder.add(column, const(64 * r + 32))))
            return state

        loop(builder, args[2], 1, [], body)
        return context.get_dummy_value()

    return signature, code


def _tile(k: int) -> Any:
    return ir.Constant(I8, k)


def _load(builder: ir.IRBuilder, tile: int, place: Any, stride: int) -> None:
    _call(builder, "llvm.x86.tileloadd64", [_tile(tile), builder.bitcast(place, _POINTER), const(stride)])


def _call(builder: ir.IRBuilder, name: str, args: list[Any]) -> None:
    builder.call(declare(builder, name, ir.FunctionType(_VOID, [a.type for a in args])), args)
