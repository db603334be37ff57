"""Attack 10: low-rank extraction of the LM head from logits (arXiv 2403.06634, 2403.09539).

Logits are W h for hidden states h of n entries: any n independent answers span the columns of W [v, n], so
that W is known up to an invertible n x n matrix.  No split can prevent it: it needs no share.  Of a share in
a public basis, it leaves k x k unknowns of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sliplm.attacks.a04_core import core_delta, null_space
from sliplm.attacks.case import Case, Delta, ShareView, Start, Teacher
from sliplm.attacks.student import blank_model

_ANSWERS = 2  # times the head's width
_OUTSIDE = 0.1  # part of a share outside the span of the logits from which its rows are not the head's


class Head:
    """The head's columns from logits; the rest as in attacks 3 and 4, or untrained without a share."""

    number, name, title = 10, "head", "Low-rank extraction of the LM head"
    variants: tuple[str, ...] = ("basis", "core")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        head = output_embedding(case)
        if head is None:
            return None
        module, width = head
        basis, values = logit_basis(teacher, width)
        state = case.guess()
        notes: dict[str, float | str] = {"gap": float(values[width - 1] / values[width])}
        if variant == "basis":  # coordinates in which hidden states have unit variance
            state[f"{module}.weight"] = basis * values[:width]
            return Start(state, whole=True, rates=(3e-4, 1e-3, 3e-3), notes=notes)
        delta = head_core(case.shares[module], basis) if module in case.shares else None
        if delta is None:
            return None
        deltas = {name: core_delta(view) for name, view in case.shares.items() if view.rank}
        deltas[module] = delta
        return Start(state, deltas, rates=(1e-3, 3e-3, 1e-2), notes=notes)


def output_embedding(case: Case) -> tuple[str, int] | None:
    """Module name and width of the LM head, if it is protected."""
    with torch.device("meta"):
        model = blank_model(case.config)
    head = model.get_output_embeddings()
    shared = {name for name, p in model.named_parameters() if p is head.weight}
    if shared & case.known.keys():
        return None
    module = next(name for name, part in model.named_modules() if part is head)
    return module, head.weight.shape[1]


def logit_basis(teacher: Teacher, width: int) -> tuple[Tensor, Tensor]:
    """Orthonormal [v, width] spanning the head's columns, and the singular values of the answers, over the
    root of their number; the step after the `width`-th shows that the width is right.
    """
    rows: list[Tensor] = []
    while sum(map(len, rows)) < _ANSWERS * width:
        answer = teacher.answers(torch.tensor([len(rows)]))[0]
        rows.append(answer)
    logits = torch.cat(rows)[: _ANSWERS * width].double()
    squares, left = torch.linalg.eigh(logits @ logits.T)
    values = squares.flip(0).clamp_min(1e-300).sqrt()
    basis = logits.T @ (left.flip(1)[:, :width] / values[:width])
    return basis.float(), (values / len(logits) ** 0.5).float()


def head_core(view: ShareView, basis: Tensor) -> Delta | None:
    """The head's unknown k x k core, where the share's columns lie in the logits' span; None elsewhere."""
    inside = basis.T @ view.matrix  # [n, n]
    outside = 1 - float(inside.norm() / view.matrix.norm()) ** 2
    if not view.rank or outside > _OUTSIDE:
        return None
    left = null_space(inside.T, view.rank)
    k = view.rank
    zero = torch.zeros(k, k, device=basis.device)
    return Delta(basis @ left.T, null_space(view.matrix, k), zero, frozenset({"core"}))
