"""The dense algebra of a split by PyTorch, on a card: what numpy and compiled loops do on the processor, with
the same short vectors and decisions, which stay there.

Long sums and products are float64 whatever PyTorch's settings for float32 are, of a slice of rows at a time:
no float64 copy of a large matrix.  Nothing secret is drawn here.  A caller imports this module where it is
needed, since PyTorch takes a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sliplm.arithmetic.equilibration import diagonals, fillings, inverse
from sliplm.arithmetic.fixedpoint import Floats, largest_integer, row_scales
from sliplm.arithmetic.likely import power_bound

AT_ONCE: Final = 1 << 24  # entries of a slice: 128 MB in float64

Vector = npt.NDArray[np.float64]


def taken(array: npt.NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of an array on a device."""
    return torch.tensor(array, dtype=dtype, device=device)


def given(x: Tensor) -> npt.NDArray[Any]:
    """An array of a tensor on whatever device."""
    found: npt.NDArray[Any] = x.cpu().numpy()
    return found


def slices(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and which: views."""
    step = max(1, AT_ONCE // max(1, x.shape[1]))
    for first in range(0, x.shape[0], step):
        yield slice(first, first + step), x[first : first + step]


# --- products ----------------------------------------------------------------------------------------------


def gram(x: Tensor) -> Tensor:
    """X^T X, float64 [n, n], for X [m, n]."""
    total = torch.zeros((x.shape[1],) * 2, dtype=torch.float64, device=x.device)
    for _, part in slices(x):
        wide = part.double()
        total.addmm_(wide.T, wide)
    return total


def gram_of_rows(x: Tensor) -> Tensor:
    """X X^T, float64 [m, m], for X [m, n]."""
    total = torch.zeros((x.shape[0],) * 2, dtype=torch.float64, device=x.device)
    step = max(1, AT_ONCE // max(1, x.shape[0]))
    for first in range(0, x.shape[1], step):
        wide = x[:, first : first + step].double()
        total.addmm_(wide, wide.T)
    return total


def times(x: Tensor, y: Tensor) -> Tensor:
    """X Y, float64 [m, k], for a thin Y, float64 [n, k]."""
    return torch.cat([part.double() @ y for _, part in slices(x)])


def transposed_times(x: Tensor, y: Tensor) -> Tensor:
    """X^T Y, float64 [n, k], for a thin Y, float64 [m, k]."""
    total = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    for rows, part in slices(x):
        total.addmm_(part.double().T, y[rows])
    return total


def subtract(x: Tensor, a: Tensor, b: Tensor) -> None:
    """X - A B in the place of X [m, n], for float64 A [m, k] and B [k, n]."""
    for rows, part in slices(x):
        part.copy_(torch.addmm(part.double(), a[rows], b, alpha=-1))


def row_squares(x: Tensor, by: Vector) -> Vector:
    """Squared norms of the rows of X diag(f)."""
    factors = taken(by, x.device)
    return given(torch.cat([(part * factors).square_().sum(1) for _, part in slices(x)]))


def column_squares(x: Tensor, by: Vector) -> Vector:
    """Squared norms of the columns of diag(f) X."""
    factors, total = taken(by, x.device), torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows, part in slices(x):
        total += (part * factors[rows, None]).square_().sum(0)
    return given(total)


def right_vectors(x: Tensor, rank: int) -> Tensor:
    """The right singular vectors of the largest singular values, float64 [n, k], by a symmetric eigenproblem
    of the smaller side.
    """
    if x.shape[1] <= x.shape[0]:
        return eigenvectors(gram(x))[:, -rank:].flip(1)
    left = eigenvectors(gram_of_rows(x))[:, -rank:].flip(1)
    vectors: Tensor = torch.linalg.qr(transposed_times(x, left))[0]
    return vectors


def range_vectors(x: Tensor, start: Tensor, rank: int, steps: int) -> Tensor:
    """As `right_vectors`, by a randomised range finder with power steps.

    Args:
        start: random, float64 [n, rank and some more].
    """
    basis = torch.linalg.qr(start)[0]
    for _ in range(steps):
        basis = torch.linalg.qr(transposed_times(x, times(x, basis)))[0]
    right = torch.linalg.svd(times(x, basis), full_matrices=False)[2]
    vectors: Tensor = basis @ right[:rank].T
    return vectors


def localisation(x: Tensor, null: int) -> float:
    """As `equilibration.localisation`."""
    vectors = eigenvectors(gram(x) if x.shape[1] <= x.shape[0] else gram_of_rows(x))[:, null:]
    return float(vectors.abs().max()) if vectors.numel() else 0.0


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Of a symmetric matrix, in the columns, by rising eigenvalues."""
    # near 1, for the squares of the largest and smallest float32 are far beyond what a solver is made for
    size = float(symmetric.abs().max()) if symmetric.numel() else 0.0
    vectors: Tensor = torch.linalg.eigh(symmetric / size if size else symmetric)[1]
    return vectors


def spectral_bound(x: Tensor, enough: float) -> float:
    """As `likely.spectral_bound`."""

    def squared(vectors: npt.NDArray[np.floating]) -> Vector:
        on_device = taken(vectors, x.device, torch.float64)
        return given(transposed_times(x, times(x, on_device)))

    return power_bound(squared, x.shape[1], enough)


# --- between diagonals, and in integers ------------------------------------------------------------------


def equilibrate(x: Tensor) -> tuple[Floats, Floats]:
    """As `equilibration.equilibrated`, with the matrix in the place of x; D_out [m] and D_in [n]."""
    d_out, d_in = diagonals(
        tuple(x.shape), lambda by: row_squares(x, by), lambda by: column_squares(x, by)
    )  # fmt: skip
    x *= taken(inverse(d_out).astype(np.float32), x.device)[:, None]
    x *= taken(inverse(d_in).astype(np.float32), x.device)
    if d_in.any():
        dead_rows, dead_columns = fillings(d_out, d_in)
        x[taken(d_out == 0, x.device)] = taken(dead_rows, x.device)
        x[:, taken(d_in == 0, x.device)] = taken(dead_columns, x.device)
    return d_out, d_in


class Integers(NamedTuple):
    """A matrix in fixed point.

    Attributes:
        w: int8 or int16 [m, n], and scale, float32 [m]: as `fixedpoint.quantise_rows`.
        norms, errors: of the rows of w, and of what rounding has added, in their scales: float64 [m].
        lengths: of the rows of the matrix itself, float64 [m].
    """

    w: npt.NDArray[np.integer]
    scale: Floats
    norms: Vector
    errors: Vector
    lengths: Vector


def in_integers(x: Tensor, precision: int) -> Integers:
    """Each row of x, float32 [m, n], rounded to integers (SPEC split step 3)."""
    scale = row_scales(given(torch.maximum(x.amax(1), -x.amin(1))), precision)
    largest, scales = float(largest_integer(precision)), taken(scale, x.device)[:, None]
    w = torch.empty(x.shape, dtype=torch.int8 if precision <= 8 else torch.int16, device=x.device)
    found = []
    for rows, part in slices(x):
        rounded = (part / scales[rows]).round_().clamp_(-largest, largest)
        w[rows] = rounded.to(w.dtype)
        wide, integers = part.double(), rounded.double()
        wrong = (wide / scales[rows] - integers).square_().sum(1)
        found.append(torch.stack([integers.square_().sum(1), wrong, wide.square_().sum(1)]))
    norms, errors, lengths = np.sqrt(given(torch.cat(found, 1)))
    return Integers(given(w), scale, norms, errors, lengths)
