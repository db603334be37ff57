"""One training loop for every attack that trains."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import PreTrainedModel

from sliplm.attacks.device import autocast
from sliplm.attacks.scene import Scene

Access = Literal["text", "logits", "hidden"]

_STEPS = 64  # at least: small budgets get small batches
_BATCH = 16  # windows at most
_CLIP = 1.0
_EAGER = 3  # steps before one is recorded: libraries and the optimiser allocate in the first


@dataclass(frozen=True)
class Training:
    """How an attack trains.

    Attributes:
        access: "text" (next tokens of a text), "logits" (the victim's on it), or "hidden" (also the hidden
            states that leave the protected blocks).
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
    order = _windows(len(scene.text.train), how.tokens // scene.text.train.shape[1], how.seed)
    size = max(1, min(_BATCH, len(order) // _STEPS))
    batches = torch.split(order, size)[: max(1, len(order) // size)]  # every step of one shape
    stepper = _Stepper(student, scene, how, size)
    for step, indices in enumerate(batches):
        stepper.step(indices, how.rate * _schedule(step, len(batches)))
    return len(batches)


class _Stepper:
    """One optimiser step at a time; on a GPU recorded as a graph after the first few, which then costs one
    launch instead of thousands.
    """

    def __init__(self, student: PreTrainedModel, scene: Scene, how: Training, size: int) -> None:
        self._student, self._scene, self._how = student, scene, how
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._cuda = scene.device.type == "cuda"
        self._rate = torch.tensor(how.rate, device=scene.device)
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            lr=self._rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=self._cuda,
            capturable=self._cuda,
        )
        length = scene.text.train.shape[1]
        self._tokens = torch.zeros(size, length, dtype=torch.int64, device=scene.device)
        self._targets: dict[int, Tensor] = {}  # hidden states of the victim by layer, in place for the graph
        self._mask: Tensor | None = None
        if self._cuda and student.config.model_type != "opt":  # which takes no other than its own
            # given, so that the library need not look at tokens, which a recording cannot
            seen = torch.ones(length, length, dtype=torch.bool, device=scene.device).tril()
            self._mask = seen.expand(size, 1, length, length)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done = 0

    def step(self, indices: Tensor, rate: float) -> None:
        """Train on the windows with these indices."""
        self._tokens.copy_(self._scene.text.train[indices])
        self._rate.fill_(rate)
        for layer in self._layers():
            states = self._scene.oracle.hidden(indices, layer)
            self._targets.setdefault(layer, torch.empty_like(states)).copy_(states)
        if self._graph is not None:
            self._graph.replay()
        elif not (self._cuda and self._done == _EAGER and self._recorded()):
            self._whole_step()
        self._done += 1

    def _layers(self) -> list[int]:
        wanted = [] if self._how.access == "text" else [-1]
        hidden = self._how.hidden_layer
        return wanted if hidden is None or hidden in wanted else [*wanted, hidden]

    def _recorded(self) -> bool:
        """Record a step, then play it; False if it cannot be recorded, and is to be run as it is."""
        self._optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a recording has memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._whole_step()
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a recording hides what broke it
            warnings.warn(f"a training step cannot be recorded: {first}".splitlines()[0], stacklevel=2)
            torch.cuda.synchronize()
            return False
        self._graph = graph
        graph.replay()
        return True

    def _whole_step(self) -> None:
        self._optimiser.zero_grad(set_to_none=True)
        self._loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, _CLIP)
        self._optimiser.step()

    def _loss(self) -> Tensor:
        hidden = self._how.hidden_layer
        with autocast(self._scene.device):
            out = self._student(
                input_ids=self._tokens,
                attention_mask=self._mask,
                use_cache=False,
                output_hidden_states=hidden is not None,
            )
        if self._how.access == "text":
            loss = cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), self._tokens[:, 1:].flatten())
        else:
            wanted = softmax(self._scene.oracle.head(self._targets[-1]), dim=-1)
            loss = -(wanted * log_softmax(out.logits.float(), dim=-1)).sum(-1).mean()
        if hidden is not None:
            target = self._targets[hidden].float()
            spread = target.flatten(0, 1).var(0) + 1e-6  # a few coordinates are far larger than all others
            loss = loss + ((out.hidden_states[hidden] - target).square() / spread).mean()
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
