"""From a budget to a recipe: never over the budget, never less worth for more, as few rules as it takes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm.errors import InputError, RecipeError
from sliplm.planning.counts import count_group
from sliplm.planning.planner import (
    Amount,
    Budget,
    Planner,
    Recommendation,
    account,
    parse_amount,
)
from sliplm.shares.recipe import GroupChoice, Recipe
from sliplm.shares.rules import Piece, blank, escape, make_recipe

SHAPES = {"q+k": (768, 512), "o": (512, 512), "up": (2816, 512), "down": (512, 1408)}
RANKS = (1, 2, 4, 8, 16)


def pieces(layers: int, head: int = 4000, tied: bool = True) -> tuple[Piece, ...]:
    """A small transformer of a few layers, with a wide head."""
    found = [
        Piece(f"m.{i}.{kind}", (f"m.{i}.{kind}",), kind, f"m.*.{kind}", m, n, 4 * m * n, float(-i % 3))
        for i in range(layers)
        for kind, (m, n) in SHAPES.items()
    ]
    head_bytes = 0 if tied else 4 * head * 512
    return (*found, Piece("head", ("head",), "head", "head", head, 512, head_bytes))


def rising(values: list[float]) -> dict[int, float]:
    return dict(zip(RANKS, itertools.accumulate(values, max), strict=True))


worths = st.lists(st.floats(0, 1), min_size=5, max_size=5).map(rising)
planners = st.builds(
    lambda layers, tied, kept, lines: Planner(
        pieces(layers, tied=tied), dict(zip((*SHAPES, "head"), lines, strict=True)), kept
    ),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 20_000_000),
    st.lists(worths, min_size=5, max_size=5),
)
budgets = st.builds(
    Budget,
    macs=st.none() | st.floats(0.04, 1.2).map(lambda share: Amount(share, is_share=True)),
    bytes=st.none() | st.floats(0.1, 1).map(lambda share: Amount(share, is_share=True)),
    exchanges=st.none() | st.integers(0, 17),
)


def recommend(planner: Planner, budget: Budget) -> Recommendation | None:
    try:
        return planner.recommend(budget)
    except RecipeError:
        return None


@settings(max_examples=60)
@given(planner=planners, budget=budgets)
def test_a_recipe_never_costs_more_than_the_budget(planner: Planner, budget: Budget) -> None:
    found = recommend(planner, budget)
    if found is None:
        return
    report = found.report
    if budget.macs is not None:
        assert report.vault_macs.total <= budget.macs.of(planner.plain_macs)
    if budget.bytes is not None:
        assert report.vault_bytes <= budget.bytes.of(report.vault_bytes + report.worker_bytes)
    if budget.exchanges is not None:
        assert report.exchanges <= budget.exchanges
    assert report.plain_macs == planner.plain_macs
    assert sum(choice.worth for choice in found.choices) == pytest.approx(found.worth)


@settings(max_examples=60)
@given(
    planner=planners,
    share=st.floats(0.04, 1.2),
    exchanges=st.integers(0, 17),
    more=st.floats(0, 0.5),
    further=st.integers(0, 6),
    size=st.none() | st.floats(0.2, 1),
)
def test_a_larger_budget_never_protects_less(
    planner: Planner, share: float, exchanges: int, more: float, further: int, size: float | None
) -> None:
    def budget(extra: float, steps: int) -> Budget:
        limit = None if size is None else Amount(size + extra, is_share=True)
        return Budget(Amount(share + extra, is_share=True), limit, exchanges + steps)

    before, after = recommend(planner, budget(0, 0)), recommend(planner, budget(more, further))
    if before is not None:
        assert after is not None
        assert after.worth >= before.worth - 1e-12


@settings(max_examples=25)
@given(layers=st.integers(1, 2), lines=st.lists(worths, min_size=5, max_size=5), share=st.floats(0.05, 0.15))
def test_the_ranks_are_the_best_there_are(layers: int, lines: list[dict[int, float]], share: float) -> None:
    """Against every combination, where nothing has to be whole in the vault."""
    every = pieces(layers)
    worth = dict(zip((*SHAPES, "head"), lines, strict=True))
    planner = Planner(every, worth)
    limit = share * planner.plain_macs

    def macs(piece: Piece, rank: int) -> int:
        choice = GroupChoice(rank, 12, "fast", "split")
        return count_group(piece.name, piece.rows, piece.columns, choice).vault_macs.total

    cost = {(kind, r): sum(macs(p, r) for p in every if p.kind == kind) for kind in worth for r in RANKS}
    combinations = itertools.product(RANKS, repeat=len(worth))
    possible = [
        sum(worth[kind][rank] for kind, rank in zip(worth, ranks, strict=True))
        for ranks in combinations
        if sum(cost[kind, rank] for kind, rank in zip(worth, ranks, strict=True)) <= limit
    ]
    found = recommend(planner, Budget(Amount(share, is_share=True)))
    if possible:
        assert found is not None
        assert found.worth >= max(possible) - 1e-9


def flat(rank_worth: float = 0.1) -> dict[str, dict[int, float]]:
    return {kind: {rank: rank_worth * i for i, rank in enumerate(RANKS)} for kind in (*SHAPES, "head")}


def test_without_a_budget_it_costs_what_the_default_recipe_costs() -> None:
    every = pieces(3)
    found = Planner(every, flat()).recommend(Budget())
    usual = account(every, Recipe(), 0)
    assert found.report.vault_macs.total <= found.limit_macs == usual.vault_macs.total


def test_fewer_exchanges_put_the_cheapest_groups_into_the_vault() -> None:
    every = pieces(3)
    planner = Planner(every, flat())
    all_split = planner.recommend(Budget(exchanges=13))
    assert all_split.report.exchanges == 13
    fewer = planner.recommend(Budget(exchanges=8))
    assert fewer.report.exchanges == 8
    inside = {choice.kind: choice.in_vault for choice in fewer.choices}
    # the tied head takes no bytes, but many multiply-adds; of q+k the two most sensitive layers go in
    assert inside == {"q+k": 2, "o": 3, "up": 0, "down": 0, "head": 0}
    whole = {g.name for g in fewer.report.groups if g.placement == "vault" and g.name.endswith("q+k")}
    assert whole == {"m.1.q+k", "m.2.q+k"}
    none = planner.recommend(Budget(exchanges=0))
    assert (none.report.exchanges, none.report.vault_macs_share) == (0, 1.0)
    assert none.worth == 5


def test_a_budget_of_bytes_takes_the_tied_head_first() -> None:
    planner = Planner(pieces(2, tied=True), flat(), kept_bytes=8_000_000)
    tight = planner.recommend(Budget(macs=Amount(0.4, is_share=True), exchanges=8, bytes=Amount(9_000_000)))
    assert [c.kind for c in tight.choices if c.in_vault] == ["head"]


def test_what_cannot_be_met_is_refused_with_numbers() -> None:
    planner = Planner(pieces(2), flat(), kept_bytes=1000)
    with pytest.raises(RecipeError, match=r"1 % of the multiply-adds.*at least [\d,]+ multiply-adds .*%"):
        planner.check(Budget(macs=Amount(0.01, is_share=True)))
    with pytest.raises(RecipeError, match=r"\(500 of the bytes\).*keeps at least [\d,]+ bytes"):
        planner.check(Budget(bytes=Amount(500)))
    with pytest.raises(RecipeError, match=r"not both at once.*9 exchanges when every group"):
        planner.check(Budget(Amount(0.01, is_share=True), Amount(500), 3))
    with pytest.raises(RecipeError, match="with at most 3 exchanges a token"):
        planner.check(Budget(Amount(0.2, is_share=True), exchanges=3))


# --- recipes ----------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    layers=st.integers(1, 5),
    ranks=st.lists(st.sampled_from(RANKS), min_size=5, max_size=5),
    data=st.data(),
)
def test_a_recipe_says_what_was_chosen(layers: int, ranks: list[int], data: st.DataObject) -> None:
    every = pieces(layers)
    placed = frozenset(data.draw(st.sets(st.sampled_from([piece.name for piece in every]))))
    chosen = dict(zip((*SHAPES, "head"), ranks, strict=True))
    recipe = make_recipe(every, chosen, placed)
    for piece in every:
        choice = recipe.for_group(piece.name, piece.modules)
        if piece.name in placed:
            assert choice.placement == "vault"
        else:
            assert (choice.placement, choice.rank) == ("split", chosen[piece.kind])
    assert len(recipe.rules) <= 5 * (1 + layers // 2)
    assert not recipe.unmatched(piece.name for piece in every)


def test_a_recipe_has_as_few_rules_as_it_takes() -> None:
    every = pieces(4)
    same = dict.fromkeys((*SHAPES, "head"), 8)
    assert make_recipe(every, same, frozenset()) == Recipe(rank=8)
    recipe = make_recipe(every, same | {"o": 2}, frozenset(p.name for p in every if p.kind == "q+k"))
    assert [(r.pattern, r.rank, r.placement) for r in recipe.rules] == [
        ("m.*.q+k", None, "vault"),
        ("m.*.o", 2, None),
    ]
    three = frozenset(p.name for p in every if p.kind == "o" and p.name != "m.1.o")
    assert [(r.pattern, r.placement) for r in make_recipe(every, same, three).rules] == [
        ("m.*.o", "vault"),
        ("m.1.o", "split"),
    ]


def test_patterns_that_match_too_much_are_not_used() -> None:
    """`h.*.c` would also match `h.0.cross.c`."""
    short = Piece("h.0.c", ("h.0.c",), "c", "h.*.c", 64, 64, 0)
    long = Piece("h.0.cross.c", ("h.0.cross.c",), "cross.c", "h.*.cross.c", 64, 64, 0)
    recipe = make_recipe((long, short), {"c": 2, "cross.c": 8}, frozenset(), ("h.0.[x]",))
    assert recipe.for_group("h.0.c").rank == 2
    assert recipe.for_group("h.0.cross.c").rank == 8
    assert recipe.for_group("h.0.[x]").placement == "vault"


def test_modules_that_cannot_be_split_get_one_rule_for_all_layers() -> None:
    whole = [f"m.{i}.experts" for i in range(3)]
    recipe = make_recipe(pieces(3), dict.fromkeys((*SHAPES, "head"), 4), frozenset(), whole)
    assert [(r.pattern, r.placement) for r in recipe.rules] == [("m.*.experts", "vault")]


def test_names_are_matched_as_they_are() -> None:
    assert blank("model.layers.12.mlp.3.up") == "model.layers.*.mlp.*.up"
    assert blank("h12.c3") == "h12.c3"
    assert escape("a[0].*?") == "a[[]0].[*][?]"


# --- amounts ----------------------------------------------------------------------------------------------


def test_amounts() -> None:
    read = {text: parse_amount(text) for text in ("5%", "200MB", "1.5 G", "3000", "8M", "2kB", "1K", "0.5 %")}
    assert read == {
        "5%": Amount(0.05, is_share=True),
        "200MB": Amount(200e6),
        "1.5 G": Amount(1.5e9),
        "3000": Amount(3000),
        "8M": Amount(8e6),
        "2kB": Amount(2000),
        "1K": Amount(1000),
        "0.5 %": Amount(0.005, is_share=True),
    }
    assert [str(read[text]) for text in ("5%", "3000")] == ["5 %", "3,000"]
    for text in ("", "%", "-5%", "5 MiB", "five", "1e9", "5%%", "1,000"):
        with pytest.raises(InputError, match="is no amount"):
            parse_amount(text)
