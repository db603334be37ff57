"""Sums of limbs, folded modulo p = 2^32 - 5, sixteen at a time, in LLVM's words."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sliplm.arithmetic.field import P
from sliplm.arithmetic.kernels.llvm import SUMS, WIDE, at, const, data, every, load, loop, store

_OFFSET = P << 31  # a multiple of p above any -sum


@intrinsic  # type: ignore[untyped-decorator]
def fold(typing: Any, sums: Any, residues: Any, count: Any) -> Any:
    """uint32 residues[:count] = int64 sums[:count] mod p, |sums| < 2^62, count a multiple of 16 above 0."""
    signature = types.void(sums, residues, types.intp)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (data(context, builder, signature, args, k) for k in (0, 1))

        def body(i: Any, state: list[Any]) -> list[Any]:
            store(
                builder, _folded(builder, load(builder, at(builder, source, i), WIDE)), at(builder, target, i)
            )
            return state

        loop(builder, args[2], 16, [], body)
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def join(typing: Any, limbs: Any, first: Any, second: Any, shift: Any, sums: Any) -> Any:
    """int64 sums[i] += (a + 2^8 b + 2^16 c + 2^24 d) 2^shift for i < 256.

    a and b are int32 limbs[first + i] and limbs[first + 256 + i], c and d those from `second` on.
    """
    signature = types.void(limbs, types.intp, types.intp, types.int64, sums)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (data(context, builder, signature, args, k) for k in (0, 4))
        starts = [builder.add(args[k], const(more)) for k in (1, 2) for more in (0, 256)]
        one = builder.insert_element(ir.Constant(WIDE, ir.Undefined), args[3], const(0))
        shifts = builder.shuffle_vector(one, ir.Constant(WIDE, ir.Undefined), every(SUMS, 0))

        def body(i: Any, state: list[Any]) -> list[Any]:
            total = every(WIDE, 0)
            for k, start in enumerate(starts):
                limb = load(builder, at(builder, source, builder.add(start, i)), SUMS)
                total = builder.add(total, builder.shl(builder.sext(limb, WIDE), every(WIDE, 8 * k)))
            place = at(builder, target, i)
            store(builder, builder.add(load(builder, place, WIDE), builder.shl(total, shifts)), place)
            return state

        loop(builder, const(256), 16, [], body)
        return context.get_dummy_value()

    return signature, code


def _folded(builder: ir.IRBuilder, total: Any) -> Any:
    """2^32 = 5: below 5 * 2^32 after the first round, below 2 p after the second."""
    v = builder.add(total, every(WIDE, _OFFSET))
    for _ in range(2):
        high = builder.lshr(v, every(WIDE, 32))
        low = builder.and_(v, every(WIDE, 0xFFFFFFFF))
        v = builder.add(low, builder.add(high, builder.shl(high, every(WIDE, 2))))
    less = builder.sub(v, every(WIDE, P))
    return builder.trunc(builder.select(builder.icmp_unsigned("<", v, less), v, less), SUMS)
