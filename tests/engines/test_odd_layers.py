"""Layers that are not quite nn.Linear, and models that read more than tokens: no rule is typed."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import families
import sliplm
from sliplm.engines.transformers.inputs import candidates
from sliplm.engines.transformers.layout import attention_of, discover, meta_model
from sliplm.engines.transformers.load import reference
from sliplm.engines.transformers.trial import Trial, run_trial
from sliplm.errors import CheckpointError, SlipWarning, UnsplittableError

SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = SMALL | {"vocab_size": 300}
IMAGES = SMALL | {"image_size": 32, "patch_size": 8}

ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "reads a weight": (
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=300, hidden_size=48, num_hidden_layers=1, state_size=8)
        ),
        r"mixer\..*: the model reads its `weight`",
    ),
    "multiple choice": (lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT)), "it has 1 singular"),
    "text and images": (
        lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=IMAGES, projection_dim=32)),
        "Conv2d is no linear layer",
    ),
    "a wave": (
        lambda: tf.Wav2Vec2Model(
            tf.Wav2Vec2Config(
                **SMALL, conv_dim=(32, 32), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2,
                num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            )
        ),
        "Conv1d is no linear layer",
    ),
    "permutations": (
        lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=300, d_model=48, n_layer=1, n_head=4, d_inner=96)),
        "holds matrices",
    ),
    "sines that no checkpoint has": (
        lambda: tf.MarianMTModel(
            tf.MarianConfig(
                vocab_size=300, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0,
                max_position_embeddings=64, decoder_start_token_id=1, eos_token_id=2,
            )
        ),
        "",
    ),
    "writes to a weight": (
        lambda: tf.RwkvForCausalLM(
            tf.RwkvConfig(
                vocab_size=300, hidden_size=48, num_hidden_layers=2, attention_hidden_size=48,
                intermediate_size=96, rescale_every=1, bos_token_id=0, eos_token_id=0,
            )
        ),
        r"attention\.output.*: the model reads its `weight`",
    ),
    "initialises by shape": (
        lambda: tf.BltForCausalLM(
            tf.BltConfig(
                vocab_size=260, encoder_hash_byte_group_vocab=64, encoder_hash_byte_group_size=[3],
                patch_in_forward=False, max_position_embeddings=128,
                patcher_config=TEXT | {"vocab_size": 260},
                encoder_config=TEXT | {"vocab_size": 260, "hidden_size_global": 48},
                decoder_config=TEXT | {"vocab_size": 260, "hidden_size_global": 48},
                global_config=TEXT,
            )
        ),
        "",
    ),
    "a row of tokens for each code": (
        lambda: tf.MusicgenForCausalLM(
            tf.MusicgenDecoderConfig(
                vocab_size=300, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, ffn_dim=96,
                num_codebooks=4, pad_token_id=0, bos_token_id=0,
            )
        ),
        "took no part",
    ),
    "what a detector saw": (
        lambda: tf.LxmertModel(
            tf.LxmertConfig(
                vocab_size=300, hidden_size=48, num_attention_heads=4, intermediate_size=96, l_layers=1,
                x_layers=1, r_layers=1, visual_feat_dim=32,
            )
        ),
        "it has 4 singular",
    ),
    "one weight in two layers": (
        lambda: tf.ZambaForCausalLM(
            tf.ZambaConfig(
                vocab_size=300, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=4, intermediate_size=96, mamba_d_state=8,
                layers_block_type=["linear_attention", "hybrid"] * 2,
            )
        ),
        r"q_proj.*: it shares its weight with model\.layers\.\d\.shared_transf",
    ),
    "frequencies that depend on the length": (
        lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**TEXT, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        ),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_splits_with_the_defaults(name: str, tmp_path: Path) -> None:
    build, why = ODD[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().save_pretrained(tmp_path / "model")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = sliplm.split(tmp_path / "model", tmp_path)
    assert report.exchanges
    told = [str(w.message) for w in said if issubclass(w.category, SlipWarning)]
    assert len(told) == bool(why)
    model = type(build()).from_pretrained(tmp_path / "model", dtype=torch.float32)
    found, expected = (_run(each)[0] for each in (reference(tmp_path), model))
    assert (found - expected).norm() <= 5e-3 * expected.norm() + 5e-3  # CLIP gives one small cosine
    if why:
        assert re.search(why, told[0])


def _run(model: Any) -> Any:
    for inputs in candidates(model):
        with torch.no_grad(), contextlib.suppress(Exception):
            return model(**inputs)
    raise AssertionError("no inputs")


class _Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class _Written(nn.Linear):
    """Falcon's way: the product, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-100, 100))


class _Same(nn.Linear):
    """A subclass that multiplies and no more: it is split."""


def _odd_llama() -> Any:
    return meta_model(families.CONFIGS["llama"](num_hidden_layers=1))


def test_a_forward_of_its_own_stays_whole_and_a_mere_subclass_does_not() -> None:
    model = _odd_llama()
    with torch.device("meta"):
        layer = model.model.layers[0]
        layer.mlp.extra = _Pair(64, 64)
        layer.mlp.down_proj = _Same(176, 64, bias=False)
    layer.mlp.register_forward_pre_hook(lambda module, args: (module.extra(args[0])[0],))
    trial = run_trial(model)
    assert trial.whole == {"model.layers.0.mlp.extra": "_Pair has a forward of its own"}
    assert "model.layers.0.mlp.down_proj" in trial.calls


@pytest.mark.parametrize(
    ("kind", "whole"), [(_Written, False), (_Doubled, True), (_Clipped, True), (_Pair, True)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_written_out_is_split_and_what_does_more_is_not(
    kind: type[nn.Linear], whole: bool, bias: bool
) -> None:
    model = _odd_llama()
    with torch.device("meta"):
        model.model.layers[0].mlp.extra = kind(64, 64, bias=bias)
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: module.extra(args[0]) if not whole else None
    )
    trial = run_trial(model)
    assert ("model.layers.0.mlp.extra" in trial.whole) is whole
    assert ("model.layers.0.mlp.extra" in trial.calls) is not whole


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda layer: layer.weight.dtype, "reads its `weight`"),
        (lambda layer: isinstance(layer.weight, torch.Tensor), "reads its `weight`"),
        (lambda layer: layer.weight.norm(), "reads its `weight`"),
        (lambda layer: layer.extra_repr, ""),
    ],
)
def test_whatever_the_model_reads_of_a_layer_is_seen(read: Callable[[Any], Any], why: str) -> None:
    model = _odd_llama()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, _: read(module.up_proj) and None)
    trial: Trial = run_trial(model)
    found = trial.whole.get("model.layers.0.mlp.up_proj", "")
    assert found.endswith(why)
    assert bool(found) == bool(why)


def test_heads_that_differ_between_layers_are_counted_one_by_one() -> None:
    config = tf.Dots3NoteTextConfig()
    each = [layer.num_attention_heads for layer in config.per_layer_config]
    assert len(set(each)) == 2
    assert [layer.heads for layer in attention_of(config)] == each


def test_what_the_text_path_does_not_run_stays_whole(tmp_path: Path) -> None:
    text = tf.LlamaConfig(**TEXT, num_key_value_heads=4)
    config = tf.LlavaConfig(
        text_config=text, vision_config=tf.CLIPVisionConfig(**IMAGES), image_token_index=299
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    layout = discover(tmp_path)
    assert all("language_model" in group.name or group.name == "lm_head" for group in layout.groups)
    tower = {why for name, why in layout.unsplittable.items() if "vision_tower" in name and "proj" in name}
    assert "this linear layer took no part in the forward pass" in tower


def test_nothing_to_split_is_refused_before_with_why(tmp_path: Path) -> None:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    tf.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsplittableError, match=r"classifier.1: it has 2 singular(.|\n)*Conv2d is no linear"):
        sliplm.split(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out" / "vault").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_gives_the_type_that_the_plain_model_gives(family: str, tmp_path: Path) -> None:
    model = (
        families.make(family, tmp_path / "model", num_hidden_layers=1)
        if family == "llama"
        else (families.make(family, tmp_path / "model", n_layer=1))
    )
    sliplm.split(model, tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = reference(tmp_path)(ids).logits, plain(ids).logits
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.05 * expected.norm()


def _changed(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    model = families.make("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.complex64])
def test_types_that_are_not_used_do_no_harm(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _changed(tmp_path, lambda tensors: tensors.update(unused=torch.zeros(4).to(dtype)))
    assert sliplm.split(model, tmp_path / "out").exchanges
    name = "model.norm.weight"
    model = _changed(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{name} has the type (F8_E8M0|C64)"):
        sliplm.split(model, tmp_path / "other", i_know=True)


def test_a_row_of_huge_values_is_split(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    model = _changed(tmp_path, lambda tensors: tensors[name][0].fill_(3e37))
    report = sliplm.split(model, tmp_path / "out")
    assert all(group.error < 1e-3 for group in report.groups if group.error is not None)
