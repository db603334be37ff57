"""Attack 6: match rows, or columns, with those of a public relative by direction (as ArrowMatch does).

ArrowMatch undoes permutations and scalings of a fine-tune's weights by looking for each obfuscated vector's
nearest direction among the public base's.  What finds no partner is taken from the relative itself.
Where the share's rows and columns are equal in norm, the relative's are made so first (as in attack 5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sliplm.attacks.a04_core import null_space
from sliplm.attacks.a05_align import levelled, without_top
from sliplm.attacks.case import Case, ShareView, Start, Teacher

_ALIKE = 0.5  # |cosine| from which two vectors count as partners
_CHUNK = 4096


class Match:
    """Needs a public relative of the model."""

    number, name, title = 6, "match", "Matching of rows with a public relative"
    variants: tuple[str, ...] = ("rows", "columns")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if case.relative is None or not case.shares:
            return None
        state = {name: value for name, value in case.relative.items() if name not in case.known}
        matched = total = 0
        for view in case.shares.values():
            base = view.stack(case.relative)
            estimate, found = match(view, base, columns=variant == "columns")
            state.update(view.parts(estimate))
            matched, total = matched + int(found.sum()), total + len(found)
        return Start(state, whole=True, rates=(0.0, 3e-5, 1e-4, 3e-4), notes={"matched": matched / total})


def match(view: ShareView, base: Tensor, *, columns: bool) -> tuple[Tensor, Tensor]:
    """The group's matrix as matching restores it, float32 [m, n], and which rows (columns) found a partner.

    Args:
        base: the relative's matrix [m, n].
    """
    share = view.matrix
    if view.level:
        rest = without_top(base, view.rank)
        target, d_out, d_in = levelled(rest)
        restored, found = _partners(share, target, columns=columns)
        return base - rest + d_out[:, None] * restored * d_in, found
    if view.rank and min(share.shape) > view.rank:  # what the share lacks is taken from the relative
        wide = share.shape[1] > share.shape[0]
        null = null_space(share.T if wide else share, view.rank)
        part = null.T @ (null @ base) if wide else base @ null.T @ null
    else:
        part = torch.zeros_like(base)
    restored, found = _partners(share, base - part, columns=columns)
    return restored + part, found


def _partners(share: Tensor, target: Tensor, *, columns: bool) -> tuple[Tensor, Tensor]:
    """The target [m, n] with rows (columns) replaced by partners among the share's, and which were."""
    vectors, targets = (share.T, target.T) if columns else (share, target)
    partner, cosine = nearest(targets, vectors)
    scale = targets.norm(dim=1) / vectors[partner].norm(dim=1).clamp_min(1e-30) * cosine.sign()
    found = cosine.abs() >= _ALIKE
    restored = torch.where(found[:, None], vectors[partner] * scale[:, None], targets)
    return restored.T if columns else restored, found


def nearest(queries: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `queries` [a, n] the row of `among` [b, n] with the largest |cosine|: indices and
    cosines [a].
    """
    among = normalize(among)
    indices, cosines = [], []
    for part in torch.split(normalize(queries), _CHUNK):
        product = part @ among.T
        best = product.abs().argmax(1)
        indices.append(best)
        cosines.append(product.gather(1, best[:, None])[:, 0])
    return torch.cat(indices), torch.cat(cosines)
