"""One forward pass of a model as a split leaves it: without the weights of its linear layers.

Every parameter is a view of one short ramp, so a model of any size takes next to no memory; where a layer may
be split stands one that has a bias and no weight, and answers with a ramp.  What a layer reads is noted.
A model that reads a layer's weight itself, and a layer with a forward of its own, are found here, before the
split: such layers stay whole.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sliplm.engines.transformers.experts import experts_of
from sliplm.engines.transformers.inputs import candidates
from sliplm.errors import CheckpointError

LINEAR = (nn.Linear, Conv1D)

FORWARDS = tuple(kind.forward for kind in LINEAR)


@dataclass
class Trial:
    """What a forward pass showed.

    Attributes:
        calls: layer -> what it read at each call: the tensor (kept, so that no address is used twice) and how
            often it was changed; in the order of first calls.
        whole: layer -> why it cannot be split.
    """

    calls: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


def run_trial(model: PreTrainedModel) -> Trial:
    """Run a model, built on the meta device, once; it holds no weight afterwards and is of no further use.

    Raises:
        CheckpointError: none of the inputs that it may read can be had without its values.
    """
    experts = experts_of(model)
    fill(model)
    trial = Trial()
    layers = dict(linears(model))
    for name, layer in layers.items():
        why = _odd(layer)
        if why:
            trial.whole[name] = why
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, StandIn(name, layer, trial))
    for name, module in model.named_modules():
        if name in experts:
            module.register_forward_pre_hook(_note(name, trial), with_kwargs=True)
        if raw(module):
            _stub(module)
    _run(model, trial)
    for name in layers:
        if name not in trial.calls and name not in trial.whole:
            trial.whole[name] = "this linear layer took no part in the forward pass"
    trial.calls = {name: read for name, read in trial.calls.items() if name not in trial.whole}
    return trial


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer with its name, tied ones included."""
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            yield name, module


def raw(module: nn.Module) -> bool:
    """Whether a module that is neither linear nor an embedding has matrices of its own.

    What has a leading dimension of 1 is added to a batch: a table of positions, a class token.
    """
    if isinstance(module, (*LINEAR, nn.Embedding, StandIn)):
        return False
    return any(p.ndim > 1 and p.shape[0] > 1 for p in module.parameters(recurse=False))


def fill(model: PreTrainedModel) -> None:
    """Give a model on the meta device values on the CPU that take no memory; its tables get their own."""
    ramps: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, ramps.setdefault(id(parameter), _ramp(parameter)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    with torch.no_grad():
        model.initialize_weights()  # positions, frequencies, statistics; ramps count as initialised


class StandIn(nn.Module):
    """Stands where a split layer will: a bias at most, no weight.  What else is read of it is noted."""

    def __init__(self, name: str, layer: nn.Module, trial: Trial) -> None:
        super().__init__()
        self.name = name
        rows, columns = layer.get_parameter("weight").shape
        transposed = isinstance(layer, Conv1D)
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        self._parameters["bias"] = layer._parameters["bias"]
        self.trial = trial
        object.__setattr__(self, "layer", layer)  # no part of the model
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """A ramp [..., out_features]."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            self._whole("it is not called with rows of its own width")
        self.trial.calls.setdefault(self.name, []).append((x, x._version))
        ramp = torch.linspace(-1, 1, self.out_features, dtype=x.dtype)
        return ramp.expand(*x.shape[:-1], self.out_features).contiguous()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.layer, name)
            self._whole(f"the model reads its `{name}`")
            if isinstance(found, nn.Parameter):  # a model may write to it: RWKV scales its layers so
                return nn.Parameter(found.clone(memory_format=torch.contiguous_format), requires_grad=False)
            return found

    def _whole(self, why: str) -> None:
        self.trial.whole.setdefault(self.name, why)


def _odd(layer: nn.Module) -> str:
    """Why a layer does more than to multiply; empty if it does not."""
    kind = type(layer).__name__
    if (
        set(layer._parameters) != {"weight", "bias"}
        or layer._buffers
        or layer.get_parameter("weight").ndim != 2
    ):
        return f"{kind} makes its weight from others"
    if "forward" in vars(layer) or not (type(layer).forward in FORWARDS or _multiplies(layer)):
        return f"{kind} has a forward of its own"
    return ""


def _multiplies(layer: nn.Module) -> bool:
    """Whether a forward of its own takes one tensor, and is the product and no more, as Falcon's: tried with
    a small weight."""
    if isinstance(layer, Conv1D) or len(inspect.signature(layer.forward).parameters) != 1:
        return False
    small = copy.copy(layer)
    weight, x = (torch.linspace(-9, 9, n).sin().reshape(-1, 5) for n in (35, 30))
    x = x * torch.logspace(-3, 4, 6)[:, None]  # small and large rows: some clip
    bias = None if layer._parameters["bias"] is None else torch.linspace(1, 2, 7)
    values = {"weight": weight, "bias": bias}
    own = {name: v if v is None else nn.Parameter(v, False) for name, v in values.items()}
    vars(small).update(_parameters=own, in_features=5, out_features=7)
    try:
        found = small(x.reshape(2, 3, 5))
    except Exception:  # the model's own code runs here
        return False
    if not isinstance(found, Tensor) or found.shape != (2, 3, 7):
        return False
    expected = nn.functional.linear(x, weight, bias)
    wrong = (found.reshape(6, 7) - expected).norm(dim=1)
    return bool((wrong <= 1e-5 * expected.norm(dim=1)).all())


def _note(name: str, trial: Trial) -> Any:
    """Notes what a module with raw weights reads: fused experts are split too."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if read:
            trial.calls.setdefault(name, []).append((read[0], read[0]._version))

    return hook


def _stub(module: nn.Module) -> None:
    """Let a module with raw weights (fused experts) that a ramp is not enough for stand for its own input."""
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not inputs:
                raise
            return torch.zeros_like(inputs[0])

    module.forward = forward  # an instance attribute that hides the class's method


def _run(model: PreTrainedModel, trial: Trial) -> None:
    failures: list[str] = []
    for inputs in candidates(model):
        trial.calls.clear()
        try:
            # tensors need their version counters, which inference mode, where the caller may be, takes away
            with torch.inference_mode(False), torch.no_grad():
                model(**inputs)
        except Exception as error:  # the model's own code runs here
            failures.append(line(error))
        else:
            return
    raise CheckpointError(
        f"{type(model).__name__} cannot be run on made-up inputs, its groups stay unknown: "
        + "; ".join(_once(failures))
    )


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))[:3]


def _ramp(parameter: nn.Parameter) -> nn.Parameter:
    width = parameter.shape[-1] if parameter.ndim else 1
    values = torch.linspace(-0.5, 0.5, width) if parameter.is_floating_point() else torch.zeros(width)
    ramp = values.to(parameter.dtype).expand(parameter.shape) if parameter.ndim else values[0]
    filled = nn.Parameter(ramp, requires_grad=False)
    filled._is_hf_initialized = True  # type: ignore[attr-defined]
    return filled


def line(error: BaseException) -> str:
    """An error of transformers or torch in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
