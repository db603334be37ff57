"""Attack 1: run the share as it is."""

from __future__ import annotations

from sliplm.attacks.case import Case, Start, Teacher


class AsIs:
    """The worker's matrices in place of the weights; nothing is trained."""

    number, name, title = 1, "as is", "Run the share as it is"
    variants: tuple[str, ...] = ("",)

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        return Start(case.guess()) if case.shares else None
