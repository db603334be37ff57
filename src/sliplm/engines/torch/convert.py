"""A plain PyTorch module -> the vault's folder and the worker's folder (SPEC section 2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sliplm.engines.groups import Group
from sliplm.engines.progress import Update
from sliplm.engines.source import Errors, plain_task
from sliplm.engines.torch.trace import Inputs, Traced, arguments, trace
from sliplm.engines.transformers.plan import check_group, members, vault_group
from sliplm.engines.writing import refuse_existing, write_split
from sliplm.errors import CheckpointError, InputError, RecipeError, UnsplittableError
from sliplm.planning.counts import SplitReport
from sliplm.shares.grouptask import GroupTask
from sliplm.shares.keysource import KeySpec, checked
from sliplm.shares.manifest import FORMAT_VERSION, PLAIN_MODULE, Attention, KeptGroup, SourceModel, VaultGroup
from sliplm.shares.recipe import GroupChoice, Recipe
from sliplm.shares.share import sliplm_version
from sliplm.shares.splitter import Splitter
from sliplm.shares.tensorfile import TensorSpec

TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def split_module(
    module: nn.Module,
    example_inputs: Inputs,
    out_dir: Path | str,
    recipe: Recipe | None = None,
    *,
    key: KeySpec = None,
    i_know: bool = False,
    ledger: Path | str | None = None,
    progress: Update | None = None,
    device: str = "auto",
) -> SplitReport:
    """Split a PyTorch module into `out_dir/vault` (secret, sealed) and `out_dir/worker` (may be public).

    Its weights in `F.linear` and `F.conv2d` are split: those of `nn.Linear` and `nn.Conv2d`, and of what
    inherits from them.  What cannot be (grouped convolutions, attention and recurrent layers that multiply
    inside, weights that are used in another way too) stays whole in the vault; the report says why.

    Args:
        module: in evaluation mode, on the CPU; it is not changed.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a mapping of keyword
            arguments.  It is run on them once.  The report counts one such call.
        out_dir: made if missing; must not hold a `vault` or `worker` yet.
        recipe, key, i_know, ledger, progress, device: as `sliplm.split` takes them.  Patterns match names
            such as `features.0`.

    Raises:
        InputError: the module is in training mode or elsewhere, or cannot be run on its example inputs.
        UnsplittableError: it has no weight that can be split.
        CheckpointError: a weight holds NaN or infinity, or is of a type that cannot be stored.
        CardError, RecipeError, CredentialError, LedgerError, SealError, ShareError: as `sliplm.split`.
    """
    out, key = Path(out_dir), checked(key)
    refuse_existing(out)
    splitter = Splitter(device)
    plan = plan_module(module, example_inputs, recipe or Recipe())
    return write_split(plan, out, key, progress, i_know=i_know, ledger=ledger, splitter=lambda: splitter)


def plan_module(module: nn.Module, example_inputs: Inputs, recipe: Recipe) -> ModulePlan:
    """Look at a module and a recipe, and decide.

    Raises:
        InputError, UnsplittableError, CheckpointError, RecipeError: as `split_module`.
    """
    traced = trace(module, example_inputs)
    kind = type(module).__name__
    if not traced.groups:
        reasons = "".join(f"\n  {group.name}: {reason}" for group, reason in traced.whole)
        raise UnsplittableError(
            f"{kind} has no linear layer or convolution that can be split{reasons}",
            tuple(group.name for group, _ in traced.whole),
        )
    _check_rules(traced, recipe)
    choices = [(group, recipe.for_group(group.name, group.modules)) for group in traced.groups]
    chosen = tuple((group, choice) for group, choice in choices if choice.placement == "split")
    for group, choice in chosen:
        check_group(group, choice)
    consumed = {member.weight for group, _ in chosen for member in group.members}
    kept = {name: tensor for name, tensor in traced.parameters.items() if name not in consumed}
    plan = ModulePlan(kind, _shapes(example_inputs), traced, recipe, chosen, {**kept, **traced.buffers})
    for name in (*traced.parameters, *traced.buffers):
        _check_tensor(name, plan.tensor(name), weight=name in traced.parameters)
    return plan


@dataclass(frozen=True)
class ModulePlan:
    """A module's tensors, and what becomes of them (`engines.source.Source`)."""

    kind: str
    shapes: object
    traced: Traced
    recipe: Recipe
    split: tuple[tuple[Group, GroupChoice], ...]
    kept: dict[str, Tensor]
    attention: tuple[Attention, ...] = ()
    public: bool = False
    base_model: SourceModel | None = None
    adapter_names: tuple[str, ...] = ()

    @property
    def key(self) -> object:
        """Whatever the result depends on."""
        digest = hashlib.sha256()
        for name in (*self.traced.parameters, *self.traced.buffers):
            digest.update(name.encode() + b"\0")
            digest.update(_bytes(self.tensor(name)))
        version = [sliplm_version(), FORMAT_VERSION]
        return [digest.hexdigest(), self.shapes, self.recipe.model_dump(mode="json"), version]

    def shuffled(self, secret: bytes) -> ModulePlan:
        """Itself: it has no experts."""
        return self

    @property
    def model(self) -> SourceModel:
        """Which module this is."""
        count = sum(parameter.numel() for parameter in self.traced.parameters.values())
        return SourceModel(name=self.kind, config_class=PLAIN_MODULE, parameters=count)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer."""
        found = self.traced.parameters.get(name)
        return self.traced.buffers[name] if found is None else found

    def groups(self, errors: Mapping[str, Errors]) -> tuple[VaultGroup, ...]:
        """The split groups as the manifest has them."""
        return tuple(vault_group(g, choice, errors.get(g.name, (0.0, 0.0, 0.0))) for g, choice in self.split)

    def kept_groups(self) -> tuple[KeptGroup, ...]:
        """What stays whole: by the recipe, or because it cannot be split."""
        split = {group.name for group, _ in self.split}
        chosen = [(group, "") for group in self.traced.groups if group.name not in split]
        return tuple(
            KeptGroup(
                name=g.name,
                rows=g.rows,
                columns=g.columns,
                members=members(g),
                positions=g.positions,
                reason=why,
            )
            for g, why in (*chosen, *self.traced.whole)
        )

    def kept_specs(self) -> list[TensorSpec]:
        """The tensors that stay whole, in clear."""
        return [TensorSpec(name, TYPES[t.dtype], tuple(t.shape)) for name, t in self.kept.items()]

    def kept_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor that stays whole."""
        yield _bytes(self.kept[name])

    def read(self, weight: str) -> npt.NDArray[np.float32]:
        """A parameter that is split, in its shape."""
        return self.traced.parameters[weight].detach().to(torch.float32).numpy()

    def task(self, group: Group, choice: GroupChoice) -> GroupTask:
        """What splitting a group takes."""
        return plain_task(self, group, choice)

    def adapter_arrays(self, group: Group, found: VaultGroup) -> Mapping[str, npt.NDArray[np.float32]]:
        """None: modules have no adapters."""
        return {}

    def companions(self) -> dict[str, bytes]:
        """What `load_module` reads to tell a module's vault from a checkpoint's."""
        config = {"format": PLAIN_MODULE, "class": self.kind, "example_inputs": self.shapes}
        return {"config.json": json.dumps(config, indent=2).encode()}


def _check_rules(traced: Traced, recipe: Recipe) -> None:
    every = (*traced.groups, *(group for group, _ in traced.whole))
    names = [name for group in every for name in (group.name, *group.modules)]
    unmatched = recipe.unmatched(names)
    if unmatched:
        raise RecipeError(
            f"no group or layer matches the recipe's pattern {', '.join(map(repr, unmatched))}; "
            f"names look like {names[0]}"
        )


def _check_tensor(name: str, tensor: Tensor, *, weight: bool) -> None:
    if tensor.dtype not in TYPES:
        raise CheckpointError(f"{name} has the type {tensor.dtype}, which a share cannot hold; convert it")
    if tensor.is_sparse or tensor.is_quantized:
        raise CheckpointError(f"{name} is sparse or quantised; split the module as it was before")
    if weight and not torch.isfinite(tensor).all():  # a buffer may be a mask of minus infinity
        raise CheckpointError(f"{name} holds NaN or infinity; the module is damaged")
    if tensor.ndim > 8 or max(tensor.shape, default=0) >= 1 << 31:
        raise InputError(f"{name} of shape {list(tensor.shape)} is too large for a share")


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def _shapes(inputs: Inputs) -> object:
    """The example inputs for people: types and shapes."""
    args, kwargs = arguments(inputs)
    if kwargs:
        return {name: _shape(value) for name, value in kwargs.items()}
    return [_shape(value) for value in args]


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
