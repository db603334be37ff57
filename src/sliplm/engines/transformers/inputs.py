"""Inputs for one forward pass of any kind of model, made up from its configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

TOKENS = (3, 32)  # some models want more than a few

Inputs = dict[str, Any]


def candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """Arguments that a model of this kind may take: the first that it can be run on are the right ones."""
    takes = inspect.signature(model.forward).parameters
    made = [
        {name: value for name, value in (inputs | {"use_cache": False}).items() if name in takes}
        for tokens in TOKENS
        for main in _mains(model, tokens)
        for inputs in _with_text(model, main, tokens, takes)
    ]
    yield from made
    for inputs in made:
        yield {name: value for name, value in inputs.items() if name != "attention_mask"}
    own = model.dummy_inputs
    if isinstance(own, dict):
        yield own


def _mains(model: PreTrainedModel, tokens: int) -> Iterator[Inputs]:
    """What the model reads first: tokens, an image, a wave or a spectrogram."""
    main, config = model.main_input_name, model.config
    if main == "pixel_values":
        for shape in _images(config):
            yield {main: _wave(shape)}
    elif main == "input_features":
        for shape in _spectrograms(config):
            yield {main: _wave(shape)}
    elif main in ("input_values", "audio_values"):
        for shape in _sounds(config):
            yield {main: _wave(shape)}
    else:
        yield {main: _tokens(model, tokens)}


def _with_text(model: PreTrainedModel, main: Inputs, tokens: int, takes: Any) -> Iterator[Inputs]:
    """The same with what else a model of its kind calls for."""
    config, text = model.config, _tokens(model, tokens)
    mask = torch.ones_like(text)
    inputs = dict(main)
    if model.main_input_name == "input_ids" or "input_ids" in _required(takes):
        inputs |= {"input_ids": text, "attention_mask": mask}
    if "decoder_input_ids" in takes and setting(config, "is_encoder_decoder"):
        inputs |= {"decoder_input_ids": text, "decoder_attention_mask": mask}
    if model.main_input_name == "input_ids" and type(model).__name__.endswith("ForMultipleChoice"):
        inputs |= {
            "input_ids": text[:, None].expand(1, 2, -1),
            "attention_mask": mask[:, None].expand(1, 2, -1),
        }
    yield inputs
    codes = _find(config, "num_codebooks")
    if codes and model.main_input_name == "input_ids":  # a row of tokens for each code of a sound
        yield inputs | {"input_ids": text.repeat(codes, 1)}
    if "visual_feats" in takes:  # what a detector saw, and where
        seen, place = _find(config, "visual_feat_dim") or 2048, _find(config, "visual_pos_dim") or 4
        yield inputs | {"visual_feats": _wave((1, 2, seen)), "visual_pos": _wave((1, 2, place))}
    if "pixel_values" in takes and "pixel_values" not in main and hasattr(config, "vision_config"):
        for shape in _images(config):
            yield inputs | {"pixel_values": _wave(shape)}
    if "input_ids" in takes and "input_ids" not in inputs:
        yield inputs | {"input_ids": text}
    if "decoder_input_ids" in takes and "decoder_input_ids" not in inputs:
        yield inputs | {"decoder_input_ids": text}


def _required(takes: Any) -> set[str]:
    return {name for name, parameter in takes.items() if parameter.default is parameter.empty}


def _tokens(model: PreTrainedModel, tokens: int) -> Tensor:
    """Token ids [1, tokens] that stand for nothing but text, with an end where a classifier looks for one."""
    config = model.config.get_text_config()
    size = _find(model.config, "vocab_size") or 8
    special = {
        value
        for part in (model.config, config)
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain = [token for token in range(min(size, 64)) if token not in special] or [0]
    ids = torch.tensor([[plain[i % len(plain)] for i in range(tokens)]])
    end = setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < size and _find(model.config, "is_encoder_decoder"):
        ids[0, -1] = end
    return ids


def _images(config: PretrainedConfig) -> Iterator[tuple[int, ...]]:
    channels = _find(config, "num_channels") or _find(config, "in_channels") or 3
    size = _find(config, "image_size")
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    sizes: list[Any] = [] if size is None else [size]
    for one in (*sizes, 64, 224):
        height, width = one if isinstance(one, list | tuple) else (one, one)
        yield (1, channels, height, width)


def _spectrograms(config: PretrainedConfig) -> Iterator[tuple[int, ...]]:
    bins = next((n for k in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim",
                             "num_mel_bands") if (n := _find(config, k))), 80)  # fmt: skip
    positions = _find(config, "max_source_positions") or 64
    yield (1, bins, 2 * positions)
    yield (1, 64, bins)


def _sounds(config: PretrainedConfig) -> Iterator[tuple[int, ...]]:
    strides = _find(config, "conv_stride")
    bins, length = _find(config, "num_mel_bins"), _find(config, "max_length")
    if bins and length and not strides:
        yield (1, length, bins)
    reach = math.prod(strides) if isinstance(strides, list | tuple) else 320
    yield (1, 16 * reach)
    yield (1, 1, 16 * reach)
    if bins:
        yield (1, 64, bins)


def setting(config: PretrainedConfig, name: str) -> Any:
    """A setting of a configuration; None where it has none, or another one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # what transformers raises where layers differ
        return None


def _find(config: Any, name: str) -> Any:
    """A setting of a configuration, or of the first of its parts that has it."""
    value = setting(config, name)
    if value is not None:
        return value
    parts = (v for v in vars(config).values() if isinstance(v, PretrainedConfig))
    return next((found for part in parts if (found := _find(part, name)) is not None), None)


def _wave(shape: tuple[int, ...]) -> Tensor:
    """Values that are not all equal."""
    return torch.linspace(-1, 1, math.prod(shape)).mul(7).sin().reshape(shape)
