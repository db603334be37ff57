"""What the writing of a split (`transformers.convert.write_split`) asks of whoever has the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sliplm.engines.groups import Group
from sliplm.manifest import Attention, KeptGroup, SourceModel, VaultGroup
from sliplm.recipe import GroupChoice, Recipe
from sliplm.tensorfile import TensorSpec

Errors = tuple[float, float]  # of quantisation, of the decomposition


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

    def companions(self) -> Mapping[str, bytes]:
        """Files that lie beside the shares in the vault folder, `config.json` among them."""
