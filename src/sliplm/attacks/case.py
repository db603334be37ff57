"""What one attacker holds, what he may ask, and what an attack makes of it.

The attacker is granted more than a real worker has: the row scales of the fixed point, the mean size of the
diagonals, the names and places of the group's members, and the rank.  What he never has is
`Scene.victim`: attacks get a `Case` and a `Teacher`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Placement:
    """Which groups are protected; all else is known to the attacker in clear.

    Attributes:
        name: as reports show it.
        patterns: globs over names of groups; None protects everything, embeddings and norms included, which
            is the product's own placement.
        exit_layer: the block that reads what the protected ones produce, -1 for the head, where it is known
            and runs in clear.
    """

    name: str
    patterns: tuple[str, ...] | None
    exit_layer: int | None = None

    def protects(self, group: str) -> bool:
        """Whether the group is protected."""
        return self.patterns is None or any(fnmatchcase(group, pattern) for pattern in self.patterns)


def layers(name: str, numbers: range, depth: int) -> Placement:
    """The linear layers of consecutive blocks of a model that has `depth`, by the number in their names."""
    exit_layer = -1 if numbers.stop >= depth else numbers.stop
    return Placement(name, tuple(f"*.{i}.*" for i in numbers), exit_layer)


@dataclass(frozen=True)
class Part:
    """A linear layer's rows in its group's matrix; `transposed`: its weight is kept as [n, rows] (GPT-2).

    Of an expert `module` is the fused parameter's own name, [experts, rows, n], and `expert` its number.
    """

    module: str
    rows: int
    transposed: bool = False
    expert: int | None = None

    @property
    def parameter(self) -> str:
        """The model's parameter that holds its weight."""
        return f"{self.module}.weight" if self.expert is None else self.module

    @property
    def key(self) -> str:
        """What guesses call its weight: an expert's is a part of a parameter."""
        return self.parameter if self.expert is None else f"{self.module}.{self.expert}"

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Its weight [rows, n] in a model with these parameters."""
        whole = self.expert is None or self.key in state
        weight = state[self.key] if whole else state[self.parameter][self.expert]
        return weight.T if self.transposed else weight


@dataclass(frozen=True, eq=False)
class ShareView:
    """One group as an attacker sees it.

    Attributes:
        members: in the order of their rows.
        matrix: float32 [m, n], the worker's integers times the granted row scales, and as large as W_D.
        rank: k of the removed part, granted.
        level: rows and columns are equal in norm: the share lies between secret diagonals.
    """

    name: str
    members: tuple[Part, ...]
    matrix: Tensor
    rank: int
    level: bool = False

    def parts(self, matrix: Tensor | None = None) -> dict[str, Tensor]:
        """`Part.key` -> weight, from the rows of `matrix` [m, n] (the share's own if None)."""
        pieces = torch.split(self.matrix if matrix is None else matrix, [part.rows for part in self.members])
        return {
            part.key: piece.T if part.transposed else piece
            for part, piece in zip(self.members, pieces, strict=True)
        }

    def stack(self, state: Mapping[str, Tensor]) -> Tensor:
        """The group's matrix [m, n] of a model with these parameters, where the share's is."""
        return torch.cat([part.of(state) for part in self.members]).to(self.matrix.device)


@dataclass(frozen=True)
class Case:
    """What one attacker holds.

    Attributes:
        recipe: name of the split: "plain", "default", "haar"; "none" for an attacker without a share.
        config: the architecture, public.
        groups: protected group -> its linear layers.
        shares: protected group -> view; empty for an attacker without a share.
        known: parameter -> value, for all that is not protected.
        relative: parameter -> value of a public relative of the model, where there is one.
        second: a second share of the same weights, where there is one.
    """

    recipe: str
    placement: Placement
    config: PretrainedConfig
    groups: Mapping[str, tuple[Part, ...]]
    shares: Mapping[str, ShareView]
    known: Mapping[str, Tensor]
    relative: Mapping[str, Tensor] | None = None
    second: Mapping[str, ShareView] | None = None

    def guess(self) -> dict[str, Tensor]:
        """The shares taken for weights: `Part.key` -> value."""
        return {name: part for view in self.shares.values() for name, part in view.parts().items()}


@dataclass(frozen=True)
class Delta:
    """A low-rank part that is trained on top of a group's matrix: W = W0 + left core right.

    Attributes:
        left: float32 [m, k].  right: float32 [k, n].
        core: float32 [k, k], or None for the identity.
        train: which of "left", "right", "core" are trained.
    """

    left: Tensor
    right: Tensor
    core: Tensor | None
    train: frozenset[str]


@dataclass
class Start:
    """What an attack knows before it trains.

    Attributes:
        state: guesses for protected parameters, or for single experts of one (`Part.key`); a missing one
            starts as in an untrained model.
        deltas: low-rank parts by group.
        whole: train the protected groups whole.  Protected parameters outside all groups (norms, embeddings)
            are unknown to every attacker and always trained.
        hidden_layer: match the hidden states that enter this block instead of the outputs.
        rates: learning rates to search.
        notes: what the algebra found.
    """

    state: dict[str, Tensor]
    deltas: dict[str, Delta] = field(default_factory=dict)
    whole: bool = False
    hidden_layer: int | None = None
    rates: tuple[float, ...] = ()
    notes: dict[str, float | str] = field(default_factory=dict)


class Teacher(Protocol):
    """The only access to the victim: what it answers, counted."""

    def questions(self, count: int) -> Tensor:
        """The first windows of the training text, which the attacker has: int64 [count, length]."""

    def answers(self, indices: Tensor) -> Tensor:
        """float32 [count, length, vocabulary] on the windows of the training text with these indices."""


class Attack(Protocol):
    """A numbered attack."""

    number: int
    name: str
    title: str
    variants: tuple[str, ...]  # searched like learning rates; the best counts

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        """What it knows before training; None where it does not apply to the case."""
