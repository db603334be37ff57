"""Public relatives of a victim: checkpoints, perturbed copies, and a fine-tune made here."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sliplm.attacks.device import autocast
from sliplm.engines.transformers.checkpoint import Checkpoint
from sliplm.errors import InputError
from sliplm.filesystem import utf8_name

Relative = Path | float
"""A checkpoint folder; or how far a perturbed copy is (of each parameter, in Frobenius norm)."""

_STEPS, _STEPS_CPU, _BATCH, _WINDOW, _RATE = 200, 30, 8, 256, 5e-5


def perturbed(victim: PreTrainedModel, distance: float) -> dict[str, Tensor]:
    """The victim with Gaussian noise of this relative size on every parameter: parameter -> value."""
    random = torch.Generator(victim.device).manual_seed(0)
    state = {}
    for name, value in victim.named_parameters():
        noise = torch.randn(value.shape, generator=random, device=value.device)
        state[name] = value.detach() + noise * (distance * value.norm() / noise.norm())
    return state


def tune(model_dir: Path, out: Path, device: torch.device) -> None:
    """Fine-tune the victim whole on the source code of Python's standard library, into a checkpoint folder;
    200 steps on a GPU, 30 on a CPU.
    """
    steps = _STEPS if device.type == "cuda" else _STEPS_CPU
    model = read_model(model_dir).to(device).train()
    tokens = _source_code(model_dir, (steps * _BATCH + 1) * _WINDOW)
    windows = tokens[: len(tokens) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    for step in range(steps):
        at = order[torch.arange(step * _BATCH, (step + 1) * _BATCH) % len(order)]
        part = windows[at].to(device)
        with autocast(device):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1)
        optimiser.zero_grad()
        cross_entropy(logits.float(), part[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    out.mkdir(parents=True, exist_ok=True)
    with utf8_name(out) as named:
        model.save_pretrained(named)


def distance(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """|a - b| / |b| over all matrices, Frobenius."""
    names = [name for name, value in other.items() if value.ndim == 2]
    with torch.no_grad():
        wrong = sum(float((state[name] - other[name]).square().sum()) for name in names)
        return float((wrong / sum(float(other[name].square().sum()) for name in names)) ** 0.5)


def check_related(model_dir: Path, relatives: Mapping[str, Relative]) -> None:
    """Check that checkpoints are of the model's shape, before anything is made.

    Raises:
        InputError: one has other tensors, a larger vocabulary for instance.
        CheckpointError: as `Checkpoint`.
    """
    ours = _shapes(model_dir)
    for name, folder in relatives.items():
        if not isinstance(folder, Path) or not folder.exists():
            continue  # noise, or a fine-tune that is made later
        theirs = _shapes(folder)
        other = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
        if other:
            what = f"its {other[0]} has the shape {theirs[other[0]]}, not {ours[other[0]]}"
        elif not ours.keys() & theirs.keys():
            what = "they have no tensor of the same name"
        else:
            continue
        raise InputError(
            f"{name}, {folder}, is no relative of {model_dir}: {what}; name a model of the same configuration"
        )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(entry.shape) for key, entry in Checkpoint(folder).entries.items()}


def read_model(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, for inference."""
    with utf8_name(folder) as named:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            named, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return model.eval()


def _source_code(model_dir: Path, count: int) -> Tensor:
    """Tokens of Python's standard library, `count` at most: int64 [tokens]."""
    with utf8_name(model_dir) as named:
        tokenizer = AutoTokenizer.from_pretrained(named, local_files_only=True, trust_remote_code=False)
    found: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += tokenizer(file.read_text(encoding="utf-8", errors="replace"))["input_ids"]
        if len(found) >= count:
            break
    return torch.tensor(found[:count])
