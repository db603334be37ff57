"""Words of LLVM that the tiles of several kernels are written in: loops over registers, loads, shuffles.

Tiles are intrinsics because no loop in numba's Python keeps 32-bit sums in vector registers reliably.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
SUMS, WIDE = ir.VectorType(I32, 16), ir.VectorType(I64, 16)
SHORTS, CHARS = ir.VectorType(I16, 32), ir.VectorType(I8, 64)


def loop(
    builder: ir.IRBuilder,
    end: Any,
    step: int,
    initial: list[Any],
    body: Callable[[Any, list[Any]], list[Any]],
) -> list[Any]:
    """The state after body(i, state) -> state for i = 0, step, ... below end > 0."""
    before, start, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(start)
    builder.position_at_end(start)
    index = builder.phi(I64)
    state = [builder.phi(value.type) for value in initial]
    updated = body(index, list(state))
    following, last = builder.add(index, const(step)), builder.block
    index.add_incoming(const(0), before)
    index.add_incoming(following, last)
    for phi, first, new in zip(state, initial, updated, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(new, last)
    builder.cbranch(builder.icmp_signed("<", following, end), start, after)
    builder.position_at_end(after)
    return updated


def zeros(count: int) -> list[Any]:
    """So many vectors of 32-bit sums."""
    return [every(SUMS, 0)] * count


def every(kind: Any, value: int) -> Any:
    """A vector of one constant."""
    return ir.Constant(kind, [value] * kind.count)


def const(value: int) -> Any:
    """A constant index."""
    return ir.Constant(I64, value)


def data(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, k: int) -> Any:
    """Pointer to the elements of array argument k."""
    return context.make_array(signature.args[k])(context, builder, args[k]).data


def at(builder: ir.IRBuilder, pointer: Any, index: Any) -> Any:
    """Pointer to an element."""
    return builder.gep(pointer, [index], inbounds=True)


def starts(builder: ir.IRBuilder, pointer: Any, start: Any, stride: Any, count: int) -> list[Any]:
    """Pointers to the beginnings of `count` rows."""
    return [at(builder, pointer, builder.add(start, builder.mul(stride, const(k)))) for k in range(count)]


def load(builder: ir.IRBuilder, place: Any, kind: Any) -> Any:
    """A vector or word from anywhere: rows of a memory map keep no alignment."""
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def store(builder: ir.IRBuilder, value: Any, place: Any, align: int = 1) -> None:
    """A vector to anywhere."""
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=align)


def shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: Iterable[int]) -> Any:
    """The named lanes of a, then b."""
    chosen = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))


def field(builder: ir.IRBuilder, word: Any, first: int, bits: int) -> Any:
    """Some bits of every word."""
    shifted = builder.lshr(word, every(SUMS, first))
    return builder.and_(shifted, every(SUMS, (1 << bits) - 1))


def side_by_side(builder: ir.IRBuilder, fields: list[Any], bits: int) -> Any:
    """Fields of so many bits in one word, the first lowest."""
    word = fields[0]
    for i, value in enumerate(fields[1:], 1):
        word = builder.or_(word, builder.shl(value, every(SUMS, i * bits)))
    return word


def transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The words of 8 or 16 rows, column after column: each round deals the first half between the second."""
    half = len(rows) // 2
    low = [k // 2 + k % 2 * 16 for k in range(16)]  # lanes of both, in turn
    high = [k + 8 for k in low]
    for _ in range(half.bit_length()):
        rows = [
            shuffle(builder, rows[i], rows[i + half], lanes) for i in range(half) for lanes in (low, high)
        ]
    return rows


def splat(builder: ir.IRBuilder, word: Any) -> Any:
    """A 32-bit word in every lane."""
    undefined = ir.Constant(SUMS, ir.Undefined)
    one = builder.insert_element(undefined, word, ir.Constant(I32, 0))
    return shuffle(builder, one, undefined, [0] * 16)


def prefetch(builder: ir.IRBuilder, pointer: Any, index: Any) -> None:
    """Ask for a place, which may lie past the end: a hint never faults.

    Into the second-level cache: in the first, the tiles to come would push out what this one reads again.
    """
    byte = I8.as_pointer()
    hint = declare(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]))
    read_second_data = [ir.Constant(I32, k) for k in (0, 2, 1)]
    builder.call(hint, [builder.bitcast(builder.gep(pointer, [index]), byte), *read_second_data])


def declare(builder: ir.IRBuilder, name: str, kind: ir.FunctionType) -> Any:
    """A function of LLVM's own."""
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)
