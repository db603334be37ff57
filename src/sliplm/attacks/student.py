"""The attacker's model: an untrained one, filled with what he knows and guesses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sliplm.attacks.case import Case, Delta, Part, Start


def blank_model(config: PretrainedConfig) -> PreTrainedModel:
    """An untrained model, as the library initialises it from torch's generator."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def build_student(case: Case, start: Start, device: torch.device, seed: int) -> PreTrainedModel:
    """The attacker's model on `device`, float32; exactly what he may train requires gradients."""
    torch.manual_seed(seed)
    model = filled_model(case, start.state, device)
    model.requires_grad_(True)
    for name in case.known:
        model.get_parameter(name).requires_grad_(False)
    if not start.whole:
        for members in case.groups.values():
            for member in members:
                model.get_parameter(member.parameter).requires_grad_(False)
    experts: dict[str, dict[int, LowRank]] = {}
    for group, delta in start.deltas.items():
        members = case.groups[group]
        if (number := members[0].expert) is not None:
            part = LowRank(_factors(delta, device), slice(None), members[0].transposed)
            experts.setdefault(members[0].parameter, {})[number] = part
        else:
            _add_delta(model, members, delta, device)
    for name, parts in experts.items():
        owner, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(
            model.get_submodule(owner), leaf, ManyLowRank(parts), unsafe=True
        )
    return model


def filled_model(case: Case, state: Mapping[str, Tensor], device: torch.device) -> PreTrainedModel:
    """A model with what is known and these guesses; what is missing is as the library initialises it."""
    with device:
        model = blank_model(case.config)
    with torch.no_grad():
        for name, value in {**state, **case.known}.items():
            _place(model, name).copy_(value)
    return model


def _place(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter, or an expert's part of one (`Part.key`)."""
    fused, _, number = name.rpartition(".")
    if number.isdigit() and name not in dict(model.named_parameters(remove_duplicate=False)):
        part: Tensor = model.get_parameter(fused)[int(number)]
        return part
    whole: Tensor = model.get_parameter(name)
    return whole


class LowRank(nn.Module):
    """W0 -> W0 + left[rows] core right, with factors that the group's members have in common."""

    def __init__(self, factors: dict[str, nn.Parameter], rows: slice, transposed: bool) -> None:
        super().__init__()
        self.factors, self.rows, self.transposed = nn.ParameterDict(factors), rows, transposed

    def forward(self, weight: Tensor) -> Tensor:
        part: Tensor = self.factors["left"][self.rows]
        if "core" in self.factors:
            part = part @ self.factors["core"]
        part = part @ self.factors["right"]
        return weight + (part.T if self.transposed else part)


class ManyLowRank(nn.Module):
    """The same for experts, whose weights lie in one parameter: number -> what is added to its part."""

    def __init__(self, parts: Mapping[int, LowRank]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(number): part for number, part in parts.items()})

    def forward(self, weight: Tensor) -> Tensor:
        each = [
            self.parts[str(i)](one) if str(i) in self.parts else one for i, one in enumerate(weight.unbind())
        ]
        return torch.stack(each)


def _factors(delta: Delta, device: torch.device) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(value.to(device, copy=True), requires_grad=name in delta.train)
        for name, value in (("left", delta.left), ("core", delta.core), ("right", delta.right))
        if value is not None
    }


def _add_delta(model: PreTrainedModel, members: tuple[Part, ...], delta: Delta, device: torch.device) -> None:
    factors = _factors(delta, device)
    first = 0
    for member in members:
        part = LowRank(factors, slice(first, first + member.rows), member.transposed)
        weight = model.get_parameter(member.parameter)
        for module in model.modules():  # a tied weight has a second user, which must see the same matrix
            if module._parameters.get("weight") is weight:
                parametrize.register_parametrization(module, "weight", part, unsafe=True)
        first += member.rows
