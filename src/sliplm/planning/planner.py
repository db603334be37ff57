"""From a budget to a recipe: pure arithmetic on shapes and on what each rank is worth.

Every group is split or whole in the vault; nothing is ever in clear.  A piece is a group, or all experts of
one layer's weight: these are placed alike and share an exchange.  Pieces of one kind (the same place in
different layers) share a rank, so that the recipe stays short.  The candidates are

    which groups are whole in the vault: none, or the cheapest first, counted in multiply-adds or in bytes, up
        to the number that `exchanges` calls for, or up to the last of a kind;
    each combination of ranks, one for each kind.

The best candidate that meets the budget wins.  It is worth the sum of `worth[kind][rank]` over the kinds; a
kind that is whole in the vault is worth 1.  The candidates do not depend on the limits of multiply-adds and
bytes, so that a larger budget never leads to a recipe of less worth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from sliplm.errors import InputError, RecipeError
from sliplm.planning.counts import SplitReport, count_group, counts_for_shapes, used
from sliplm.shares.recipe import GroupChoice, Recipe
from sliplm.shares.rules import Piece, make_recipe

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
DEFAULT_RANK = Recipe().rank


@dataclass(frozen=True)
class Amount:
    """A limit: a number, or a share of a whole."""

    value: float
    is_share: bool = False

    def of(self, whole: float) -> float:
        """The number that it stands for."""
        return self.value * whole if self.is_share else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:.6g} %" if self.is_share else f"{self.value:,.0f}"


def parse_amount(text: str) -> Amount:
    """Read `5%`, `200MB`, `1.5 G`, `3000`.

    Raises:
        InputError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:(%)|([kKMGT]?)[bB]?)\s*", text)
    if not found:
        raise InputError(f"{text!r} is no amount: write a share such as 5%, or a number such as 200M")
    number, share, unit = found.groups()
    if share:
        return Amount(float(number) / 100, is_share=True)
    return Amount(float(number) * UNITS["k" if unit == "K" else unit])


@dataclass(frozen=True)
class Budget:
    """What the vault may cost; None is no limit.

    Attributes:
        macs: multiply-adds per token; a share is of the model's linear layers.
        bytes: of the vault's share on disk; a share is of both shares together.
        exchanges: masked products per token.
    """

    macs: Amount | None = None
    bytes: Amount | None = None
    exchanges: int | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen for a kind: `rank` where it is split, and how many of its groups are whole (an expert's
    weight is a group).
    """

    kind: str
    groups: int
    rank: int
    in_vault: int
    worth: float


@dataclass(frozen=True)
class Recommendation:
    """A recipe with its account.

    Attributes:
        worth: the sum over the kinds, of at most one each.
        limit_macs: the limit that was used where the budget named none.
    """

    recipe: Recipe
    report: SplitReport
    choices: tuple[Choice, ...]
    worth: float
    limit_macs: float


class Planner:
    """Candidates and their costs.

    Args:
        pieces: all groups that can be split.
        worth: kind -> rank -> worth between 0 and 1, not falling with the rank.
        kept_bytes: what stays whole in the vault when every piece is split.
        whole: modules that cannot be split: they get a rule that keeps them in the vault.
        beside: groups that are in the vault whatever the recipe: name -> (rows, columns).
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        worth: Mapping[str, Mapping[int, float]],
        kept_bytes: int = 0,
        whole: Sequence[str] = (),
        beside: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._beside = beside or {}
        self._pieces, self._worth = tuple(pieces), worth
        self._kept_bytes, self._whole = kept_bytes, tuple(whole)
        self._kinds = tuple(dict.fromkeys(piece.kind for piece in pieces))
        self._counts = {
            (piece.name, rank): _count(piece, rank)
            for piece in pieces
            for rank in {*worth[piece.kind], DEFAULT_RANK}
        }
        self._whole_macs = {piece.name: _count(piece, None).macs for piece in pieces}
        self._fixed = sum(rows * columns for rows, columns in self._beside.values())
        self._plain = self._fixed + sum(self._whole_macs.values())

    @property
    def plain_macs(self) -> int:
        """Multiply-adds of the pieces, and of what is beside them, per token, unprotected."""
        return self._plain

    def recommend(self, budget: Budget) -> Recommendation:
        """The best recipe within a budget.  Without a limit of multiply-adds, the limit is what the default
        rank takes wherever it is split, with as many groups in the vault as `exchanges` calls for; or the
        least that the other limits allow, if that is more.

        Raises:
            RecipeError: no recipe meets the budget; the message says what the least is.
        """
        limit = self._limit_macs(budget)
        best: _State | None = None
        for placed in self._placements(budget.exchanges):
            for state in self._states(placed):
                if state.macs <= limit and self._fits_bytes(state, budget) and (best is None or state > best):
                    best = state
        if best is None:
            raise RecipeError(self._least(budget))
        return self._account(best, limit)

    def check(self, budget: Budget) -> None:
        """Say at once whether a budget can be met: that depends on shapes alone.

        Raises:
            RecipeError: as `recommend`.
        """
        self.recommend(budget)

    # --- candidates ---------------------------------------------------------------------------------------

    @cached_property
    def _orders(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces as they go to the vault: by what that costs in multiply-adds, and in bytes."""
        place = {kind: i for i, kind in enumerate(self._kinds)}

        def by_macs(piece: Piece) -> tuple[float, int, float]:
            split = self._floor(piece)
            return self._whole_macs[piece.name] - split.macs, place[piece.kind], -piece.sensitivity

        def by_bytes(piece: Piece) -> tuple[float, int, float]:
            split = self._floor(piece)
            return piece.whole_bytes - split.bytes, place[piece.kind], -piece.sensitivity

        return tuple(sorted(self._pieces, key=by_macs)), tuple(sorted(self._pieces, key=by_bytes))

    def _floor(self, piece: Piece) -> _Cost:
        return self._counts[piece.name, min(self._worth[piece.kind])]

    def _placements(self, exchanges: int | None) -> Iterable[frozenset[str]]:
        """Sets of groups that are whole in the vault."""
        total = len(self._pieces)
        least = 0 if exchanges is None else max(0, total - exchanges)
        seen = set()
        for order in self._orders:
            ends = [n for n in range(1, total) if order[n - 1].kind != order[n].kind]
            for count in sorted({least, total, *(n for n in ends if n > least)}):
                seen.add(frozenset(piece.name for piece in order[:count]))
        return sorted(seen, key=lambda names: (len(names), sorted(names)))

    def _states(self, placed: frozenset[str]) -> list[_State]:
        """The combinations of ranks that no other beats in both multiply-adds and worth."""
        states = [_State(0.0, self._fixed, 0, 0, (), placed)]
        for kind in self._kinds:
            pieces = [piece for piece in self._pieces if piece.kind == kind]
            options = [self._option(pieces, rank, placed) for rank in sorted(self._worth[kind])]
            if all(piece.name in placed for piece in pieces):
                options = options[:1]
            states = _frontier(state.joined(option) for state in states for option in options)
        return states

    def _option(self, pieces: Sequence[Piece], rank: int, placed: frozenset[str]) -> _State:
        """One kind at one rank."""
        whole = [piece for piece in pieces if piece.name in placed]
        counts = [self._counts[piece.name, rank] for piece in pieces if piece.name not in placed]
        return _State(
            worth=self._worth[pieces[0].kind].get(rank, 0.0) if counts else 1.0,
            macs=sum(self._whole_macs[p.name] for p in whole) + sum(c.macs for c in counts),
            bytes=sum(p.whole_bytes for p in whole) + sum(c.bytes for c in counts),
            worker_bytes=sum(c.worker_bytes for c in counts),
            ranks=(rank,),
            placed=placed,
        )

    # --- limits -------------------------------------------------------------------------------------------

    def _fits_bytes(self, state: _State, budget: Budget) -> bool:
        if budget.bytes is None:
            return True
        vault = self._kept_bytes + state.bytes
        return vault <= budget.bytes.of(vault + state.worker_bytes)

    def _limit_macs(self, budget: Budget) -> float:
        if budget.macs is not None:
            return budget.macs.of(self._plain)
        fitting, usual = [], []
        for placed in self._placements(budget.exchanges):
            usual.append(self._at(placed, dict.fromkeys(self._kinds, DEFAULT_RANK)).macs)
            fitting += [state.macs for state in self._states(placed) if self._fits_bytes(state, budget)]
        return max(min(usual), min(fitting, default=0))

    def _at(self, placed: frozenset[str], ranks: Mapping[str, int]) -> _State:
        state = _State(0.0, self._fixed, 0, 0, (), placed)
        for kind in self._kinds:
            pieces = [piece for piece in self._pieces if piece.kind == kind]
            state = state.joined(self._option(pieces, ranks[kind], placed))
        return state

    def _least(self, budget: Budget) -> str:
        """Why no recipe meets a budget."""
        floors = [
            self._at(placed, {kind: min(self._worth[kind]) for kind in self._kinds})
            for placed in self._placements(budget.exchanges)
        ]
        macs = min(state.macs for state in floors)
        vaults = [(self._kept_bytes + s.bytes, s) for s in floors]
        fewest = min(vault for vault, _ in vaults)
        share = min(vault / max(1, vault + s.worker_bytes) for vault, s in vaults)
        within = "" if budget.exchanges is None else f" with at most {budget.exchanges} exchanges a token"
        asked = [f"{limit} of {what}" for limit, what in
                 ((budget.macs, "the multiply-adds"), (budget.bytes, "the bytes")) if limit]  # fmt: skip
        both = ", and not both at once" if len(asked) == 2 else ""
        return (
            f"no recipe meets this budget ({' and '.join(asked) or 'exchanges'}): the vault does at least "
            f"{macs:,} multiply-adds a token ({100 * macs / self._plain:.3g} %) and keeps at least "
            f"{fewest:,} bytes ({100 * share:.3g} %){within}{both}; {len(self._pieces)} exchanges when every "
            "group is split. Allow more"
        )

    # --- the result ---------------------------------------------------------------------------------------

    def _account(self, state: _State, limit: float) -> Recommendation:
        ranks = dict(zip(self._kinds, state.ranks, strict=True))
        recipe = make_recipe(self._pieces, ranks, state.placed, self._whole)
        kept = self._kept_bytes + sum(p.whole_bytes for p in self._pieces if p.name in state.placed)
        choices = []
        for kind in self._kinds:
            pieces = [piece for piece in self._pieces if piece.kind == kind]
            inside = [piece for piece in pieces if piece.name in state.placed]
            worth = 1.0 if len(inside) == len(pieces) else self._worth[kind][ranks[kind]]
            groups, whole = (sum(len(piece.groups) for piece in some) for some in (pieces, inside))
            choices.append(Choice(kind, groups, ranks[kind], whole, worth))
        return Recommendation(
            recipe=recipe,
            report=account(self._pieces, recipe, kept, self._beside),
            choices=tuple(choices),
            worth=state.worth,
            limit_macs=limit,
        )


def account(
    pieces: Sequence[Piece],
    recipe: Recipe,
    kept_bytes: int,
    beside: Mapping[str, tuple[int, int]] | None = None,
) -> SplitReport:
    """What a recipe costs; the recipe is asked by the groups' names.  `beside`: as `Planner`."""
    shapes = {name: (piece.rows, piece.columns) for piece in pieces for name in piece.groups}
    uses = {name: piece.use for piece in pieces if piece.experts for name in piece.groups}
    return counts_for_shapes(shapes, recipe, kept_bytes=kept_bytes, uses=uses, whole=beside)


class _Cost(NamedTuple):
    """Of a piece: the vault's multiply-adds a token, and the bytes of its groups in both shares."""

    macs: int
    bytes: int
    worker_bytes: int


@dataclass(frozen=True)
class _State:
    """A candidate, or a part of one; the better one is the greater: worth, then few multiply-adds."""

    worth: float
    macs: int
    bytes: int
    worker_bytes: int
    ranks: tuple[int, ...]
    placed: frozenset[str]

    def joined(self, other: _State) -> _State:
        return _State(
            self.worth + other.worth,
            self.macs + other.macs,
            self.bytes + other.bytes,
            self.worker_bytes + other.worker_bytes,
            self.ranks + other.ranks,
            self.placed,
        )

    def __gt__(self, other: _State) -> bool:
        return (self.worth, -self.macs) > (other.worth, -other.macs)


def _frontier(states: Iterable[_State]) -> list[_State]:
    """Those with more worth than every cheaper one."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda s: (s.macs, -s.worth)):
        if not kept or state.worth > kept[-1].worth:
            kept.append(state)
    return kept


def _count(piece: Piece, rank: int | None) -> _Cost:
    """A piece that is split at a rank, or whole (None)."""
    usual = Recipe()
    choice = GroupChoice(
        min(rank or 0, piece.rows, piece.columns),
        usual.precision,
        usual.rotation,
        "vault" if rank is None else "split",
    )
    report = count_group(piece.name, piece.rows, piece.columns, choice)
    if piece.experts:
        report = used(report, piece.use, piece.name)
    times = len(piece.groups)
    return _Cost(times * report.vault_macs.total, times * report.vault_bytes, times * report.worker_bytes)
