"""The vault's own arithmetic for one group: steps 1, 2, 4 and 5 on arrays, without masks' origin or
sockets.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic.field import Elements, accepts, add_mod, sub_centred
from sliplm.arithmetic.fixedpoint import Floats, rounding_losses, row_alpha, scale_limit, to_field
from sliplm.arithmetic.jit import fast_jit, jit
from sliplm.arithmetic.kernels.threads import default_threads, in_parallel
from sliplm.errors import ExhaustedError, InputError, PrecisionError, SlipWarning
from sliplm.secrecy import Secret
from sliplm.shares.splitting import CHALLENGE_SETS, GroupSecrets, LowRank

Scales = npt.NDArray[np.float64]
Losses = npt.NDArray[np.float64]

LOSSY = 1 / 32  # an expected relative error that is counted and warned of; that of bfloat16 is about 1/500
_LOST = 1 / 2  # one that leaves nothing
_FEW = 16  # outputs below which an answer may be small by chance

_ROWS_A_THREAD = 4  # rows below which a second thread costs more than it gains
_ROWS_AT_ONCE = 16  # what passes between the parts of a step stays in the cache


class _Challenges(NamedTuple):
    """The challenges in force: all of one set, in one object."""

    number: int
    e: Elements
    c: Elements


class GroupCodec(Secret):
    """One group, its secrets laid out for use.  Many rows are shared out over the cores."""

    def __init__(self, secrets: GroupSecrets) -> None:
        self.name, self.m, self.n = secrets.name, secrets.m, secrets.n
        self._limit = scale_limit(secrets.norm, secrets.n)
        self._rotation_in, self._rotation_out = secrets.rotation_in(), secrets.rotation_out()
        self._scale = secrets.scale.astype(np.float64)
        self._d_in, self._noise, self._warned = secrets.d_in, secrets.noise, False
        self._float_loses = 2**20 * math.sqrt(self.n / 12) / self._limit  # so small a rest float32 loses too
        self._kept = _laid_out([LowRank(0, secrets.a, secrets.b)])
        self._adapters = {name: self._kept + _laid_out(parts) for name, parts in secrets.adapters.items()}
        self._secrets = secrets
        self._challenges = _Challenges(0, secrets.challenges(0), secrets.challenge_products(0))
        self._renewing = threading.Lock()

    def __repr__(self) -> str:
        return f"GroupCodec({self.name!r}, m={self.m}, n={self.n}, secrets hidden)"

    def check_left(self) -> None:
        """Raise ExhaustedError when no product of this group can be checked any more: that is for good."""
        self._left()

    def _left(self) -> _Challenges:
        """The challenges in force: read once, since another thread may put others in their place."""
        found = self._challenges
        if found.number >= CHALLENGE_SETS:
            raise ExhaustedError(
                f"{self.name}: {CHALLENGE_SETS} wrong products used up its challenges; the audit record "
                "names who lied: leave them out and load the model again"
            )
        return found

    def _renew_challenges(self, failed: _Challenges) -> None:
        """Put the next set in the place of `failed`, if no other thread has done so: after the last, none."""
        with self._renewing:
            if self._challenges is not failed:
                return
            number = failed.number + 1
            if number >= CHALLENGE_SETS:
                empty = np.empty((0, 0), np.uint32)
                self._challenges = _Challenges(number, empty, empty)
                return
            self._challenges = _Challenges(
                number, self._secrets.challenges(number), self._secrets.challenge_products(number)
            )

    def scaled(self, x: Floats) -> tuple[Floats, Scales]:
        """Step 1: Q_in x and the secret scales alpha, float32 [rows, n] and float64 [rows].

        Raises: InputError for NaN or infinity in x.
        """
        z, alpha = np.empty_like(x), np.empty(len(x), np.float64)

        def part(first: int, last: int) -> None:
            self._rotation_in.apply(x[first:last], z[first:last])
            alpha[first:last] = _alphas(z[first:last], self._limit)

        in_parallel(part, len(x), _threads(len(x)))
        if not alpha.min(initial=1.0) > 0:  # also where one is NaN; the others are positive
            raise InputError(
                f"{self.name}: the input holds NaN or infinity; look for the cause in the layers before it"
            )
        return z, alpha

    def masked(self, z: Floats, alpha: Scales, r: Elements) -> Elements:
        """Steps 1 and 2: round(alpha z) + r mod p, uint32 [rows, n]."""
        hidden = np.empty(z.shape, np.uint32)

        def part(first: int, last: int) -> None:
            hidden[first:last] = _mask(z[first:last], alpha[first:last], r[first:last])

        in_parallel(part, len(z), _threads(len(z)))
        return hidden

    def in_field(self, z: Floats, alpha: Scales) -> Elements:
        """Step 1 alone: round(alpha z) as elements, uint32 [rows, n]; for products that never leave this
        process.
        """
        return _mask(z, alpha, np.zeros(z.shape, np.uint32))

    def accepts(self, x: Elements, y: Elements) -> bool:
        """Step 4 and O3: is y [rows, m] the product of x [rows, n]?  Wrong at most once in p^t.

        After a False other challenges are in force (M15): that it failed tells its maker of them.

        Raises: ExhaustedError where none are left.
        """
        asked = self._left()
        verdicts: list[bool] = []
        in_parallel(
            lambda first, last: verdicts.append(accepts(asked.e, asked.c, x[first:last], y[first:last])),
            len(x),
            _threads(len(x)),
        )
        if all(verdicts):
            return True
        self._renew_challenges(asked)
        return False

    def opened(
        self, x: Floats, alpha: Scales, y: Elements, u: Elements, out: Floats, adapter: str | None = None
    ) -> Losses:
        """Step 5: D_out Q_out^T (s * centre(y - u) / alpha) + A (B x) into out, float32 [rows, m]; and what
        the adapter adds, if it changes this group.

        Returns: what rounding the input has cost, for `judge`: float64 [rows, 2].
        """
        added = self._kept if adapter is None else self._adapters.get(adapter, self._kept)
        losses = np.empty((len(x), 2))

        def part(start: int, end: int) -> None:
            for first in range(start, end, _ROWS_AT_ONCE):
                rows = slice(first, min(end, first + _ROWS_AT_ONCE))
                opened = _unmask(y[rows], u[rows], self._scale, alpha[rows])
                self._rotation_out.apply_transpose(opened, out[rows])
                for low in added:
                    _add_low_rank(low.a_transposed, low.b, x[rows], out[rows], low.first)
                losses[rows] = rounding_losses(x[rows], self._d_in, out[rows], alpha[rows], self._noise)

        in_parallel(part, len(x), _threads(len(x)))
        return losses

    def judge(self, losses: Losses) -> int:
        """Number of rows of which rounding the input has cost much; the first in a group is warned of.

        Raises: PrecisionError if of a row nothing is left: the answer is smaller than its error, and so is
            the input beside its largest entry.
        """
        if len(losses) == 1 and losses[0, 0] <= LOSSY and losses[0, 1] <= LOSSY:
            return 0  # nearly always, and on the way of every token
        answer = losses[:, 0] if self.m >= _FEW else np.zeros(len(losses))
        rest = np.where(losses[:, 1] < self._float_loses, losses[:, 1], 0.0)
        lossy = int(np.count_nonzero((answer > LOSSY) | (rest > LOSSY)))
        if not lossy:
            return 0
        advice = (
            f"split again with a rule such as Rule(pattern={self.name!r}, precision=8), which leaves the "
            'input more bits, or placement="vault"'
        )
        if ((answer > _LOST) & (losses[:, 1] > _LOST)).any():
            raise PrecisionError(
                f"{self.name}: an entry of the input is so much larger than the rest that rounding to "
                f"integers leaves nothing of the rest, on which the answer depends; {advice}"
            )
        if not self._warned:
            self._warned = True
            worst = min(1.0, float(np.maximum(answer, rest).max()))
            warnings.warn(
                f"{self.name}: rounding an input to integers cost up to {worst:.1%} of the answer, or of the "
                f"input beside its largest entry (counted as rows_lossy; said once a group); {advice}",
                SlipWarning,
                stacklevel=2,
            )
        return lossy


class _LowRank(NamedTuple):
    """A `LowRank` as the loop below reads it."""

    first: int
    a_transposed: Floats
    b: Floats


def _laid_out(parts: Iterable[LowRank]) -> list[_LowRank]:
    return [_LowRank(part.first, np.ascontiguousarray(part.a.T), part.b) for part in parts if len(part.b)]


def _threads(rows: int) -> int:
    return default_threads() if rows >= 2 * _ROWS_A_THREAD else 1


@jit
def _alphas(z: Floats, limit: float) -> Scales:
    out = np.empty(z.shape[0], np.float64)
    for i in range(z.shape[0]):
        out[i] = row_alpha(z[i], limit)
    return out


@jit
def _mask(z: Floats, alpha: Scales, r: Elements) -> Elements:
    out = np.empty(z.shape, np.uint32)
    for i in range(z.shape[0]):
        scale = alpha[i]
        for j in range(z.shape[1]):
            out[i, j] = np.uint32(add_mod(to_field(z[i, j], scale), np.uint64(r[i, j])))
    return out


@jit
def _unmask(y: Elements, u: Elements, scale: Scales, alpha: Scales) -> Floats:
    out = np.empty(y.shape, np.float32)
    for i in range(y.shape[0]):
        inverse = 1.0 / alpha[i]
        for j in range(y.shape[1]):
            out[i, j] = np.float32(np.float64(sub_centred(y[i, j], u[i, j])) * (scale[j] * inverse))
    return out


@fast_jit
def _add_low_rank(a_transposed: Floats, b: Floats, x: Floats, out: Floats, first: int) -> None:
    last = first + a_transposed.shape[1]
    for i in range(x.shape[0]):
        for k in range(b.shape[0]):
            row, vector, factors, result = b[k], x[i], a_transposed[k], out[i, first:last]
            factor = np.float32(0)
            for j in range(row.size):
                factor += row[j] * vector[j]
            for j in range(factors.size):
                result[j] += factors[j] * factor
