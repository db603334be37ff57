"""The shortest recipe that says for every group what was chosen for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sliplm.shares.recipe import Recipe, Rule


@dataclass(frozen=True)
class Piece:
    """A group that can be split, or the experts of one layer, which are split alike.

    Attributes:
        name: the group's; of experts the parameter's, which the groups are named by, with numbers.
        modules: its linear layers; of experts the labels of the first.
        kind: pieces of one kind get the same rank.
        pattern: a glob that matches the groups of its kind, if there is one.
        whole_bytes: what the vault's file grows by when this group stays whole (0: a tied embedding that is
            there anyway).
        sensitivity: of pieces that cost the same, the most sensitive goes to the vault first.
        experts: how many groups it is; 0 for one group that is of no expert.
        use: what part of the tokens each of them is expected to see.
    """

    name: str
    modules: tuple[str, ...]
    kind: str
    pattern: str
    rows: int
    columns: int
    whole_bytes: int
    sensitivity: float = 0.0
    experts: int = 0
    use: float = 1.0

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of its groups."""
        return tuple(f"{self.name}.{i}" for i in range(self.experts)) if self.experts else (self.name,)

    @property
    def own_pattern(self) -> str:
        """A glob that matches its groups alone."""
        return f"{escape(self.name)}.*" if self.experts else escape(self.name)


def make_recipe(
    pieces: Sequence[Piece], ranks: Mapping[str, int], placed: frozenset[str], whole: Sequence[str] = ()
) -> Recipe:
    """The recipe with few rules that gives each kind its rank and keeps `placed` and `whole` in the vault."""
    wanted = {
        piece.name: None if piece.name in placed else min(ranks[piece.kind], piece.rows, piece.columns)
        for piece in pieces
    }
    split = [rank for rank in wanted.values() if rank is not None]
    base = max(sorted(set(split)), key=split.count) if split else Recipe().rank
    rules: list[Rule] = []
    for kind in dict.fromkeys(piece.kind for piece in pieces):
        rules += _kind_rules([piece for piece in pieces if piece.kind == kind], wanted, base)
    whole_patterns = dict.fromkeys(blank(name) for name in whole)
    recipe = Recipe(rank=base, rules=(*rules, *(Rule(pattern=p, placement="vault") for p in whole_patterns)))
    if all(_agrees(recipe, piece, wanted[piece.name]) for piece in pieces):
        return recipe
    exact = [_exact(piece, wanted[piece.name]) for piece in pieces]  # patterns that match too much
    rest = [Rule(pattern=escape(name), placement="vault") for name in whole]
    return Recipe(rank=base, rules=(*exact, *rest))


def _kind_rules(pieces: Sequence[Piece], wanted: Mapping[str, int | None], base: int) -> list[Rule]:
    inside = [piece for piece in pieces if wanted[piece.name] is None]
    pattern = pieces[0].pattern
    if len(inside) == len(pieces):
        return [Rule(pattern=pattern, placement="vault")]
    ranks = [rank for piece in pieces if (rank := wanted[piece.name]) is not None]
    usual = max(sorted(set(ranks)), key=ranks.count)
    mostly_inside = 2 * len(inside) > len(pieces)
    rules = []
    if mostly_inside or usual != base:
        rules.append(
            Rule(
                pattern=pattern,
                rank=None if usual == base else usual,
                placement="vault" if mostly_inside else None,
            )
        )
    for piece in pieces:
        rank = wanted[piece.name]
        if rank is None and not mostly_inside:
            rules.append(Rule(pattern=piece.own_pattern, placement="vault"))
        elif rank is not None and (mostly_inside or rank != usual):
            rules.append(Rule(pattern=piece.own_pattern, rank=None if rank == usual else rank,
                              placement="split" if mostly_inside else None))  # fmt: skip
    return rules


def _exact(piece: Piece, rank: int | None) -> Rule:
    pattern = piece.own_pattern
    return Rule(pattern=pattern, placement="vault") if rank is None else Rule(pattern=pattern, rank=rank)


def _agrees(recipe: Recipe, piece: Piece, rank: int | None) -> bool:
    choice = recipe.for_group(piece.groups[0], piece.modules)
    return choice.placement == "vault" if rank is None else (choice.placement, choice.rank) == ("split", rank)


def escape(name: str) -> str:
    """A glob that matches a name and nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def blank(name: str) -> str:
    """A glob for all names that differ from this one in numbers only (and perhaps for more)."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", escape(name))
