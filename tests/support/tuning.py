"""Fine-tunes made in a test: LoRA adapters and full ones, of the tiny checkpoints in `families`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokens(seed: int, rows: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def train_lora(base: Path, folder: Path, *, seed: int = 0, steps: int = 6, **config: Any) -> Path:
    """Train an adapter to `base` for a few steps and save it in `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 8, "lora_alpha": 12, "target_modules": LAYERS, "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**options))
        _train(tuned, seed, steps, 1e-2)
        tuned.save_pretrained(folder)
    return folder


def train_full(base: Path, folder: Path, *, seed: int = 0, steps: int = 4, frozen: str = "") -> Path:
    """Train all weights, but those whose names contain `frozen`, and save the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    _train(model, seed, steps, 1e-3)
    model.save_pretrained(folder)
    return folder


def _train(model: Any, seed: int, steps: int, rate: float) -> None:
    batch = tokens(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1  # it did learn something


def merged(base: Path | PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """peft's own merge of an adapter into its base."""
    model = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, Path) else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return tuned.eval()
