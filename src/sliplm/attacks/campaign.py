"""Which attacks meet which splits: the lines of a whole red-team campaign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from sliplm.attacks.case import Placement
from sliplm.attacks.folder import AGAIN
from sliplm.attacks.runs import Line
from sliplm.attacks.training import Access
from sliplm.shares.recipe import Recipe, Rule

NONE = "none"  # the attacker without a share

_ON_SHARES = (1, 2, 3, 4)
_KIN = (5, 6)  # need a public relative
_TWO, _BLOCKS, _BLACK, _HEAD = 7, 8, 9, 10


def standard_recipes() -> dict[str, Recipe]:
    """The papers' plain split, the default, the provable reference, and second splits of the same weights.

    Haar rotations are refused for very wide groups: the LM head then stays in the vault.
    """
    plain, default = Recipe(rotation="none"), Recipe()
    half = default.rank // 2
    return {
        "plain": plain,
        "default": default,
        "haar": Recipe(rotation="haar", rules=(Rule(pattern="lm_head", placement="vault"),)),
        "plain" + AGAIN: plain.model_copy(update={"rank": half}),
        "default" + AGAIN: default.model_copy(update={"rank": half}),
    }


def lines(
    recipes: Sequence[str],
    placements: Sequence[Placement],
    accesses: Sequence[Access],
    relatives: Sequence[str] = (),
    attacks: Sequence[int] | None = None,
) -> tuple[Line, ...]:
    """Every attack where it applies, and the attacker without a share beside it.

    Args:
        recipes: names of splits; those of second splits only add attack 7 to the first's.
        relatives: names of public relatives; attacks 5 and 6, and 9 as their black-box line.
        attacks: numbers; all if None. The black-box line always runs.
    """
    firsts = [name for name in recipes if not name.endswith(AGAIN)]
    found: list[Line] = []
    for access, placement in product(accesses, placements):
        places = [(NONE, black) for black in _black(placement, access)]
        for name in firsts:
            places += [(name, n) for n in _on_share(placement, access, again=name + AGAIN in recipes)]
        found += [Line(n, name, placement, access) for name, n in places]
        if access != "hidden":
            for kin in relatives:
                found.append(Line(_BLACK, NONE, placement, access, kin))
                found += [Line(n, name, placement, access, kin) for name in firsts for n in _KIN]
    return tuple(line for line in found if attacks is None or line.recipe == NONE or line.attack in attacks)


def _black(placement: Placement, access: Access) -> Iterator[int]:
    """What an attacker without a share can do."""
    if access == "hidden":
        yield from [_BLOCKS] if placement.exit_layer is not None else []
        return
    yield _BLACK
    if access == "logits" and placement.patterns is None:
        yield _HEAD


def _on_share(placement: Placement, access: Access, *, again: bool) -> Iterator[int]:
    if access == "hidden":
        yield from _black(placement, access)
        return
    yield from _ON_SHARES
    if again:
        yield _TWO
    if access == "logits" and placement.patterns is None:
        yield _HEAD
