"""The vault's steps for one group of a message, each one compiled call, named as in SPEC section 4.

    ask      steps 1 and 2: rotate, scale, mask; x~ goes straight into the message
    ahead    what does not depend on the answer, while the worker computes: A (B x), <c, x~>, and what
             rounding costs the input
    holds    step 4: <e, y~> = <c, x~> for every row; in `field`, where the check is
    opened   step 5: mask off, back to the true basis, A (B x) added, straight into the layer's answer

All of a group's secrets lie in one array, laid out once: handing an array to compiled code costs more than
most of what these loops do for one row.  Each call takes rows `first` to `last` of arrays that hold them all,
so that many rows can be shared out over the cores.  A rotation without compiled loops (`haar`) is turned
outside, between `unmask` and `finish`, before `mask`.

Where there are twice as many alphas as rows, each input travels as two (SPEC section 3): the second half of
x~, y, u, alpha and what is expected is that of the remainders.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, Sums, add_mod, expect, sub_centred
from sliplm.arithmetic.fixedpoint import Floats, answer_loss, input_loss, row_alpha, to_field
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.lowrank import add_low_rank
from sliplm.arithmetic.rotation import Fast, Identity, Rotation, Tables, rotate_rows, rotate_rows_back

Sizes = npt.NDArray[np.int64]
Scales = npt.NDArray[np.float64]
Losses = npt.NDArray[np.float64]

_N: Final = 0  # inputs
_D_IN: Final = 1  # where D_in begins
_SCALE: Final = 2  # where the row scales begin, as float64
_IN: Final = 3  # of Q_in D_in: kind, where its tables begin, distance, block
_OUT: Final = 7  # of Q_out D_out
_EDGE: Final = 11  # what an answer must stay within
_SIZES: Final = 12

_IDENTITY, _FAST = 0, 1  # kinds
_AT_ONCE: Final = 16  # rows: what passes between the parts of a step stays in the cache
_NEAR: Final = 2**17  # numbers that a core's own cache holds beside all else


class Laid(NamedTuple):
    """A group's secrets for the compiled steps: sizes and places int64 [12], the rest float32 [:]."""

    sizes: Sizes
    table: Floats

    def __repr__(self) -> str:
        return f"Laid({self.table.nbytes} bytes, hidden)"


def laid_out(rotation_in: Rotation, rotation_out: Rotation, d_in: Floats, scale: Floats, edge: float) -> Laid:
    """Lay out both rotations with their diagonals, D_in [n], the row scales s [m], and the size that no
    product is above (M64).
    """
    sizes, pieces = np.zeros(_SIZES, np.int64), []
    sizes[_EDGE] = int(edge)
    place = 0

    def lay(array: npt.NDArray[np.generic]) -> int:
        nonlocal place
        words = np.ascontiguousarray(array).reshape(-1).view(np.float32)
        pieces.append(words)
        place += words.size
        return place - words.size

    sizes[_SCALE] = lay(scale.astype(np.float64))  # first, where it is aligned
    sizes[_N], sizes[_D_IN] = rotation_in.n, lay(d_in)
    for head, rotation in ((_IN, rotation_in), (_OUT, rotation_out)):
        if isinstance(rotation, Fast):
            *arrays, distance, block = rotation.tables
            sizes[head : head + 4] = _FAST, place, distance, block
            for array in arrays:
                lay(array)
        else:
            sizes[head : head + 2] = _IDENTITY, place
            lay(rotation.diagonal if isinstance(rotation, Identity) else np.ones(rotation.n, np.float32))
    return Laid(sizes, np.concatenate(pieces))


# --- the steps -------------------------------------------------------------------------------------------


@jit
def ask(
    sizes: Sizes,
    table: Floats,
    limit: float,
    x: Floats,
    r: Elements,
    hidden: Elements,
    alpha: Scales,
    first: int,
    last: int,
) -> bool:
    """Steps 1 and 2: x~ = round(alpha Q_in D_in x) + r mod p into `hidden`, and the secret scales alpha.

    Args:
        limit: alpha times the norm of a row, see `fixedpoint.scale_limit`.
        x: float32 [rows, n].  r: uint32 [rows, n or more].  hidden: uint32 [rows, n].  alpha: float64 [rows].
            All but x have twice the rows where each input travels as two.

    Returns: False where a row holds NaN or infinity; what was written for it is no message.
    """
    finite = True
    z = np.empty((min(last - first, _AT_ONCE), sizes[_N]), np.float32)
    for start in range(first, last, _AT_ONCE):
        end = min(last, start + _AT_ONCE)
        _turn(sizes, table, x[start:end], z[: end - start])
        if alpha.size == x.shape[0]:
            done = mask(limit, z, start, r, hidden, alpha, start, end)
        else:
            done = mask_both(limit, z, start, r, hidden, alpha, start, end)
        if not done:
            finite = False
    return finite


@jit
def mask(
    limit: float, z: Floats, above: int, r: Elements, hidden: Elements, alpha: Scales, first: int, last: int
) -> bool:
    """The rest of `ask`, for z = Q_in D_in x, which lacks the `above` rows before."""
    finite = True
    for i in range(first, last):
        scale = row_alpha(z[i - above], limit)
        alpha[i] = scale
        if not scale > 0:  # NaN
            finite = False
            continue
        for j in range(z.shape[1]):
            hidden[i, j] = np.uint32(add_mod(to_field(z[i - above, j], scale), np.uint64(r[i, j])))
    return finite


@jit
def mask_both(
    limit: float, z: Floats, above: int, r: Elements, hidden: Elements, alpha: Scales, first: int, last: int
) -> bool:
    """`mask` for inputs that travel as two rows each: `z` is overwritten by alpha times the remainders.

    With a power of two for the first alpha, they are exact in float32.
    """
    rows, finite = alpha.size // 2, True
    for i in range(first, last):
        scale = row_alpha(z[i - above], limit)
        alpha[i] = scale
        if not scale > 0:  # NaN
            finite = False
            continue
        alpha[i] = scale = math.ldexp(1.0, math.frexp(scale)[1] - 1)  # at most that
        for j in range(z.shape[1]):
            value = z[i - above, j]
            hidden[i, j] = np.uint32(add_mod(to_field(value, scale), np.uint64(r[i, j])))
            scaled = scale * np.float64(value)
            z[i - above, j] = np.float32(scaled - np.rint(scaled))
    mask(limit, z, rows + above, r, hidden, alpha, rows + first, rows + last)
    for i in range(first, last):
        finer = alpha[rows + i]
        alpha[rows + i] = alpha[i] * (finer if finer > 1 else limit)  # 1: no remainder, so nothing is lost
    return finite


@jit
def ahead(
    sizes: Sizes,
    table: Floats,
    a_transposed: Floats,
    b: Floats,
    c: Elements,
    e: Elements,
    x: Floats,
    hidden: Elements,
    alpha: Scales,
    out: Floats,
    expected: Sums,
    losses: Losses,
    first: int,
    last: int,
) -> float:
    """What of steps 4 and 5 does not depend on the answer: A (B x) into `out`, <c, x~> into `expected`, and
    what rounding costs the input into column 1 of `losses`.  What `holds` and `opened` read is brought near.

    Args:
        a_transposed: float32 [k, m].  b: float32 [k, n].  c: uint32 [t, n].  e: uint32 [t, m].
        out: float32 [rows, m].  expected: uint64 [rows, t], or of both halves.  losses: float64 [rows, 2].

    Returns: nothing that means anything.
    """
    d_in = table[sizes[_D_IN] : sizes[_D_IN] + sizes[_N]]
    out[first:last] = 0
    add_low_rank(a_transposed, b, x, out, 0, first, last)
    expect(c, hidden, expected, first, last)
    rest = alpha.size - x.shape[0]  # where the remainders begin, if there are any
    if rest:
        expect(c, hidden, expected, rest + first, rest + last)
    for i in range(first, last):
        losses[i, 1] = input_loss(x[i], d_in, alpha[rest + i])
    first, tables = sizes[_OUT + 1], table.size - sizes[_OUT + 1]  # Q_out comes last
    if tables > _NEAR:
        return 0.0
    scale = sizes[_SCALE]
    near = _near(table[scale : scale + 2 * out.shape[1]]) + _near(table[first : first + tables])
    return near + _near(e.reshape(-1).view(np.float32))


@jit
def bring_near(sizes: Sizes, table: Floats) -> float:
    """Read what `ask` will read, if a core's own cache holds it.  Returns: nothing that means anything."""
    first, end = sizes[_IN + 1], sizes[_OUT + 1]  # Q_in, up to where Q_out begins
    return _near(table[first:end]) if end - first <= _NEAR else 0.0


@jit
def _near(numbers: Floats) -> float:
    """Read one of each line of the cache."""
    total = 0.0
    for j in range(0, numbers.size, 16):
        total += numbers[j]
    return total


@jit
def opened(
    sizes: Sizes,
    table: Floats,
    noise: float,
    y: Elements,
    u: Elements,
    alpha: Scales,
    out: Floats,
    losses: Losses,
    first: int,
    last: int,
) -> float:
    """Step 5: adds D_out Q_out^T (s * centre(y - u) / alpha) to `out`, which holds A (B x); and what rounding
    the input has cost the answer, into column 0 of `losses`.

    Args:
        noise: that of rounding in an answer, times alpha.

    Returns: the largest of these rows' losses; NaN where a product is too large to be believed (M64).
    """
    shape = (min(last - first, _AT_ONCE), out.shape[1])
    unmasked, back = np.empty(shape, np.float32), np.empty(shape, np.float32)
    worst, within = 0.0, True
    for start in range(first, last, _AT_ONCE):
        end = min(last, start + _AT_ONCE)
        if alpha.size == out.shape[0]:
            small = unmask(sizes, table, y, u, alpha, unmasked, start, start, end)
        else:
            small = unmask_both(sizes, table, y, u, alpha, unmasked, start, start, end)
        if not small:
            within = False
        _turn_back(sizes, table, unmasked[: end - start], back[: end - start])
        worst = max(worst, finish(noise, back, start, alpha, out, losses, start, end))
    return worst if within else np.nan


@jit
def unmask(
    sizes: Sizes,
    table: Floats,
    y: Elements,
    u: Elements,
    alpha: Scales,
    out: Floats,
    above: int,
    first: int,
    last: int,
) -> bool:
    """The first part of `opened`: s * centre(y - u) / alpha into `out`, without the `above` rows before.

    Returns: whether all products w x_int are as large as they may be, at most (M64).
    """
    m, largest = out.shape[1], np.int64(0)
    scale = table[sizes[_SCALE] : sizes[_SCALE] + 2 * m].view(np.float64)
    for i in range(first, last):
        inverse = 1.0 / alpha[i]
        for j in range(m):
            product = sub_centred(y[i, j], u[i, j])
            largest = max(largest, abs(product))
            out[i - above, j] = np.float32(np.float64(product) * (scale[j] * inverse))
    return bool(largest <= sizes[_EDGE])


@jit
def unmask_both(
    sizes: Sizes,
    table: Floats,
    y: Elements,
    u: Elements,
    alpha: Scales,
    out: Floats,
    above: int,
    first: int,
    last: int,
) -> bool:
    """`unmask` for inputs that travelled as two rows each: the products of both, added in float64."""
    m, rows, largest = out.shape[1], alpha.size // 2, np.int64(0)
    scale = table[sizes[_SCALE] : sizes[_SCALE] + 2 * m].view(np.float64)
    for i in range(first, last):
        inverse, finer = 1.0 / alpha[i], 1.0 / alpha[rows + i]
        for j in range(m):
            product = sub_centred(y[i, j], u[i, j])
            rest = sub_centred(y[rows + i, j], u[rows + i, j])
            largest = max(largest, abs(product), abs(rest))
            out[i - above, j] = np.float32(scale[j] * (product * inverse + rest * finer))
    return bool(largest <= sizes[_EDGE])


@jit
def finish(
    noise: float, back: Floats, above: int, alpha: Scales, out: Floats, losses: Losses, first: int, last: int
) -> float:
    """The last part of `opened`, for `back` in the true basis, which lacks the `above` rows before."""
    worst, rest = 0.0, alpha.size - out.shape[0]
    for i in range(first, last):
        for j in range(out.shape[1]):
            out[i, j] += back[i - above, j]
        losses[i, 0] = answer_loss(out[i], noise, alpha[rest + i])
        worst = max(worst, losses[i, 0], losses[i, 1])
    return worst


# --- their parts -----------------------------------------------------------------------------------------


@jit
def _turn(sizes: Sizes, table: Floats, x: Floats, z: Floats) -> None:
    """z = Q_in D_in x."""
    if sizes[_IN] == _FAST:
        rotate_rows(x, z, _tables(sizes, table, _IN, x.shape[1]))
    else:
        _times(x, table[sizes[_IN + 1] : sizes[_IN + 1] + x.shape[1]], z)


@jit
def _turn_back(sizes: Sizes, table: Floats, x: Floats, out: Floats) -> None:
    """out = D_out Q_out^T x."""
    if sizes[_OUT] == _FAST:
        rotate_rows_back(x, out, _tables(sizes, table, _OUT, x.shape[1]))
    else:
        _times(x, table[sizes[_OUT + 1] : sizes[_OUT + 1] + x.shape[1]], out)


@jit
def _times(x: Floats, diagonal: Floats, out: Floats) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * diagonal[j]


@jit
def _tables(sizes: Sizes, table: Floats, head: int, n: int) -> Tables:
    """A fast rotation's tables, as they were before they were laid out."""
    place, half = sizes[head + 1], n // 2
    layers = 3 * n
    order = table[place : place + layers].view(np.int32).reshape((3, n))
    signs = table[place + layers : place + 2 * layers].reshape((3, n))
    inverse = table[place + 2 * layers : place + 3 * layers].view(np.int32).reshape((3, n))
    signs_back = table[place + 3 * layers : place + 4 * layers].reshape((3, n))
    turns = table[place + 4 * layers : place + 4 * layers + 4 * half].reshape((4, half))
    return order, signs, inverse, signs_back, turns, sizes[head + 2], sizes[head + 3]
