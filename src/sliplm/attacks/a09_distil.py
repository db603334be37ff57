"""Attack 9: distil the model from its answers, without the share: the black-box line of every table."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sliplm.attacks.case import Case, Delta, Start, Teacher
from sliplm.attacks.student import blank_model

_RANK = 16  # of what is trained on random matrices


class Distil:
    """Protected matrices start untrained: as the library's own initialisation has them, or scaled to keep
    variances; trained whole, or left random with a trained low-rank part, as attack 2 has it; or, where some
    blocks are not protected, as copies of the nearest of those. Applies only to the attacker without a share.
    """

    number, name, title = 9, "distil", "Distillation within a query budget, no share"
    variants: tuple[str, ...] = ("library", "scaled", "scaled, low rank", "neighbour")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if case.shares:
            return None
        if case.relative is not None:  # the line of an attacker who has only the relative
            state = {name: value for name, value in case.relative.items() if name not in case.known}
            rates = (0.0, 3e-5, 1e-4, 3e-4)
            return Start(state, whole=True, rates=rates) if variant == self.variants[0] else None
        if variant == "library":
            return Start({}, whole=True, rates=(3e-4, 1e-3, 3e-3))
        shapes = _shapes(case)
        if variant == "neighbour":
            copies = neighbours(shapes, case.known)
            return Start(copies, whole=True, rates=(3e-4, 1e-3, 3e-3)) if copies else None
        generator = torch.Generator().manual_seed(seed)
        parts = [part for members in case.groups.values() for part in members]
        inputs = {part.parameter: -2 if part.transposed else -1 for part in parts if part.expert is not None}
        state = {
            name: torch.randn(shape, generator=generator) / shape[inputs.get(name, -1)] ** 0.5
            for name, shape in shapes.items()
            if (len(shape) == 2 or name in inputs) and name not in case.known
        }
        if variant == "scaled":
            return Start(state, whole=True, rates=(3e-4, 1e-3, 3e-3))
        deltas = {}
        for name, members in case.groups.items():
            n = shapes[members[0].parameter][-2 if members[0].transposed else -1]
            left = torch.zeros(sum(member.rows for member in members), _RANK)
            right = torch.randn(_RANK, n, generator=generator) / n**0.5
            deltas[name] = Delta(left, right, None, frozenset({"left", "right"}))
        return Start(state, deltas, rates=(3e-3, 1e-2))


def _shapes(case: Case) -> dict[str, torch.Size]:
    """Parameter -> shape, tied ones under each of their names."""
    with torch.device("meta"):
        parameters = blank_model(case.config).named_parameters(remove_duplicate=False)
    return {name: value.shape for name, value in parameters}


def neighbours(shapes: Mapping[str, torch.Size], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For unknown matrices that of the same kind in the nearest block that is known: parameter -> value."""
    found = {}
    for name, shape in shapes.items():
        if name in known or len(shape) not in (2, 3):
            continue
        same = [each for each in known if _kind(each) == _kind(name) and known[each].shape == shape]
        if same:
            found[name] = known[min(same, key=lambda each: abs(_number(each) - _number(name)))]
    return found


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _number(name: str) -> int:
    """The block's: the first number of a parameter's name."""
    first = re.search(r"\d+", name)
    return int(first[0]) if first else 0
