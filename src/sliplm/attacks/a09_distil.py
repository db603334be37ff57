"""Attack 9: distil the model from its answers, without the share: the black-box line of every table."""

from __future__ import annotations

import torch

from sliplm.attacks.case import Case, Start, Teacher
from sliplm.attacks.student import blank_model


class Distil:
    """Protected matrices start untrained: as the library's own initialisation has them, or scaled to keep
    variances. Applies only to the attacker without a share.
    """

    number, name, title = 9, "distil", "Distillation within a query budget, no share"
    variants: tuple[str, ...] = ("library", "scaled")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if case.shares:
            return None
        state = {}
        if variant == "scaled":
            torch.manual_seed(seed)
            for name, value in blank_model(case.config).named_parameters():
                if value.ndim == 2 and name not in case.known:
                    state[name] = torch.randn(value.shape) / value.shape[1] ** 0.5
        return Start(state, whole=True, rates=(3e-4, 1e-3, 3e-3))
