"""One training loop for every attack that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import PreTrainedModel

from sliplm.attacks.scene import Scene, autocast

Access = Literal["text", "logits"]

_STEPS = 64  # at least: small budgets get small batches
_BATCH = 16  # windows at most
_CLIP = 1.0


@dataclass(frozen=True)
class Training:
    """How an attack trains.

    Attributes:
        access: "text" (next tokens of a text) or "logits" (also the victim's logits on it).
        tokens: seen in training; epochs repeat the text where it is shorter.
        rate: learning rate at its peak.
        hidden_layer: also match the hidden states that enter this block.
    """

    access: Access
    tokens: int
    rate: float
    seed: int
    hidden_layer: int | None = None


def train(student: PreTrainedModel, scene: Scene, how: Training) -> int:
    """Train in place by AdamW, warm-up and cosine decay; returns the optimiser's steps."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    order = _windows(len(scene.text.train), how.tokens // scene.text.train.shape[1], how.seed)
    batch = max(1, min(_BATCH, len(order) // _STEPS))
    batches = torch.split(order, batch)
    fused = scene.device.type == "cuda"
    optimiser = torch.optim.AdamW(parameters, lr=how.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    student.train()
    for step, indices in enumerate(batches):
        for settings in optimiser.param_groups:
            settings["lr"] = how.rate * _schedule(step, len(batches))
        loss = _loss(student, scene, indices, how)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
    student.eval()
    return len(batches)


def _loss(student: PreTrainedModel, scene: Scene, indices: Tensor, how: Training) -> Tensor:
    tokens = scene.text.train[indices].to(scene.device)
    with autocast(scene.device):
        out = student(input_ids=tokens, use_cache=False, output_hidden_states=how.hidden_layer is not None)
    if how.access == "text":
        loss = cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    else:
        wanted = softmax(scene.oracle.answers(indices), dim=-1)
        loss = -(wanted * log_softmax(out.logits.float(), dim=-1)).sum(-1).mean()
    if how.hidden_layer is not None:
        target = scene.oracle.hidden(indices, how.hidden_layer).float()
        spread = target.flatten(0, 1).var(0) + 1e-6  # a few coordinates are far larger than all others
        loss = loss + ((out.hidden_states[how.hidden_layer] - target).square() / spread).mean()
    return loss


def _windows(count: int, wanted: int, seed: int) -> Tensor:
    """Indices of windows, epoch after epoch in new orders."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(wanted / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])[:wanted]


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
