"""Decode and prefill speed of the hybrid SmolLM2-135M against the plain fp32 model, in one run.

Vault and worker share the machine: TLS 1.3 with client certificates on loopback, every product verified.
Masks are dealt before the clock starts, in memory or (`pool`) on disk, burnt durably there before their use;
but for `meanwhile`: dealt in the background while tokens are made.  `guards` is the share of a token's time
that burning masks and checking products take.
Rounds alternate plain and hybrid; figures are medians.

    python bench/decode.py [--tokens 48] [--rounds 7] [--prompt 512]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: as the command line does

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sliplm
from _common import console, decode, finish, machine, median, prefill, seconds, split_smollm2
from sliplm.examples import smollm2, wikipedia

HEAD = "lm_head"
PHASES = ("vault", "burn", "check", "link", "worker")


def phases(model: Any, before: dict[str, float], steps: int) -> dict[str, float]:
    """Milliseconds a token, by where they went, since the counters `before`."""
    now = model.slip.counters.as_dict()
    return {name: 1e3 * (now[f"seconds_{name}"] - before[f"seconds_{name}"]) / steps for name in PHASES}


def measure(
    plain: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace, precision: int
) -> dict[str, Any]:
    """All figures of one precision."""
    out = split_smollm2(precision)
    result: dict[str, Any] = {"precision": precision}
    with sliplm.open(out, ahead=0) as model:
        vault: Any = model.slip
        names = list(vault.groups)
        inner = [name for name in names if name != HEAD]
        short, steps = ids[:, :32], args.tokens

        def deal_for(prompt: int, tokens: int) -> None:
            vault.deal(prompt + tokens, inner)
            vault.deal(1 + tokens, [HEAD])

        deal_for(32, steps)
        decode(plain, short, 4), decode(model, short, 4)
        rows: list[dict[str, float]] = []
        for _ in range(args.rounds):
            deal_for(32, steps)
            one, expected = decode(plain, short, steps)
            before = vault.counters.as_dict()
            two, found = decode(model, short, steps)
            rows.append(
                {
                    "plain": steps / one,
                    "hybrid": steps / two,
                    "ratio": one / two,
                    **phases(model, before, steps),
                }
            )
            rows[-1]["guards"] = (rows[-1]["burn"] + rows[-1]["check"]) * steps / (1e3 * two)
            rows[-1]["same"] = float(found == expected)
            if vault.counters.rows_dealt_late != before["rows_dealt_late"]:
                raise RuntimeError("masks ran out in a round that should have had them ready")
        result["decode"] = {key: median([row[key] for row in rows]) for key in rows[0]}

        fills = []
        for _ in range(max(3, args.rounds // 2)):
            deal_for(ids.shape[1], 0)
            before = vault.counters.as_dict()
            fills.append((prefill(plain, ids), prefill(model, ids), phases(model, before, 1)))
        result["prefill"] = {
            "tokens": ids.shape[1],
            "plain_seconds": median([one for one, _, _ in fills]),
            "hybrid_seconds": median([two for _, two, _ in fills]),
            "ratio": median([one / two for one, two, _ in fills]),
            **{f"{name}_seconds": median([p[name] / 1e3 for _, _, p in fills]) for name in PHASES},
        }

        spent = median([seconds(lambda: vault.deal(64)) for _ in range(3)])
        held = vault.mask_bytes()
        vault.deal(64)
        result["dealing"] = {
            "masks_per_second": round(64 / spent, 1),
            "milliseconds_per_token": round(1e3 * spent / 64, 3),
            "bytes_per_token": (vault.mask_bytes() - held) // 64,
        }
    with sliplm.open(out, ahead=64) as model:
        vault = model.slip
        ratios = []
        decode(model, short, 4)
        for _ in range(max(3, args.rounds // 2)):
            vault.wait_dealt(60)
            one, _ = decode(plain, short, 4 * steps)
            two, _ = decode(model, short, 4 * steps)
            ratios.append(one / two)
        result["decode_dealing_meanwhile"] = {"tokens": 4 * steps, "ratio": median(ratios)}
    result["pool"] = measure_pool(plain, short, out, args)
    return result


def measure_pool(
    plain: PreTrainedModel, short: torch.Tensor, out: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Decoding with masks from a pool on disk, and a fresh anchor on the same disk."""
    steps, rows = args.tokens, []
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        os.environ["SLIPLM_STATE"] = str(Path(folder) / "anchors")
        tokens = (args.rounds + 1) * (steps + short.shape[1]) + 64
        deal = ["deal", str(out / "vault"), str(Path(folder) / "pool"), "--tokens", str(tokens)]
        subprocess.run([sys.executable, "-m", "sliplm", *deal], check=True, stdout=sys.stderr)
        with sliplm.open(out, pool=Path(folder) / "pool") as model:
            decode(model, short, steps)
            for _ in range(args.rounds):
                one, _ = decode(plain, short, steps)
                before = model.slip.counters.as_dict()
                two, _ = decode(model, short, steps)
                spent = phases(model, before, steps)
                guards = (spent["burn"] + spent["check"]) * steps / (1e3 * two)
                rows.append({"ratio": one / two, **spent, "guards": guards})
            if model.slip.counters.rows_dealt:
                raise RuntimeError("the pool ran out in a round that should have had enough")
    return {key: median([row[key] for row in rows]) for key in rows[0]}


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A column for each precision."""
    table = Table("", *(f"{result['precision']} bits" for result in results))
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "plain, tokens/s": lambda r: f"{r['decode']['plain']:.1f}",
        "hybrid, tokens/s": lambda r: f"{r['decode']['hybrid']:.1f}",
        "ratio": lambda r: f"{r['decode']['ratio']:.2f}",
        "ratio, masks dealt meanwhile": lambda r: f"{r['decode_dealing_meanwhile']['ratio']:.2f}",
        "ratio, masks from a pool": lambda r: f"{r['pool']['ratio']:.2f}",
        "guards": lambda r: f"{r['decode']['guards']:.1%}",
        "guards, with a pool": lambda r: f"{r['pool']['guards']:.1%}",
        **{f"{phase}, ms a token": partial(_phase, phase) for phase in PHASES},
        "prompt, ratio": lambda r: f"{r['prefill']['ratio']:.2f}",
        "masks dealt a second": lambda r: f"{r['dealing']['masks_per_second']:.0f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, results))
    return table


def _phase(phase: str, result: dict[str, Any]) -> str:
    return f"{result['decode'][phase]:.2f}"


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=48, help="decoded tokens a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    args = parser.parse_args()
    document: dict[str, Any] = {"bench": "decode", "machine": machine(), "results": []}
    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    ids = tokenizer(wikipedia()[:20_000], return_tensors="pt").input_ids[:, : args.prompt]
    for precision in (12, 8):
        result = measure(plain, ids, args, precision)
        document["results"].append(result)
    console.print(table(document["results"]))
    finish(document)


if __name__ == "__main__":
    main()
