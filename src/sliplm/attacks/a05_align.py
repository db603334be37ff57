"""Attack 5: align the share's hidden bases with those of a public relative.

The relative put in the victim's place is the line of an attacker without a share (attack 9 with a relative).
With a share he may look for orthogonal Q_out and Q_in that turn it onto the relative's matrix B:

    singular vectors  the two-sided Procrustes fit, min |Q_out^T W_R Q_in - B|: both sides' singular vectors
                      are matched in order.  It has 2^n solutions, one for each choice of the vectors' signs,
                      which all give the same estimate: the relative's vectors, the share's singular values.
    covariance        the same weighted by what the relative's layers read, with C their second moments,
                      min |(Q_out^T W_R Q_in - B) C^(1/2)|: directions that matter are fitted best.

A share whose rows and columns are equal in norm lies between secret diagonals.  He then takes the relative's
rest between diagonals of its own, B = D_out B' D_in, which are near the secret ones where the relative is
near; aligns B', with D_in C D_in for C; and puts them back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sliplm.arithmetic.equilibration import equilibrated
from sliplm.attacks.case import Case, ShareView, Start, Teacher
from sliplm.attacks.student import filled_model

_ROUNDS = 8  # of the weighted fit, a step on each side in turn
_NEWTON_STEPS = 30
_WIDEST = 4096  # above, Q_out would be larger than the layer: singular vectors only
_WINDOWS = 16  # of text that the relative reads for its second moments


class Align:
    """Needs a public relative of the model."""

    number, name, title = 5, "align", "Alignment of the bases with a public relative"
    variants: tuple[str, ...] = ("singular vectors", "covariance")

    def start(self, case: Case, teacher: Teacher, variant: str, seed: int) -> Start | None:
        if case.relative is None or not case.shares:
            return None
        state = {name: value for name, value in case.relative.items() if name not in case.known}
        moments: dict[str, Tensor] = {}
        if variant == "covariance":
            windows = teacher.questions(_WINDOWS)
            reader = filled_model(case, state, windows.device)
            moments = second_moments(reader, case.shares, windows)
        for view in case.shares.values():
            base = view.stack(case.relative)
            state.update(view.parts(aligned(view, base, moments.get(view.name))))
        return Start(state, whole=True, rates=(0.0, 3e-5, 1e-4, 3e-4))


def aligned(view: ShareView, base: Tensor, moments: Tensor | None = None) -> Tensor:
    """The group's matrix [m, n] as an alignment with `base` [m, n] restores it; what was removed is taken
    from the base.

    Args:
        moments: of what the group reads, [n, n], for the weighted fit.
    """
    rest = without_top(base, view.rank)
    if not view.level:
        return base - rest + _aligned(view.matrix, rest, moments)
    target, d_out, d_in = levelled(rest)
    share = view.matrix * (target.norm() / view.matrix.norm())
    within = None if moments is None else d_in[:, None] * moments * d_in
    return base - rest + d_out[:, None] * _aligned(share, target, within) * d_in


def levelled(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix [m, n] with rows and columns equal in norm, and the diagonals it lay between: [m], [n]."""
    found = equilibrated(matrix.detach().float().cpu().numpy())
    whole, d_out, d_in = (torch.from_numpy(part).to(matrix.device) for part in found)
    return whole, d_out, d_in


def _aligned(share: Tensor, target: Tensor, moments: Tensor | None) -> Tensor:
    if moments is None or max(target.shape) > _WIDEST:
        return respectrumed(target, singular_values(share))
    return weighted_fit(share, target, moments)


def weighted_fit(share: Tensor, target: Tensor, moments: Tensor) -> Tensor:
    """Q_out^T W_R Q_in [m, n] by alternating steps, from the unweighted fit on.

    With W_R = L S R^T it is P_out S P_in^T, and P_out = Q_out^T L [m, r], P_in = Q_in^T R [n, r] are all that
    is unknown: r = min(m, n).
    """
    root = _root(moments / moments.diagonal().mean())
    values = singular_values(share).float()
    own, vectors = _gram(target)
    if target.shape[0] < target.shape[1]:
        p_out, p_in = vectors.float(), (target.double().T @ vectors / own.clamp_min(1e-30)).float()
    else:
        p_out, p_in = (target.double() @ vectors / own.clamp_min(1e-30)).float(), vectors.float()
    goal = target @ root
    step = 0.5 / (values[0] * torch.linalg.matrix_norm(root, 2)) ** 2
    for _ in range(_ROUNDS):
        p_out = polar(goal @ root @ p_in * values)
        wrong = (p_out * values) @ (p_in.T @ root) - goal
        p_in = polar(p_in - step * root @ wrong.T @ p_out * values)
    return (p_out * values) @ p_in.T


def polar(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns to x [m, r], r <= m, by Newton and Schulz's iteration."""
    x = x / torch.linalg.matrix_norm(x)
    for _ in range(_NEWTON_STEPS):
        x = 1.5 * x - 0.5 * x @ (x.T @ x)
    return x


def second_moments(
    model: PreTrainedModel, shares: Mapping[str, ShareView], windows: Tensor
) -> dict[str, Tensor]:
    """E[x x^T] of what each group reads on these windows of tokens: group -> float32 [n, n].

    Not of experts, whose inputs no layer shows: they are aligned by singular vectors alone.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for view in shares.values():
        if view.members[0].expert is not None:
            continue
        module = model.get_submodule(view.members[0].module)

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = view.name) -> None:
            x = args[0].flatten(0, -2).float()
            found[name] = found.get(name, 0) + x.T @ x / len(windows)

        handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for part in windows:
            model.base_model(input_ids=part[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def singular_values(matrix: Tensor) -> Tensor:
    """Descending, float64 [min(m, n)]."""
    small = matrix.double() if matrix.shape[0] < matrix.shape[1] else matrix.double().T
    values: Tensor = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0).sqrt()
    return values


def without_top(matrix: Tensor, rank: int) -> Tensor:
    """The matrix [m, n] without its top `rank` triplets."""
    if not rank:
        return matrix
    wide = matrix.shape[0] < matrix.shape[1]
    top = _gram(matrix)[1][:, :rank].float()  # of the smaller side
    return matrix - (top @ (top.T @ matrix) if wide else matrix @ top @ top.T)


def respectrumed(matrix: Tensor, values: Tensor) -> Tensor:
    """The matrix [m, n] with other singular values, float64 [min(m, n)], and its own vectors."""
    own, vectors = _gram(matrix)
    keep = own > own[0] * 1e-6  # a null space has no direction to give
    factor = torch.where(keep, values / own.clamp_min(1e-30), 0.0)
    map_ = ((vectors * factor) @ vectors.T).float()
    return map_ @ matrix if matrix.shape[0] < matrix.shape[1] else matrix @ map_


def _gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and vectors of the smaller side, descending, float64."""
    small = matrix.double() if matrix.shape[0] < matrix.shape[1] else matrix.double().T
    squares, vectors = torch.linalg.eigh(small @ small.T)
    return squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments.double())
    root: Tensor = (vectors * values.clamp_min(0).sqrt() @ vectors.T).float()
    return root
