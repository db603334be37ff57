"""Which products a plain module computes, seen by running it once on example inputs.

Every call of a function of PyTorch passes by (`TorchFunctionMode`).  `F.linear` and `F.conv2d` with a
parameter of the module as weight are products that can be split, whichever class makes them.  A parameter
that is used in any other way too stays whole, and so does one that is used by a function that multiplies
inside, such as attention or an LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from sliplm.engines.groups import Group, Linear, group_name
from sliplm.engines.modules import Patches
from sliplm.engines.torch.patches import patches_of
from sliplm.engines.torch.weights import ABOUT, Call, name_of
from sliplm.errors import InputError

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a module is called with: one tensor, positional arguments, or keyword arguments."""


@dataclass(frozen=True)
class Traced:
    """What `trace` found.

    Attributes:
        groups: what can be split, in the order in which a forward pass reaches it.
        whole: what cannot be, with why.
        parameters: name -> parameter, once for tied ones.
        tied: other name -> name in `parameters`.
        buffers: name -> persistent buffer.
    """

    groups: tuple[Group, ...]
    whole: tuple[tuple[Group, str], ...]
    parameters: dict[str, nn.Parameter]
    tied: dict[str, str]
    buffers: dict[str, Tensor]


def trace(module: nn.Module, example_inputs: Inputs) -> Traced:
    """Run a module once and note its products.

    Raises:
        InputError: it is in training mode, not on the CPU, keeps state that is no tensor, or cannot be run on
            these inputs.
    """
    _check(module)
    args, kwargs = arguments(example_inputs)
    parameters, tied = named_parameters(module)
    seen = _Products({id(parameter): name for name, parameter in parameters.items()})
    try:
        # tensors need their version counters, which inference mode, where the caller may be, takes away
        with torch.inference_mode(False), torch.no_grad(), seen:
            module(*args, **kwargs)
    except Exception as error:  # the module's own code runs here
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{type(module).__name__} cannot be run on its example inputs: {text}") from error
    return Traced(
        groups=tuple(_groups(seen, parameters)),
        whole=tuple(_whole(seen, module, parameters)),
        parameters=parameters,
        tied=tied,
        buffers=persistent_buffers(module),
    )


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def named_parameters(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Name -> parameter, once for each; other name -> first name, for those that have several."""
    every = dict(module.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(every.items())}
    return (
        {name: p for name, p in every.items() if first[id(p)] == name},
        {name: first[id(p)] for name, p in every.items() if first[id(p)] != name},
    )


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, for those that belong to the state."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, child in module.named_modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    }


@dataclass(eq=False)
class _Use:
    """How one parameter was used: what its products read, and what else was done with it."""

    kind: Any  # F.linear or F.conv2d
    inputs: list[tuple[Tensor, int, Patches | None]] = field(default_factory=list)
    rows: int = 0
    other: str = ""


class _Products(TorchFunctionMode):
    """Notes every product with one of the named parameters; input tensors are kept, so that no id is used
    twice.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.uses: dict[str, _Use] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in ABOUT:
            call = Call.of(args, kwargs) if func in (F.linear, F.conv2d) else None
            weight = None if call is None else self.names.get(id(call.weight))
            for tensor in _tensors((args, kwargs)):
                name = self.names.get(id(tensor))
                if name is not None and name != weight and not (call and tensor is call.bias):
                    self._use(name, func).other = name_of(func)
            if call is not None and weight is not None:
                self._product(weight, func, call)
        return func(*args, **kwargs)

    def _use(self, name: str, func: Any) -> _Use:
        return self.uses.setdefault(name, _Use(func))

    def _product(self, name: str, func: Any, call: Call) -> None:
        use = self._use(name, func)
        if use.kind is not func and not use.other:
            use.other = "another kind of product"
        if call.groups != 1:
            use.other = f"a convolution in {call.groups} groups, which is as many small matrices"
        if func is F.linear:
            patches, rows = None, call.x.numel() // max(1, call.x.shape[-1])
            if call.weight.ndim != 2:
                use.other = "a product with a vector"
        else:
            patches = patches_of(tuple(call.weight.shape), call.stride, call.padding, call.dilation)
            rows = patches.rows(tuple(call.x.shape))
        changes = 0 if call.x.is_inference() else call.x._version
        use.inputs.append((call.x, changes, patches))
        use.rows += rows


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _groups(seen: _Products, parameters: Mapping[str, nn.Parameter]) -> Iterator[Group]:
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, use in seen.uses.items():
        if not use.other:
            key = tuple((id(tensor), changes, patches) for tensor, changes, patches in use.inputs)
            together.setdefault(key, []).append(name)
    for names in together.values():
        yield _group([_linear(name, parameters[name]) for name in names], seen.uses[names[0]].rows)


def _whole(
    seen: _Products, module: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[Group, str]]:
    """What has two dimensions or more and cannot be split; embeddings are tables, and in no product."""
    tables = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    for name, parameter in parameters.items():
        use = seen.uses.get(name)
        if parameter.ndim < 2 or (name in tables and (use is None or not use.inputs)):
            continue
        if use is None:
            yield _group([_linear(name, parameter)], 0), "it took no part in the forward pass"
        elif use.other:
            yield _group([_linear(name, parameter)], use.rows), f"it is used by {use.other}"


def _group(members: list[Linear], rows: int) -> Group:
    return Group(group_name([member.module for member in members]), tuple(members), rows)


def _linear(name: str, parameter: nn.Parameter) -> Linear:
    rows = parameter.shape[0]
    return Linear(module_of(name), rows, math.prod(parameter.shape[1:]), name, transposed=False)


def module_of(parameter: str) -> str:
    """A parameter's name without `.weight`: what recipes match, and what the manifest has."""
    return parameter.removesuffix(".weight")


def _check(module: nn.Module) -> None:
    kind = type(module).__name__
    if any(child.training for child in module.modules()):
        raise InputError(f"{kind} is in training mode: call its eval() before it is split")
    state = [*module.parameters(), *module.buffers()]
    elsewhere = [tensor for tensor in state if tensor.device.type != "cpu"]
    if elsewhere:
        raise InputError(f"{kind} has tensors on {elsewhere[0].device}: call its cpu() before it is split")
    loose = [name for name in module.state_dict() if name.endswith("_extra_state")]
    if loose:
        raise InputError(f"{kind} keeps state that is no tensor ({loose[0]}): it cannot be split")
