"""Which linear layers of a model read one input, and so share one exchange.

The model is built from its configuration on the meta device (shapes without memory) and run once on three
tokens; hooks note which tensor object every linear layer reads.  Layers that read the same object are one
group.  Nothing is known about families: whatever follows the same rule is found.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging  # its verbosity is that of `logging`

from sliplm.engines.groups import Group, Linear, group_name
from sliplm.engines.transformers.experts import expert_groups, experts_of, router_groups, routers_of
from sliplm.errors import CheckpointError
from sliplm.shares.manifest import Attention

TOKENS = 3


@dataclass(frozen=True)
class Layout:
    """What `discover` found.

    Attributes:
        groups: in the order in which a forward pass reaches them.
        routers: those that choose among experts; they stay whole.
        unsplittable: module -> why: its weights are used in products but cannot be split.
        parameters: name -> shape of every parameter, once for tied ones.
        tied: other name -> name in `parameters`.
        buffers: name -> shape of every persistent buffer; a checkpoint may lack them.
        attention: one entry per layer, for counting.
    """

    config: PretrainedConfig
    groups: tuple[Group, ...]
    routers: tuple[Group, ...]
    unsplittable: dict[str, str]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    buffers: dict[str, tuple[int, ...]]
    attention: tuple[Attention, ...]
    model: PreTrainedModel = field(repr=False)


def discover(model_dir: Path | str) -> Layout:
    """Find the groups of the model that a checkpoint folder's config.json describes; no weight is read.

    Raises:
        CheckpointError: the configuration is missing, of an unknown kind or needs code from the folder, or
            the model cannot be run on shapes alone.
    """
    config = read_config(Path(model_dir))
    model = meta_model(config)
    calls = _trace(model)
    state = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter has several names
    first = {id(p): name for name, p in reversed(state.items())}
    return Layout(
        config=config,
        groups=_groups(model, calls),
        routers=router_groups(model),
        unsplittable=_unsplittable(model, calls),
        parameters={name: tuple(p.shape) for name, p in state.items() if first[id(p)] == name},
        tied={name: first[id(p)] for name, p in state.items() if first[id(p)] != name},
        buffers=_buffers(model),
        attention=attention_of(config),
        model=model,
    )


def read_config(model_dir: Path) -> PretrainedConfig:
    """The configuration of a checkpoint folder; code that came with the folder is never run.

    Raises:
        CheckpointError: there is none, or this version of transformers does not know it.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a folder; give the folder of a Hugging Face checkpoint")
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{model_dir} has no config.json; give the folder of a Hugging Face checkpoint")
    refused = f"{model_dir / 'config.json'}: transformers cannot use this configuration"
    try:
        with _quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many kinds for a bad file
        code = own_code(model_dir)
        why = (
            f"it names {code}, code that came with the checkpoint, which is never run"
            if code
            else _line(error)
        )
        raise CheckpointError(
            f"{refused} ({why}); models that bring their own code are not supported"
        ) from error
    code = own_code(model_dir)
    if code and getattr(config, "architectures", None) and architecture(config) is None:
        raise CheckpointError(
            f"{refused}: it names {code}, which came with the checkpoint and is never run, and transformers "
            f"has no {config.architectures[0]}; models that bring their own code are not supported"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{model_dir} is quantised or already split; split the original checkpoint")
    return config


def own_code(model_dir: Path) -> str:
    """The code that config.json names as its own, such as "configuration_x.Y, modeling_x.Z", if any."""
    try:
        found = json.loads((model_dir / "config.json").read_bytes()).get("auto_map")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return ", ".join(sorted({str(name) for name in found.values()})) if isinstance(found, dict) else ""


def architecture(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a checkpoint was saved from; None where its configuration is silent.

    Never code that came with the checkpoint: a name that transformers does not have is no class.
    """
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, str(names[0]), None) if names else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def check_reads_text(model_dir: Path) -> None:
    """Check that a checkpoint is of a causal language model, whose perplexity can be measured.

    Raises:
        CheckpointError: it is not.
    """
    config = read_config(model_dir)
    found = architecture(config)
    if found is not None and (not found.can_generate() or getattr(config, "is_encoder_decoder", False)):
        raise CheckpointError(
            f"{model_dir} is a {found.__name__}, which does not predict a text's next token: only causal "
            "language models can be measured so; `slip split` and `slip inspect` take it"
        )


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, on the meta device, in evaluation mode.

    It is of the class that the configuration names, else a causal language model.

    Raises:
        CheckpointError: transformers has no such model, or it cannot be built.
    """
    found, options = architecture(config), {"attn_implementation": "eager", "dtype": torch.float32}
    try:
        with _quiet(), torch.device("meta"):
            model: PreTrainedModel = (
                AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
                if found is None
                else found._from_config(config, **options)
            )
    except Exception as error:  # the model's own code runs here
        kind = "causal language model" if found is None else found.__name__
        raise CheckpointError(
            f"no {kind} can be built from {type(config).__name__}: {_line(error)}"
        ) from error
    model.train(False)
    return model


def attention_of(config: PretrainedConfig) -> tuple[Attention, ...]:
    """Heads, head width and window of each layer, from the configuration; empty where it does not say."""
    text = config.get_text_config()
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        return ()
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", heads) // heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * layers
    return tuple(
        Attention(heads=heads, head_dim=width, window=window if kind == "sliding_attention" else None)
        for kind in kinds
    )


# --- the trace ----------------------------------------------------------------------------------------


# linear layer -> what it read: tensors (kept, so that no address is used twice) and how often each changed
_Calls = dict[str, list[tuple[torch.Tensor, int]]]


def _trace(model: PreTrainedModel) -> _Calls:
    """What every linear layer reads in one forward pass, in the order of first calls."""
    calls: _Calls = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else next(iter(kwargs.values()))
            calls.setdefault(name, []).append((tensor, tensor._version))

        return hook

    noted = {name: module for name, module in linears(model) if name not in routers_of(model)}
    noted |= experts_of(model)
    handles = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in noted.items()]
    stubbed = [module for module in model.modules() if _raw(module)]
    for module in stubbed:
        _stub(module)
    try:
        # tensors need their version counters, which inference mode, where the caller may be, takes away
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            _run(model, calls.clear)
    except Exception as error:  # the model's own code runs here
        raise CheckpointError(
            f"{type(model).__name__} cannot be run on shapes alone, its groups stay unknown: {_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module in stubbed:
            del module.forward
    return calls


def _run(model: PreTrainedModel, clear: Callable[[], None]) -> None:
    """One forward pass on shapes.

    Models look at (absent) values of a mask in different ways: of two kinds of mask, one number a token and
    one that is ready to be added, each of them can do with one.
    """
    tokens = torch.ones((1, TOKENS), dtype=torch.long, device="meta")
    try:
        model(**_inputs(model, tokens))
    except (RuntimeError, NotImplementedError):
        clear()
        model(**_inputs(model, torch.zeros((1, 1, TOKENS, TOKENS), device="meta")))


def _inputs(model: PreTrainedModel, mask: torch.Tensor) -> dict[str, Any]:
    """Arguments that any model of its kind takes, without values: three tokens, an image, a spectrogram."""
    takes = inspect.signature(model.forward).parameters
    main, config = model.main_input_name, model.config
    tokens = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {main: torch.zeros((1, config.num_channels, height, width), device="meta")}
    elif main == "input_features":  # of the length that the encoder reads
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {main: torch.zeros(shape, device="meta")}
    elif main != "input_ids":
        raise CheckpointError(f"models that read {main} are not supported")
    if config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    return {name: value for name, value in (inputs | {"use_cache": False}).items() if name in takes}


def _stub(module: nn.Module) -> None:
    """Let a module with raw weights (fused experts) that looks at values stand for its own input."""
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            return torch.empty_like(inputs[0])

    module.forward = forward  # an instance attribute that hides the class's method


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Every linear layer with its name, tied ones included."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _groups(model: PreTrainedModel, calls: _Calls) -> tuple[Group, ...]:
    experts = experts_of(model)
    together: dict[object, list[str]] = {}
    for name, inputs in calls.items():
        read = tuple((id(tensor), changes) for tensor, changes in inputs)
        together.setdefault(name if name in experts else read, []).append(name)
    found: list[Group] = []
    for names in together.values():
        if names[0] in experts:
            found += expert_groups(names[0], experts[names[0]], model.config)
        else:
            linear = tuple(_linear(name, model.get_submodule(name)) for name in names)
            found.append(Group(group_name(names), linear))
    return tuple(found)


def _linear(name: str, module: nn.Module) -> Linear:
    weight = module.get_parameter("weight")
    transposed = isinstance(module, Conv1D)
    rows, columns = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
    return Linear(name, rows, columns, f"{name}.weight", transposed)


def _unsplittable(model: PreTrainedModel, calls: _Calls) -> dict[str, str]:
    found, routers, experts = {}, routers_of(model), experts_of(model)
    for name, module in model.named_modules():
        if name in routers or (name in experts and name in calls):
            continue
        if _raw(module):
            found[name] = f"{type(module).__name__} is no linear layer but holds matrices"
        elif isinstance(module, nn.Linear | Conv1D) and name not in calls:
            found[name] = "this linear layer took no part in the forward pass"
    return found


def _raw(module: nn.Module) -> bool:
    """Whether a module that is neither linear nor an embedding has matrices of its own.

    What has a leading dimension of 1 is added to a batch: a table of positions, a class token.
    """
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return False
    return any(p.ndim > 1 and p.shape[0] > 1 for p in module.parameters(recurse=False))


def _buffers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.{name}" if prefix else name: tuple(buffer.shape)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
