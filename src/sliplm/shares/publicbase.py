"""One group of a fine-tune of a public model -> the vault's part and the worker's part (SPEC section 2, "A
public base").

The worker's integers are the public base's matrix, rounded, and nothing else; the vault keeps what differs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.equilibration import Equilibrated, column_factors, divided
from sliplm.arithmetic.field import new_key
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.errors import CheckpointError
from sliplm.shares.splitter import Splitter
from sliplm.shares.splitting import GroupSplit, direction_error, in_integers

LEAST_COSINE = 0.5  # below, a model is not taken for a fine-tune; unrelated ones have 0

Norms = tuple[float, float, float]
"""Frobenius norms: of the difference, of the base, and of the tail of the difference."""


def split_base(name: str, base: Floats, precision: int) -> GroupSplit:
    """The public matrix alone, float32 [m, n]: no part of it is secret, and w is a function of `base` and
    `precision` (M40), as is the diagonal D_in.
    """
    m, n = base.shape
    empty = np.zeros((m, 0), np.float32), np.zeros((0, n), np.float32)
    published = _published(base, column_factors(base))
    secrets, w, error = in_integers(
        name, published, *empty, precision=precision, rotation="none", seed=new_key()
    )
    return GroupSplit(secrets, w, error, 0.0)


def split_difference(
    name: str,
    weight: Floats,
    base: Floats,
    *,
    rank: int,
    precision: int,
    tail_to_worker: bool = False,
    splitter: Splitter | None = None,
) -> tuple[GroupSplit, Norms]:
    """A fine-tuned matrix W against its base: A B is the best approximation of rank k of D = W - W_base.

    The worker gets W_base; with `tail_to_worker` it gets W - A B, in which whoever has the base reads D - A B
    (M43).  D is taken from the base as it is and not as it is rounded: A B then is what was trained, and a
    matrix that was not trained costs nothing.

    Args:
        weight, base: float32 [m, n], finite.
        rank: k, at most min(m, n).
        splitter: where A B is found; None for the processor.
    """
    difference = weight - base
    place = Splitter("cpu") if splitter is None else splitter
    a, b = place.top_triplets(name, difference, rank)
    tail = difference - a @ b
    public = base + tail if tail_to_worker else base
    columns = column_factors(base)
    columns[(columns == 0) & public.any(axis=0)] = 1  # where only the tail is anything
    published = _published(public, columns)
    secrets, w, error = in_integers(
        name, published, a, b, precision=precision, rotation="none", seed=new_key()
    )
    norms = (frobenius(difference), frobenius(base), frobenius(tail))
    return GroupSplit(secrets, w, error, direction_error(difference, a, b)), norms


def _published(matrix: Floats, columns: Floats) -> Equilibrated:
    """The worker's matrix before rounding: no column far from the others, by a diagonal of the base alone.

    Its rows have scales of their own (step 3), since nothing mixes them.
    """
    return Equilibrated(divided(matrix, columns), np.ones(len(matrix), np.float32), columns)


def energy_rank(squared_values: npt.NDArray[np.float64], energy: float) -> int:
    """The smallest k for which the best approximation of rank k keeps `energy` of |D|^2; 0 for D = 0.

    Args:
        squared_values: of D, as `splitting.squared_values`.
    """
    kept = np.cumsum(np.clip(squared_values[::-1], 0, None))
    if not kept[-1]:
        return 0
    return int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1


def check_related(name: str, cosine: float) -> None:
    """Refuse a base that the model does not come from.

    Args:
        name: the base.
        cosine: of the angle between all of the model's matrices and all of the base's.

    Raises: CheckpointError: they have less in common than any fine-tune has with its base.
    """
    if cosine < LEAST_COSINE:
        raise CheckpointError(
            f"this model is no fine-tune of {name}: the cosine between their weights is {cosine:.3f}, and "
            "that of a fine-tune with its base is near 1; name the model that it was trained from"
        )


def frobenius(x: Floats) -> float:
    """|X|, summed in float64 row by row."""
    return float(np.sqrt(sum(float(np.dot(row, row)) for row in (r.astype(np.float64) for r in x))))
