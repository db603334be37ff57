"""Attack 4: the residual's null space is the span of the removed vectors.

A share without a secret basis has W_D = W - A B with the top k triplets gone, so that its k smallest singular
values are (up to rounding) zero and their vectors span what was removed.  Of a square matrix only the k x k
core between both spans is unknown; of a tall one [m, k] numbers, of a wide one [k, n].
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sliplm.attacks.case import Case, Delta, ShareView, Start, Teacher


class Core:
    """Only what the null space leaves unknown is trained; then, in a second variant, everything."""

    number, name, title = 4, "core", "Null space of the residual"
    variants: tuple[str, ...] = ("core", "core and all")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if not case.shares:
            return None
        deltas = {name: core_delta(view) for name, view in case.shares.items() if view.rank}
        whole = variant == "core and all"
        rates = (3e-4, 1e-3, 3e-3) if whole else (1e-3, 3e-3, 1e-2)
        return Start(case.guess(), deltas, whole=whole, rates=rates)


@cache
def core_delta(view: ShareView) -> Delta:
    """The unknown part of a group, in the span that its share gives away.

    The norms of the bases make a step on an entry of what is trained move W by about as much everywhere.
    """
    (m, n), k = view.matrix.shape, view.rank
    if m == n:
        left, right = null_space(view.matrix.T, k), null_space(view.matrix, k)
        return Delta(left.T.contiguous(), right, torch.zeros(k, k), frozenset({"core"}))
    if m > n:
        return Delta(torch.zeros(m, k), null_space(view.matrix, k), None, frozenset({"left"}))
    return Delta(null_space(view.matrix.T, k).T.contiguous(), torch.zeros(k, n), None, frozenset({"right"}))


def null_space(matrix: Tensor, k: int) -> Tensor:
    """The k right singular vectors with the smallest singular values, float32 [k, n], for n <= m."""
    gram = matrix.double().T @ matrix.double()
    vectors: Tensor = torch.linalg.eigh(gram)[1][:, :k]
    return vectors.T.float().contiguous()
