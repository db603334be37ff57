"""The inner tiles of the VNNI kernel, as LLVM code: rows of w times the limbs of x, all sums in registers.

    tall    4 rows of w times one x: columns lie in the lanes, which are added up at the end
    block   6 or 8 rows of w times 16 x: each lane has an x of its own, so that no sum crosses lanes

Written as intrinsics because no loop in numba's Python keeps 32-bit sums in vector registers reliably.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

TOKENS = 16  # rows of x in a block
TALL = 4  # rows of w in a tall tile: its sums, weights and limbs fit in 32 registers


@dataclass(frozen=True)
class Format:
    """How w and x of one width are multiplied."""

    instruction: str  # sums 32 bits of products into each lane
    bits: int  # of an element of w and of the memory of a limb of x
    limbs: int  # that an x is cut into
    limb_bits: int
    height: int  # rows of w in a block: height * limbs sums, the limbs and one weight fit in 32 registers
    exact: int  # columns that a lane of a block can sum without overflow
    weight_first: bool

    @property
    def step(self) -> int:
        """Columns in the 32 bits of a lane."""
        return 32 // self.bits

    @property
    def vector(self) -> ir.VectorType:
        """A register full of elements."""
        return ir.VectorType(ir.IntType(self.bits), 512 // self.bits)


# 255 * 127 * 2^16 < 2^31
BYTES = Format("llvm.x86.avx512.vpdpbusd.512", 8, 4, 8, height=6, exact=1 << 16, weight_first=False)
# 2047 * 2047 * 512 < 2^31
WORDS = Format("llvm.x86.avx512.vpdpwssd.512", 16, 3, 11, height=8, exact=512, weight_first=True)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SUMS, _WIDE = ir.VectorType(_I32, 16), ir.VectorType(_I64, 16)


@intrinsic  # type: ignore[untyped-decorator]
def tall(
    typing: Any,
    w: Any,
    w_start: Any,
    w_stride: Any,
    x: Any,
    x_start: Any,
    ahead: Any,
    columns: Any,
    sums: Any,
) -> Any:
    """sums[r] += <w[w_start + r w_stride :], x> over columns > 0, a multiple of 64, for int64 sums[TALL].

    x is the sum of its limbs x[x_start + l w_stride :] shifted left by l limb_bits.  From w[ahead :] on, as
    much of w is asked for as the tile reads.
    """
    signature = types.void(w, types.intp, types.intp, x, types.intp, types.intp, types.intp, sums)
    form = _format(w)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights, limbs, out = (_data(context, builder, signature, args, k) for k in (0, 3, 7))
        rows = _starts(builder, weights, args[1], args[2], TALL)
        parts = _starts(builder, limbs, args[4], args[2], form.limbs)
        hints = builder.gep(weights, [args[5]])

        def body(column: Any, totals: list[Any]) -> list[Any]:
            xs = [_load(builder, _at(builder, part, column), form.vector) for part in parts]
            updated = []
            for r, row in enumerate(rows):
                weight = _load(builder, _at(builder, row, column), form.vector)
                offset = builder.mul(column, _const(TALL))
                _prefetch(builder, hints, builder.add(offset, _const(r * form.vector.count)))
                for k, limb in enumerate(xs):
                    updated.append(_dot(builder, form, totals[r * form.limbs + k], weight, limb))
            return updated

        totals = _loop(builder, args[6], form.vector.count, TALL * form.limbs, body)
        add = _declare(builder, "llvm.vector.reduce.add.v16i64", ir.FunctionType(_I64, [_WIDE]))
        for r, joined in enumerate(_joined(builder, form, totals)):
            place = _at(builder, out, _const(r))
            builder.store(builder.add(builder.load(place), builder.call(add, [joined])), place)
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def block(
    typing: Any, w: Any, w_start: Any, w_stride: Any, x: Any, x_start: Any, ahead: Any, steps: Any, sums: Any
) -> Any:
    """sums[r, t] += <w[w_start + r w_stride :], x of token t> over steps > 0, for int64 sums[height, 16].

    x[x_start :] is uint32 [steps, limbs, 16]: in a word, a limb of each column of a step.  From w[ahead :]
    on, as much of w is asked for as the tile reads.
    """
    signature = types.void(w, types.intp, types.intp, x, types.intp, types.intp, types.intp, sums)
    form = _format(w)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights = _data(context, builder, signature, args, 0)
        rows = _starts(builder, weights, args[1], args[2], form.height)
        hints = builder.gep(weights, [args[5]])
        packed = _at(builder, _data(context, builder, signature, args, 3), args[4])

        def body(step: Any, totals: list[Any]) -> list[Any]:
            place = builder.mul(step, _const(form.limbs * TOKENS))
            xs = [
                _load(builder, _at(builder, packed, builder.add(place, _const(k * TOKENS))), _SUMS)
                for k in range(form.limbs)
            ]
            column = builder.mul(step, _const(form.step))
            _prefetch(builder, hints, builder.mul(column, _const(form.height)))
            updated = []
            for r, row in enumerate(rows):
                weight = _splat(builder, _load(builder, _at(builder, row, column), _I32))
                for k, limb in enumerate(xs):
                    updated.append(_dot(builder, form, totals[r * form.limbs + k], weight, limb))
            return updated

        totals = _loop(builder, args[6], 1, form.height * form.limbs, body)
        out = _data(context, builder, signature, args, 7)
        for r, joined in enumerate(_joined(builder, form, totals)):
            place = builder.bitcast(_at(builder, out, _const(r * TOKENS)), _WIDE.as_pointer())
            builder.store(builder.add(builder.load(place, align=8), joined), place, align=8)
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def pack(typing: Any, w: Any, x: Any, x_start: Any, x_stride: Any, packed: Any, start: Any) -> Any:
    """packed[start :] = 16 columns of 16 rows x[x_start + t x_stride :], in limbs as `block` takes them."""
    signature = types.void(w, x, types.intp, types.intp, packed, types.intp)
    form = _format(w)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source = _data(context, builder, signature, args, 1)
        target = _at(builder, _data(context, builder, signature, args, 4), args[5])
        rows = [_load(builder, row, _SUMS) for row in _starts(builder, source, args[2], args[3], TOKENS)]
        columns = _transposed(builder, rows)
        words = [
            _word(builder, form, columns[first : first + form.step], k)
            for first in range(0, TOKENS, form.step)
            for k in range(form.limbs)
        ]
        for i, word in enumerate(words):
            _store(builder, word, _at(builder, target, _const(i * TOKENS)))
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def put(typing: Any, w: Any, results: Any, out: Any, out_start: Any, out_stride: Any) -> Any:
    """out[out_start + t out_stride + r] = results[r, t] for uint32 results[height, 16] of a block of w."""
    signature = types.void(w, results, out, types.intp, types.intp)
    form = _format(w)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (_data(context, builder, signature, args, k) for k in (1, 2))
        rows = [_load(builder, _at(builder, source, _const(r * TOKENS)), _SUMS) for r in range(form.height)]
        rows += [ir.Constant(_SUMS, ir.Undefined)] * (8 - form.height)
        pairs = _transposed(builder, rows)
        for t, place in enumerate(_starts(builder, target, args[3], args[4], TOKENS)):
            first = t % 2 * 8
            token = _shuffle(builder, pairs[t // 2], pairs[t // 2], range(first, first + form.height))
            _store(builder, token, place)
        return context.get_dummy_value()

    return signature, code


def _word(builder: ir.IRBuilder, form: Format, columns: list[Any], k: int) -> Any:
    """Limb k of each column, side by side in one word of each lane."""
    word = ir.Constant(_SUMS, [0] * 16)
    for i, column in enumerate(columns):
        shifted = builder.lshr(column, ir.Constant(_SUMS, [k * form.limb_bits] * 16))
        limb = builder.and_(shifted, ir.Constant(_SUMS, [(1 << form.limb_bits) - 1] * 16))
        word = builder.or_(word, builder.shl(limb, ir.Constant(_SUMS, [i * form.bits] * 16)))
    return word


def _transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The words of 8 or 16 rows, column after column: each round deals the first half between the second."""
    half = len(rows) // 2
    low = [k // 2 + k % 2 * 16 for k in range(16)]  # lanes of both, in turn
    high = [k + 8 for k in low]
    for _ in range(half.bit_length()):
        rows = [
            _shuffle(builder, rows[i], rows[i + half], lanes) for i in range(half) for lanes in (low, high)
        ]
    return rows


def _shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: Iterable[int]) -> Any:
    chosen = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(chosen)), chosen))


def _store(builder: ir.IRBuilder, value: Any, place: Any) -> None:
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4)


def _format(w: Any) -> Format:
    return BYTES if w.dtype == types.int8 else WORDS


def _loop(builder: ir.IRBuilder, end: Any, step: int, count: int, body: Any) -> list[Any]:
    """`count` vectors of sums after body(i, sums) -> sums for i = 0, step, ... below end > 0."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(_I64)
    totals = [builder.phi(_SUMS) for _ in range(count)]
    updated: list[Any] = body(index, totals)
    following = builder.add(index, _const(step))
    index.add_incoming(_const(0), before)
    index.add_incoming(following, loop)
    for total, new in zip(totals, updated, strict=True):
        total.add_incoming(ir.Constant(_SUMS, [0] * 16), before)
        total.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    return updated


def _dot(builder: ir.IRBuilder, form: Format, total: Any, weights: Any, x: Any) -> Any:
    dot = _declare(builder, form.instruction, ir.FunctionType(_SUMS, [_SUMS, form.vector, form.vector]))
    operands = (weights, x) if form.weight_first else (x, weights)
    return builder.call(dot, [total, *(builder.bitcast(operand, form.vector) for operand in operands)])


def _joined(builder: ir.IRBuilder, form: Format, totals: list[Any]) -> Iterator[Any]:
    """For each row the sum of its limbs' sums in 64-bit lanes: each below 2^31 << 24."""
    for start in range(0, len(totals), form.limbs):
        joined = builder.sext(totals[start], _WIDE)
        for k in range(1, form.limbs):
            shift = ir.Constant(_WIDE, [k * form.limb_bits] * 16)
            joined = builder.add(joined, builder.shl(builder.sext(totals[start + k], _WIDE), shift))
        yield joined


def _splat(builder: ir.IRBuilder, word: Any) -> Any:
    undefined = ir.Constant(_SUMS, ir.Undefined)
    one = builder.insert_element(undefined, word, ir.Constant(_I32, 0))
    return _shuffle(builder, one, undefined, [0] * 16)


def _data(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, k: int) -> Any:
    return context.make_array(signature.args[k])(context, builder, args[k]).data


def _const(value: int) -> Any:
    return ir.Constant(_I64, value)


def _starts(builder: ir.IRBuilder, data: Any, start: Any, stride: Any, count: int) -> list[Any]:
    return [_at(builder, data, builder.add(start, builder.mul(stride, _const(k)))) for k in range(count)]


def _at(builder: ir.IRBuilder, data: Any, index: Any) -> Any:
    return builder.gep(data, [index], inbounds=True)


def _load(builder: ir.IRBuilder, place: Any, kind: Any) -> Any:
    # rows of a memory map start anywhere
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _prefetch(builder: ir.IRBuilder, data: Any, index: Any) -> None:
    """Ask for a place, which may lie past the end: a hint never faults.

    Into the second-level cache: in the first, the tiles to come would push out what this one reads again.
    """
    byte = _I8.as_pointer()
    hint = _declare(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]))
    read_second_data = [ir.Constant(_I32, k) for k in (0, 2, 1)]
    builder.call(hint, [builder.bitcast(builder.gep(data, [index]), byte), *read_second_data])


def _declare(builder: ir.IRBuilder, name: str, kind: ir.FunctionType) -> Any:
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)
