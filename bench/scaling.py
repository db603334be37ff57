"""Sizes of a model that nobody need have: bytes and exchanges a token, from its configuration alone.

Counts are those of `slip plan` and `slip inspect` (`planning.counts`); no weight is read.  docs/scaling.md
goes on from here.

python bench/scaling.py [--model llama-2-70b|llama-2-7b] [--precision 8] [--rank 16] [--tokens 1000000]
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from transformers import LlamaConfig

from _common import finish
from sliplm.masks.maskfile import row_bytes
from sliplm.planning.counts import counts_for_shapes
from sliplm.shares.recipe import Recipe

CONFIGS: Final = {
    "llama-2-7b": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000,
    ),
    "llama-2-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000,
    ),
}  # fmt: skip


def shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The groups that a split makes: name -> (rows, columns)."""
    wide, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (wide // config.num_attention_heads)
    layer = {
        "qkv": (wide + 2 * kv, wide), "o": (wide, wide), "gate_up": (2 * inner, wide), "down": (wide, inner),
    }  # fmt: skip
    found = {f"{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}
    return found | {"lm_head": (config.vocab_size, wide)}


def counted(config: LlamaConfig, rank: int, precision: int, tokens: int) -> dict[str, Any]:
    """All that docs/scaling.md takes from here; bytes."""
    groups = shapes(config)
    embedding = 2 * config.vocab_size * config.hidden_size  # bfloat16; norms are nothing beside it
    report = counts_for_shapes(groups, Recipe(rank=rank, precision=precision), kept_bytes=embedding)
    kv = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return {
        "groups": len(groups),
        "weights": report.plain_macs,
        "exchanges": report.exchanges,
        "to_worker": report.bytes_to_worker,
        "from_worker": report.bytes_from_worker,
        "mask_products": report.mask_bytes,
        "masks_on_disk": sum(row_bytes(m) for m, _ in groups.values()),
        "masks_on_disk_for_tokens": tokens * sum(row_bytes(m) for m, _ in groups.values()),
        "worker_share": report.worker_bytes,
        "vault_share": report.vault_bytes,
        "vault_macs_share": report.vault_macs_share,
        "largest_group_float32": max(4 * m * n for m, n in groups.values()),
        "kv_cache_a_token": 2 * 2 * kv * config.num_hidden_layers,  # bfloat16
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=CONFIGS, default="llama-2-70b")
    parser.add_argument("--precision", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    args = parser.parse_args()
    found = counted(CONFIGS[args.model], args.rank, args.precision, args.tokens)
    for name, value in found.items():
        print(f"{name:26} {value:.4f}" if isinstance(value, float) else f"{name:26} {value:,}")
    finish(vars(args) | found)


if __name__ == "__main__":
    main()
