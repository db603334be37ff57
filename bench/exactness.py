"""How exact the hybrid SmolLM2-135M is: KL to the fp32 model beside bf16's own, greedy text, and the bits.

    python bench/exactness.py [--windows 8] [--prompts 20] [--tokens 64] [--outlier-windows 2]

`kl` is the mean Kullback-Leibler divergence per token from the fp32 model's distribution, on Wikipedia text
in windows of 512 tokens.  Greedy texts come from the hybrid through real sockets; one that differs is named
with fp32's logit gap at the first difference.  `outliers` is the same divergence for SmolLM2 and a tiny
random model with activation outliers of x1, x100 and x1000 in every layer that leave the function as it is
(`_outliers`), split alone and against a base.  `layer_error` is the relative error of one product for
random layers of real models' shapes, and what of it is the weights' rounding; `by_norms` with the scale
that a public base has; `two` with `inputs=2`.  The field leaves a wide input fewer bits.  `rest` is what an
input with one entry of 10^6 times the others, which the weights do not make up for, loses of the others.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sliplm
from _common import console, finish, machine, split_smollm2
from _outliers import with_outliers
from sliplm.arithmetic import kernels
from sliplm.arithmetic.fixedpoint import norm_bound
from sliplm.arithmetic.kernels import Matrix
from sliplm.engines.transformers.load import reference
from sliplm.examples import PROMPTS, smollm2, wikipedia
from sliplm.parties.codec import GroupCodec
from sliplm.shares.splitting import GroupSecrets, GroupSplit, split_group

WINDOW = 512
FACTORS = (1, 100, 1000)
SHAPES = ((576, 576), (4096, 4096), (4096, 11008), (8192, 28672))


def divergences(
    models: dict[str, PreTrainedModel], plain: PreTrainedModel, ids: torch.Tensor
) -> dict[str, float]:
    """Mean KL per token of each model from the plain one."""
    totals = dict.fromkeys(models, 0.0)
    windows = torch.split(ids, WINDOW, dim=1)
    with torch.inference_mode():
        for part in track(windows, "KL", console=console):
            truth = log_softmax(plain(part).logits[0].double(), -1)
            for name, model in models.items():
                found = log_softmax(model(part).logits[0].double(), -1)
                totals[name] += float(kl_div(found, truth, log_target=True, reduction="sum"))
    return {name: total / ids.shape[1] for name, total in totals.items()}


def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens that follow a prompt."""
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    following: torch.Tensor = out[0, ids.shape[1] :]
    return following


def compare_texts(
    out: Path, plain: PreTrainedModel, tokenizer: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Texts of the hybrid, through sockets, against the plain model; its bits against the quantised one."""
    differ = []
    local = reference(out)
    with sliplm.open(out) as model:
        text = tokenizer(wikipedia()[:3000], return_tensors="pt").input_ids[:, :256]
        with torch.inference_mode():
            same_bits = torch.equal(model(text).logits, local(text).logits)
        for prompt in track(PROMPTS[: args.prompts], "greedy texts", console=console):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            ).input_ids
            one, two = greedy(plain, ids, args.tokens), greedy(model, ids, args.tokens)
            if not torch.equal(one, two):
                place = int((one != two).nonzero()[0])
                with torch.inference_mode():
                    logits = plain(torch.cat([ids, one[None, :place]], dim=1)).logits[0, -1]
                gap = float(logits[one[place]] - logits[two[place]])
                differ.append({"prompt": prompt, "token": place, "fp32_logit_gap": round(gap, 6)})
    count = min(args.prompts, len(PROMPTS))
    return {
        "bits_equal_quantised": same_bits,
        "prompts": count,
        "tokens": args.tokens,
        "same": count - len(differ),
        "differ": differ,
    }


def tiny(folder: Path) -> Path:
    """A random Llama of two layers, with weights large enough that its answers are no uniform guess."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def outliers(source: Path, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Divergences from the float32 model with outliers, by factor: bf16 and both precisions."""
    found = {}
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            plain = with_outliers(source, folder / "model", factor)
            models = {
                "bf16": AutoModelForCausalLM.from_pretrained(
                    folder / "model", dtype=torch.bfloat16, trust_remote_code=False
                )
            }
            for precision in (12, 8):
                for name, base in (("p", None), ("base p", folder / "model")):
                    out = folder / f"{name}{precision}"
                    recipe = sliplm.Recipe(precision=precision)
                    sliplm.split(
                        folder / "model", out, recipe, base=base, i_know=True, ledger=folder / "ledger"
                    )
                    models[f"{name}{precision}"] = reference(out)
            found[f"x{factor}"] = divergences(models, plain, ids)
    return found


def show(name: str, found: dict[str, dict[str, float]]) -> None:
    """A table of divergences, and beside each how many times that without outliers it is."""
    console.print(table(name, found))


def table(name: str, found: dict[str, dict[str, float]]) -> Table:
    """A column for each factor, which fit 80 columns."""
    table = Table("outliers", *found, title=f"KL to fp32, {name}")
    for kind in next(iter(found.values())):
        table.add_row(
            kind, *(f"{row[kind]:.1e} ({row[kind] / found['x1'][kind]:.2f})" for row in found.values())
        )
    return table


def layer_error(m: int, n: int, precision: int) -> dict[str, float]:
    """Relative error of one product of a random layer [m, n], beside bf16's."""
    rng = np.random.default_rng(n)
    weight = rng.standard_normal((m, n), np.float32) / np.float32(math.sqrt(n))
    x = rng.standard_normal((16, n), np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    parts = split_group("layer", weight, rank=16, precision=precision, rotation="fast")
    by_norms = replace(parts.secrets, norm=norm_bound(parts.w))
    left = np.linalg.norm(weight - parts.secrets.a @ parts.secrets.b) / np.linalg.norm(weight)
    matrix = kernels.prepare(parts.w)
    half = (torch.from_numpy(x).bfloat16() @ torch.from_numpy(weight).bfloat16().T).float().numpy()
    return {
        "ours": _distance(_product(parts.secrets, matrix, x), exact),
        "weights": parts.error * float(left),
        "by_norms": _distance(_product(by_norms, matrix, x), exact),
        "two": _distance(_product(parts.secrets, matrix, x, 2), exact),
        "bf16": _distance(half, exact),
        **_beside_an_outlier(parts, matrix, x[:1], float(np.linalg.norm(exact[0]))),
    }


def _beside_an_outlier(parts: GroupSplit, matrix: Matrix, x: np.ndarray, usual: float) -> dict[str, float]:
    """What rounding an input with an outlier costs its answer, over what the other entries give."""
    secrets, outlier = parts.secrets, x.copy()
    outlier[0, x.size // 2] = 1e6
    z = secrets.rotation_in().apply(outlier)[0].astype(np.float64)
    products = [rows.astype(np.float64) @ z for rows in np.array_split(parts.w, 64)]
    turned = (np.concatenate(products) * secrets.scale)[None].astype(np.float32)
    kept = outlier.astype(np.float64) @ secrets.b.T.astype(np.float64) @ secrets.a.T.astype(np.float64)
    truth = secrets.rotation_out().apply_transpose(turned) + kept
    found = {"rest": _product(secrets, matrix, outlier), "rest_two": _product(secrets, matrix, outlier, 2)}
    return {name: float(np.linalg.norm(product - truth) / usual) for name, product in found.items()}


def _product(secrets: GroupSecrets, matrix: Matrix, x: np.ndarray, inputs: int = 1) -> np.ndarray:
    codec = GroupCodec(secrets)
    out = np.empty((len(x), codec.m), np.float32)
    codec.here(x, out, matrix.product, inputs=inputs)
    return out


def _distance(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to continue each with")
    parser.add_argument("--outlier-windows", type=int, default=2, help="windows for models with outliers")
    args = parser.parse_args()
    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    ids = tokenizer(wikipedia()[: 4000 * args.windows], return_tensors="pt").input_ids[
        :, : WINDOW * args.windows
    ]
    models = {
        "bf16": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=False),
        "p12": reference(split_smollm2(12)),
        "p8": reference(split_smollm2(8)),
    }
    kl = divergences(models, plain, ids)
    texts = {
        f"p{precision}": compare_texts(split_smollm2(precision), plain, tokenizer, args)
        for precision in (12, 8)
    }
    wide = {f"n{n}_p{b}": layer_error(m, n, b) for m, n in SHAPES for b in (12, 8)}
    with tempfile.TemporaryDirectory() as folder:
        random = torch.randint(512, (1, 4 * WINDOW), generator=torch.Generator().manual_seed(0))
        extreme = {"tiny": outliers(tiny(Path(folder)), random)}
    extreme["smollm2"] = outliers(source, ids[:, : WINDOW * args.outlier_windows])
    for name, found in extreme.items():
        show(name, found)
    for name, value in kl.items():
        console.print(f"KL to fp32, {name}: {value:.2e} over {ids.shape[1]} tokens")
    for name, text in texts.items():
        console.print(
            f"{name}: {text['same']} of {text['prompts']} greedy texts of {text['tokens']} tokens are fp32's"
        )
    document = {
        "bench": "exactness",
        "machine": machine(),
        "kl_tokens": ids.shape[1],
        "kl": kl,
        "greedy": texts,
    }
    finish({**document, "outliers": extreme, "layer_error": wide})


if __name__ == "__main__":
    main()
