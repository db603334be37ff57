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
        if case.relative is not None:  # the line of an attacker who has only the relative
            state = {name: value for name, value in case.relative.items() if name not in case.known}
            rates = (0.0, 3e-5, 1e-4, 3e-4)
            return Start(state, whole=True, rates=rates) if variant == self.variants[0] else None
        state = {}
        if variant == "scaled":
            generator = torch.Generator().manual_seed(seed)
            with torch.device("meta"):
                shapes = {name: value.shape for name, value in blank_model(case.config).named_parameters()}
            for name, shape in shapes.items():
                if len(shape) == 2 and name not in case.known:
                    state[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        return Start(state, whole=True, rates=(3e-4, 1e-3, 3e-3))
