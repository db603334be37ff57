"""How exact SmolLM2-135M is with its vault, and its worker, on an NVIDIA card.

    python bench/oncard.py [--bits 12,8] [--windows 4]

The mean Kullback-Leibler divergence per token, over English text of this repository's documents in windows of
512 tokens: of the split model with its activations on the card from itself on the processor; and of that in
bfloat16 from the plain float32 model, beside what bfloat16 costs the plain model on the same card.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import sliplm
from _common import console, finish, machine
from sliplm.examples import smollm2

WINDOW = 512
DOCUMENTS = Path(__file__).parents[1] / "docs"
TEXTS = ("tutorial.md", "operations.md", "THREAT_MODEL.md", "LIMITATIONS.md")


def truth(model: Any, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Its log-probabilities, float64 [tokens, words] of each window."""
    with torch.no_grad():
        return [log_softmax(model(part.to(model.device)).logits[0].double(), -1).cpu() for part in windows]


def divergence(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Mean KL per token, in nats."""
    pairs = zip(found, wanted, strict=True)
    total = sum(float(kl_div(one, other, log_target=True, reduction="sum")) for one, other in pairs)
    return total / sum(len(each) for each in wanted)


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", default="12,8")
    parser.add_argument("--windows", type=int, default=4)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        finish({"bench": "oncard", "skipped": "there is no NVIDIA card here, or PyTorch is not for CUDA"})
        return
    source = smollm2()
    text = "\n".join((DOCUMENTS / name).read_text() for name in TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : WINDOW * asked.windows]
    windows = list(torch.split(ids, WINDOW, dim=1))
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    exact = truth(plain, windows)
    half: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=False)
    found: dict[str, Any] = {"tokens": ids.shape[1]}
    found["plain_bf16"] = divergence(truth(half.to("cuda"), windows), exact)
    with tempfile.TemporaryDirectory() as temporary:
        for bits in map(int, asked.bits.split(",")):
            out = Path(temporary) / str(bits)
            sliplm.split(
                source, out, sliplm.Recipe(precision=bits), i_know=True, ledger=Path(temporary) / "ledger"
            )
            with sliplm.open(out, ahead=0, deal_on="cuda") as model:
                here = truth(model, windows)
                found[f"p{bits}"] = divergence(here, exact)
                found[f"p{bits}_card_to_itself"] = divergence(truth(model.to("cuda"), windows), here)
            with sliplm.open(out, ahead=0, deal_on="cuda", dtype=torch.bfloat16) as model:
                found[f"p{bits}_card_bf16"] = divergence(truth(model.to("cuda"), windows), exact)
            console.print(found)
    finish({"bench": "oncard", "machine": machine() | {"card": torch.cuda.get_device_name()}, "kl": found})


if __name__ == "__main__":
    main()
