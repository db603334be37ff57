"""A model as it lies on the disk: its checkpoint, its layout, and where each parameter is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sliplm.engines.groups import Group
from sliplm.engines.transformers.checkpoint import Checkpoint, Sources, locate
from sliplm.engines.transformers.layout import Layout, discover
from sliplm.errors import CheckpointError
from sliplm.filesystem import readable
from sliplm.shares.manifest import SourceModel


@dataclass(frozen=True)
class StoredModel:
    """A model of which no weight was read yet."""

    checkpoint: Checkpoint
    layout: Layout
    sources: Sources

    @property
    def source(self) -> SourceModel:
        """Its folder, class and size, for the manifest."""
        return SourceModel(
            name=readable(self.checkpoint.path.resolve().name),
            config_class=type(self.layout.config).__name__,
            parameters=sum(math.prod(shape) for shape in self.layout.parameters.values()),
        )

    def stored_as(self, name: str) -> str | None:
        """Where a parameter is stored, under its own name or one that it is tied to."""
        tied, keys = self.layout.tied, self.sources.keys
        first = tied.get(name, name)
        aliases = [alias for alias, target in tied.items() if target == first]
        return next((keys[n] for n in (name, first, *aliases) if n in keys), None)

    def holds(self, group: Group) -> bool:
        """Whether all weights of a group are stored in a form that can be split."""
        return all(
            self.stored_as(name) is not None or name in self.sources.stacks for name in group.parameters
        )

    def read(self, weight: str) -> npt.NDArray[np.float32]:
        """A parameter, in its shape; `PARAMETER.3`: what its fourth expert has of it.

        Raises:
            CheckpointError: it holds NaN or infinity, cannot be read, or is not stored as such.
        """
        if weight not in self.layout.parameters and (found := self._expert(weight)) is not None:
            return found
        key = self.stored_as(weight)
        if key is None:
            raise CheckpointError(f"{weight} is not in the checkpoint in a form that can be split")
        return self.checkpoint.read(key)

    def _expert(self, weight: str) -> npt.NDArray[np.float32] | None:
        """One expert's part of a fused parameter, from either form; None if it is none."""
        fused, _, number = weight.rpartition(".")
        if not number.isdigit() or fused not in self.layout.parameters:
            return None
        if fused in self.sources.stacks:
            keys = self.sources.stacks[fused][int(number)]
            return np.concatenate([self.checkpoint.read(key) for key in keys])
        key = self.stored_as(fused)
        return None if key is None else self.checkpoint.read(key, int(number))


def open_stored(model_dir: Path) -> StoredModel:
    """Look at a checkpoint folder.

    Raises:
        CheckpointError: as `layout.discover`, `Checkpoint` and `checkpoint.locate`.
    """
    layout = discover(model_dir)
    checkpoint = Checkpoint(model_dir)
    return StoredModel(checkpoint, layout, locate(checkpoint, layout))
