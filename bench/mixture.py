"""What a split of Qwen3-30B-A3B costs, counted from its shapes: no weight is read.

    PYTHONPATH=src python bench/mixture.py

Prints one JSON document.  Experts count by their expected use, 8 of 128 a token.
"""

from __future__ import annotations

import json
from typing import Any

from sliplm.planning.counts import counts_for_shapes
from sliplm.shares.recipe import Recipe

LAYERS, EXPERTS, CHOSEN, WIDTH, INNER, WORDS = 48, 128, 8, 2048, 768, 151936


def shapes() -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """The groups' shapes, and the use of those that are experts."""
    found: dict[str, tuple[int, int]] = {}
    uses: dict[str, float] = {}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        found[f"{place}.self_attn.q_proj+k_proj+v_proj"] = (5120, WIDTH)
        found[f"{place}.self_attn.o_proj"] = (WIDTH, 4096)
        for weight, shape in (("gate_up_proj", (2 * INNER, WIDTH)), ("down_proj", (WIDTH, INNER))):
            for number in range(EXPERTS):
                name = f"{place}.mlp.experts.{weight}.{number}"
                found[name], uses[name] = shape, CHOSEN / EXPERTS
    found["lm_head"] = (WORDS, WIDTH)
    return found, uses


def main() -> None:
    found, uses = shapes()
    kept = 2 * (WORDS * WIDTH + LAYERS * EXPERTS * WIDTH)  # embedding and routers, bfloat16
    shown = [
        "vault_bytes",
        "worker_bytes",
        "vault_bytes_share",
        "plain_macs",
        "vault_macs",
        "vault_macs_share",
    ]
    shown += ["exchanges", "bytes_to_worker", "bytes_from_worker", "mask_bytes"]
    result: dict[str, dict[str, Any]] = {}
    for name, hidden in (("chosen experts", uses), ("hide_routing", dict.fromkeys(uses, 1.0))):
        report = counts_for_shapes(found, Recipe(), kept_bytes=kept, uses=hidden)
        result[name] = {"groups": len(report.groups), **report.model_dump(include=set(shown))}
    result["hide_routing"]["plain_macs"] = plain = result["chosen experts"]["plain_macs"]  # the model's own
    result["hide_routing"]["vault_macs_share"] = report.vault_macs.total / plain
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
