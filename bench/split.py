"""Splitting a model of Llama-2-7B's shapes, on a card and on the processor.

For each shape of a group: the seconds of `split_group` (rank 16, 8 bits, basis fast) on the device, and of
today's numpy on the processor.  Weights are random, made on the spot.  The time of a whole model is estimated
from these, without reading and writing; with --whole it is measured: a checkpoint in bfloat16 is made (13.5
GB, and 7 more for the shares) and `sliplm.split` reads, splits, seals and writes all of it.  Memory is this
process's highest so far, before numpy has its turn.

python bench/split.py [--device auto] [--repeats 3] [--whole] [--layers 32] [--folder DIR] [--steps]
    [--no-processor] [--divide 1]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import sliplm
from _common import finish, machine
from sliplm.arithmetic import dense, dense_rotation
from sliplm.shares import oncard, splitting
from sliplm.shares.splitter import Splitter

Shape = tuple[int, int]

LAYERS: Final = 32
RANK: Final = 16
BITS: Final = 8
POOL: Final = 10_000_019  # places where a tensor of the checkpoint may begin in the random numbers

STEPS: Final = (
    (oncard, "_triplets"), (oncard, "_direction_error"), (dense, "subtract"), (dense, "equilibrate"),
    (dense, "localisation"), (dense_rotation, "rotated"), (dense, "in_integers"), (dense, "spectral_bound"),
    (dense_rotation, "unevenness"), (splitting, "all_challenge_products"), (oncard, "_is_whole"),
)  # fmt: skip
"""What a split on a device consists of, but for the weights' way there."""


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def configuration(divide: int, layers: int) -> LlamaConfig:
    """Llama-2-7B's, or a narrower one to try this file with."""
    return LlamaConfig(
        vocab_size=32000 // divide, hidden_size=4096 // divide, intermediate_size=11008 // divide,
        num_hidden_layers=layers, num_attention_heads=max(1, 32 // divide),
        num_key_value_heads=max(1, 32 // divide), max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def shapes(config: LlamaConfig) -> dict[str, tuple[Shape, int]]:
    """The groups by kind: (m, n), and how many there are."""
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return {
        "q, k, v": ((3 * h, h), layers), "o": ((h, h), layers), "gate, up": ((2 * i, h), layers),
        "down": ((h, i), layers), "head": ((config.vocab_size, h), 1),
    }  # fmt: skip


def entries(found: dict[str, tuple[Shape, int]]) -> int:
    """Of all groups."""
    return sum(m * n * count for (m, n), count in found.values())


def weights(shape: Shape, number: int) -> np.ndarray:
    """Random ones, as large as a model's."""
    generator = torch.Generator().manual_seed(number)
    return (torch.randn(shape, generator=generator) * 0.02).numpy()


def host_peak() -> float:
    """GB of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def card_peak() -> float | None:
    """GB of the card's memory that PyTorch has had at most; None without a card."""
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None


def seconds(splitter: Splitter, name: str, weight: np.ndarray) -> float:
    """Of one group."""
    start = time.perf_counter()
    parts = splitter.split_group(name, weight, rank=RANK, precision=BITS, rotation="fast")
    spent = time.perf_counter() - start
    if not parts.error < 0.05 or not parts.svd_error < 1e-2:
        raise SystemExit(f"{name}: wrong split: errors {parts.error}, {parts.svd_error}")
    return spent


def by_shape(splitter: Splitter, found: dict[str, tuple[Shape, int]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each kind, `repeats` times, after one group that starts everything."""
    taken = {}
    first = seconds(splitter, "first", weights(found["o"][0], 0))
    say(f"{splitter}: {first:.2f} s for the first group, which is not counted")
    for name, (shape, _) in found.items():
        taken[name] = [seconds(splitter, name, weights(shape, 1 + k)) for k in range(repeats)]
        say(f"{splitter}: {name} {shape}: " + ", ".join(f"{one:.2f}" for one in taken[name]) + " s")
    return taken


class Timed:
    """Seconds of each step while it is in force, one after the other: the device is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Timed:
        self._plain = [(module, name, getattr(module, name)) for module, name in STEPS]
        for module, name, function in self._plain:
            setattr(module, name, self._timed(name.lstrip("_"), function))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, function in self._plain:
            setattr(module, name, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            _wait()
            start = time.perf_counter()
            found = function(*args, **options)
            _wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return found

        return run


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def steps(splitter: Splitter, found: dict[str, tuple[Shape, int]]) -> dict[str, dict[str, float]]:
    """Where the time of a group goes, by kind."""
    shown = {}
    for name, (shape, _) in found.items():
        weight = weights(shape, 9)
        with Timed() as timed:
            total = seconds(splitter, name, weight)
        timed.seconds["the rest"] = total - sum(timed.seconds.values())
        shown[name] = {step: round(spent, 4) for step, spent in timed.seconds.items()}
        say(f"{name}: " + ", ".join(f"{step} {spent:.3f}" for step, spent in shown[name].items()))
    return shown


# --- a whole model ----------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Random weights in bfloat16, one file a layer."""
    folder.mkdir(parents=True)
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    numbers = (torch.randn(max(v * h, i * h) + POOL) * 0.02).to(torch.bfloat16)
    place = iter(range(0, POOL * 1000, 7919))
    layer = {
        "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (h, h), "self_attn.v_proj": (h, h), "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
    }  # fmt: skip
    files = [
        {f"model.layers.{k}.{name}.weight": shape for name, shape in layer.items()}
        for k in range(config.num_hidden_layers)
    ]
    files.append({"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h)})
    index = {}
    for number, tensors in enumerate(files):
        name = f"model-{number:05}.safetensors"
        save_file(
            {key: _some(numbers, shape, next(place) % POOL) for key, shape in tensors.items()}, folder / name
        )
        index.update(dict.fromkeys(tensors, name))
        say(f"checkpoint: {number + 1} of {len(files)} files")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _some(numbers: torch.Tensor, shape: tuple[int, ...], first: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=numbers.dtype)
    return numbers[first : first + shape[0] * shape[1]].reshape(shape).clone()


def whole(config: LlamaConfig, device: str, place: Path | None) -> dict[str, Any]:
    """Seconds of `sliplm.split`, with its parts."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        os.environ["SLIPLM_KEY_FILE"] = str(folder / "key")
        start = time.perf_counter()
        make_checkpoint(folder / "model", config)
        say(f"checkpoint: made in {time.perf_counter() - start:.0f} s, which is not counted")
        marks: list[tuple[float, str]] = []
        start = time.perf_counter()

        def progress(done: int, total: int, group: str) -> None:
            marks.append((time.perf_counter() - start, group))
            say(f"{marks[-1][0]:6.1f} s  {done / total:6.1%}  {group or 'all groups are split and written'}")

        report = sliplm.split(
            folder / "model", folder / "out", sliplm.Recipe(rank=RANK, precision=BITS),
            ledger=folder / "ledger", progress=progress, device=device,
        )  # fmt: skip
        spent = time.perf_counter() - start
        return {
            "seconds": round(spent, 1),
            "before_the_first_group": round(marks[0][0], 1),
            "groups": round(marks[-1][0] - marks[0][0], 1),
            "after_the_last_group": round(spent - marks[-1][0], 1),
            "split_groups": len(marks) - 1,
            "worker_bytes": report.worker_bytes,
            "vault_bytes": report.vault_bytes,
        }


def estimate(taken: dict[str, list[float]], found: dict[str, tuple[Shape, int]]) -> float:
    """Seconds of all groups, from the medians."""
    return sum(statistics.median(taken[name]) * count for name, (_, count) in found.items())


def show(
    found: dict[str, tuple[Shape, int]], fast: dict[str, list[float]], slow: dict[str, list[float]]
) -> None:
    """A table of 80 columns at most."""
    if not fast and not slow:
        return
    print(f"{'seconds a group':24} {'groups':>7} {'device':>9} {'processor':>10} {'times':>7}")
    for name, ((m, n), count) in found.items():
        one = statistics.median(fast[name]) if fast else float("nan")
        other = statistics.median(slow[name]) if slow else float("nan")
        print(f"{f'{name} {m} x {n}':24} {count:7} {one:9.2f} {other:10.1f} {other / one:7.1f}")
    for label, each in (("device", fast), ("processor", slow)):
        if each:
            spent = estimate(each, found)
            print(f"all groups, {label}: {spent:.0f} s = {spent / 60:.1f} min, estimated from medians,")
            print("    without reading, sealing and writing")


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="as slip split takes it")
    parser.add_argument("--repeats", type=int, default=3, help="groups of each shape on the device")
    parser.add_argument("--whole", action="store_true", help="split and write a whole model")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model")
    parser.add_argument("--folder", type=Path, help="where the whole model lies meanwhile")
    parser.add_argument("--steps", action="store_true", help="where a group's time on the device goes")
    parser.add_argument("--no-processor", action="store_true", help="leave numpy's figures out")
    parser.add_argument("--divide", type=int, default=1, help="widths by so much, to try this file")
    args = parser.parse_args()
    config = configuration(args.divide, args.layers)
    found, splitter = shapes(config), Splitter(args.device)
    document: dict[str, Any] = {"bench": "split", "machine": machine(), "device": repr(splitter)}
    if "cuda" in repr(splitter):
        document["card"] = torch.cuda.get_device_name()
    on_card = args.device != "cpu" and "cuda" in repr(splitter)
    fast = by_shape(splitter, found, args.repeats) if on_card and args.repeats else {}
    if args.steps and on_card:
        document["steps"] = steps(splitter, found)
    if args.whole:
        document["whole"] = whole(config, args.device, args.folder)
    document |= {"host_peak_gb": round(host_peak(), 2), "card_peak_gb": card_peak()}
    slow = {} if args.no_processor else by_shape(Splitter("cpu"), found, 1)
    show(found, fast, slow)
    if args.whole:
        measured = document["whole"]
        print(
            f"whole model, {args.layers} layers, split and written on {splitter}: {measured['seconds']:.0f} s"
        )
        print(f"    {measured['before_the_first_group']:.0f} s before the first group (plan, ledger),")
        print(f"    {measured['groups']:.0f} s groups, {measured['after_the_last_group']:.0f} s digests")
        if args.layers != LAYERS:
            every = entries(shapes(configuration(args.divide, LAYERS))) / entries(found)
            measured["all_layers_estimate"] = round(measured["seconds"] * every, 1)
            print(f"    {LAYERS} layers: {measured['all_layers_estimate']:.0f} s, estimated by their weights")
    memory = f"{document['card_peak_gb']:.1f} GB" if on_card else "not used"
    print(f"highest memory: host {document['host_peak_gb']:.1f} GB, card {memory}")
    for label, each in (("device", fast), ("processor", slow)):
        document[f"{label}_seconds"] = {
            name: [round(one, 3) for one in times] for name, times in each.items()
        }
        document[f"{label}_estimate"] = round(estimate(each, found), 1) if each else None
    finish(document)


if __name__ == "__main__":
    main()
