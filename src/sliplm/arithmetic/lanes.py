"""Eight vectors turned at once: coordinate j of all of them lies in line j, 8 float32 side by side.

For each vector the operations of `rotation`, in their order, so that its result has the same bits as alone;
but what moves single numbers there moves whole lines here.  In LLVM's words, so that lines stay in registers.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.kernels.llvm import SUMS, at, const, data, load, shuffle, starts, store, transposed

Floats = npt.NDArray[np.float32]
Orders = npt.NDArray[np.int32]
LANES: Final = 8  # sixteen are hardly faster for 16 rows and more, and far slower for less

_LINE = ir.VectorType(ir.FloatType(), LANES)
_WORDS: Final = SUMS.count  # columns that are transposed at a time, and words of two lines
_PAIRS: Final = [
    [word for k in range(LANES) for word in (k + side, k + side + _WORDS)] for side in (0, LANES)
]


@intrinsic  # type: ignore[untyped-decorator]
def move(typing: Any, x: Any, source: Any, out: Any, target: Any, factor: Any) -> Any:
    """Line `target` of out = factor * line `source` of x."""
    signature = types.void(x, types.intp, out, types.intp, types.float32)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        line = load(builder, _line(context, builder, signature, args, 0, args[1]), _LINE)
        result = builder.fmul(_all(builder, args[4]), line)
        store(builder, result, _line(context, builder, signature, args, 2, args[3]))
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def turn(typing: Any, x: Any, first: Any, second: Any, aa: Any, ab: Any, ba: Any, bb: Any) -> Any:
    """Two lines of x by the matrix (aa, ab; ba, bb), in place."""
    signature = types.void(x, types.intp, types.intp, *[types.float32] * 4)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        places = [_line(context, builder, signature, args, 0, args[k]) for k in (1, 2)]
        a, b = (load(builder, place, _LINE) for place in places)
        for place, k in zip(places, (3, 5), strict=True):
            left, right = (_all(builder, factor) for factor in args[k : k + 2])
            store(builder, builder.fadd(builder.fmul(left, a), builder.fmul(right, b)), place)
        return context.get_dummy_value()

    return signature, code


def _hadamard(size: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def hadamard(typing: Any, x: Any, first: Any, distance: Any) -> Any:
        """The Walsh-Hadamard transform, without its norm, of lines first, first + distance, ... of x."""
        signature = types.void(x, types.intp, types.intp)

        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            start, stride = (builder.mul(arg, const(LANES)) for arg in args[1:])
            places = starts(builder, data(context, builder, signature, args, 0), start, stride, size)
            lines = [load(builder, place, _LINE) for place in places]
            half = 1
            while half < size:
                for k in (k for k in range(size) if not k & half):
                    a, b = lines[k], lines[k + half]
                    lines[k], lines[k + half] = builder.fadd(a, b), builder.fsub(a, b)
                half *= 2
            for line, place in zip(lines, places, strict=True):
                store(builder, line, place)
            return context.get_dummy_value()

        return signature, code

    return hadamard


hadamard_2, hadamard_4, hadamard_8, hadamard_16 = (_hadamard(size) for size in (2, 4, 8, 16))


@intrinsic  # type: ignore[untyped-decorator]
def put_lines(typing: Any, x: Any, start: Any, count: Any, stride: Any, out: Any, to: Any) -> Any:
    """16 columns x[start + i stride :] of `count` rows i as lines from out[to] on; the last row again where
    there are fewer than lanes.  Both are C-contiguous.
    """
    if x.layout != "C" or out.layout != "C":
        return None  # does not compile
    signature = types.void(x, types.intp, types.intp, types.intp, out, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        places = _rows(context, builder, signature, args)
        target = at(builder, data(context, builder, signature, args, 4), args[5])
        for k, lines in enumerate(transposed(builder, [load(builder, place, SUMS) for place in places])):
            store(builder, lines, at(builder, target, const(k * _WORDS)))
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def get_lines(typing: Any, out: Any, start: Any, count: Any, stride: Any, x: Any, source: Any) -> Any:
    """The way back: 16 columns out[start + i stride :] of `count` rows from lines x[source :]."""
    if x.layout != "C" or out.layout != "C":
        return None  # does not compile
    signature = types.void(out, types.intp, types.intp, types.intp, x, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source = at(builder, data(context, builder, signature, args, 4), args[5])
        lines = [load(builder, at(builder, source, const(k * _WORDS)), SUMS) for k in range(LANES)]
        columns, half = transposed(builder, lines), LANES // 2
        for t, place in reversed(list(enumerate(_rows(context, builder, signature, args)))):
            even, odd = columns[t // 2], columns[half + t // 2]  # of row t from even lines, and from odd ones
            row = shuffle(builder, even, odd, _PAIRS[t % 2])
            store(builder, row, place)  # the last row's own comes last
        return context.get_dummy_value()

    return signature, code


@jit
def to_lines(x: Floats, first: int, lines: Floats) -> None:
    """Rows of x from `first` on, side by side; the last one again where there are fewer than lanes."""
    n, count = x.shape[1], min(LANES, x.shape[0] - first)
    whole = n // _WORDS * _WORDS
    for j in range(0, whole, _WORDS):
        put_lines(x, first * n + j, count, n, lines, j * LANES)
    for j in range(whole, n):
        for t in range(LANES):
            lines[j * LANES + t] = x[first + min(t, count - 1), j]


@jit
def from_lines(lines: Floats, out: Floats, first: int) -> None:
    """The way back, into rows of out from `first` on, as far as it has them."""
    n, count = out.shape[1], min(LANES, out.shape[0] - first)
    whole = n // _WORDS * _WORDS
    for j in range(0, whole, _WORDS):
        get_lines(out, first * n + j, count, n, lines, j * LANES)
    for j in range(whole, n):
        for t in range(count):
            out[first + t, j] = lines[j * LANES + t]


@jit
def move_lines(x: Floats, out: Floats, order: Orders, signs: Floats) -> None:
    """Line j of out = signs[j] * line order[j] of x."""
    for j in range(order.size):
        move(x, order[j], out, j, signs[j])


@jit
def hadamard_lines(x: Floats, first: int, block: int, count: int) -> None:
    """Transforms of `count` interleaved blocks, as `rotation` has them, of lines from `first` on."""
    width, left = count, block
    while left > 1:
        size = min(left, 16)
        for start in range(first, first + block * count, size * width):
            for j in range(start, start + width):
                if size == 16:
                    hadamard_16(x, j, width)
                elif size == 8:
                    hadamard_8(x, j, width)
                elif size == 4:
                    hadamard_4(x, j, width)
                else:
                    hadamard_2(x, j, width)
        width, left = size * width, left // size


@jit
def turn_lines(x: Floats, aa: Floats, ab: Floats, ba: Floats, bb: Floats, distance: int) -> None:
    """Lines turned in pairs, as `rotation` has them, by the matrices (aa, ab; ba, bb)."""
    half = aa.size
    for j in range(half):
        other = j + distance if j + distance < 2 * half else j + distance - half
        turn(x, j, other, aa[j], ab[j], ba[j], bb[j])


def _rows(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> list[Any]:
    """Where each lane's row begins: arguments 0 to 3 are the array, its start, rows and stride."""
    array, last = data(context, builder, signature, args, 0), builder.sub(args[2], const(1))
    places = []
    for t in range(LANES):
        row = builder.select(builder.icmp_signed("<", args[2], const(t + 1)), last, const(t))
        places.append(at(builder, array, builder.add(args[1], builder.mul(row, args[3]))))
    return places


def _line(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, k: int, line: Any) -> Any:
    return at(builder, data(context, builder, signature, args, k), builder.mul(line, const(LANES)))


def _all(builder: ir.IRBuilder, value: Any) -> Any:
    undefined = ir.Constant(_LINE, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return shuffle(builder, one, undefined, [0] * LANES)
