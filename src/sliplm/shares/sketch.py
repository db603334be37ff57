"""How close two models are, from a few secret numbers of each (SPEC section 8, the ledger).

The sketch of a matrix W [m, n] has 128 numbers: a secret key stream deals every entry of W to one of 128
sums, with a secret sign.

    s_j = sum of sign_i * W_i over the entries i with bucket_i = j

This is a count sketch with independent buckets and signs (Charikar, Chen, Farach-Colton 2002).  It is linear,
so the sketches of A and B give that of A - B; and for any fixed W, whatever its rank, |s|^2 has the mean
|W|^2 and a variance of at most 2 |W|^4 / 128.  One pass over the weights, one addition each.

Closeness is judged by the angle, so that scaling a matrix hides nothing.  The distance of two groups is that
of their matrices, each scaled to norm 1: 0 for the same ones, 1.41 for unrelated ones, and about e for W and
W + E with |E| = e |W|, e small.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import derive_key, keystream
from sliplm.arithmetic.jit import jit

Floats = npt.NDArray[np.float32]

NUMBERS: Final = 128
"""Numbers of a sketch: a byte of the key stream for each weight, 7 bits of bucket and one of sign."""

KIN: Final = 0.6
"""Cosine from which two groups are close.  For unrelated ones, the cosine of two sketches is near normal with
a standard deviation of 128^-1/2 = 0.09; W + E with E independent of W has it in the mean where |E| is 1.33
|W|."""

SAME: Final = 0.005
"""Distance up to which two groups differ by rounding only: that of a copy in bfloat16 is 0.0017."""

_AT_ONCE: Final = 1 << 24  # weights of which the key stream is in memory
_BLOCK_BYTES: Final = 16


@dataclass(frozen=True)
class Sketch:
    """Of one group's matrix.  The values are as secret as the weights that they are sums of."""

    name: str
    rows: int
    columns: int
    values: Floats = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Likeness:
    """How close two models are.

    Attributes:
        groups: of the model in question.
        compared: those for which the other model has a matrix of the same shape, neither of them zero.
        close: those of them whose cosine is at least `KIN`.
        distance: median distance of the close groups, or of all that were compared if none is close; None if
            none was compared.
    """

    groups: int
    compared: int
    close: int
    distance: float | None

    @property
    def same(self) -> bool:
        """Whether the close groups differ by rounding only."""
        return self.close > 0 and self.distance is not None and self.distance <= SAME

    def __str__(self) -> str:
        if self.distance is None:
            return "no group has the shape of one of the other's, so nothing can be said"
        what = (
            f"{self.close} of {self.groups} groups are {'the same' if self.same else 'close'}"
            if self.close
            else f"none of {self.compared} comparable groups is close"
        )
        return f"{what} (relative distance {self.distance:.3f}; 0 is the same, 1.41 unrelated)"


def sketch(name: str, weight: Floats, key: bytes) -> Sketch:
    """The sketch of a group's stacked weight, float32 [m, n], under a secret key of 32 bytes.

    Two groups of one shape use the same buckets and signs, whatever their names: a copy of a model with other
    names, or with layers moved, is found.
    """
    rows, columns = weight.shape
    flat = np.ascontiguousarray(weight).reshape(-1)
    stream = derive_key(key, f"sketch/{rows}/{columns}")
    sums = np.zeros(2 * NUMBERS)
    for first in range(0, flat.size, _AT_ONCE):
        part = flat[first : first + _AT_ONCE]
        words = keystream(stream, 0, first // _BLOCK_BYTES, -(-part.size // _BLOCK_BYTES))
        _deal(part, words.view(np.uint8), sums)
    return Sketch(name, rows, columns, (sums[:NUMBERS] - sums[NUMBERS:]).astype(np.float32))


@jit
def _deal(weights: Floats, places: npt.NDArray[np.uint8], sums: npt.NDArray[np.float64]) -> None:
    for i in range(weights.size):
        sums[places[i]] += weights[i]


def likeness(ours: Iterable[Sketch], theirs: Iterable[Sketch]) -> Likeness:
    """Compare two models by their sketches under one key.

    Each group of ours is compared with the group of the same name and shape; if that is not close, with the
    closest one of its shape, whatever its name.
    """
    ours, shapes = list(ours), _by_shape(theirs)
    found = [
        _nearest(mine, shapes[mine.shape]) for mine in ours if mine.shape in shapes and mine.values.any()
    ]
    close = [distance for cosine, distance in found if cosine >= KIN]
    distances = close or [distance for _, distance in found]
    return Likeness(
        groups=len(ours),
        compared=len(found),
        close=len(close),
        distance=statistics.median(distances) if distances else None,
    )


class _Others(NamedTuple):
    """The other model's groups of one shape: their names, and their sketches at length 1, float64 [count,
    128]: stacked once, since a mixture has thousands.
    """

    names: dict[str, int]
    units: npt.NDArray[np.float64]


def _by_shape(sketches: Iterable[Sketch]) -> dict[tuple[int, int], _Others]:
    found: dict[tuple[int, int], list[Sketch]] = {}
    for one in sketches:
        if one.values.any():
            found.setdefault(one.shape, []).append(one)
    return {
        shape: _Others(
            {one.name: i for i, one in reversed(list(enumerate(same)))},
            _unit(np.stack([one.values for one in same])),
        )
        for shape, same in found.items()
    }


def _nearest(mine: Sketch, theirs: _Others) -> tuple[float, float]:
    """Cosine with, and distance from, the group that `likeness` takes."""
    unit = _unit(mine.values[None])[0]
    cosines = theirs.units @ unit
    best, named = int(cosines.argmax()), theirs.names.get(mine.name)
    if named is not None and (cosines[named] >= KIN or cosines[best] < KIN):
        best = named
    return float(cosines[best]), float(np.linalg.norm(unit - theirs.units[best]))


def _unit(values: Floats) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    unit: npt.NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def of_weights(weights: Iterable[tuple[str, Floats]], keys: Sequence[bytes]) -> Mapping[bytes, list[Sketch]]:
    """Sketches of a whole model under each of the keys, reading its weights once.

    Args:
        weights: name and stacked weight of each group; one of them is in memory at a time.
    """
    found: dict[bytes, list[Sketch]] = {key: [] for key in keys}
    for name, weight in weights:
        for key, sketches in found.items():
            sketches.append(sketch(name, weight, key))
    return found
