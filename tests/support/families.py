"""Tiny random checkpoints of real model families, for tests: about 64 wide, two layers, 300 tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sliplm.engines.transformers.opened import OpenedModel
from sliplm.shares.keysource import KeySpec
from sliplm.shares.sealing import open_seal, seal_manifest
from sliplm.shares.share import open_vault

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}

_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **kw: tf.LlamaConfig(
        **_COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True} | kw
    ),
    "mistral": lambda **kw: tf.MistralConfig(
        **_COMMON | {"num_key_value_heads": 2, "sliding_window": 32} | kw
    ),
    "qwen2": lambda **kw: tf.Qwen2Config(**_COMMON | {"num_key_value_heads": 2} | kw),
    "qwen3": lambda **kw: tf.Qwen3Config(**_COMMON | {"num_key_value_heads": 2, "head_dim": 24} | kw),
    "gemma2": lambda **kw: tf.Gemma2Config(
        **_COMMON | {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 32} | kw
    ),
    "gemma3": lambda **kw: tf.Gemma3TextConfig(
        **_COMMON | {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 32} | kw
    ),
    "phi": lambda **kw: tf.PhiConfig(**_COMMON | kw),
    "gpt2": lambda **kw: tf.GPT2Config(
        **{"vocab_size": 300, "n_embd": 60, "n_inner": 176, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | _TOKENS
        | kw
    ),
    "gpt_neox": lambda **kw: tf.GPTNeoXConfig(**_COMMON | kw),
    "opt": lambda **kw: tf.OPTConfig(
        **{"vocab_size": 300, "hidden_size": 64, "ffn_dim": 176, "num_hidden_layers": 2}
        | {
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 48,
            "pad_token_id": 0,
        }
        | _TOKENS
        | kw
    ),
    "mixtral": lambda **kw: tf.MixtralConfig(
        **_COMMON | {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2} | kw
    ),
    "qwen3_moe": lambda **kw: tf.Qwen3MoeConfig(
        **_COMMON
        | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"decoder_sparse_step": 2}
        | kw
    ),
    "qwen2_moe": lambda **kw: tf.Qwen2MoeConfig(
        **_COMMON
        | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 48}
        | kw
    ),
    "olmoe": lambda **kw: tf.OlmoeConfig(
        **_COMMON | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2} | kw
    ),
    "deepseek_v2": lambda **kw: tf.DeepseekV2Config(
        **_COMMON | _DEEPSEEK | {"topk_method": "greedy", "n_group": 1, "topk_group": 1} | kw
    ),
    "deepseek_v3": lambda **kw: tf.DeepseekV3Config(
        **_COMMON | _DEEPSEEK | {"n_group": 2, "topk_group": 1} | kw
    ),
    "gpt_oss": lambda **kw: tf.GptOssConfig(
        **_COMMON
        | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        | kw
    ),
    "granitemoe": lambda **kw: tf.GraniteMoeConfig(
        **_COMMON | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2} | kw
    ),
    "phimoe": lambda **kw: tf.PhimoeConfig(
        **_COMMON | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2} | kw
    ),
    "glm4_moe": lambda **kw: tf.Glm4MoeConfig(
        **_COMMON
        | {"num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 40, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | kw
    ),
}

MIXTURES = tuple(list(CONFIGS)[list(CONFIGS).index("mixtral") :])
DENSE = tuple(name for name in CONFIGS if name not in MIXTURES)


def make(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard: str = "5GB",
    **config: Any,
) -> Path:
    """Write a checkpoint of the family into `folder` (made if missing) and return it.

    Further keywords override the configuration, e.g. `num_hidden_layers=1`.
    """
    generator = torch.Generator().manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family](**config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:  # norms: around one (Gemma's add one themselves)
                parameter.add_(noise * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard)
    return folder


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per byte: no download, and every token has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_with_tokenizer(
    family: str, folder: Path, *, template: str | dict[str, str] | None = None, **options: Any
) -> Path:
    """`make`, with a byte tokenizer beside the weights, whose chat templates these are."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    make(family, folder, vocab_size=len(tokenizer), **options)
    tokenizer.save_pretrained(folder)
    return folder


def kept_tensors(vault: Path, key: KeySpec = None) -> dict[str, torch.Tensor]:
    """What a sealed vault folder keeps whole, decrypted."""
    opened = OpenedModel(open_vault(vault, key))
    try:
        return load_file(opened.path)
    finally:
        opened.close()


def sign_manifest(vault: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change a vault's manifest, and seal it again: what only the owner of the key can do."""
    path, data_key = vault / "manifest.json", open_seal(vault, None)
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    seal_manifest(vault, data_key, path.read_bytes())


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2])))
