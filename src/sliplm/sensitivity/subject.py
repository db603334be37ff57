"""The model under study: its checkpoint, its groups, and which of them are of one kind or in one layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sliplm.engines.groups import Group
from sliplm.engines.transformers.layout import check_reads_text
from sliplm.engines.transformers.stored import StoredModel, open_stored
from sliplm.errors import UnsplittableError


@dataclass(frozen=True)
class Part:
    """A group that can be split, or the experts of one layer's weight, which are studied as one.

    Attributes:
        groups: it, or all of them, by their numbers.
        kind: what groups at the same place of different layers share, short: `q+k+v`, `down`, `lm_head`.
        layer: the first number in its name; None outside the layers.
    """

    groups: tuple[Group, ...]
    kind: str
    layer: int | None

    @property
    def name(self) -> str:
        return _name(self.groups)

    @property
    def group(self) -> Group:
        """The first, whose shape all have."""
        return self.groups[0]

    @property
    def experts(self) -> bool:
        """Whether it is experts."""
        return self.group.expert is not None

    @property
    def parameters(self) -> set[str]:
        """The model's parameters that its weights are read from."""
        return {name for group in self.groups for name in group.parameters}


@dataclass(frozen=True)
class Subject:
    """What is known of a model before any weight is read.

    Attributes:
        parts: the groups that can be split, in the order of a forward pass.
        whole: modules and groups that cannot be split, and so stay in the vault whatever the recipe.
    """

    stored: StoredModel
    parts: tuple[Part, ...]
    whole: tuple[str, ...]

    @property
    def beside(self) -> dict[str, tuple[int, int]]:
        """Routers, which are in the vault whatever the recipe, and counted: name -> (rows, columns)."""
        return {group.name: (group.rows, group.columns) for group in self.stored.layout.routers}

    @property
    def kinds(self) -> tuple[str, ...]:
        """In the order of a forward pass."""
        return tuple(dict.fromkeys(part.kind for part in self.parts))

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({part.layer for part in self.parts if part.layer is not None}))


def open_subject(model_dir: Path) -> Subject:
    """Look at a checkpoint.

    Raises:
        CheckpointError: as `open_stored`.
        UnsplittableError: nothing in it can be split.
    """
    check_reads_text(model_dir)
    stored = open_stored(model_dir)
    fit: dict[str, list[Group]] = {}
    for group in stored.layout.groups:
        if stored.holds(group):
            fit.setdefault(_name((group,)), []).append(group)
    if not fit:
        raise UnsplittableError(f"{model_dir} has no linear layer that can be split")
    parts = tuple(
        Part(tuple(groups), kind, _layer(name))
        for (name, groups), kind in zip(fit.items(), kinds_of(list(fit)), strict=True)
    )
    whole = [name for name in stored.layout.unsplittable]
    whole += [group.name for group in stored.layout.groups if _name((group,)) not in fit]
    return Subject(stored, parts, tuple(whole))


def _name(groups: Sequence[Group]) -> str:
    """A group's name; of experts that of their parameter."""
    return groups[0].name if groups[0].expert is None else groups[0].parameters[0]


def kinds_of(names: Sequence[str]) -> list[str]:
    """A short label for each group: the same for groups whose names differ in numbers only.

    `model.layers.3.self_attn.q_proj+k_proj` becomes `q+k`; kinds that would share a label keep more of their
    names.
    """
    blanks = [re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names]
    short: dict[str, str] = {}
    waiting = list(dict.fromkeys(blanks))
    take = 1
    while waiting:
        labels = [_last(blank, take) for blank in waiting]
        unique = [label for label in labels if labels.count(label) == 1 and label not in short.values()]
        short |= {blank: label for blank, label in zip(waiting, labels, strict=True) if label in unique}
        waiting = [blank for blank in waiting if blank not in short]
        take += 1
    return [short[blank] for blank in blanks]


def _last(blank: str, take: int) -> str:
    """The last pieces of a name, without `_proj` (GPT-2's `c_proj` is a name of its own)."""
    return re.sub(r"(?<!\bc)_proj(?=\+|$)", "", ".".join(blank.split(".")[-take:]))


def _layer(name: str) -> int | None:
    return next((int(piece) for piece in name.split(".") if piece.isdigit()), None)
