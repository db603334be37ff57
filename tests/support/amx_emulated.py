"""The AMX kernel's layout and loops on a processor without AMX: its tiles lie in memory, VNNI multiplies.

A program, to be run with a folder of its own for compiled code (NUMBA_CACHE_DIR).
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir

from sliplm.arithmetic import kernels
from sliplm.arithmetic.kernels import amx, amx_tile
from sliplm.arithmetic.kernels.llvm import CHARS, I8, I32, SUMS, at, const, declare, load, splat, store

TILES = ir.ArrayType(I8, 8 * 1024)


def emulated(builder: ir.IRBuilder, name: str, args: list) -> None:
    """In the place of `amx_tile._call`."""
    name = name.removeprefix("llvm.x86.")
    tiles = [_tile(builder, arg.constant) for arg in args if isinstance(arg, ir.Constant) and arg.type == I8]
    if name == "tilezero":
        for r in range(16):
            store(builder, ir.Constant(CHARS, [0] * 64), _row(builder, tiles[0], r))
    elif name in ("tileloadd64", "tilestored64"):
        for r in range(16):
            place = at(builder, args[1], builder.mul(args[2], const(r)))
            row = _row(builder, tiles[0], r)
            source, target = (place, row) if name == "tileloadd64" else (row, place)
            store(builder, load(builder, source, CHARS), target)
    elif name == "tdpbsud":
        _multiply(builder, *tiles)
    elif name not in ("ldtilecfg", "tilerelease"):
        raise NotImplementedError(name)


def _multiply(builder: ir.IRBuilder, sums: object, signed: object, unsigned: object) -> None:
    dot = declare(builder, "llvm.x86.avx512.vpdpbusd.512", ir.FunctionType(SUMS, [SUMS, CHARS, CHARS]))
    for m in range(16):
        total = load(builder, _row(builder, sums, m), SUMS)
        for k in range(16):
            word = load(builder, at(builder, _row(builder, signed, m), const(4 * k)), I32)
            column = load(builder, _row(builder, unsigned, k), CHARS)
            total = builder.call(dot, [total, column, builder.bitcast(splat(builder, word), CHARS)])
        store(builder, total, _row(builder, sums, m))


def _tile(builder: ir.IRBuilder, k: int) -> object:
    memory = builder.module.globals.get("emulated_tiles")
    if memory is None:
        memory = ir.GlobalVariable(builder.module, TILES, "emulated_tiles")
        memory.linkage, memory.initializer = "internal", ir.Constant(TILES, bytearray(8 * 1024))
    return at(builder, builder.bitcast(memory, I8.as_pointer()), const(1024 * k))


def _row(builder: ir.IRBuilder, tile: object, r: int) -> object:
    return at(builder, tile, const(64 * r))


def main() -> None:
    """Compare with the known answers."""
    amx_tile._call = emulated
    shapes = (
        (1, 1, 16),
        (25, 640, 33),
        (9, 33, 5),
        (9, 33, 4),
        (40, 200, 150),
        (16, 8256, 16),
        (33, 66_000, 17),
    )
    for dtype, largest in ((np.int8, 127), (np.int16, 2047)):
        for m, n, rows in shapes:
            w, x = kernels.known_operands(m, n, rows, largest)
            answer = amx.AmxMatrix(w.astype(dtype), 1).product(x)  # the tiles are every thread's
            if not np.array_equal(answer, kernels.known_answer(w, x)):
                sys.exit(f"wrong: {dtype.__name__} {m} x {n}, {rows} rows")
        for sign in (1, -1):
            w = np.full((20, 66_000), sign * largest, dtype)
            x = np.full((16, 66_000), kernels.P - 1, np.uint32)
            x[1] = 0xFFFFFF
            answer = amx.AmxMatrix(w, 1).product(x)
            if not np.array_equal(answer, kernels.known_answer(w.astype(np.int64), x)):
                sys.exit(f"wrong: {dtype.__name__}, largest sums")
    print("right")


if __name__ == "__main__":
    main()
