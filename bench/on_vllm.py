"""Tokens a second of vLLM with a vault, over plain vLLM's on the same cores.

SmolLM2-135M in float32, greedy, prompts of 8 tokens, masks ready; the worker is a process beside vLLM's, over
shared memory.  Both engines are up, and take turns; the medians of their rounds are compared, and texts are
counted that are the same, of all rounds.  vLLM binds its own computing to some of the cores.

    make .venv-vllm/.installed
    .venv-vllm/bin/python bench/on_vllm.py [--tokens 12] [--rounds 3] [--requests 1 8 32]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from rich.table import Table

PROMPT, LIMIT = 8, 300.0  # tokens of a prompt; seconds

if __name__ == "__main__":
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for `ready`, which runs in the engine's process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def ready(model: Any) -> bool:
    """Wait until all masks are dealt."""
    return bool(model.slip.wait_dealt(LIMIT))


def engine(model: str, **options: Any) -> Any:
    """vLLM's, with its defaults."""
    from vllm import LLM

    return LLM(
        model, dtype="float32", max_model_len=256, max_num_seqs=32, kv_cache_memory_bytes=1 << 29, **options
    )


def rate(llm: Any, requests: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens a second of so many requests at once, and the tokens."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": [1 + (7 * i + j) % 900 for j in range(PROMPT)]} for i in range(requests)]
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    begun = time.perf_counter()
    made = llm.generate(asked, how, use_tqdm=False)
    seconds = time.perf_counter() - begun
    return requests * tokens / seconds, [list(each.outputs[0].token_ids) for each in made]


def main() -> None:
    """Run and print."""
    import on_vllm  # this file, by the name that another process finds it by
    import sliplm
    from _common import console, finish, machine, median, split_smollm2
    from sliplm.examples import smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    out, found = split_smollm2(12), []
    with sliplm.LocalWorker(out / "worker") as worker:
        ahead = max(args.requests) * (PROMPT + args.tokens)
        extra = {"workers": [worker.address], "ahead": ahead}
        hybrid = engine(str(out / "vault"), model_loader_extra_config=extra)
        plain = engine(str(smollm2()))
        for requests in args.requests:
            rates: dict[str, list[float]] = {"hybrid": [], "plain": []}
            same = 0
            for _ in range(args.rounds):
                if hybrid.apply_model(on_vllm.ready) != [True]:
                    raise SystemExit(f"masks took more than {LIMIT:g} seconds")
                rates["hybrid"].append((got := rate(hybrid, requests, args.tokens))[0])
                rates["plain"].append((wanted := rate(plain, requests, args.tokens))[0])
                same += sum(a == b for a, b in zip(got[1], wanted[1], strict=True))
            over = median(rates["hybrid"]) / median(rates["plain"])
            found.append({"requests": requests, **rates, "over_plain": round(over, 3), "same_texts": same})
    table = Table(title="Tokens a second", width=80)
    for heading in ("requests", "hybrid", "plain float32", "over plain", "same texts"):
        table.add_column(heading, justify="right")
    for row in found:
        cells = [row["requests"], round(median(row["hybrid"]), 1), round(median(row["plain"]), 1)]
        table.add_row(*map(str, [*cells, row["over_plain"], row["same_texts"]]))
    console.print(table)
    finish({"bench": "on_vllm", "machine": machine(), "tokens": args.tokens, "rows": found})


if __name__ == "__main__":
    main()
