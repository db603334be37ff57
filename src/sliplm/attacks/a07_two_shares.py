"""Attack 7: two shares of the same weights.

Two splits without a secret basis differ by exactly the triplets that one has and the other has not: the
share of the smaller rank holds all that both hold together. Rotated shares have unrelated bases: together
they give the singular values of both, and the larger share is again the better start.
"""

from __future__ import annotations

from sliplm.attacks.a04_core import core_delta
from sliplm.attacks.case import Case, Start, Teacher


class TwoShares:
    """The larger of two shares, group by group; then what it leaves unknown, or everything, is trained."""

    number, name, title = 7, "two shares", "Two shares of one model"
    variants: tuple[str, ...] = ("core", "all")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if not case.shares or not case.second:
            return None
        larger = {
            name: max(view, case.second[name], key=lambda view: float(view.matrix.norm()))
            for name, view in case.shares.items()
        }
        deltas = {name: core_delta(view) for name, view in larger.items() if view.rank}
        state = {name: part for view in larger.values() for name, part in view.parts().items()}
        gained = sum(view is not case.shares[name] for name, view in larger.items()) / len(larger)
        rates = (3e-4, 1e-3, 3e-3)
        return Start(state, deltas, whole=variant == "all", rates=rates, notes={"gained": gained})
