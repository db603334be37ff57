"""Fused experts (transformers' `use_experts_implementation`): one group for each expert's weight.

Such a module holds `gate_up_proj` (or `up_proj`) and `down_proj`, [experts, rows, columns], or [experts,
columns, rows] where its class says transposed.  Its router chooses, and stays whole in the vault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from sliplm.engines.groups import Expert, Group, Linear
from sliplm.engines.transformers.inputs import setting

UP = ("gate_up_proj", "up_proj")  # the first product's weight, with and without a gate
DOWN = "down_proj"
_SAYS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")  # what the decorator leaves on its classes


def is_experts(module: nn.Module) -> bool:
    """Whether a module's forward is the common one: whatever its class, transformers may exchange it."""
    if not all(hasattr(module, name) for name in _SAYS):
        return False
    matrices = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return matrices.keys() == {UP[0] if module.has_gate else UP[1], DOWN}


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The fused experts of a model by their names."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def routers_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Modules beside fused experts that score each of them: name -> (experts, columns)."""
    found = {}
    for name, module in experts_of(model).items():
        parent, _, _ = name.rpartition(".")
        count = module.get_parameter(DOWN).shape[0]
        for child, beside in model.get_submodule(parent).named_children():
            weight = dict(beside.named_parameters(recurse=False)).get("weight")
            if weight is None or isinstance(beside, nn.Embedding):
                continue
            if weight.ndim == 2 and weight.shape[0] == count:
                found[f"{parent}.{child}" if parent else child] = (count, int(weight.shape[1]))
    return found


def router_groups(model: nn.Module) -> tuple[Group, ...]:
    """The routers as groups, which stay whole."""
    return tuple(
        Group(name, (Linear(name, rows, columns, f"{name}.weight", transposed=False),))
        for name, (rows, columns) in routers_of(model).items()
    )


def expert_groups(name: str, module: nn.Module, config: PretrainedConfig) -> Iterator[Group]:
    """The groups of one layer's experts: all first products, then all second ones."""
    for weight in (UP[0] if module.has_gate else UP[1], DOWN):
        count, one, two = module.get_parameter(weight).shape
        rows, columns = (two, one) if module.is_transposed else (one, two)
        use = _use(config, count)
        for number in range(count):
            place = f"{name}.{weight}.{number}"
            linear = Linear(place, rows, columns, place, bool(module.is_transposed))
            yield Group(place, (linear,), expert=Expert(name, weight, number, use))


def _use(config: PretrainedConfig, experts: int) -> float:
    """What part of the tokens an expert sees, if all see as many; 1 where the configuration is silent."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")
    chosen = next((v for n in names if isinstance(v := setting(text, n), int) and v > 0), experts)
    return min(1.0, chosen / experts)


def layers_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Experts by the module that holds them."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.expert is not None:
            found.setdefault(group.expert.module, []).append(group)
    return found


class Fused(NamedTuple):
    """A fused parameter of experts: what each has of it, and the places that they are called by."""

    layer: Linear
    groups: tuple[str, ...]


def fused_experts(groups: Sequence[Group]) -> dict[str, Fused]:
    """The fused parameters of a model by their names."""
    found: dict[str, list[Linear]] = {}
    for group in groups:
        if group.expert is not None:
            found.setdefault(group.parameters[0], []).append(group.members[0])
    return {name: Fused(each[0], tuple(one.module for one in each)) for name, each in found.items()}
