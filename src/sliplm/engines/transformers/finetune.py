"""Split a model against the public base that it was trained from (SPEC section 2, "A public base").

The worker's share is the base alone; the vault holds what differs: LoRA adapters as they are, a full
fine-tune cut at a rank or an energy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sliplm.engines.source import stack
from sliplm.engines.transformers.lora import Adapter, read_adapter
from sliplm.engines.transformers.plan import Plan, make_plan
from sliplm.engines.transformers.publicbase import PublicBase, Split
from sliplm.engines.transformers.stored import StoredModel, open_stored
from sliplm.errors import CheckpointError, RecipeError
from sliplm.shares.manifest import ADAPTER_NAME
from sliplm.shares.publicbase import check_related, energy_rank
from sliplm.shares.recipe import Recipe
from sliplm.shares.splitter import Splitter


def plan_against(
    model_dir: Path, recipe: Recipe, base_dir: Path, adapters: Mapping[str, Path | str], splitter: Splitter
) -> Plan:
    """As `make_plan`, against a public base; of a full fine-tune, the ranks are decided here, by `splitter`.

    Raises:
        AdapterError, CheckpointError, UnsplittableError, RecipeError: as `convert.split`.
    """
    same = base_dir.exists() and model_dir.exists() and base_dir.samefile(model_dir)
    recipe = _checked(recipe, same)
    _check_names(adapters)
    plan = make_plan(model_dir, recipe)
    public = plan.stored if same else open_stored(base_dir)
    _check_base(plan, base_dir, public)
    read = tuple(read_adapter(name, Path(path), plan.stored) for name, path in adapters.items())
    for adapter in read:
        _check_reached(plan, adapter)
    base = PublicBase(public, read, same, recipe.tail == "worker")
    return replace(plan, base=base, split=plan.split if same else _with_ranks(plan, base, splitter))


def refuse_without_base(recipe: Recipe, adapters: Mapping[str, Path | str]) -> None:
    """Refuse, in a split without a base, what only a base gives a meaning.

    Raises:
        RecipeError: there is such a thing.
    """
    if adapters:
        raise RecipeError(
            "adapters are kept beside a public base: name the model that they were trained on as base"
        )
    if recipe.tail != "drop" or recipe.energy is not None or any(r.energy is not None for r in recipe.rules):
        raise RecipeError(
            "energy and tail are about the difference between a fine-tune and its public base: name the "
            "base, or leave them out"
        )


# --- what is decided and checked -------------------------------------------------------------------------


def _checked(recipe: Recipe, same: bool) -> Recipe:
    """The recipe as it is carried out: nothing that was asked for is passed over."""
    choices: Iterable[Any] = (recipe, *recipe.rules)
    asked = [choice.rotation for choice in recipe.rules]
    if "rotation" in recipe.model_fields_set:
        asked.append(recipe.rotation)
    if any(rotation not in (None, "none") for rotation in asked):
        raise RecipeError(
            "a public base is public in every basis, so there is nothing to rotate: leave rotation out, or "
            "split without a base"
        )
    ranks = [choice.rank for choice in choices if "rank" in choice.model_fields_set]
    energies = [choice.energy for choice in choices if choice.energy is not None]
    if same and (any(ranks) or energies or recipe.tail != "drop"):
        raise RecipeError(
            "rank, energy and tail are about a full fine-tune, and here the model is its own base: leave "
            "them out (adapters are kept whole), or name the fine-tuned model"
        )
    return recipe.model_copy(update={"rotation": "none"} | ({"rank": 0} if same else {}))


def _check_names(adapters: Mapping[str, Path | str]) -> None:
    for name in adapters:
        if not re.fullmatch(ADAPTER_NAME, name) or name == "base":
            raise RecipeError(
                f"an adapter cannot be called {name!r}: choose letters, digits, '_', '.' and '-', 64 at "
                "most, and not 'base', which stands for none"
            )


def _check_base(plan: Plan, base_dir: Path, public: StoredModel) -> None:
    """Check that every group that is split is one of the base's too."""
    theirs = {group.name: group for group in public.layout.groups}
    for group, _ in plan.split:
        other = theirs.get(group.name)
        if other is None:
            raise CheckpointError(
                f"{base_dir} has no group {group.name}: it is not the base of this model; name the model "
                "that this one was trained from"
            )
        mine, its = ([(m.rows, m.columns) for m in g.members] for g in (group, other))
        if mine != its:
            raise CheckpointError(
                f"{group.name} is {group.rows} x {group.columns}, and {other.rows} x {other.columns} in "
                f"{base_dir}: if the fine-tune only has more tokens, keep it whole by a rule such as "
                f'Rule(pattern="{group.name}", placement="vault"); else name the model that this one was '
                "trained from"
            )
        if not public.holds(other):
            raise CheckpointError(
                f"{base_dir} stores {group.name} in a form that transformers converts while loading; load "
                "it with transformers and save it by save_pretrained(folder, save_original_format=False)"
            )


def _check_reached(plan: Plan, adapter: Adapter) -> None:
    reached = {module for group, _ in plan.split for module in group.modules}
    kept = sorted(set(adapter.ranks) - reached)
    if kept:
        raise RecipeError(
            f"adapter {adapter.name} changes {', '.join(kept[:5])}, which the recipe keeps whole in the "
            'vault: give it placement "split"'
        )


def _with_ranks(plan: Plan, base: PublicBase, splitter: Splitter) -> Split:
    """The groups with the ranks that their differences call for; 0 for a group that was not trained."""
    found = []
    products = np.zeros(3)  # of the model with itself, with the base, and of the base with itself
    for group, choice in plan.split:
        weight, public = (stack(model.read, group) for model in (plan.stored, base.stored))
        for row, other in zip(weight, public, strict=True):
            one, two = row.astype(np.float64), other.astype(np.float64)
            products += one @ one, one @ two, two @ two
        weight -= public
        rank = choice.rank
        if choice.energy is not None:
            rank = energy_rank(splitter.squared_values(group.name, weight), choice.energy)
        rank = rank if weight.any() else 0
        found.append((group, replace(choice, rank=rank)))
    scale = math.sqrt(products[0] * products[2])
    if scale:
        check_related(str(base.stored.checkpoint.path), products[1] / scale)
    return tuple(found)
