"""The vault's own arithmetic for one group: steps 1, 2, 4 and 5 on arrays, without masks' origin or
sockets.  `arithmetic.steps` has the loops.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sliplm.arithmetic import field, steps
from sliplm.arithmetic.field import Elements, P, Sums
from sliplm.arithmetic.fixedpoint import EDGE, ROOM, Floats, scale_limit
from sliplm.arithmetic.kernels.threads import default_threads, in_parallel
from sliplm.arithmetic.lanes import LANES
from sliplm.arithmetic.lowrank import add_low_rank
from sliplm.arithmetic.rotation import Haar
from sliplm.arithmetic.steps import Losses, Scales, laid_out
from sliplm.errors import ExhaustedError, InputError, PrecisionError, SlipWarning
from sliplm.masks.masks import Masks
from sliplm.secrecy import Secret
from sliplm.shares.splitting import CHALLENGE_SETS, CHALLENGES, GroupSecrets, LowRank

LOSSY = 1 / 32  # an expected relative error that is counted and warned of; that of bfloat16 is about 1/500
_LOST = 1 / 2  # one that leaves nothing
_FEW = 16  # outputs below which an answer may be small by chance

_SHARED = 1 << 17  # numbers of inputs and outputs, 0.3 ms, that a thread needs to gain more than it costs


class Challenges(NamedTuple):
    """The challenges in force: all of one set, in one object."""

    number: int
    e: Elements
    c: Elements


class Judged(NamedTuple):
    """What rounding has cost a product, as in `Asked`."""

    losses: Losses
    worst: float
    alpha: Scales  # or anything that is the same for both rows of an input


class Asked(Secret):
    """One group's rows in a message: what the vault knows of them before the answer is there.

    Attributes:
        x: the input, float32 [rows, n].  hidden: x~, uint32 [rows, n], in the message; or [2 rows, n], where
            the second half is of the remainders.
        alpha: the secret scales of `hidden`, float64.
        out: A (B x) once that was made, in the end the answer: float32 [rows, m].
        losses: what rounding the input has cost, for `judge`: float64 [rows, 2].  worst: the largest of them,
            or NaN where a product is too large to be believed.
    """

    __slots__ = ("alpha", "challenges", "expected", "hidden", "losses", "out", "worst", "x")

    def __init__(self, x: Floats, hidden: Elements, out: Floats) -> None:
        sent = len(hidden)
        self.x, self.hidden, self.out = x, hidden, out
        self.alpha: Scales = np.empty(sent)
        self.expected: Sums = np.empty((sent, CHALLENGES), np.uint64)
        self.losses: Losses = np.empty((len(x), 2))
        self.worst = math.inf
        self.challenges: Challenges | None = None  # those that `expected` is of


class GroupCodec(Secret):
    """One group, its secrets laid out for use.  Many rows are shared out over the cores.

    Attributes:
        limit: alpha times a row's norm.  edge: the size of a product above which it is not believed (M64).
    """

    def __init__(self, secrets: GroupSecrets) -> None:
        self.name, self.m, self.n = secrets.name, secrets.m, secrets.n
        self.limit = scale_limit(secrets.norm, secrets.n)
        rotation_in, rotation_out = secrets.rotation_in(), secrets.rotation_out()
        self._dense = (
            (rotation_in, rotation_out)
            if isinstance(rotation_in, Haar) and isinstance(rotation_out, Haar)
            else None
        )
        self.edge = _edge(secrets)
        self._laid = laid_out(rotation_in, rotation_out, secrets.d_in, secrets.scale, self.edge)
        self._noise, self._warned = secrets.noise, False
        self._float_loses = 2**20 * math.sqrt(self.n / 12) / self.limit  # so small a rest float32 loses too
        self._kept = np.ascontiguousarray(secrets.a.T), np.ascontiguousarray(secrets.b)
        self._adapters = {name: _added(parts) for name, parts in secrets.adapters.items()}
        self.secrets = secrets
        self._challenges = Challenges(0, secrets.challenges(0), secrets.challenge_products(0))
        self._renewing = threading.Lock()

    def __repr__(self) -> str:
        return f"GroupCodec({self.name!r}, m={self.m}, n={self.n}, secrets hidden)"

    def check_left(self) -> None:
        """Raise ExhaustedError when no product of this group can be checked any more: that is for good."""
        self.left()

    def left(self) -> Challenges:
        """The challenges in force: read once, since another thread may put others in their place.

        Raises: as `check_left`.
        """
        found = self._challenges
        if found.number >= CHALLENGE_SETS:
            raise ExhaustedError(
                f"{self.name}: {CHALLENGE_SETS} wrong products used up its challenges; the audit record "
                "names who lied: leave them out and load the model again"
            )
        return found

    def renew_challenges(self, failed: Challenges) -> None:
        """Put the next set in the place of `failed`, if no other thread has done so: after the last, none."""
        with self._renewing:
            if self._challenges is not failed:
                return
            number = failed.number + 1
            if number >= CHALLENGE_SETS:
                empty = np.empty((0, 0), np.uint32)
                self._challenges = Challenges(number, empty, empty)
                return
            self._challenges = Challenges(
                number, self.secrets.challenges(number), self.secrets.challenge_products(number)
            )

    def ask(self, x: Floats, masks: Masks, hidden: Elements, out: Floats) -> Asked:
        """Steps 1 and 2: x~ = round(alpha Q_in D_in x) + r mod p into `hidden`, uint32 [rows, n], or as two
        rows each into [2 rows, n]: the second half takes what rounding leaves of the first.

        Args:
            x: float32 [rows, n].  masks: of as many rows as `hidden`, burnt.
            out: where the answer will go, float32 [rows, m].

        Raises: InputError for NaN or infinity in x; there is no message then.
        """
        asked, words = Asked(np.ascontiguousarray(x), hidden, out), masks.words
        if self._dense is None:
            finite = self._over(
                len(x), steps.ask, *self._laid, self.limit, asked.x, words, hidden, asked.alpha
            )
        else:
            z = self._dense[0].apply(asked.x)
            mask = steps.mask if len(hidden) == len(x) else steps.mask_both
            finite = self._over(len(x), mask, self.limit, z, 0, words, hidden, asked.alpha)
        if not all(finite):
            raise InputError(
                f"{self.name}: the input holds NaN or infinity; look for the cause in the layers before it"
            )
        return asked

    def unmasked(self, x: Floats, out: Floats, inputs: int = 1) -> Asked:
        """Step 1 alone, for products that never leave this process: round(alpha Q_in D_in x) as elements are
        `hidden`, behind a mask of zeros.

        Args:
            inputs: rows that each input makes, 1 or 2.

        Raises: as `ask`.
        """
        zeros = np.zeros((inputs * len(x), self.n), np.uint32)
        nothing = Masks(zeros, np.zeros((len(zeros), self.m), np.uint32), self.n)
        return self.ask(x, nothing, np.empty_like(zeros), out)

    def bring_near(self) -> None:
        """Read what the next `ask` will read: it takes longer to come than the arithmetic on it."""
        steps.bring_near(*self._laid)

    def ahead(self, asked: Asked, adapter: str | None = None) -> None:
        """What of steps 4 and 5 does not depend on the answer, to be done while the worker computes:
        A (B x), what the adapter adds if it changes this group, and <c, x~>.

        Raises: as `check_left`.
        """
        challenges, rows, x, out = self.left(), len(asked.x), asked.x, asked.out
        self._over(
            rows, steps.ahead, *self._laid, *self._kept, challenges.c, challenges.e,
            x, asked.hidden, asked.alpha, out, asked.expected, asked.losses,
        )  # fmt: skip
        asked.challenges = challenges
        if adapter is not None:
            for a_transposed, b, place in self._adapters.get(adapter, ()):
                self._over(rows, add_low_rank, a_transposed, b, x, out, place)

    def holds(self, asked: Asked, y: Elements) -> bool:
        """Step 4: is y, as many rows of m, the product of x~?  Wrong at most once in p^t.

        After a False other challenges are in force (M15): that it failed tells its maker of them.

        Raises: as `check_left`.
        """
        challenges = self.left()
        if asked.challenges is not challenges:  # renewed meanwhile
            asked.expected, asked.challenges = self.expected(challenges, asked.hidden), challenges
        if self.holds_for(challenges, asked.expected, y):
            return True
        self.renew_challenges(challenges)
        return False

    def expected(self, challenges: Challenges, hidden: Elements) -> Sums:
        """<c, x~> of each row: uint64 [rows, t]."""
        found = np.empty((len(hidden), CHALLENGES), np.uint64)
        self._over(len(hidden), field.expect, challenges.c, hidden, found)
        return found

    def holds_for(self, challenges: Challenges, expected: Sums, y: Elements) -> bool:
        """Step 4 for these challenges; nothing follows from a False."""
        return all(self._over(len(y), field.holds, challenges.e, y, expected))

    def accepts(self, x: Elements, y: Elements) -> bool:
        """O3, the same for a product of elements x [rows, n] that were not asked for by `ask`."""
        challenges = self.left()
        if self.holds_for(challenges, self.expected(challenges, x), y):
            return True
        self.renew_challenges(challenges)
        return False

    def opened(self, asked: Asked, y: Elements, u: Elements) -> None:
        """Step 5: adds D_out Q_out^T (s * centre(y - u) / alpha) to `asked.out`, and completes its losses.
        Both products of an input that travelled as two rows are added before they are turned back.
        """
        rows, out, alpha, losses = len(asked.x), asked.out, asked.alpha, asked.losses
        if self._dense is None:
            worst = self._over(rows, steps.opened, *self._laid, self._noise, y, u, alpha, out, losses)
        else:
            unmasked = np.empty_like(out)
            unmask = steps.unmask if len(alpha) == rows else steps.unmask_both
            within = all(self._over(rows, unmask, *self._laid, y, u, alpha, unmasked, 0))
            back = self._dense[1].apply_transpose(unmasked)
            worst = self._over(rows, steps.finish, self._noise, back, 0, alpha, out, losses)
            worst = worst if within else [math.nan]
        asked.worst = math.nan if any(map(math.isnan, worst)) else max(worst)

    def here(
        self,
        x: Floats,
        out: Floats,
        multiply: Callable[[Elements], Elements],
        adapter: str | None = None,
        inputs: int = 1,
    ) -> Asked:
        """The same product without a mask, into `out`: for tests and figures that hold both shares.

        Args:
            multiply: rows uint32 [rows, n] -> w times them, uint32 [rows, m].
            inputs: rows that each input makes, 1 or 2.

        Raises: as `ask`.
        """
        asked = self.unmasked(x, out, inputs)
        self.ahead(asked, adapter)
        y = multiply(asked.hidden)
        self.opened(asked, y, np.zeros_like(y))
        return asked

    def _over(self, rows: int, step: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a compiled step on all rows, shared out over the cores where it is much; what it returned."""
        pieces = rows * (self.m + self.n) // _SHARED
        if pieces <= 1:
            return [step(*arguments, 0, rows)]
        found: list[Any] = []
        threads = min(pieces, default_threads())
        in_parallel(lambda first, last: found.append(step(*arguments, first, last)), rows, threads, LANES)
        return found

    def judge(self, asked: Asked | Judged) -> int:
        """Number of rows of which rounding the input has cost much; the first in a group is warned of.

        Raises: PrecisionError if of a row nothing is left: the answer is smaller than its error, and so is
            the input beside its largest entry; or if a product is too large to be believed (M64).
        """
        if asked.worst <= LOSSY:
            return 0  # nearly always, and on the way of every token
        if math.isnan(asked.worst):
            raise PrecisionError(
                f"{self.name}: a product is so large that it may have left the field, which chance brings "
                "about less than once in 2^64 rows; nothing of it was used: split the model again, or give "
                'this group placement="vault" by a rule'
            )
        losses, alpha = asked.losses, asked.alpha
        answer = losses[:, 0] if self.m >= _FEW else np.zeros(len(losses))
        finer = alpha[-len(losses) :] / alpha[: len(losses)]  # 1 but for inputs that travelled as two rows
        rest = np.where(losses[:, 1] * finer < self._float_loses, losses[:, 1], 0.0)
        lossy = int(np.count_nonzero((answer > LOSSY) | (rest > LOSSY)))
        if not lossy:
            return 0
        finest = len(alpha) > len(losses)
        advice = "" if finest else "load it with inputs=2, which sends what rounding leaves as well, or "
        advice += (
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


def _edge(secrets: GroupSecrets) -> int:
    """The size that no product is above: by norms for certain, in a secret basis nearly (M64)."""
    return P // 2 if secrets.rotation == "none" else int(EDGE * ROOM)


def _added(parts: Iterable[LowRank]) -> list[tuple[Floats, Floats, int]]:
    """A^T and B of each part of an adapter, and its first output, as `add_low_rank` takes them."""
    return [
        (np.ascontiguousarray(part.a.T), np.ascontiguousarray(part.b), part.first)
        for part in parts
        if len(part.b)
    ]
