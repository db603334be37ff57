"""The public model that a split is made against, and the adapters to it (SPEC section 2, "A public base")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sliplm.engines.groups import Group
from sliplm.engines.source import stack
from sliplm.engines.transformers.lora import Adapter, fingerprint
from sliplm.engines.transformers.stored import StoredModel
from sliplm.shares.contents import adapter_tensors
from sliplm.shares.grouptask import GroupTask
from sliplm.shares.manifest import VaultGroup
from sliplm.shares.recipe import GroupChoice

Split = tuple[tuple[Group, GroupChoice], ...]


@dataclass(frozen=True)
class PublicBase:
    """A public base, and what is kept beside it.

    Attributes:
        same: the model that is split is the base itself.
        tail_to_worker: as the recipe says.
    """

    stored: StoredModel
    adapters: tuple[Adapter, ...]
    same: bool
    tail_to_worker: bool

    @property
    def key(self) -> object:
        """What the result depends on beside the model and the recipe."""
        return [self.stored.checkpoint.fingerprint(), [fingerprint(adapter) for adapter in self.adapters]]

    @property
    def alone(self) -> bool:
        """The worker gets the base and nothing else."""
        return not self.tail_to_worker

    def with_adapters(self, groups: Sequence[VaultGroup], split: Split) -> tuple[VaultGroup, ...]:
        """The groups with what the adapters do to them."""
        changed = []
        for found, (group, _) in zip(groups, split, strict=True):
            parts = (adapter.in_group(group) for adapter in self.adapters)
            there = tuple(part for part in parts if part is not None)
            changed.append(found.model_copy(update={"adapters": there}))
        return tuple(changed)

    def task(self, model: StoredModel, group: Group, choice: GroupChoice) -> GroupTask:
        """What splitting a group of `model` takes."""
        base = stack(self.stored.read, group)
        if self.same:
            return GroupTask(group.name, choice, base, base, trained=False)
        return GroupTask(
            group.name, choice, stack(model.read, group), base, tail_to_worker=self.tail_to_worker
        )

    def adapter_arrays(self, group: Group, found: VaultGroup) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of a group's adapters, under their names in the vault's share."""
        named = {adapter.name: adapter for adapter in self.adapters}
        parts = {part.name: named[part.name].parts(group) for part in found.adapters}
        return adapter_tensors(found, parts)
