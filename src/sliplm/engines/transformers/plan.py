"""What a split will do: decided and checked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sliplm import rotation
from sliplm.engines.transformers.checkpoint import Checkpoint, Sources, locate
from sliplm.engines.transformers.journal import Errors
from sliplm.engines.transformers.layout import Group, Layout, discover, read_config
from sliplm.errors import CheckpointError, RecipeError, UnsplittableError
from sliplm.manifest import FORMAT_VERSION, Difference, Member, VaultGroup
from sliplm.recipe import GroupChoice, Recipe
from sliplm.share import integer_type, sealed_spec, secret_specs, sliplm_version, worker_spec
from sliplm.tensorfile import TensorSpec

if TYPE_CHECKING:
    from sliplm.engines.transformers.finetune import PublicBase


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first weight is read."""

    checkpoint: Checkpoint
    layout: Layout
    recipe: Recipe
    sources: Sources
    split: tuple[tuple[Group, GroupChoice], ...]
    whole: tuple[Group, ...]
    kept: dict[str, str]  # tensor in the vault's model file -> tensor of the checkpoint
    untied: bool  # a tied weight is split off, so that its other user needs a copy of its own
    base: PublicBase | None = None

    @property
    def key(self) -> object:
        """Whatever the result depends on: work of an earlier run is only used where this is the same."""
        version = [sliplm_version(), FORMAT_VERSION]
        base = [] if self.base is None else [self.base.key]
        return [self.checkpoint.fingerprint(), self.recipe.model_dump(mode="json"), version, *base]

    def groups(self, errors: Mapping[str, Errors]) -> tuple[VaultGroup, ...]:
        """The groups as the manifest has them; without `errors`, only their names and shapes count."""
        found = tuple(
            _vault_group(group, choice, errors.get(group.name, (0.0, 0.0))) for group, choice in self.split
        )
        return found if self.base is None else self.base.with_adapters(found, self.split)

    def public_specs(self) -> list[TensorSpec]:
        """The tensors of the worker's share."""
        return [worker_spec(group) for group in self.groups({})]

    def secret_specs(self) -> list[TensorSpec]:
        """The tensors of the vault's share, as they lie on the disk."""
        return [sealed_spec(spec) for group in self.groups({}) for spec in secret_specs(group)]

    def kept_specs(self) -> list[TensorSpec]:
        """The tensors that stay whole, in clear."""
        entries = {name: self.checkpoint.entries[key] for name, key in self.kept.items()}
        return [TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items()]


def make_plan(model_dir: Path, recipe: Recipe) -> Plan:
    """Look at a checkpoint and a recipe, and decide.

    Raises:
        CheckpointError, UnsplittableError, RecipeError: as `convert.split`.
    """
    read_config(model_dir)
    checkpoint = Checkpoint(model_dir)
    layout = discover(model_dir)
    _check_rules(layout, recipe)
    choices = [(group, recipe.for_group(group.name, group.modules)) for group in layout.groups]
    chosen = tuple((group, choice) for group, choice in choices if choice.placement == "split")
    for group, choice in chosen:
        _check_group(group, choice)
    sources = locate(checkpoint, layout)
    consumed = {member.weight for group, _ in chosen for member in group.members}
    _check_stored(consumed, layout, sources)
    kept, untied = kept_tensors(layout, sources, consumed)
    return Plan(
        checkpoint=checkpoint,
        layout=layout,
        recipe=recipe,
        sources=sources,
        split=chosen,
        whole=tuple(group for group, choice in choices if choice.placement == "vault"),
        kept=kept,
        untied=untied,
    )


def _check_rules(layout: Layout, recipe: Recipe) -> None:
    names = [name for group in layout.groups for name in (group.name, *group.modules)]
    unmatched = recipe.unmatched([*names, *layout.unsplittable])
    if unmatched:
        raise RecipeError(
            f"no group or layer matches the recipe's pattern {', '.join(map(repr, unmatched))}; "
            f"names look like {names[0] if names else '(none)'}"
        )
    loose = [name for name in layout.unsplittable if recipe.for_group(name).placement != "vault"]
    if loose:
        reasons = "\n".join(f"  {name}: {layout.unsplittable[name]}" for name in loose)
        raise UnsplittableError(
            f"these modules cannot be split:\n{reasons}\n"
            'keep them whole in the vault by a rule such as Rule(pattern="'
            f'{re.sub(r"[.][0-9]+[.]", ".*.", loose[0])}", placement="vault")',
            tuple(loose),
        )


def _check_group(group: Group, choice: GroupChoice) -> None:
    if choice.rank > min(group.rows, group.columns):
        raise RecipeError(
            f"{group.name}: rank {choice.rank} is more than its {group.rows} x {group.columns} matrix has; "
            f"choose at most {min(group.rows, group.columns)}, or placement 'vault'"
        )
    if choice.rotation == "haar" and max(group.rows, group.columns) > rotation.MAX_HAAR:
        raise RecipeError(
            f"{group.name}: {group.rows} x {group.columns} is too wide for rotation 'haar' (at most "
            f"{rotation.MAX_HAAR}); give it rotation 'fast' or placement 'vault' by a rule"
        )


def _check_stored(consumed: set[str], layout: Layout, sources: Sources) -> None:
    odd = tuple(sorted(name for name in consumed if stored_as(name, layout, sources) is None))
    if odd:
        raise UnsplittableError(
            f"the checkpoint stores {', '.join(odd[:5])} in a form that transformers converts while loading; "
            "load and save it once with transformers, or place these layers in the vault",
            odd,
        )


def kept_tensors(layout: Layout, sources: Sources, consumed: set[str]) -> tuple[dict[str, str], bool]:
    """What stays whole when the weights `consumed` are split: its name in the vault -> its key in the
    checkpoint; and whether a tied weight is among the consumed."""
    untied = any(alias in consumed or name in consumed for alias, name in layout.tied.items())
    kept = {name: key for name, key in sources.keys.items() if name not in consumed}
    if untied:
        for name in {*layout.tied, *layout.tied.values()} - consumed - set(kept):
            key = stored_as(name, layout, sources)
            if key is not None:
                kept[name] = key
    return kept | {key: key for key in sources.converted}, untied


def stored_as(name: str, layout: Layout, sources: Sources) -> str | None:
    """Where a parameter is stored, under its own name or one that it is tied to."""
    first = layout.tied.get(name, name)
    aliases = [alias for alias, target in layout.tied.items() if target == first]
    return next((sources.keys[n] for n in (name, first, *aliases) if n in sources.keys), None)


def stack(checkpoint: Checkpoint, layout: Layout, sources: Sources, group: Group) -> npt.NDArray[np.float32]:
    """The members' weights under each other: float32 [rows, columns].

    Raises:
        CheckpointError: a weight holds NaN or infinity, cannot be read, or is not stored as such.
    """
    stacked = np.empty((group.rows, group.columns), dtype=np.float32)
    first = 0
    for member in group.members:
        key = stored_as(member.weight, layout, sources)
        if key is None:
            raise CheckpointError(f"{member.weight} is not in the checkpoint in a form that can be split")
        weight = checkpoint.read(key)
        stacked[first : first + member.rows] = weight.T if member.transposed else weight
        first += member.rows
    return stacked


def _vault_group(group: Group, choice: GroupChoice, errors: Errors) -> VaultGroup:
    return VaultGroup(
        name=group.name,
        rows=group.rows,
        columns=group.columns,
        dtype=integer_type(choice.precision),
        members=members(group),
        rank=choice.rank,
        precision=choice.precision,
        rotation=choice.rotation,
        error=errors[0],
        svd_error=errors[1],
        difference=Difference(**dict(zip(("norm", "base", "tail"), errors[2:], strict=True)))
        if errors[2:]
        else None,
    )


def members(group: Group) -> tuple[Member, ...]:
    """The linear layers of a group, as the manifest has them."""
    return tuple(Member(member.module, member.rows) for member in group.members)
