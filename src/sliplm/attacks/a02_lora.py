"""Attack 2: restore what was removed by a trained low-rank part (as Recover-LoRA and RestoreLCC would)."""

from __future__ import annotations

import torch

from sliplm.attacks.case import Case, Delta, Start, Teacher


class Lora:
    """The share, and on each matrix a trained part of the removed rank, or of four times as much."""

    number, name, title = 2, "LoRA", "LoRA restoration"
    variants: tuple[str, ...] = ("1", "4")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if not case.shares:
            return None
        generator = torch.Generator().manual_seed(seed)
        deltas = {}
        for name, view in case.shares.items():
            m, n = view.matrix.shape
            rank = min(int(variant) * max(view.rank, 1), m, n)
            right = torch.randn(rank, n, generator=generator) / n**0.5
            deltas[name] = Delta(torch.zeros(m, rank), right, None, frozenset({"left", "right"}))
        return Start(case.guess(), deltas, rates=(1e-3, 3e-3, 1e-2))
