"""What a study found, as plain numbers: for the report, the recommendation and `plan.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from sliplm.sensitivity.variants import ALL, Table


class _Found(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measurement(_Found):
    """The mean loss (nats a token) of the model without the top `rank` triplets of some groups, see
    `variants.Variant`; infinite values are null in JSON."""

    table: Table
    of: str
    rank: int
    loss: float
    perplexity: float


class Spectrum(_Found):
    """A group's singular values at some `places` (1 is the largest), the share of the energy |W|^2 that the
    top triplets hold, and the localisation of what a split hides (`factors.Factors`)."""

    group: str
    kind: str
    layer: int | None
    rows: int
    columns: int
    energy: float
    places: tuple[int, ...]
    values: tuple[float, ...]
    shares: dict[int, float]
    localisation: float | None = None


class Cost(_Found):
    """What the vault does and keeps when every group is split with one rank.

    Attributes:
        macs: per token; `macs_share` is of the unprotected linear layers; `kinds` the same for each kind.
        low_rank, rotations, checks: parts of it, checks with the fixed point.
        bytes: of the vault's share; `secret_bytes` without what stays whole whatever the rank.
    """

    rank: int
    macs: int
    macs_share: float
    low_rank: int
    rotations: int
    checks: int
    secret_bytes: int
    bytes: int
    bytes_share: float
    kinds: dict[str, float]


class Results(_Found):
    """All of a study.

    Attributes:
        vocabulary: the perplexity of a uniform guess.
        layers: how many.
        whole: modules that cannot be split.
        cumulative_rank: the rank of the tables "first" and "last".
    """

    model: str
    config_class: str
    parameters: int
    device: str
    tokens: int
    window: int
    vocabulary: int
    kinds: tuple[str, ...]
    layers: int
    whole: tuple[str, ...]
    cumulative_rank: int
    measurements: tuple[Measurement, ...]
    spectra: tuple[Spectrum, ...]
    costs: tuple[Cost, ...]

    @property
    def base(self) -> Measurement:
        """The whole model."""
        return self.table("whole")[0]

    def table(self, name: Table, of: str | None = None) -> tuple[Measurement, ...]:
        """The measurements of a table, or of one row of it, in their order."""
        return tuple(m for m in self.measurements if m.table == name and of in (None, m.of))

    def layer_losses(self) -> dict[int, float]:
        """Layer -> mean loss over the ranks that were measured; what cannot be computed counts as a uniform
        guess."""
        worst = math.log(self.vocabulary)
        found: dict[int, list[float]] = {}
        for m in self.table("layer"):
            found.setdefault(int(m.of), []).append(min(m.loss, worst))
        return {layer: sum(losses) / len(losses) for layer, losses in found.items()}

    def damage(self, loss: float) -> float:
        """How far a loss is from the whole model's (0) to a uniform guess's (1)."""
        worst = math.log(self.vocabulary)
        if worst <= self.base.loss:  # the model is no better than a guess: there is nothing to lose
            return 0.0
        return min(1.0, max(0.0, (loss - self.base.loss) / (worst - self.base.loss)))

    def energy(self, kind: str, rank: int) -> float:
        """The share of the energy of all matrices of a kind that the top triplets hold."""
        mine = [s for s in self.spectra if s.kind == kind]
        total = sum(s.energy for s in mine)
        return sum(s.energy * s.shares[rank] for s in mine) / total if total else 0.0

    def localisation(self, kind: str) -> float | None:
        """The largest entry of a singular vector in what a split hides of a kind; None if not measured."""
        mine = [s.localisation for s in self.spectra if s.kind == kind and s.localisation is not None]
        return max(mine, default=None)

    def worth(self) -> dict[str, dict[int, float]]:
        """Kind -> rank -> the mean of two shares: how far the loss goes to a uniform guess when this kind's
        top triplets are taken away, and how much of its energy they hold.  It does not fall with the rank."""
        return {kind: self._worth(kind, self.table("kind", kind)) for kind in (self.kinds)}

    def _worth(self, kind: str, row: Sequence[Measurement]) -> dict[int, float]:
        best, found = 0.0, {}
        for m in sorted(row, key=lambda m: m.rank):
            best = max(best, (self.damage(m.loss) + self.energy(kind, m.rank)) / 2)
            found[m.rank] = best
        return found

    def everything(self) -> tuple[Measurement, ...]:
        """All kinds at once, by rank."""
        return self.table("kind", ALL)
