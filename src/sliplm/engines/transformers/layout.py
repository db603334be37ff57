"""Which linear layers of a model read one input, and so share one exchange.

The model is built from its configuration without memory and run once as a split would leave it (`trial`).
Layers that read the same tensor object are one group.  Nothing is known about families: whatever follows the
same rule is found, and what cannot be split is found too, with why.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging  # its verbosity is that of `logging`

from sliplm.engines.groups import Group, Linear, group_name
from sliplm.engines.transformers.experts import expert_groups, experts_of, router_groups, routers_of
from sliplm.engines.transformers.inputs import setting
from sliplm.engines.transformers.trial import Trial, line, raw, run_trial
from sliplm.errors import CheckpointError
from sliplm.reading import read_bounded
from sliplm.shares.manifest import Attention


@dataclass(frozen=True)
class Layout:
    """What `discover` found.

    Attributes:
        groups: in the order in which a forward pass reaches them.
        routers: those that choose among experts; they stay whole.
        unsplittable: module -> why: its weights are used in products but cannot be split; they stay whole.
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
            the model cannot be run without its weights.
    """
    config = read_config(Path(model_dir))
    model = meta_model(config)
    with _quiet():
        trial = run_trial(meta_model(config))
    state = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter has several names
    first = {id(p): name for name, p in reversed(state.items())}
    tied = {name: first[id(p)] for name, p in state.items() if first[id(p)] != name}
    _keep_shared(trial, tied)
    if getattr(config, "is_encoder_decoder", False):
        _keep_tied(trial, tied)
    return Layout(
        config=config,
        groups=_groups(model, trial),
        routers=router_groups(model),
        unsplittable=_unsplittable(model, trial),
        parameters={name: tuple(p.shape) for name, p in state.items() if first[id(p)] == name},
        tied=tied,
        buffers=_buffers(model),
        attention=attention_of(config),
        model=model,
    )


MAX_CONFIG_BYTES = 16 << 20


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
            else line(error)
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
        found = json.loads(read_bounded(model_dir / "config.json", MAX_CONFIG_BYTES)).get("auto_map")
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
    found, options = architecture(config), {"dtype": torch.float32}
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
            f"no {kind} can be built from {type(config).__name__}: {line(error)}"
        ) from error
    model.train(False)
    return model


def attention_of(config: PretrainedConfig) -> tuple[Attention, ...]:
    """Heads, head width and window of each layer, from the configuration; empty where it does not say."""
    text = config.get_text_config()
    layers = setting(text, "num_hidden_layers")
    if not isinstance(layers, int):
        return ()
    each = setting(text, "per_layer_config") or [text] * layers  # Gemma 4's layers differ in width
    kinds = setting(text, "layer_types")
    found = []
    for i, layer in enumerate(each[j] for j in range(layers)):
        heads = setting(layer, "num_attention_heads")
        if not isinstance(heads, int):
            return ()
        width = setting(layer, "head_dim") or (setting(layer, "hidden_size") or heads) // heads
        window = setting(layer, "sliding_window")
        kind = kinds[i] if kinds else "sliding_attention" if window else "full_attention"
        limit = window if kind == "sliding_attention" else None
        found.append(Attention(heads=heads, head_dim=width, window=limit))
    return tuple(found)


# --- what the trial showed ----------------------------------------------------------------------------


def _keep_shared(trial: Trial, tied: dict[str, str]) -> None:
    """Layers with one weight between them stay whole: two shares of a matrix show more than one."""
    users: dict[str, list[str]] = {}
    for name in trial.calls:
        users.setdefault(tied.get(f"{name}.weight", f"{name}.weight"), []).append(name)
    for names in users.values():
        for name, other in zip(names, reversed(names), strict=True):
            if len(names) > 1:
                del trial.calls[name]
                trial.whole[name] = f"it shares its weight with {other if other != name else names[0]}"


def _keep_tied(trial: Trial, tied: dict[str, str]) -> None:
    """Encoder-decoder models scale their output by whether the head is tied, so that stays as it is."""
    shared = {name for pair in tied.items() for name in pair}
    for name in list(trial.calls):
        if f"{name}.weight" in shared:
            del trial.calls[name]
            trial.whole[name] = "it shares its weight with an embedding, in an encoder-decoder model"


def _groups(model: PreTrainedModel, trial: Trial) -> tuple[Group, ...]:
    experts, routers = experts_of(model), routers_of(model)
    together: dict[object, list[str]] = {}
    for name, inputs in trial.calls.items():
        if name not in routers:
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


def _unsplittable(model: PreTrainedModel, trial: Trial) -> dict[str, str]:
    routers, experts = routers_of(model), experts_of(model)
    found = trial.whole | {
        name: f"{type(module).__name__} is no linear layer but holds matrices"
        for name, module in model.named_modules()
        if raw(module)
    }
    split = {name for name in experts if name in trial.calls}
    return {name: why for name, why in found.items() if name not in routers and name not in split}


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
