"""One group's weight matrix -> the vault's part and the worker's part (SPEC section 2, in its order)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.equilibration import Equilibrated, equilibrated, localisation
from sliplm.arithmetic.field import Elements, challenge_products, challenge_vectors, derive_key, new_key
from sliplm.arithmetic.fixedpoint import Floats, norm_bound, quantise_rows, scale_limit
from sliplm.arithmetic.likely import likely_norm
from sliplm.arithmetic.rotation import Rotation, gaussians
from sliplm.arithmetic.rotation import make as make_rotation
from sliplm.errors import CheckpointError, RecipeError
from sliplm.secrecy import Secret

CHALLENGES = 2  # t: a wrong product passes with probability p^-2 = 2^-64
CHALLENGE_SETS = 4  # one in use, the others spare: a set is not used again after a failed check
EXACT_SVD = 4096  # smaller side up to which the decomposition is exact; above, randomised
POWER_STEPS = 4
_OVERSAMPLING = 16
_USUAL = 20  # exponents of the largest entry, with which no square leaves float32
_SLIGHT = 2.0**-20  # of the columns' root mean square


@dataclass(frozen=True, repr=False)
class LowRank(Secret):
    """A [m, k] times B [k, n], float32, added to the `m` rows of a group's product from row `first` on."""

    first: int
    a: Floats
    b: Floats

    def __repr__(self) -> str:
        return f"LowRank(first={self.first}, rank={self.b.shape[0]}, secrets hidden)"


@dataclass(frozen=True, repr=False)
class GroupSecrets(Secret):
    """The vault's part of one split group: all that is needed beside the worker's integers w.

    Attributes:
        m, n: outputs (of all members together) and inputs.
        a, b: float32 [m, k] and [k, n], the most sensitive part W_C = A B.
        d_out, d_in: float32 [m] and [n], the diagonals that the share lies between.
        scale: float32 [m], row scales of the fixed point.  norm: N, the largest row norm of w, or with a
            secret basis what stands for it (`likely_norm`).
        noise: what rounding an input to integers adds to an answer, expected Euclidean norm, times alpha.
        c: uint32 [CHALLENGE_SETS * t, n], products of the challenge vectors with w, one set after the other.
        seed: 32 bytes from which the rotations and the challenge vectors are derived.
        adapters: by name what an adapter adds, one part for each member that it changes.
    """

    name: str
    m: int
    n: int
    precision: int
    rotation: str
    a: Floats
    b: Floats
    d_out: Floats
    d_in: Floats
    scale: Floats
    norm: float
    noise: float
    c: Elements
    seed: bytes
    adapters: Mapping[str, tuple[LowRank, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"GroupSecrets({self.name!r}, m={self.m}, n={self.n}, rank={self.b.shape[0]}, secrets hidden)"

    def rotation_out(self) -> Rotation:
        """Q_out D_out of R^m."""
        return make_rotation(self.rotation, derive_key(self.seed, "rotation out"), self.m, _other(self.d_out))

    def rotation_in(self) -> Rotation:
        """Q_in D_in of R^n."""
        return make_rotation(self.rotation, derive_key(self.seed, "rotation in"), self.n, _other(self.d_in))

    def challenges(self, number: int = 0) -> Elements:
        """The challenge vectors e of one set, 0 <= number < CHALLENGE_SETS: uint32 [t, m]."""
        return _challenges(self.seed, number, self.m)

    def challenge_products(self, number: int) -> Elements:
        """Their products with w: uint32 [t, n], a view."""
        return self.c[number * CHALLENGES : (number + 1) * CHALLENGES]


@dataclass(frozen=True, repr=False)
class GroupSplit(Secret):
    """Both parts of one group.

    Attributes:
        w: int8 or int16 [m, n], all that the worker gets.
        error: relative Frobenius error of w.
        svd_error: how far the kept directions are from singular ones, see `direction_error`.
        localisation: of what is hidden, see `equilibration.localisation`; 0 where nothing is, or where the
            decomposition is not exact.
    """

    secrets: GroupSecrets
    w: npt.NDArray[np.integer]
    error: float
    svd_error: float
    localisation: float = 0.0


def split_group(name: str, weight: Floats, *, rank: int, precision: int, rotation: str) -> GroupSplit:
    """Split the stacked weight of a group, float32 [m, n] (rows: outputs).

    Raises: RecipeError for a rank above the matrix's; CheckpointError for weights that are not finite.
    """
    m, n = weight.shape
    check_group(name, weight, rank)
    # 1. the most sensitive part
    a, b = top_triplets(weight, rank)
    with np.errstate(over="ignore", invalid="ignore"):
        rest = weight - a @ b
    if not np.isfinite(rest).all():
        raise too_large(name, weight)
    # 2. hide the basis, of a matrix without small or large rows and columns
    seed = new_key()
    level = equilibrated(rest) if rotation != "none" else undivided(rest)
    hidden = rotate_both(level.matrix, rotation, seed)
    secrets, w, error = in_integers(
        name, level._replace(matrix=hidden), a, b, precision=precision, rotation=rotation, seed=seed
    )
    concentrated = localisation(level.matrix, rank) if has_localisation(m, n, rotation) else 0.0
    return GroupSplit(secrets, w, error, direction_error(weight, a, b), concentrated)


def check_group(name: str, weight: Floats, rank: int) -> None:
    """Whether a group can be split.  Raises: RecipeError, CheckpointError as `split_group`."""
    if not 0 <= rank <= min(weight.shape):
        raise RecipeError(
            f"{name}: rank {rank} is above the matrix's {min(weight.shape)}; choose a smaller rank"
        )
    if not np.isfinite(weight).all():
        raise CheckpointError(f"{name}: the weights hold NaN or infinity; the checkpoint is damaged")


def too_large(name: str, weight: Floats) -> CheckpointError:
    """The error for a matrix of which step 1 leaves no finite rest."""
    return CheckpointError(
        f"{name}: its largest values, near {np.abs(weight).max():.0e}, leave float32 in every product; "
        "keep it whole by a rule with placement 'vault', or scale it down where the checkpoint is made"
    )


def has_localisation(m: int, n: int, rotation: str) -> bool:
    """Whether `GroupSplit.localisation` is measured."""
    return rotation != "none" and min(m, n) <= EXACT_SVD


def undivided(w: Floats) -> Equilibrated:
    """W between diagonals of ones, which change nothing."""
    return Equilibrated(w, np.ones(w.shape[0], np.float32), np.ones(w.shape[1], np.float32))


def in_integers(
    name: str, hidden: Equilibrated, a: Floats, b: Floats, *, precision: int, rotation: str, seed: bytes
) -> tuple[GroupSecrets, npt.NDArray[np.integer], float]:
    """Steps 3 and 4 for W_R = `hidden.matrix`, float32 [m, n]: the secrets, w and w's relative error."""
    m, n = hidden.matrix.shape
    # 3. fixed point
    w, scale = quantise_rows(hidden.matrix, precision)
    if rotation == "none":
        norm = norm_bound(w)
    else:
        norm = likely_norm(hidden.matrix, w, scale, rotation, derive_key(seed, "rotation out"))
    scale_limit(norm, n)
    # 4. verification
    c = all_challenge_products(seed, w)
    squares = np.array([float(np.dot(row, row)) for row in (r.astype(np.float64) for r in w)])
    secrets = GroupSecrets(
        name, m, n, precision, rotation, a, b, hidden.d_out, hidden.d_in, scale, norm,
        rounding_noise(squares, scale, hidden.d_out), c, seed,
    )  # fmt: skip
    return secrets, w, _relative_error(hidden.matrix, w, scale)


def all_challenge_products(seed: bytes, w: npt.NDArray[np.integer]) -> Elements:
    """`GroupSecrets.c` of w (SPEC split step 4)."""
    sets = (_challenges(seed, number, len(w)) for number in range(CHALLENGE_SETS))
    return np.concatenate([challenge_products(e, w) for e in sets])


def rounding_noise(squares: npt.NDArray[np.float64], scale: Floats, d_out: Floats) -> float:
    """Root mean square of |D_out Q_out^T (s * w d)| for an error d of x_int that is uniform in [-1/2, 1/2]^n.

    Q_out spreads it over all rows alike.  A public base has neither Q_out nor D_out.

    Args:
        squares: |w_i|^2 of the rows of w, [m].
    """
    total = float(squares @ np.square(scale.astype(np.float64)))
    return math.sqrt(total / 12 * float(np.square(d_out.astype(np.float64)).mean()))


def top_triplets(weight: Floats, rank: int) -> tuple[Floats, Floats]:
    """A [m, k], B [k, n] with A B the best rank-k approximation of W [m, n], B's rows orthonormal (SPEC split
    step 1), times a power of two where float32 could not hold A else.

    Exact up to EXACT_SVD on the smaller side; above, by a randomised range finder with power steps.
    """
    if rank == 0:
        return no_triplets(weight.shape)
    weight, exponent = near_one(weight)
    right = _right_vectors(weight, rank)
    right[slight(np.linalg.norm(weight, axis=0))] = 0
    return scaled_triplets(weight @ right, right, exponent)


def no_triplets(shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """A and B of rank 0 for a matrix [m, n]."""
    return np.zeros((shape[0], 0), np.float32), np.zeros((0, shape[1]), np.float32)


def slight(norms: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which columns, by their norms [n], are nearly zero: what the vectors have of them is rounding noise,
    which W_D would show beside it.
    """
    found: npt.NDArray[np.bool_] = norms <= _SLIGHT * np.sqrt(np.square(norms).mean())
    return found


def scaled_triplets(
    left: npt.NDArray[np.floating], right: npt.NDArray[np.floating], exponent: int = 0
) -> tuple[Floats, Floats]:
    """A and B from W V, [m, k], times 2^exponent, and V, [n, k]."""
    above = max(0, exponent + _exponent(left) - 127)  # what float32 has no room for in A
    a, b = np.ldexp(left, exponent - above), np.ldexp(right.T, above)
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def direction_error(weight: Floats, a: Floats, b: Floats) -> float:
    """|W^T A - B^T (B W^T A)| / |W^T A|, Frobenius: 0 if the rows of B are right singular vectors of W.

    About 10^-6 where the decomposition is exact; where it is randomised, how well it went.
    """
    turned = near_one(weight)[0].T @ near_one(a)[0]
    b = b / max(1.0, float(np.linalg.norm(b, axis=1).max(initial=0.0)))
    total = float(np.linalg.norm(turned))
    return float(np.linalg.norm(turned - b.T @ (b @ turned))) / total if total else 0.0


def near_one(matrix: Floats) -> tuple[Floats, int]:
    """A matrix whose squares float32 can hold, and the exponent of two that was taken out of it; 0 and the
    matrix itself where its sizes are usual.
    """
    exponent = _exponent(matrix)
    return (matrix, 0) if abs(exponent) <= _USUAL else (np.ldexp(matrix, -exponent), exponent)


def _exponent(matrix: npt.NDArray[np.floating]) -> int:
    return int(np.frexp(max(matrix.max(initial=0.0), -matrix.min(initial=0.0)))[1])


def _right_vectors(weight: Floats, rank: int) -> Floats:
    m, n = weight.shape
    if min(m, n) <= EXACT_SVD:
        # the top of the spectrum loses nothing in a float64 Gram matrix, and costs a tenth of an SVD
        if n <= m:
            return np.linalg.eigh(gram(weight))[1][:, -1 : -rank - 1 : -1].astype(np.float32)
        left = np.linalg.eigh(gram(weight.T))[1][:, -1 : -rank - 1 : -1]
        return np.linalg.qr((weight.T @ left.astype(np.float32)).astype(np.float64))[0].astype(np.float32)
    basis = np.linalg.qr(random_start(m, n, rank).astype(np.float32))[0]
    for _ in range(POWER_STEPS):
        basis = np.linalg.qr(weight.T @ (weight @ basis))[0]
    _, _, right = np.linalg.svd(weight @ basis, full_matrices=False)
    top: Floats = basis @ right[:rank].T
    return top


def random_start(m: int, n: int, rank: int) -> npt.NDArray[np.float64]:
    """Where the randomised decomposition begins: [n, rank and some more]."""
    return gaussians(new_key(), n * min(rank + _OVERSAMPLING, m, n)).reshape(n, -1)


def squared_values(weight: Floats) -> npt.NDArray[np.float64]:
    """The squared singular values of W [m, n], rising: of the float64 Gram matrix of its smaller side."""
    m, n = weight.shape
    return np.linalg.eigvalsh(gram(weight if n <= m else weight.T)).astype(np.float64, copy=False)


def gram(x: Floats) -> npt.NDArray[np.float64]:
    """X^T X in float64."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for first in range(0, x.shape[0], 4096):  # in slices: no float64 copy of a large matrix
        part = x[first : first + 4096].astype(np.float64)
        total += part.T @ part
    return total


def rotate_both(w: Floats, kind: str, seed: bytes) -> Floats:
    """Q_out W Q_in^T (SPEC split step 2), without any diagonal: float32 [m, n]."""
    m, n = w.shape
    inner = make_rotation(kind, derive_key(seed, "rotation in"), n).apply(w)
    outer = make_rotation(kind, derive_key(seed, "rotation out"), m).apply(np.ascontiguousarray(inner.T))
    return np.ascontiguousarray(outer.T)


def _other(factors: Floats) -> Floats | None:
    """A diagonal, or None for that of ones."""
    return None if np.all(factors == 1) else factors


def _challenges(seed: bytes, number: int, m: int) -> Elements:
    return challenge_vectors(derive_key(seed, f"challenges {number}"), CHALLENGES, m)


def _relative_error(hidden: Floats, w: npt.NDArray[np.integer], scale: Floats) -> float:
    wrong = total = 0.0
    for row, integers, s in zip(hidden, w, scale, strict=True):
        wrong += float(np.square(row - integers * s, dtype=np.float64).sum())
        total += float(np.square(row, dtype=np.float64).sum())
    return math.sqrt(wrong / total) if total else 0.0
