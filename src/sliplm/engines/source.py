"""What the writing of a split (`writing.write_split`) asks of whoever has the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sliplm.engines.groups import Group
from sliplm.shares.grouptask import GroupTask
from sliplm.shares.manifest import Attention, KeptGroup, SourceModel, VaultGroup
from sliplm.shares.recipe import GroupChoice, Recipe
from sliplm.shares.tensorfile import TensorSpec

Errors = tuple[float, ...]
"""Of quantisation, of the decomposition; the localisation; the norms of a `Difference`, if any."""


class Source(Protocol):
    """A model's tensors, and what a recipe makes of them; all of it was checked."""

    @property
    def key(self) -> object:
        """Whatever the result depends on: work of an earlier run is only used where this is the same."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def split(self) -> tuple[tuple[Group, GroupChoice], ...]:
        """The groups that are split, in the order of the shares."""

    def shuffled(self, secret: bytes) -> Source:
        """The same with experts in a secret order; itself where there are none."""

    @property
    def attention(self) -> tuple[Attention, ...]: ...

    @property
    def model(self) -> SourceModel: ...

    def groups(self, errors: Mapping[str, Errors]) -> tuple[VaultGroup, ...]:
        """The split groups as the manifest has them."""

    def kept_groups(self) -> tuple[KeptGroup, ...]:
        """The linear layers that stay whole, as the manifest has them."""

    def kept_specs(self) -> list[TensorSpec]:
        """The tensors that stay whole, in clear."""

    def kept_bytes(self, name: str) -> Iterable[bytes]:
        """A tensor that stays whole, as it is stored, in pieces; NaN and infinity in weights raise."""

    def read(self, weight: str) -> npt.NDArray[np.float32]:
        """A parameter that is split, in its shape; NaN and infinity raise CheckpointError."""

    def task(self, group: Group, choice: GroupChoice) -> GroupTask:
        """What splitting a group takes."""

    @property
    def public(self) -> bool:
        """Whether the worker's share is a public base alone (SPEC M40, M41)."""

    @property
    def base_model(self) -> SourceModel | None:
        """The public base, if any."""

    @property
    def adapter_names(self) -> tuple[str, ...]: ...

    def adapter_arrays(self, group: Group, found: VaultGroup) -> Mapping[str, npt.NDArray[np.float32]]:
        """The tensors of a group's adapters, under their names in the vault's share."""

    def companions(self) -> Mapping[str, bytes]:
        """Files that lie beside the shares in the vault folder, `config.json` among them."""


def stack(read: Callable[[str], npt.NDArray[np.float32]], group: Group) -> npt.NDArray[np.float32]:
    """The members' weights under each other: float32 [rows, columns].

    Args:
        read: gives a parameter by its name, in its shape.

    Raises:
        CheckpointError: as `read`.
    """
    stacked = np.empty((group.rows, group.columns), dtype=np.float32)
    first = 0
    for member in group.members:
        weight = read(member.weight)
        weight = weight.T if member.transposed else weight.reshape(member.rows, member.columns)
        stacked[first : first + member.rows] = weight
        first += member.rows
    return stacked


def plain_task(source: Source, group: Group, choice: GroupChoice) -> GroupTask:
    """Of a group that is split without a base."""
    return GroupTask(group.name, choice, stack(source.read, group))
