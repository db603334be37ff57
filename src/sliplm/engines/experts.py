"""Fused experts whose weights are split: one exchange for the first products of all experts that a call
needs, and one for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from sliplm.engines.modules import Floats, Products, Split, check_input, refuse_recording, refuse_script
from sliplm.errors import InputError, ShareError
from sliplm.shares.manifest import VaultGroup


class ManyProducts(Products, Protocol):
    """Who multiplies for several groups at once."""

    @property
    def hides_routing(self) -> bool:
        """Whether every expert is to get as many rows as there are tokens."""

    def products(self, asked: Sequence[tuple[str, Floats]]) -> list[Floats]:
        """`W x` of several groups, each named once: float32 [rows, n] each -> float32 [rows, m] each."""


Product = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""(weight, x [rows, n], the expert of each row, ascending, and its token) -> each row times its expert's
weight, [rows, m]."""


def run_experts(
    experts: nn.Module, family: Any, product: Product, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """What the chosen experts make of each token, weighted and added up, whoever multiplies.

    Args:
        experts: the fused experts: their biases, their activation.  family: their class, for its gate.
        hidden: [tokens, width].  index, weights: [tokens, k].
    """
    tokens, k = index.shape
    if not index.numel():
        return torch.zeros_like(hidden)
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    token = order // k

    def biased(weight: str, x: Tensor) -> Tensor:
        y = product(weight, x, chosen, token)
        return y + experts.get_parameter(f"{weight}_bias")[chosen] if experts.has_bias else y

    y = biased("gate_up_proj" if experts.has_gate else "up_proj", hidden[token])
    y = family._apply_gate(experts, y) if experts.has_gate else cast(Any, experts.act_fn)(y)
    y = biased("down_proj", y)
    if getattr(experts, "has_post_expert_norm", False):
        y = cast(Any, experts.post_expert_norm)(y)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(y)
    back[order] = y
    return back.view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


class SlipExperts(Split):
    """The experts of one layer: what their class keeps beside the split weights, and its activation.

    Args:
        old: the fused experts as transformers made them; what is not split of it is taken over.
        split: parameter -> the groups of its experts, by their number.
        source: who multiplies.  It may be set later, before the first call.
    """

    lacks: Collection[str] = ()
    __prepare_scriptable__ = refuse_script

    def __init__(
        self, old: nn.Module, split: Mapping[str, Sequence[str]], source: ManyProducts | None
    ) -> None:
        super().__init__()
        self.lacks = frozenset(split)
        for name, value in vars(old).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, parameter in old.named_parameters(recurse=False):
            if name not in split:
                self.register_parameter(name, parameter)
        for name, buffer in old.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
        for name, child in old.named_children():
            self.add_module(name, child)
        self.source = source
        self._family: Any = type(old)
        self._split = {name: tuple(groups) for name, groups in split.items()}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts: what the chosen experts make of each token, weighted and added up.

        Args:
            hidden_states: [tokens, width] on the CPU.  top_k_index, top_k_weights: [tokens, k].

        Raises:
            InputError, WorkerError: as `SlipLinear.forward`.
        """
        if torch.compiler.is_exporting():
            refuse_recording("of experts")
        if torch.compiler.is_compiling():
            whole = torch.compiler.disable(self.forward)  # type: ignore[no-untyped-call]
            return cast(Tensor, whole(hidden_states, top_k_index, top_k_weights))
        tokens = len(top_k_index)

        def product(weight: str, x: Tensor, chosen: Tensor, token: Tensor) -> Tensor:
            return self._product(weight, x, chosen, tokens)

        return run_experts(self, self._family, product, hidden_states, top_k_index, top_k_weights)

    def _product(self, weight: str, x: Tensor, chosen: Tensor, tokens: int) -> Tensor:
        """Each row of x [rows, n] times its expert's weight: [rows, m]; `chosen` ascends."""
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        numbers, rows = experts.tolist(), torch.split(x, counts.tolist())
        if weight in self._split:
            return self._asked(weight, dict(zip(numbers, rows, strict=True)), tokens, x.dtype)
        matrices = self.get_parameter(weight)
        parts = [
            part @ (matrices[number] if self.is_transposed else matrices[number].T)
            for number, part in zip(numbers, rows, strict=True)
        ]
        return torch.cat(parts)

    def _asked(self, weight: str, rows: dict[int, Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
        groups = self._split[weight]
        if self.source is None:
            raise InputError(f"group {groups[0]} has no vault: load the model with sliplm.load")
        asked = []
        for number, x in rows.items():
            check_input(groups[number], x, x.ndim == 2, "[rows, n]")
            asked.append((groups[number], x.detach().to("cpu", torch.float32).contiguous().numpy()))
        if self.source.hides_routing:
            asked = _covered(asked, groups, tokens)
        products = dict(zip((group for group, _ in asked), self.source.products(asked), strict=True))
        answers = [products[groups[number]][: len(x)] for number, x in rows.items()]
        device = next(iter(rows.values())).device
        return torch.from_numpy(np.concatenate(answers)).to(device, dtype)

    def extra_repr(self) -> str:
        """Sizes and names: nothing secret."""
        return ", ".join(f"{name}: {len(groups)} groups" for name, groups in self._split.items())

    def __reduce__(self) -> NoReturn:
        raise InputError("a model with split layers cannot be copied or pickled: load its vault folder again")


def _covered(
    asked: Sequence[tuple[str, Floats]], groups: Sequence[str], tokens: int
) -> list[tuple[str, Floats]]:
    """The same with rows of zeros, so that every expert of the layer gets one row for each token."""
    given, n = dict(asked), asked[0][1].shape[1]
    covered = []
    for group in groups:
        x = np.zeros((tokens, n), np.float32)
        if group in given:
            x[: len(given[group])] = given[group]
        covered.append((group, x))
    return covered


def replace_experts(
    model: nn.Module, groups: Sequence[VaultGroup], source: ManyProducts | None
) -> tuple[SlipExperts, ...]:
    """Replace the fused experts that `groups` are of; nothing is changed if any does not fit.

    Raises:
        ShareError: the model has no such experts, or others than the share.
    """
    found: dict[str, dict[str, dict[int, VaultGroup]]] = {}
    for group in groups:
        if (expert := group.expert) is not None:
            found.setdefault(expert.module, {}).setdefault(expert.weight, {})[expert.number] = group
    modules, made = dict(model.named_modules()), []
    for name, weights in found.items():
        old = modules.get(name)
        for weight, experts in weights.items():
            _check(old, name, weight, experts)
    for name, weights in found.items():
        split = {
            weight: [experts[i].name for i in range(len(experts))] for weight, experts in weights.items()
        }
        parent, _, leaf = name.rpartition(".")
        new = SlipExperts(modules[name], split, source)
        setattr(modules[parent], leaf, new.train(modules[name].training))
        made.append(new)
    return tuple(made)


def _check(old: nn.Module | None, name: str, weight: str, experts: Mapping[int, VaultGroup]) -> None:
    parameter = None if old is None else dict(old.named_parameters(recurse=False)).get(weight)
    shape = () if parameter is None else tuple(parameter.shape)
    transposed = bool(getattr(old, "is_transposed", False))
    sizes = {(g.columns, g.rows) if transposed else (g.rows, g.columns) for g in experts.values()}
    if set(experts) != set(range(len(experts))) or {(len(experts), *size) for size in sizes} != {shape}:
        raise ShareError(
            f"the share has {len(experts)} experts for {name}.{weight}, and the model {list(shape)} there: "
            "load the share with the model class that it was split from"
        )
