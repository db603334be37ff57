"""What a split will do: decided and checked before any weight is read."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic import rotation
from sliplm.arithmetic.field import derive_key
from sliplm.engines.groups import Group, Linear
from sliplm.engines.source import Errors, plain_task
from sliplm.engines.transformers.checkpoint import Checkpoint, locate
from sliplm.engines.transformers.companions import check_code, companions
from sliplm.engines.transformers.layout import Layout, discover, own_code, read_config
from sliplm.engines.transformers.publicbase import PublicBase, Split
from sliplm.engines.transformers.stored import StoredModel
from sliplm.errors import RecipeError, SlipWarning, UnsplittableError
from sliplm.shares.contents import integer_type
from sliplm.shares.grouptask import GroupTask
from sliplm.shares.manifest import (
    FORMAT_VERSION,
    Attention,
    Difference,
    ExpertOf,
    KeptGroup,
    Member,
    SourceModel,
    VaultGroup,
)
from sliplm.shares.recipe import GroupChoice, Recipe
from sliplm.shares.share import sliplm_version
from sliplm.shares.tensorfile import TensorSpec

CONVERTED = (
    "the checkpoint stores it in a form that transformers converts; to split it, load the model with "
    "transformers and save it with save_pretrained(folder, save_original_format=False)"
)


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first weight is read."""

    stored: StoredModel
    recipe: Recipe
    split: Split
    whole: tuple[Group, ...]
    kept: dict[str, str]  # tensor in the vault's model file -> tensor of the checkpoint
    untied: bool  # a tied weight is split off, so that its other user needs a copy of its own
    base: PublicBase | None = None
    unsplit: tuple[tuple[Group, str], ...] = ()  # what cannot be split, with why
    reasons: Mapping[str, str] = field(default_factory=dict)  # of groups in `whole` that no rule placed there

    def by_itself(self) -> Iterator[tuple[Group, str]]:
        """What stays whole although no rule says so, with why."""
        for group in self.whole:
            if group.name in self.reasons:
                yield group, self.reasons[group.name]
        for group, why in self.unsplit:
            if self.recipe.for_group(group.name, group.modules).placement != "vault":
                yield group, why

    @property
    def key(self) -> object:
        """Whatever the result depends on: work of an earlier run is only used where this is the same."""
        version = [sliplm_version(), FORMAT_VERSION]
        base = [] if self.base is None else [self.base.key]
        return [self.stored.checkpoint.fingerprint(), self.recipe.model_dump(mode="json"), version, *base]

    def groups(self, errors: Mapping[str, Errors]) -> tuple[VaultGroup, ...]:
        """The groups as the manifest has them; without `errors`, only their names and shapes count."""
        unknown = (0.0, 0.0, 0.0)
        found = tuple(
            vault_group(group, choice, errors.get(group.name, unknown)) for group, choice in self.split
        )
        return found if self.base is None else self.base.with_adapters(found, self.split)

    def kept_groups(self) -> tuple[KeptGroup, ...]:
        """The linear layers that stay whole, as the manifest has them."""
        whole = ((group, self.reasons.get(group.name, "")) for group in self.whole)
        return tuple(
            KeptGroup(
                name=g.name,
                rows=g.rows,
                columns=g.columns,
                members=members(g),
                positions=g.positions,
                reason=why,
                expert=expert_of(g),
            )
            for g, why in (*whole, *self.unsplit)
        )

    def kept_specs(self) -> list[TensorSpec]:
        """The tensors that stay whole, in clear."""
        entries = {name: self.stored.checkpoint.entries[key] for name, key in self.kept.items()}
        return [TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items()]

    def kept_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor that stays whole, as it is stored, in pieces."""
        return self.stored.checkpoint.chunks(self.kept[name])

    def read(self, weight: str) -> npt.NDArray[np.float32]:
        """A parameter that is split, in its shape."""
        return self.stored.read(weight)

    def task(self, group: Group, choice: GroupChoice) -> GroupTask:
        """What splitting a group takes."""
        if self.base is not None:
            return self.base.task(self.stored, group, choice)
        return plain_task(self, group, choice)

    def shuffled(self, secret: bytes) -> Plan:
        """The same with the experts of each layer in a secret order, under which the worker knows them.

        A public base is known to the worker: there nothing is hidden by an order.
        """
        return self if self.base is not None else replace(self, split=_shuffled(self.split, secret))

    @property
    def public(self) -> bool:
        """Whether the worker's share is the public base alone."""
        return self.base is not None and self.base.alone

    @property
    def base_model(self) -> SourceModel | None:
        """The public base, if any."""
        return None if self.base is None else self.base.stored.source

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of the adapters that are kept beside the base."""
        return () if self.base is None else tuple(adapter.name for adapter in self.base.adapters)

    def adapter_arrays(self, group: Group, found: VaultGroup) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of a group's adapters, under their names in the vault's share."""
        return {} if self.base is None else self.base.adapter_arrays(group, found)

    @property
    def attention(self) -> tuple[Attention, ...]:
        """For counting."""
        return self.stored.layout.attention

    @property
    def model(self) -> SourceModel:
        """Which model this is."""
        return self.stored.source

    def companions(self) -> dict[str, bytes]:
        """config.json of the split model, generation settings, tokenizer files."""
        return companions(self.stored.checkpoint, untied=self.untied)


def _shuffled(split: Split, secret: bytes) -> Split:
    """One order for each layer: a worker that sees the rows of both weights learns no more than from one."""
    numbers: dict[str, set[int]] = {}
    for group, _ in split:
        if group.expert is not None:
            numbers.setdefault(group.expert.module, set()).add(group.expert.number)
    places = {
        module: {
            number: place
            for place, number in enumerate(
                sorted(known, key=lambda i: derive_key(secret, f"experts/{module}/{i}"))
            )
        }
        for module, known in numbers.items()
    }
    named = []
    for at, (group, choice) in enumerate(split):
        expert, order = group.expert, (at, 0)
        if expert is not None:
            place = places[expert.module][expert.number]
            order = (at - expert.number, place)  # they follow each other by their numbers
            renamed = replace(group, name=f"{expert.module}.{expert.weight}.{place}")
        named.append((order, (group if expert is None else renamed, choice)))
    return tuple(pair for _, pair in sorted(named, key=lambda item: item[0]))


def make_plan(model_dir: Path, recipe: Recipe) -> Plan:
    """Look at a checkpoint and a recipe, and decide.

    Raises:
        CheckpointError, UnsplittableError, RecipeError: as `convert.split`.
    """
    config = read_config(model_dir)
    check_code(model_dir)
    code = own_code(model_dir)
    if code:
        warnings.warn(
            f"{model_dir / 'config.json'} names code of its own ({code}): it is not run and not copied; "
            f"transformers' own {type(config).__name__} and its model serve",
            SlipWarning,
            stacklevel=2,
        )
    checkpoint = Checkpoint(model_dir)
    layout = discover(model_dir)
    _check_rules(layout, recipe)
    stored = StoredModel(checkpoint, layout, locate(checkpoint, layout))
    choices = [(group, recipe.for_group(group.name, group.labels)) for group in layout.groups]
    _check_experts(choices)
    reasons = _narrow(choices, recipe) | {
        group.name: CONVERTED for group in layout.groups if not stored.holds(group)
    }
    wished = tuple((group, choice) for group, choice in choices if choice.placement == "split")
    chosen = tuple((group, choice) for group, choice in wished if group.name not in reasons)
    for group, choice in chosen:
        check_group(group, choice)
    unsplit = _unsplit(stored)
    if not chosen and recipe.placement == "split" and not (layout.groups and not wished):
        _refuse(model_dir, reasons | layout.unsplittable)
    consumed = {name for group, _ in chosen for name in group.parameters}
    kept, untied = kept_tensors(stored, consumed)
    split = {group.name for group, _ in chosen}
    return Plan(
        stored=stored,
        recipe=recipe,
        split=chosen,
        whole=(*(group for group in layout.groups if group.name not in split), *layout.routers),
        kept=kept,
        untied=untied,
        unsplit=unsplit,
        reasons={group.name: reasons[group.name] for group, _ in wished if group.name in reasons},
    )


def _refuse(model_dir: Path, reasons: Mapping[str, str]) -> NoReturn:
    said = "\n".join(f"  {name}: {why}" for name, why in list(reasons.items())[:20])
    raise UnsplittableError(
        f"{model_dir} has no linear layer that can be split:\n{said or '  (none at all)'}\n"
        "(sliplm.split_module splits convolutions too)",
        tuple(reasons),
    )


def _check_rules(layout: Layout, recipe: Recipe) -> None:
    names = [name for group in layout.groups for name in (group.name, *group.labels)]
    names += [group.name for group in layout.routers]  # whole whatever a rule says
    unmatched = recipe.unmatched([*names, *layout.unsplittable])
    if unmatched:
        raise RecipeError(
            f"no group or layer matches the recipe's pattern {', '.join(map(repr, unmatched))}; "
            f"names look like {names[0] if names else '(none)'}"
        )


def _narrow(choices: Sequence[tuple[Group, GroupChoice]], recipe: Recipe) -> dict[str, str]:
    """The groups that are too small for the recipe's rank, if that is not all of them: they stay whole."""
    found = {
        group.name: f"it has {min(group.rows, group.columns)} singular triplets, which rank {choice.rank} "
        "would keep"
        for group, choice in choices
        if choice.placement == "split" and choice.rank > min(group.rows, group.columns)
        if choice.rank == recipe.rank
    }
    fitting = any(g.name not in found and c.placement == "split" for g, c in choices)
    return found if fitting or "rank" not in recipe.model_fields_set else {}


def _unsplit(stored: StoredModel) -> tuple[tuple[Group, str], ...]:
    """What cannot be split, its matrices as the manifest has them, with why."""
    found = []
    for module, why in stored.layout.unsplittable.items():
        for name, shape in stored.layout.parameters.items():
            owner, _, leaf = name.rpartition(".")
            if owner == module and len(shape) > 1 and leaf != "bias":
                label = module if leaf == "weight" else name
                matrix = Linear(label, math.prod(shape[:-1]), shape[-1], name, transposed=False)
                found.append((Group(label, (matrix,), 0), why))
    return tuple(found)


def warn_of_whole(plan: Plan, *, level: int) -> None:
    """Say what stays whole by itself, and how much of the model that is."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group, why in plan.by_itself():
        found.setdefault((re.sub(r"(?<=[.])[0-9]+(?=[.]|$)", "*", group.name), why), []).append(group)
    if not found:
        return
    weights = sum(g.rows * g.columns for groups in found.values() for g in groups)
    share = weights / max(1, plan.model.parameters)
    lines = [f"  {name} ({len(groups)}): {why}" for (name, why), groups in found.items()]
    rest = [f"  and {len(lines) - 12} more kinds"] if len(lines) > 12 else []
    warnings.warn(
        f"{min(1.0, share):.1%} of the model's weights cannot be split and stay whole in the vault:\n"
        + "\n".join(lines[:12] + rest),
        SlipWarning,
        stacklevel=level + 1,
    )


def _check_experts(choices: Sequence[tuple[Group, GroupChoice]]) -> None:
    """All experts of a layer's weight are split, or none: else the worker would see which are not."""
    placed: dict[str, set[str]] = {}
    for group, choice in choices:
        if group.expert is not None:
            placed.setdefault(group.parameters[0], set()).add(choice.placement)
    mixed = [name for name, placements in placed.items() if len(placements) > 1]
    if mixed:
        raise RecipeError(
            f"{mixed[0]}: some experts are split and others whole in the vault; place all of them alike by "
            f'the pattern "{mixed[0]}.*"'
        )


def check_group(group: Group, choice: GroupChoice) -> None:
    """Check that a group can be split as a recipe says.

    Raises:
        RecipeError: it has not that many triplets, or is too wide for its rotation.
    """
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


def kept_tensors(model: StoredModel, consumed: set[str]) -> tuple[dict[str, str], bool]:
    """What stays whole when the weights `consumed` are split: its name in the vault -> its key in the
    checkpoint; and whether a tied weight is among the consumed."""
    tied, sources = model.layout.tied, model.sources
    untied = any(alias in consumed or name in consumed for alias, name in tied.items())
    kept = {name: key for name, key in sources.keys.items() if name not in consumed}
    if untied:
        for name in {*tied, *tied.values()} - consumed - set(kept):
            key = model.stored_as(name)
            if key is not None:
                kept[name] = key
    read = {key for name in consumed for keys in sources.stacks.get(name, ()) for key in keys}
    return kept | {key: key for key in sources.converted if key not in read}, untied


def vault_group(group: Group, choice: GroupChoice, errors: Errors) -> VaultGroup:
    """A split group as the manifest has it."""
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
        localisation=errors[2],
        difference=Difference(**dict(zip(("norm", "base", "tail"), errors[3:], strict=True)))
        if errors[3:]
        else None,
        positions=group.positions,
        expert=expert_of(group),
    )


def expert_of(group: Group) -> ExpertOf | None:
    """Which expert a group is of, as the manifest has it."""
    expert = group.expert
    if expert is None:
        return None
    return ExpertOf(module=expert.module, weight=expert.weight, number=expert.number, use=expert.use)


def members(group: Group) -> tuple[Member, ...]:
    """The linear layers of a group, as the manifest has them."""
    return tuple(Member(member.module, member.rows) for member in group.members)
