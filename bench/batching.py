"""Tokens a second of many requests at once, over the plain model's by the same engine on the same cores.

SmolLM2-135M, greedy, short prompts, masks ready; the hybrid's worker is a second process.  Hybrid and plain
take turns; the medians of their rounds are compared, and texts are counted that are the same, of all rounds.

    python bench/batching.py [--tokens 12] [--rounds 3] [--requests 1 8 32]
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

import sliplm
from _common import console, finish, machine, median, split_smollm2
from sliplm.engines.transformers.batching import Batch
from sliplm.engines.transformers.drawing import Drawing
from sliplm.engines.transformers.loop import Request, Room
from sliplm.examples import smollm2

PROMPT, LIMIT = 8, 300.0  # tokens of a prompt; seconds


def rate(batch: Batch, requests: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens a second from the first request's submission to the last one's end, and the tokens."""
    left = threading.Semaphore(0)

    def tell(request: Request) -> None:
        if request.done:
            left.release()

    asked = [
        Request([1 + (7 * i + j) % 900 for j in range(PROMPT)], tokens, Drawing(), None, tell)
        for i in range(requests)
    ]
    begun = time.perf_counter()
    for request in asked:
        batch.submit(request)
    for _ in asked:
        if not left.acquire(timeout=LIMIT):
            raise SystemExit(f"a request took more than {LIMIT:g} seconds")
    seconds = time.perf_counter() - begun
    if errors := [request.error for request in asked if request.error]:
        raise errors[0]
    over = [[token.id for token in request.tokens] for request in asked]
    return sum(map(len, over)) / seconds, over


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    room, found = Room(tokens=2048, batch=256, requests=32), []
    plain: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    with (
        sliplm.open(split_smollm2(12), ahead=0) as hybrid,
        Batch(hybrid, room) as ours,
        Batch(plain, room) as theirs,
    ):
        for requests in args.requests:
            rates: dict[str, list[float]] = {"hybrid": [], "plain": []}
            same = 0
            for _ in range(args.rounds):
                hybrid.slip.deal(requests * (PROMPT + args.tokens))
                rates["hybrid"].append((got := rate(ours, requests, args.tokens))[0])
                rates["plain"].append((wanted := rate(theirs, requests, args.tokens))[0])
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
    finish({"bench": "batching", "machine": machine(), "tokens": args.tokens, "rows": found})


if __name__ == "__main__":
    main()
