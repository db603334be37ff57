"""What the benches share: the demo model split once, paired timing, and the closing JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import sliplm
from sliplm.arithmetic import kernels
from sliplm.examples import cache_dir, smollm2
from sliplm.shares.manifest import FORMAT_VERSION
from sliplm.shares.share import sliplm_version

console = Console(stderr=True)
transformers_logging.disable_progress_bar()


def split_smollm2(precision: int) -> Path:
    """The folder with both shares of SmolLM2-135M at rank 16, made once and kept in the cache."""
    out = cache_dir() / f"bench-{sliplm_version()}-{FORMAT_VERSION}-p{precision}"
    if not (out / "vault").exists():
        with console.status(f"splitting SmolLM2 with {precision} bits"):
            recipe = sliplm.Recipe(precision=precision)
            # several shares of a public model that stay here: no business of the owner's ledger
            sliplm.split(smollm2(), out, recipe, i_know=True, ledger=cache_dir() / "ledger")
    return out


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else ""
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "kernel": kernels.choose(),
        "load_before": os.getloadavg()[0],
    }


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    """Median, rounded for printing."""
    return round(statistics.median(values), 5)


class Decoded(NamedTuple):
    """Some steps of decoding."""

    seconds: float
    cpu: float  # seconds of all processors that this process took
    tokens: list[int]  # of the first sequence


def decode(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Decoded:
    """Greedy decoding of `tokens` steps, the prompts' prefill left out."""
    found: list[int] = []
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
        start, spent = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            following = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(following[0, 0]))
            out = model(following, past_key_values=out.past_key_values, use_cache=True)
        return Decoded(time.perf_counter() - start, time.process_time() - spent, found)


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Seconds to read a prompt."""
    with torch.inference_mode():
        return seconds(lambda: model(ids, use_cache=True, logits_to_keep=1))


def finish(document: dict[str, Any]) -> None:
    """The last line of every bench: one JSON document."""
    print(json.dumps(document))
