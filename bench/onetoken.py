"""Where the time of one decoded token goes, or of one of several sequences each, beside the plain model's in
the same run.

The functions on the way of one token (docs/ARCHITECTURE.md) are wrapped in clocks; each figure is what a
function takes by itself, without those named below it, and with what the clocks add: half a microsecond a
call.  The worker's time is its own word.  Masks are dealt before.

    python bench/onetoken.py [--bits 12] [--rows 1] [--tokens 48]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Final

import torch
from rich.table import Table
from transformers import AutoTokenizer

import sliplm
from _common import console, finish, machine, split_smollm2
from _sides import HEAD, SHORT, Side
from sliplm.arithmetic import field, steps
from sliplm.engines.modules import GroupProduct, SlipLinear
from sliplm.examples import smollm2, wikipedia
from sliplm.network.link import Link
from sliplm.network.transport import Connection
from sliplm.parties.codec import GroupCodec
from sliplm.parties.counters import Counters
from sliplm.parties.exchange import Exchange
from sliplm.parties.supply import Supply
from sliplm.parties.vault import Vault
from sliplm.parties.workforce import Workforce

WAY: Final[tuple[tuple[str, Any, str], ...]] = (
    ("split layers, checks and results", SlipLinear, "forward"),
    ("a group's members, the input kept", GroupProduct, "rows_of"),
    ("vault: shape, room for the answer", Vault, "product"),
    ("exchange: the order of steps", Exchange, "run"),
    ("masks: taken and burnt", Supply, "take"),
    ("codec of steps 1 and 2", GroupCodec, "ask"),
    ("  step 1, 2: rotate, scale, mask", steps, "ask"),
    ("whose turn it is", Workforce, "pick"),
    ("link: headers, the turn", Link, "exchange"),
    ("sending", Connection, "send"),
    ("codec of what needs no answer", GroupCodec, "ahead"),
    ("  A (B x), <c, x~>", steps, "ahead"),
    ("waiting, receiving", Connection, "receive"),
    ("codec of step 4", GroupCodec, "holds"),
    ("  step 4: the check", field, "holds"),
    ("codec of step 5", GroupCodec, "opened"),
    ("  step 5: unmask, rotate back", steps, "opened"),
    ("who served how fast", Workforce, "served"),
    ("counters", Counters, "exchanged"),
)
"""What the table says, and the function."""


class Clocks:
    """Nanoseconds of each function by itself, and calls."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner = [0]

    def wrap(self, name: str, owner: Any, attribute: str) -> None:
        """Clock a function from now on."""
        function: Callable[..., Any] = getattr(owner, attribute)
        own, calls, inner = self.own, self.calls, self._inner

        def clocked(*args: Any, **options: Any) -> Any:
            start, outside = perf_counter_ns(), inner[0]
            inner[0] = 0
            try:
                return function(*args, **options)
            finally:
                took = perf_counter_ns() - start
                own[name] += took - inner[0]
                calls[name] += 1
                inner[0] = outside + took

        setattr(owner, attribute, clocked)

    def clear(self) -> None:
        """Begin again."""
        self.own.clear()
        self.calls.clear()


def decode(model: Any, ids: torch.Tensor, tokens: int, begin: Callable[[], None]) -> float:
    """Seconds a token, after a prompt; `begin` is called between."""
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
        begin()
        start = perf_counter_ns()
        for _ in range(tokens):
            following = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(following, past_key_values=out.past_key_values, use_cache=True)
        return (perf_counter_ns() - start) / tokens / 1e9


def row(what: str, calls: float, token: float) -> dict[str, Any]:
    """A row of the table: microseconds of all calls in one token."""
    return {"what": what, "calls": calls, "call": token / max(calls, 1e-9), "token": token}


def table(rows: list[dict[str, Any]], total: float, bits: int) -> Table:
    """A row for each function."""
    table = Table(f"{bits} bits", "calls", "us a call", "us a token", "of it")
    for each in rows:
        cells = f"{each['calls']:.0f}", f"{each['call']:.1f}", f"{each['token']:.0f}"
        table.add_row(each["what"], *cells, f"{each['token'] / total:.1%}")
    return table


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=12, help="precision of the split")
    parser.add_argument("--rows", type=int, default=1, help="sequences at once")
    parser.add_argument("--tokens", type=int, default=48, help="decoded tokens of each")
    args = parser.parse_args()
    with Side("Plain", prompt=args.rows * SHORT) as plain:
        found = {
            d: plain.call("decode", dtype=d, rows=args.rows, tokens=args.tokens)
            for d in ("float32", "bfloat16")
        }
    base = {name: 1e6 * each["seconds"] / args.tokens for name, each in found.items()}
    text = AutoTokenizer.from_pretrained(smollm2(), trust_remote_code=False)(wikipedia()[:20_000])
    ids, clocks = torch.tensor(text.input_ids[: args.rows * SHORT]).reshape(args.rows, SHORT), Clocks()
    with sliplm.open(split_smollm2(args.bits), ahead=0) as model:
        vault: Any = model.slip
        inner = [name for name in vault.groups if name != HEAD]
        vault.deal(args.rows * (2 * args.tokens + 3 * SHORT + 8), inner)
        vault.deal(args.rows * (2 * args.tokens + 11), [HEAD])
        decode(model, ids, 8, clocks.clear)
        bare = 1e6 * decode(model, ids, args.tokens, clocks.clear)
        for name, owner, attribute in WAY:
            clocks.wrap(name, owner, attribute)
        seconds = 0.0

        def begin() -> None:
            nonlocal seconds
            clocks.clear()
            seconds = vault.counters.seconds_worker

        total = 1e6 * decode(model, ids, args.tokens, begin)
        worker = 1e6 * (vault.counters.seconds_worker - seconds) / args.tokens
    way = [
        row(name, clocks.calls[name] / args.tokens, clocks.own[name] / 1e3 / args.tokens) for name, *_ in WAY
    ]
    exchanges = clocks.calls["exchange: the order of steps"] / args.tokens
    rows = [
        row("all else in the model", 1, total - sum(each["token"] for each in way)),
        *way,
        row("worker, of the waiting", exchanges, worker),
        row("one token, with clocks", 1, total),
        row("one token, without", 1, bare),
        *(row(f"one token, plain {kind}", 1, took) for kind, took in base.items()),
    ]
    console.print(table(rows, total, args.bits))
    document = {"bench": "onetoken", "machine": machine(), "bits": args.bits, "sequences": args.rows}
    finish({**document, "rows": rows, "plain": base})


if __name__ == "__main__":
    main()
