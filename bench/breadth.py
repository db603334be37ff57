"""Beyond language models: a network for digits, EfficientNet-lite0 and MiniLM, each split, run and stolen.

    python bench/breadth.py [--crops 9] [--paragraphs 100]

Three tables of removal: what the model is worth to a thief who runs the worker's share as it is, when the top
k singular triplets of every matrix are kept from him.  `residual` is the plain split, W - A_k B_k in its own
basis, exact; `rotated` is what a worker really gets, in a secret basis and as 12-bit integers, with the true
norm of every row given back to the thief.  Whatever is no split matrix he has for nothing: embeddings, norms,
biases, depthwise convolutions.  A matrix with fewer than k triplets is gone.  `split` compares the hybrid
(a worker process, masks, checks) with the quantised model, bit for bit, and with the original; `seconds` are
those of one call, with all masks dealt while it waits, and with masks ready.  `no share` is the line to
compare with: a thief who has all the rest, and random matrices with rows of the true norms; `a guess` is the
commonest answer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import sliplm
from _common import console, finish, machine, seconds
from sliplm.arithmetic.equilibration import equilibrated
from sliplm.arithmetic.field import derive_key
from sliplm.arithmetic.fixedpoint import quantise_rows
from sliplm.engines.groups import Group
from sliplm.engines.torch.load import reference_module
from sliplm.engines.torch.trace import trace
from sliplm.engines.transformers.layout import discover
from sliplm.engines.transformers.load import reference
from sliplm.examples import minilm, wikipedia
from sliplm.examples.digits import accuracy, digits, digits_mlp, digits_skeleton
from sliplm.examples.efficientnet import efficientnet_lite0, photographs, skeleton
from sliplm.examples.minilm import embed
from sliplm.planning.counts import SplitReport
from sliplm.shares.splitting import rotate_both, top_triplets

RANK = {"digits": 8, "efficientnet": 8, "minilm": 16}
RANKS = {
    "digits": (0, 1, 2, 4, 8, 16, 32),
    "efficientnet": (0, 1, 2, 4, 8, 16, 32),
    "minilm": (0, 1, 2, 4, 8, 16, 32, 64, 128),
}
Quality = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A trained model, its groups, and what it is worth."""

    name: str
    title: str
    model: nn.Module
    groups: Sequence[Group]
    quality: Callable[[nn.Module], Quality]
    quantised: Callable[[Path], Any]  # split into a folder, and what that computes
    guess: Quality  # what the commonest answer is worth


# --- removal -------------------------------------------------------------------------------------------


def removal(subject: Subject) -> list[dict[str, Any]]:
    """A line for each number of removed triplets: {"k": ..., "residual": {...}, "rotated": {...}}."""
    matrices = {group.name: _matrix(subject.model, group) for group in subject.groups}
    most = max(RANKS[subject.name])
    triplets = {name: top_triplets(w, min(most, *w.shape)) for name, w in matrices.items()}
    rows = []
    for k in RANKS[subject.name]:
        lines: dict[str, Any] = {"k": k}
        for kind in ("residual", "rotated"):
            stolen = copy.deepcopy(subject.model)
            for group in subject.groups:
                w, (a, b) = matrices[group.name], triplets[group.name]
                rest = w - a[:, :k] @ b[:k]
                _put(stolen, group, rest if kind == "residual" else _as_it_is(group.name, w, rest))
            lines[kind] = {name: round(value, 4) for name, value in subject.quality(stolen).items()}
        rows.append(lines)
    return rows


def without(subject: Subject, seeds: Sequence[int] = (0, 1, 2)) -> Quality:
    """What a thief has without the share, but all the rest: random matrices with rows of the true norms."""
    found = []
    for seed in seeds:
        stolen, rng = copy.deepcopy(subject.model), np.random.default_rng(seed)
        for group in subject.groups:
            w = _matrix(subject.model, group)
            noise = rng.standard_normal(w.shape, np.float32)
            _put(stolen, group, noise * _ratio(w, noise))
        found.append(subject.quality(stolen))
    return {name: statistics.mean(quality[name] for quality in found) for name in subject.guess}


def _as_it_is(name: str, w: Any, rest: Any) -> Any:
    """The worker's integers, each row scaled to the true one's norm."""
    hidden = rotate_both(equilibrated(rest).matrix, "fast", derive_key(bytes(32), name))
    integers = quantise_rows(hidden, 12)[0].astype(np.float32)
    return integers * _ratio(w, integers)


def _ratio(w: Any, rows: Any) -> Any:
    """What brings each row to the true one's norm."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.linalg.norm(w, axis=1, keepdims=True) / np.where(norms > 0, norms, 1)


def _matrix(model: nn.Module, group: Group) -> Any:
    parts = [model.get_parameter(member.weight).detach() for member in group.members]
    return np.concatenate([part.reshape(part.shape[0], -1).numpy() for part in parts])


def _put(model: nn.Module, group: Group, matrix: Any) -> None:
    first = 0
    for member in group.members:
        weight = model.get_parameter(member.weight)
        rows = torch.from_numpy(np.ascontiguousarray(matrix[first : first + member.rows], dtype=np.float32))
        weight.data = rows.reshape(weight.shape)
        first += member.rows


def hybrid_quality(subject: Subject) -> Quality:
    """What the hybrid is worth: the quantised model's worth, since their bits are the same."""
    with _folder() as out:
        return subject.quality(subject.quantised(out))


# --- the three -----------------------------------------------------------------------------------------


def of_digits() -> Subject:
    """Accuracy on 597 scans that were held out."""
    model, (_, held_out) = digits_mlp(), digits()
    groups = trace(model, held_out.images[:1]).groups

    def quantised(out: Path) -> nn.Module:
        sliplm.split_module(model, held_out.images[:1], out, sliplm.Recipe(rank=RANK["digits"]))
        return reference_module(digits_skeleton(), out)

    return Subject(
        "digits", "MLP, scans of digits", model, groups, lambda m: {"accuracy": accuracy(m, held_out)},
        quantised, {"accuracy": float(held_out.labels.bincount().max()) / len(held_out.labels)},
    )  # fmt: skip


def of_efficientnet(crops: int) -> Subject:
    """Top-1 agreement with the original on crops of three photographs, and the cosine of the logits."""
    model, images = efficientnet_lite0(), photographs(crops=crops)
    with torch.inference_mode():
        true = model(images)

    def quality(module: nn.Module) -> Quality:
        with torch.inference_mode():
            found = module(images)
        return {
            "agreement": float((found.argmax(1) == true.argmax(1)).float().mean()),
            "cosine": float(nn.functional.cosine_similarity(found, true).nan_to_num().mean()),
        }

    def quantised(out: Path) -> nn.Module:
        sliplm.split_module(model, images[:1], out, sliplm.Recipe(rank=RANK["efficientnet"]))
        return reference_module(skeleton(), out)

    guess = {"agreement": float(true.argmax(1).bincount().max()) / len(images), "cosine": 0.0}
    groups = trace(model, images[:1]).groups
    title = "EfficientNet-lite0, photographs"
    return Subject("efficientnet", title, model, groups, quality, quantised, guess)


def of_minilm(paragraphs: int) -> Subject:
    """Cosine to the true embedding; and how often a paragraph's first sentence finds the rest of it."""
    folder = minilm()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    queries, answers = _sentences(paragraphs)
    true = embed(model, tokenizer, queries)

    def quality(module: Any) -> Quality:
        one, two = embed(module, tokenizer, queries), embed(module, tokenizer, answers)
        hits = (one @ two.T).argmax(1) == torch.arange(len(queries))
        return {"retrieval": float(hits.float().mean()), "cosine": float((one * true).sum(1).mean())}

    def quantised(out: Path) -> Any:
        sliplm.split(folder, out, sliplm.Recipe(rank=RANK["minilm"]))
        return reference(out)

    guess = {"retrieval": 1 / paragraphs, "cosine": 0.0}
    return Subject("minilm", "MiniLM, sentences", model, discover(folder).groups, quality, quantised, guess)


def _sentences(count: int) -> tuple[list[str], list[str]]:
    """First sentences of paragraphs, each of another part of the text, and what follows them."""
    found = [line.split(". ", 1) for line in wikipedia().splitlines()]
    pairs = [pair for pair in found if len(pair) == 2 and min(map(len, pair)) > 40]
    chosen = pairs[:: len(pairs) // count][:count]
    return [one for one, _ in chosen], [two[:250] for _, two in chosen]


# --- the hybrids ---------------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def measured(
    report: SplitReport, original: Callable[[], Tensor], quantised: Callable[[], Tensor], hybrid: Any,
    run: Callable[[], Tensor], tokens: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Bits, distance and seconds of one split; a call asks `tokens` times what the report counts."""
    true, found = original(), run()
    late = statistics.median(seconds(run) for _ in range(3))
    ready = []
    for _ in range(3):
        for group in report.groups:
            if group.placement == "split":
                hybrid.slip.deal(group.positions * tokens, [group.name])
        ready.append(seconds(run))
    return {
        "bits_equal_quantised": torch.equal(found, quantised()),
        "relative_error": float((found - true).norm() / true.norm()),
        "top1_equal": bool(torch.equal(found.argmax(1), true.argmax(1))),
        "groups": report.exchanges,
        "vault_macs_share": round(report.vault_macs_share, 4),
        "vault_bytes_share": round(report.vault_bytes_share, 4),
        "rows": sum(group.positions for group in report.groups if group.placement == "split"),
        "bytes": report.bytes_to_worker + report.bytes_from_worker,
        "seconds_plain": round(statistics.median(seconds(original) for _ in range(5)), 5),
        "seconds_masks_late": round(late, 5),
        "seconds_masks_ready": round(statistics.median(ready), 5),
    }


def split_digits() -> dict[str, Any]:
    """One scan at a time."""
    model, image = digits_mlp(), digits()[1].images[:1]
    with _folder() as out:
        report = sliplm.split_module(model, image, out, sliplm.Recipe(rank=RANK["digits"]))
        local = reference_module(digits_skeleton(), out)
        with sliplm.open_module(digits_skeleton(), out, ahead=0) as hybrid, torch.inference_mode():
            return measured(report, lambda: model(image), lambda: local(image), hybrid, lambda: hybrid(image))


def split_efficientnet(size: int) -> dict[str, Any]:
    """One photograph at a time, `size` pixels wide."""
    model, image = efficientnet_lite0(size), photographs(size)[:1]
    with _folder() as out:
        report = sliplm.split_module(model, image, out, sliplm.Recipe(rank=RANK["efficientnet"]))
        local = reference_module(skeleton(size), out)
        with sliplm.open_module(skeleton(size), out, ahead=0) as hybrid, torch.inference_mode():
            return measured(report, lambda: model(image), lambda: local(image), hybrid, lambda: hybrid(image))


def split_minilm() -> dict[str, Any]:
    """One sentence of 12 tokens at a time; costs are counted for a token."""
    folder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    original: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    sentence = ["Someone is eating a piece of bread in the kitchen."]
    tokens = len(tokenizer(sentence[0]).input_ids)
    with _folder() as out:
        report = sliplm.split(folder, out, sliplm.Recipe(rank=RANK["minilm"]))
        local = reference(out)
        with sliplm.open(out, ahead=0) as hybrid:
            return measured(
                report,
                lambda: embed(original, tokenizer, sentence),
                lambda: embed(local, tokenizer, sentence),
                hybrid,
                lambda: embed(hybrid, tokenizer, sentence),
                tokens,
            )


# --- printing ------------------------------------------------------------------------------------------


def table(subject: Subject, rows: Sequence[dict[str, Any]], nothing: Quality) -> Table:
    """A table of removal."""
    names = list(subject.guess)
    table = Table(title=f"{subject.title}: what the share is worth as it is", title_justify="left")
    table.add_column("k removed", justify="right")
    for kind in ("residual", "rotated"):
        for name in names:
            table.add_column(f"{kind}\n{name}", justify="right")
    for row in rows:
        values = [f"{row[kind][name]:.3f}" for kind in ("residual", "rotated") for name in names]
        table.add_row(str(row["k"]), *values)
    for title, quality in (("no share", nothing), ("a guess", subject.guess)):
        table.add_row(title, *[f"{quality[name]:.3f}" for name in (*names, *names)])
    return table


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crops", type=int, default=9, help="crops of each photograph")
    parser.add_argument("--paragraphs", type=int, default=100, help="paragraphs to find")
    args = parser.parse_args()
    document: dict[str, Any] = {"bench": "breadth", "machine": machine(), "removal": {}}
    document |= {"no_share": {}, "guess": {}, "hybrid": {}}
    for subject in (of_digits(), of_efficientnet(args.crops), of_minilm(args.paragraphs)):
        with console.status(f"stealing: {subject.title}"):
            rows, nothing = removal(subject), without(subject)
            hybrid = hybrid_quality(subject)
        console.print(table(subject, rows, nothing))
        console.print("the hybrid:", ", ".join(f"{name} {value:.6f}" for name, value in hybrid.items()))
        document["hybrid"][subject.name] = {name: round(value, 7) for name, value in hybrid.items()}
        document["no_share"][subject.name] = {name: round(value, 4) for name, value in nothing.items()}
        document["removal"][subject.name] = rows
        document["guess"][subject.name] = {name: round(value, 4) for name, value in subject.guess.items()}
    runs = {
        "digits": split_digits,
        "efficientnet_64": lambda: split_efficientnet(64),
        "efficientnet_224": lambda: split_efficientnet(224),
        "minilm": split_minilm,
    }
    document["split"] = {}
    for name, run in runs.items():
        with console.status(f"running: {name}"):
            document["split"][name] = run()
        console.print(name, document["split"][name])
    finish(document)


if __name__ == "__main__":
    main()
