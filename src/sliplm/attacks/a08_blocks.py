"""Attack 8: regression of protected blocks from what enters and leaves them in clear.

Only where a placement exposes both, which none that the product offers does: the worker would have to hold
whole blocks behind the protected ones.  The hidden states are then targets beside the logits, and a few
blocks are far easier to fit than a model.
"""

from __future__ import annotations

from sliplm.attacks.a04_core import core_delta
from sliplm.attacks.case import Case, Start, Teacher


class Blocks:
    """From the share whole, from its null space, or from nothing (its own black-box line)."""

    number, name, title = 8, "blocks", "Regression of blocks from clear inputs and outputs"
    variants: tuple[str, ...] = ("whole", "core")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if case.placement.exit_layer is None:
            return None
        deltas = {}
        if variant == "core":
            deltas = {name: core_delta(view) for name, view in case.shares.items() if view.rank}
            if not deltas:
                return None
        return Start(
            case.guess(),
            deltas,
            whole=variant == "whole",
            hidden_layer=case.placement.exit_layer,
            rates=(3e-4, 1e-3, 3e-3),
        )
