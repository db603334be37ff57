"""`splitting.split_group` with its dense algebra on a card (SPEC section 2, steps 1 to 3), by PyTorch.

Step 4 stays on the processor: the challenges' products are those of the very integers that are written,
whatever a card does.  So does what is drawn: seeds, fillings, starts.  And there both parts' product with a
random vector is compared with the weight's, so that no share is written that a card has spoilt.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sliplm.arithmetic import dense, dense_rotation
from sliplm.arithmetic.dense import given, taken
from sliplm.arithmetic.field import derive_key, new_key
from sliplm.arithmetic.fixedpoint import Floats, bound_of_squares, scale_limit
from sliplm.arithmetic.likely import likely_norm_of
from sliplm.arithmetic.rotation import gaussians
from sliplm.errors import CardError
from sliplm.shares import splitting
from sliplm.shares.splitting import GroupSecrets, GroupSplit

_OFTEN: Final = 8  # times its standard deviation, which a normal number leaves with probability 10^-15
_FLOAT32: Final = 1e-3  # of the weight's norm: far above what float32 costs, far below what is hidden
_ROWS: Final = 512  # of the integers at a time


class _Levelled(NamedTuple):
    """D_out and D_in, and the localisation of what lies between them."""

    d_out: Floats
    d_in: Floats
    localisation: float


def top_triplets(weight: Floats, rank: int, device: torch.device) -> tuple[Floats, Floats]:
    """As `splitting.top_triplets`."""
    return _triplets(taken(weight, device), rank)


def split_group(
    name: str, weight: Floats, *, rank: int, precision: int, rotation: str, device: torch.device
) -> GroupSplit:
    """As `splitting.split_group`, which says what it takes and raises; and CardError where the parts are not
    the weight's.
    """
    m, n = weight.shape
    splitting.check_group(name, weight, rank)
    x = taken(weight, device)
    # 1. the most sensitive part
    a, b = _triplets(x, rank)
    wide_a, wide_b = (taken(part, device, torch.float64) for part in (a, b))
    svd_error = _direction_error(x, wide_a, wide_b)
    dense.subtract(x, wide_a, wide_b)
    if not all(bool(torch.isfinite(part).all()) for _, part in dense.slices(x)):
        raise splitting.too_large(name, weight)
    # 2. hide the basis
    seed = new_key()
    level = _levelled(x, rank, rotation)
    out = derive_key(seed, "rotation out")
    x = dense_rotation.rotated(x, rotation, out, derive_key(seed, "rotation in"))
    # 3. fixed point
    found = dense.in_integers(x, precision)
    norm = _norm(x, found, rotation, out)
    scale_limit(norm, n)
    noise = splitting.rounding_noise(np.square(found.norms), found.scale, level.d_out)
    # 4. verification
    c = splitting.all_challenge_products(seed, found.w)
    secrets = GroupSecrets(
        name, m, n, precision, rotation, a, b, level.d_out, level.d_in, found.scale, norm, noise, c, seed
    )
    total = float(np.linalg.norm(found.lengths))
    error = float(np.linalg.norm(found.errors * found.scale)) / total if total else 0.0
    parts = GroupSplit(secrets, found.w, error, svd_error, level.localisation)
    if not _is_whole(parts, weight):
        raise CardError(f"what it made of {name} does not give its products")
    return parts


def squared_values(weight: Floats, device: torch.device) -> dense.Vector:
    """As `splitting.squared_values`."""
    x = taken(weight, device)
    return given(torch.linalg.eigvalsh(dense.gram(x) if x.shape[1] <= x.shape[0] else dense.gram_of_rows(x)))


def _is_whole(parts: GroupSplit, weight: Floats) -> bool:
    """Whether A (B x) + D_out Q_out^T (s w (Q_in D_in x)) = W x for a random x, as far as rounding allows."""
    secrets = parts.secrets
    near, exponent = splitting.near_one(weight)
    shift = max(-100, min(100, exponent))  # x makes up for W's size, as far as float32 goes
    x = gaussians(new_key(), secrets.n).astype(np.float32)
    small = np.ldexp(x, -shift)
    hidden = secrets.rotation_in().apply(small[None])[0]
    rows = (parts.w[first : first + _ROWS] for first in range(0, secrets.m, _ROWS))
    y = np.concatenate([part.astype(np.float32) @ hidden for part in rows]) * secrets.scale
    rest = secrets.rotation_out().apply_transpose(y[None])[0].astype(np.float64)
    kept = secrets.a.astype(np.float64) @ (secrets.b.astype(np.float64) @ small)
    wrong = float(np.linalg.norm((kept + rest) * 2.0 ** (shift - exponent) - near @ x))
    # what rounding leaves in W, its norm: E in w's scales between the diagonals
    level = math.sqrt(12 * float(np.square(secrets.d_in.astype(np.float64)).mean())) * secrets.noise
    rounding = max(parts.error, _FLOAT32) * level * 2.0**-exponent
    return wrong <= _OFTEN * rounding + _FLOAT32 * float(np.linalg.norm(near))


def _triplets(x: Tensor, rank: int) -> tuple[Floats, Floats]:
    if rank == 0:
        return splitting.no_triplets(x.shape)
    m, n = x.shape
    if min(m, n) <= splitting.EXACT_SVD:
        right = dense.right_vectors(x, rank)
    else:
        start = taken(splitting.random_start(m, n, rank), x.device)
        right = dense.range_vectors(x, start, rank, splitting.POWER_STEPS)
    right = right.float()
    right[taken(splitting.slight(np.sqrt(dense.column_squares(x, np.ones(m)))), x.device)] = 0
    return splitting.scaled_triplets(given(dense.times(x, right.double())), given(right))


def _direction_error(x: Tensor, a: Tensor, b: Tensor) -> float:
    """As `splitting.direction_error`, for float64 A and B."""
    turned = dense.transposed_times(x, a)
    size = float(turned.abs().max()) if turned.numel() else 0.0
    if not size:
        return 0.0
    turned /= size  # for the squares of what float32 just holds
    b = b / max(1.0, float(torch.linalg.vector_norm(b, dim=1).max()))
    return float(torch.linalg.norm(turned - b.T @ (b @ turned)) / torch.linalg.norm(turned))


def _levelled(x: Tensor, rank: int, rotation: str) -> _Levelled:
    """Level x in its place, unless nothing will hide it."""
    m, n = x.shape
    if rotation == "none":
        return _Levelled(np.ones(m, np.float32), np.ones(n, np.float32), 0.0)
    d_out, d_in = dense.equilibrate(x)
    measured = splitting.has_localisation(m, n, rotation)
    return _Levelled(d_out, d_in, dense.localisation(x, rank) if measured else 0.0)


def _norm(x: Tensor, found: dense.Integers, rotation: str, key: bytes) -> float:
    """N of W_R = x and its integers."""
    m, n = x.shape
    if rotation == "none":
        return bound_of_squares(round(float(np.square(found.norms).max(initial=0.0))))
    return likely_norm_of(
        found.norms, found.errors, found.scale, n, rotation,
        largest=lambda enough: dense.spectral_bound(x, enough),
        uneven=lambda: dense_rotation.unevenness(key, m, x.device),
    )  # fmt: skip
