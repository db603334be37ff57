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
from sliplm.shares.manifest import VaultGroup
from sliplm.shares.publicbase import split_base, split_difference
from sliplm.shares.recipe import GroupChoice
from sliplm.shares.splitter import Splitter
from sliplm.shares.splitting import GroupSplit

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

    def split_group(
        self, model: StoredModel, group: Group, choice: GroupChoice, splitter: Splitter
    ) -> tuple[GroupSplit, tuple[float, ...]]:
        """Both parts of a group of `model`, and the norms of the difference, if there may be one."""
        base = stack(self.stored.read, group)
        if self.same:
            return split_base(group.name, base, choice.precision), ()
        return split_difference(
            group.name,
            stack(model.read, group),
            base,
            rank=choice.rank,
            precision=choice.precision,
            tail_to_worker=self.tail_to_worker,
            splitter=splitter,
        )

    def adapter_arrays(self, group: Group, found: VaultGroup) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of a group's adapters, under their names in the vault's share."""
        named = {adapter.name: adapter for adapter in self.adapters}
        parts = {part.name: named[part.name].parts(group) for part in found.adapters}
        return adapter_tensors(found, parts)
