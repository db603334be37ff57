"""Fine-tunes of SmolLM2-135M against SmolLM2: how exact an adapter is, what a cut costs, what it all takes.

    python bench/public_base.py [--steps 12] [--windows 4] [--tokens 32]

An adapter (rank 16 on every linear layer) and all weights are trained for some steps on one part of the
Wikipedia text; `kl` is the mean Kullback-Leibler divergence per token from the fine-tuned fp32 model (for the
adapter: peft's own merge) on another part, beside that of the same model in bf16.  `full` cuts the full
fine-tune at several ranks and energies.  `from_rounded` is the error |W - s w - A B| of a
matrix with the difference taken from the base, over that with the difference taken from the rounded
base s w.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sliplm
from _common import console, decode, finish, machine
from sliplm import Recipe
from sliplm.arithmetic.fixedpoint import quantise_rows
from sliplm.engines.transformers.load import reference
from sliplm.engines.transformers.perplexity import divergence, perplexity
from sliplm.examples import smollm2, wikipedia
from sliplm.shares.publicbase import frobenius, split_difference
from sliplm.shares.splitting import top_triplets

WINDOW = 256
CUTS = {
    "rank16": Recipe(rank=16),
    "rank64": Recipe(rank=64),
    "energy0.5": Recipe(energy=0.5),
    "energy0.9": Recipe(energy=0.9),
    "energy0.99": Recipe(energy=0.99),
}


def train(model: Any, tokens: torch.Tensor, steps: int, rate: float) -> None:
    """Some steps of AdamW, a window each."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for part in track(torch.split(tokens, WINDOW)[:steps], "training", console=console):
        model(part[None], labels=part[None]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def fine_tunes(base: Path, folder: Path, tokens: torch.Tensor, steps: int) -> tuple[Path, Path]:
    """An adapter and a full fine-tune of the base."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False), config
    )
    train(tuned, tokens, steps, 1e-3)
    tuned.save_pretrained(str(folder / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    train(model, tokens, steps, 5e-5)
    model.save_pretrained(folder / "full")
    return folder / "adapter", folder / "full"


def half(model: PreTrainedModel) -> PreTrainedModel:
    """The model in bf16; it is not of use in fp32 after that."""
    return model.to(torch.bfloat16)


def digest(out: Path) -> str:
    """Of both files of a worker folder."""
    found = hashlib.sha256()
    for file in sorted((out / "worker").iterdir()):
        found.update(file.read_bytes())
    return found.hexdigest()


def adapter_figures(out: Path, base: Path, adapter: Path, tokens: torch.Tensor, count: int) -> dict[str, Any]:
    """Closeness to peft's merged model, and decoding with and without the adapter: the best of five."""
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False), adapter
    ).merge_and_unload()
    hybrid = reference(out, adapter="tuned")
    found: dict[str, Any] = {
        "perplexity": {
            "base": perplexity(reference(out), tokens, WINDOW),
            "merged": perplexity(merged, tokens, WINDOW),
            "split": perplexity(hybrid, tokens, WINDOW),
        },
        "kl": {"split": divergence(hybrid, merged, tokens, WINDOW)},
    }
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    rough = half(PeftModel.from_pretrained(plain, adapter).merge_and_unload())
    found["kl"]["bf16"] = divergence(rough, merged, tokens, WINDOW)
    found["kl_bf16_over_split"] = found["kl"]["bf16"] / found["kl"]["split"]
    seconds: dict[str, list[float]] = {"base": [], "tuned": []}
    with sliplm.open(out) as model:
        for _ in track(range(5), "decoding", console=console):
            for name, times in seconds.items():
                model.slip.deal(count + 16)
                model.slip.wait_dealt(60)
                with model.slip.adapter(name):
                    times.append(decode(model, tokens[None, :16], count)[0])
    found["decode_tokens_per_second"] = {name: count / min(times) for name, times in seconds.items()}
    found["decode_time_over_base"] = min(seconds["tuned"]) / min(seconds["base"])
    return found


def full_figures(folder: Path, base: Path, full: Path, tokens: torch.Tensor, share: str) -> dict[str, Any]:
    """What each cut of the full fine-tune loses and costs."""
    truth = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32, trust_remote_code=False)
    rough = AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16, trust_remote_code=False)
    found: dict[str, Any] = {"kl_bf16": divergence(rough, truth, tokens, WINDOW)}
    found["kl_base"] = divergence(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False),
        truth,
        tokens,
        WINDOW,
    )
    for name, recipe in CUTS.items():
        report = sliplm.split(full, folder / name, recipe, base=base)
        ranks = [group.rank for group in report.groups]
        found[name] = {
            "change": report.change,
            "left_out": report.left_out,
            "ranks": [min(ranks), statistics.median(ranks), max(ranks)],
            "vault_macs_share": report.vault_macs_share,
            "vault_bytes_share": report.vault_bytes_share,
            "kl": divergence(reference(folder / name), truth, tokens, WINDOW),
            "worker_is_the_base_s": digest(folder / name) == share,
        }
        console.print(f"{name}: {found[name]}")
    return found


def from_rounded(base: Path, full: Path, rank: int = 16) -> dict[str, float]:
    """Error of three matrices with D = W - W_base, over that with D = W - s w."""
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        for path in (full, base)
    ]
    found = {}
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        weight, public = (
            model.get_submodule(f"model.layers.10.{name}").weight.detach().numpy() for model in models
        )
        for precision in (12, 8):
            w, scale = quantise_rows(public, precision)
            rounded = (w * scale[:, None]).astype(np.float32)
            part, _ = split_difference(name, weight, public, rank=rank, precision=precision)
            ours = frobenius(weight - rounded - part.secrets.a @ part.secrets.b)
            a, b = top_triplets(weight - rounded, rank)
            found[f"{name} p{precision}"] = ours / frobenius(weight - rounded - a @ b)
    return found


def main() -> None:
    """Measure and end with one JSON line."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of training, 256 tokens each")
    parser.add_argument("--windows", type=int, default=4, help="windows of 256 tokens to measure on")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode, five times each way")
    args = parser.parse_args()
    base = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    ids = tokenizer(wikipedia()[:200_000], return_tensors="pt").input_ids[0]
    training, held_out = ids[: args.steps * WINDOW], ids[-args.windows * WINDOW :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter, full = fine_tunes(base, folder, training, args.steps)
        sliplm.split(base, folder / "alone", base=base)
        report = sliplm.split(base, folder / "out", base=base, adapters={"tuned": adapter})
        share = digest(folder / "alone")
        document = {
            "bench": "public_base",
            "machine": machine(),
            "steps": args.steps,
            "kl_tokens": len(held_out),
            "adapter": {
                **report.adapters[0].model_dump(),
                "vault_macs_share": report.vault_macs_share,
                "worker_is_the_base_s": digest(folder / "out") == share,
                **adapter_figures(folder / "out", base, adapter, held_out, args.tokens),
            },
        }
        console.print(document["adapter"])
        document["full"] = full_figures(folder, base, full, held_out, share)
        document["from_rounded"] = from_rounded(base, full)
        finish(document)


if __name__ == "__main__":
    main()
