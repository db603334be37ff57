"""The files of a checkpoint that go along with a split model."""

from __future__ import annotations

import json
import re
from typing import Any

from sliplm.engines.transformers.checkpoint import Checkpoint

# how to generate, how to make tokens, how to prepare images and sound
_COMPANIONS = re.compile(
    r"(generation_config\.json|tokenizer[\w.-]*|[\w-]*\.model|vocab\.(json|txt)|merges\.txt|"
    r"added_tokens\.json|special_tokens_map\.json|chat_template\.(json|jinja)|"
    r"(pre)?processor_config\.json)"
)


def companions(checkpoint: Checkpoint, *, untied: bool) -> dict[str, bytes]:
    """config.json of the split model, generation settings, tokenizer and preprocessor files, by name.

    Args:
        untied: a tied weight was split off.
    """
    source = checkpoint.path
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "slip"}
    if untied:
        config["tie_word_embeddings"] = False
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = _dtype(checkpoint)  # transformers would look for it in the sealed weights
    files = {"config.json": json.dumps(config, indent=2).encode()}
    for file in sorted(source.iterdir()):
        if _COMPANIONS.fullmatch(file.name) and file.is_file():
            files[file.name] = file.read_bytes()
    return files


def _dtype(checkpoint: Checkpoint) -> str:
    """The type of the checkpoint's first floating tensor, as transformers would find it."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    types = (entry.dtype for entry in checkpoint.entries.values())
    return next((names[dtype] for dtype in types if dtype in names), "float32")
