"""Decode and prefill speed of the hybrid SmolLM2-135M against the plain model as anybody runs it.

The plain model is in a process of its own, with torch's default settings, in float32 and in bfloat16: each
ratio is against the faster of the two.  Rounds alternate: one side is timed, the others sleep.  Medians.
Vault and worker share the machine, every product is verified.

example     `sliplm.open`, and at once a prompt and tokens: default settings, masks dealt in the background
host        the same with all masks ready; and the vault's processor seconds over the plain model's
tls         the same over TLS 1.3 with client certificates on loopback
eight       eight sequences at once, masks ready
prompt      a long prompt, masks ready
sustained   four times as many tokens, until all masks that they took are made again
pool        masks from a pool on disk, burnt durably there before their use
two         two vaults on one worker, each in a process of its own: tokens of both, over those of one plain
            model

    python bench/decode.py [--cases host,tls] [--bits 12,8] [--tokens 48] [--rounds 5] [--prompt 512]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

from rich.table import Table

from _common import console, finish, machine, median
from _sides import PHASES, SHORT, Side

DTYPES: Final = ("float32", "bfloat16")
ROWS_AT_ONCE: Final = 8
LONGER: Final = 4  # times the tokens, for what has to last

Case = Callable[[Side, int, argparse.Namespace, ExitStack], list[dict[str, Any]]]


def plain_decode(plain: Side, rows: int, tokens: int) -> dict[str, Any]:
    """Both plain models' decoding."""
    return {dtype: plain.call("decode", dtype=dtype, rows=rows, tokens=tokens) for dtype in DTYPES}


def example(plain: Side, bits: int, args: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    """As the README has it."""
    hybrid = stack.enter_context(Side("Hybrid", bits=bits, prompt=args.prompt))
    rounds = []
    for _ in range(args.rounds):
        hybrid.call("rest")
        found = plain_decode(plain, 1, args.tokens)
        hybrid.call("reopen")
        rounds.append({**found, "hybrid": hybrid.call("decode", rows=1, tokens=args.tokens)})
    return rounds


def ready(link: str = "own", rows: int = 1, part: int = 1) -> Case:
    """Masks ready before; a `part`th of the tokens."""

    def case(plain: Side, bits: int, args: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
        hybrid = stack.enter_context(Side("Hybrid", bits=bits, prompt=args.prompt, link=link, ahead=0))
        rounds, tokens = [], args.tokens // part
        for _ in range(args.rounds):
            hybrid.call("deal", rows=rows, tokens=tokens)
            found = plain_decode(plain, rows, tokens)
            rounds.append({**found, "hybrid": hybrid.call("decode", rows=rows, tokens=tokens)})
            if rounds[-1]["hybrid"]["late"]:
                raise RuntimeError("masks ran out in a round that should have had them ready")
        if link == "own" and rows == 1:
            rounds[-1]["dealing"] = median([hybrid.call("dealing")["seconds"] / 64 for _ in range(3)])
        return rounds

    return case


def prompt(plain: Side, bits: int, args: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    """A long prompt."""
    hybrid = stack.enter_context(Side("Hybrid", bits=bits, prompt=args.prompt, ahead=0))
    rounds = []
    for _ in range(args.rounds):
        hybrid.call("deal", rows=1, tokens=0, prompt=args.prompt)
        found = {dtype: plain.call("prompt", dtype=dtype) for dtype in DTYPES}
        rounds.append({**found, "hybrid": hybrid.call("prompt")})
    return rounds


def sustained(plain: Side, bits: int, args: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    """Decoding, and the dealing of what it takes."""
    hybrid = stack.enter_context(Side("Hybrid", bits=bits, prompt=args.prompt))
    rounds, tokens = [], LONGER * args.tokens
    for _ in range(args.rounds):
        hybrid.call("wait")
        found = plain_decode(plain, 1, tokens)
        took = hybrid.call("decode", rows=1, tokens=tokens)
        took["seconds"] += hybrid.call("wait")["seconds"]
        rounds.append({**found, "hybrid": took})
    return rounds


def pool(plain: Side, bits: int, args: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    """Masks from the disk."""
    need = (args.rounds + 1) * (args.tokens + SHORT) + 64
    hybrid = stack.enter_context(Side("Hybrid", bits=bits, prompt=args.prompt, pool=need))
    rounds = []
    for _ in range(args.rounds):
        found = plain_decode(plain, 1, args.tokens)
        rounds.append({**found, "hybrid": hybrid.call("decode", rows=1, tokens=args.tokens)})
        if rounds[-1]["hybrid"]["late"]:
            raise RuntimeError("the pool ran out in a round that should have had enough")
    return rounds


def two(plain: Side, bits: int, args: argparse.Namespace, stack: ExitStack) -> list[dict[str, Any]]:
    """Two vaults of one worker decode together."""
    options: dict[str, Any] = {"bits": bits, "prompt": args.prompt, "ahead": 0}
    one = stack.enter_context(Side("Hybrid", **options))
    other = stack.enter_context(Side("Hybrid", **options, link=one.call("worker")["address"]))
    rounds = []
    for _ in range(args.rounds):
        for vault in (one, other):
            vault.call("deal", rows=1, tokens=args.tokens)
        found = plain_decode(plain, 1, args.tokens)
        for vault in (one, other):
            vault.start("decode", rows=1, tokens=args.tokens)
        took = [vault.result() for vault in (one, other)]
        slower = max(took, key=lambda each: float(each["seconds"]))
        rounds.append({**found, "hybrid": {**slower, "seconds": slower["seconds"] / 2}})
    return rounds


CASES: Final[dict[str, tuple[str, Case]]] = {
    "example": ("the README's example", example),
    "host": ("same host, masks ready", ready()),
    "tls": ("TLS on loopback, masks ready", ready("tls")),
    "eight": (f"{ROWS_AT_ONCE} sequences at once", ready(rows=ROWS_AT_ONCE, part=2)),
    "prompt": ("a long prompt", prompt),
    "sustained": ("with all dealing, sustained", sustained),
    "pool": ("masks from a pool", pool),
    "two": ("two vaults on one worker, both", two),
}
"""By name: what the table says, and how it is measured."""


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a case's rounds."""
    base = min(DTYPES, key=lambda dtype: median([each[dtype]["seconds"] for each in rounds]))
    result: dict[str, Any] = {"base": base}
    for name in (*DTYPES, "hybrid"):
        result[f"{name}_seconds"] = median([each[name]["seconds"] for each in rounds])
    for name in DTYPES:
        result[f"over_{name}"] = median([e[name]["seconds"] / e["hybrid"]["seconds"] for e in rounds])
    result["ratio"] = result[f"over_{base}"]
    if "cpu" in rounds[0]["hybrid"]:
        tokens = len(rounds[0]["hybrid"]["tokens"])
        result["cpu"] = median([each["hybrid"]["cpu"] / each[base]["cpu"] for each in rounds])
        result["same"] = median([each["hybrid"]["tokens"] == each["float32"]["tokens"] for each in rounds])
        result["tokens"] = tokens
        for name in ("late", *PHASES):
            result[name] = median([each["hybrid"][name] for each in rounds])
    if "dealing" in rounds[-1]:
        result["masks_per_second"] = round(1 / rounds[-1]["dealing"], 1)
    return result


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A row for each case, a column for each precision."""
    table = Table("over the faster plain model", *(f"{result['bits']} bits" for result in results))

    def row(name: str, case: str, form: Callable[[dict[str, Any]], str]) -> None:
        if any(case in result for result in results):
            table.add_row(name, *(form(result[case]) if case in result else "" for result in results))

    for dtype in DTYPES:
        row(f"plain {dtype}, tokens/s", "host", lambda r, d=dtype: _rate(r, d))  # type: ignore[misc]
    row("hybrid, tokens/s", "host", lambda r: _rate(r, "hybrid"))
    for case, (name, _) in CASES.items():
        row(name, case, lambda r: f"{r['ratio']:.2f}")
        if case == "prompt":
            row(f"{name}, over float32", case, lambda r: f"{r['over_float32']:.2f}")
    row("vault's processor seconds", "host", lambda r: f"{r['cpu']:.2f}")
    for phase in PHASES:
        row(f"{phase}, ms a token", "host", lambda r, p=phase: f"{r[p]:.2f}")  # type: ignore[misc]
    row("masks dealt a second", "host", lambda r: f"{r['masks_per_second']:.0f}")
    return table


def _rate(result: dict[str, Any], who: str) -> str:
    return f"{result['tokens'] / result[f'{who}_seconds']:.1f}"


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas")
    parser.add_argument("--bits", default="12,8", help="precisions, with commas")
    parser.add_argument("--tokens", type=int, default=48, help="decoded tokens a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt")
    args = parser.parse_args()
    document: dict[str, Any] = {"bench": "decode", "machine": machine(), "rounds": args.rounds, "results": []}
    with Side("Plain", prompt=args.prompt) as plain:
        for bits in map(int, args.bits.split(",")):
            result: dict[str, Any] = {"bits": bits}
            document["results"].append(result)
            for name in args.cases.split(","):
                with ExitStack() as stack:
                    result[name] = summary(CASES[name][1](plain, bits, args, stack))
                shown = {key: value for key, value in result[name].items() if key not in PHASES}
                console.print(bits, name, shown, soft_wrap=True)
    console.print(table(document["results"]))
    finish(document)


if __name__ == "__main__":
    main()
