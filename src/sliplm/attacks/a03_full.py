"""Attack 3: take the share for the weights and train them whole."""

from __future__ import annotations

from sliplm.attacks.case import Case, Start, Teacher


class Full:
    """Fine-tuning of every protected matrix from where the share stands."""

    number, name, title = 3, "full", "Full fine-tuning of the share"
    variants: tuple[str, ...] = ("",)

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if not case.shares:
            return None
        return Start(case.guess(), whole=True, rates=(1e-4, 3e-4, 1e-3, 3e-3))
