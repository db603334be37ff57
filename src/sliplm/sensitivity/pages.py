"""The report of a study: pictures, and the page that explains them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from sliplm.planning.planner import Recommendation
from sliplm.report.figures import Axis, Line, line_chart
from sliplm.report.page import Section, Table
from sliplm.sensitivity.results import Measurement, Results
from sliplm.sensitivity.variants import ALL
from sliplm.shares.recipe import Recipe

BEYOND = 10**6  # times a uniform guess: what is worse is drawn there
_RECIPE_FILE = "recipe.json, beside this page, is for slip split MODEL OUT --recipe recipe.json."
_DRAWN = "Nothing is drawn above a million times a uniform guess."


def recipe_text(recipe: Recipe) -> str:
    """The recipe as a JSON file that `Recipe.read` takes: what is not said is the default."""
    fields = recipe.model_dump(mode="json", exclude={"rules"})
    rules = [rule.model_dump(mode="json", exclude_none=True) for rule in recipe.rules]
    return json.dumps(fields | {"rules": rules}, indent=2) + "\n"


def sections(results: Results, advice: Recommendation, asked: str) -> list[Section]:
    """The page's sections, in order.  `asked`: the budget in words."""
    return [
        _advice(results, advice, asked),
        Section("The recipe as a file", (_RECIPE_FILE,), code=recipe_text(advice.recipe)),
        _by_kind(results),
        _by_layer(results),
        _cumulative(results),
        _spectra(results),
        _cost(results, advice),
        _how(results),
    ]


def lead(results: Results) -> list[str]:
    """The paragraphs under the title."""
    return [
        f"{results.config_class}, {results.parameters:,} parameters, {results.layers} layers. Its perplexity "
        f"on this text is {_number(results.base.perplexity)}; that of a uniform guess is "
        f"{results.vocabulary:,}.",
        "The figures say how much the model depends on the part of each matrix that a split keeps in the "
        "vault. They are no security claim: whoever has the worker's share has it in a secret basis, so that "
        "it is noise to him whatever the rank. What an attacker can win back is measured by attacks, not "
        "here.",
    ]


# --- sections ------------------------------------------------------------------------------------------


def _advice(results: Results, advice: Recommendation, asked: str) -> Section:
    report = advice.report
    rows = [
        (
            choice.kind,
            f"{choice.groups}",
            "" if choice.in_vault == choice.groups else f"{choice.rank}",
            f"{choice.in_vault}",
            "" if choice.in_vault == choice.groups else _damage(results, choice.kind, choice.rank),
            "" if choice.in_vault == choice.groups else _percent(results.energy(choice.kind, choice.rank)),
            "" if (entry := results.localisation(choice.kind)) is None else f"{entry:.2f}",
        )
        for choice in advice.choices
    ]
    table = Table(
        (
            "kind of matrix",
            "groups",
            "rank",
            "whole in the vault",
            "perplexity without that rank",
            "energy",
            "max |v|",
        ),
        rows,
        "The recipe, by kind. Perplexity and energy are of what the vault takes of this kind alone. max |v| "
        "is the largest entry of a singular vector of what is hidden, at the default rank: at 1 the share "
        "would show the image of a unit vector, which is a column of the secret basis.",
    )
    costs = Table(
        ("the vault", "", "share"),
        (
            ("multiply-adds a token", f"{report.vault_macs.total:,}", _percent(report.vault_macs_share)),
            ("bytes", f"{report.vault_bytes:,}", _percent(report.vault_bytes_share)),
            ("of them whole (embeddings, norms, ...)", f"{report.kept_bytes:,}", ""),
            ("exchanges a token", f"{report.exchanges}", ""),
            ("payload a token, out and back", f"{report.bytes_to_worker + report.bytes_from_worker:,}", ""),
        ),
        "What it costs: shares of the unprotected linear layers' multiply-adds, and of both shares' bytes.",
    )
    text = [
        f"Budget: {asked}. Every group of linear layers is split or whole in the vault; none is in clear.",
        "For each kind of matrix a rank is worth the mean of two shares: how far the perplexity goes (in its "
        "logarithm) from the model's own to a uniform guess's when that much of this kind alone is taken "
        "away, and how much of the matrices' energy that much holds. Among all combinations of the measured "
        "ranks, with the cheapest groups whole in the vault where exchanges are limited, the one worth most "
        "that meets the budget is taken.",
    ]
    return Section("Recommended recipe", text, tables=(table, costs))


def _by_kind(results: Results) -> Section:
    rows = {kind: results.table("kind", kind) for kind in (*results.kinds, ALL)}
    ranks = [m.rank for m in results.everything()]
    lines = [Line(_kind(kind), [m.rank for m in row], _shown(results, row)) for kind, row in rows.items()]
    picture = line_chart(
        "removal-by-kind",
        "Perplexity when the top k triplets of one kind of matrix are taken away in all layers, or of all "
        f"kinds at once. {_DRAWN}",
        lines,
        Axis("rank k that is taken away", base=2, ticks=ranks),
        _perplexity_axis(results),
        title="Without the top k of one kind of matrix",
        levels=_levels(results),
    )
    table = Table(
        ("taken away", *(f"k = {rank}" for rank in ranks)),
        [(_kind(kind), *(_number(m.perplexity) for m in row)) for kind, row in rows.items()],
        f"Perplexity; {_number(results.base.perplexity)} with nothing taken away.",
    )
    return Section("By kind of matrix", (), (picture,), (table,))


def _by_layer(results: Results) -> Section:
    table = results.table("layer")
    if not table:
        return Section("By layer", ("This model has no numbered layers.",))
    ranks = sorted({m.rank for m in table})
    rows = {rank: sorted((m for m in table if m.rank == rank), key=lambda m: int(m.of)) for rank in ranks}
    picture = line_chart(
        "removal-by-layer",
        f"Perplexity when the top k triplets of all matrices of a single layer are taken away. {_DRAWN}",
        [Line(f"k = {k}", [int(m.of) for m in row], _shown(results, row)) for k, row in rows.items()],
        Axis("layer"),
        _perplexity_axis(results),
        title="Without the top k of one layer",
        levels=_levels(results),
    )
    layers = [m.of for m in rows[ranks[0]]]
    by_place = {(m.of, m.rank): _number(m.perplexity) for m in table}
    numbers = Table(
        ("layer", *(f"k = {rank}" for rank in ranks)),
        [(layer, *(by_place.get((layer, rank), "") for rank in ranks)) for layer in layers],
        "Perplexity.",
    )
    return Section("By layer", (), (picture,), (numbers,))


def _cumulative(results: Results) -> Section:
    first, last = results.table("first"), results.table("last")
    if not first:
        return Section("Layer after layer", ("This model has no numbered layers.",))
    picture = line_chart(
        "removal-cumulative",
        f"Perplexity when the top {results.cumulative_rank} triplets of all matrices of the first j layers "
        "are taken away, and of the last j. " + _DRAWN,
        [
            Line("first j", [int(m.of) for m in first], _shown(results, first)),
            Line("last j", [int(m.of) for m in last], _shown(results, last)),
        ],
        Axis("number of layers j"),
        _perplexity_axis(results),
        title=f"Without the top {results.cumulative_rank} of j layers",
        levels=_levels(results),
    )
    numbers = Table(
        ("layers", "the first", "the last"),
        [(a.of, _number(a.perplexity), _number(b.perplexity)) for a, b in zip(first, last, strict=True)],
        f"Perplexity, k = {results.cumulative_rank}.",
    )
    return Section("Layer after layer", (), (picture,), (numbers,))


def _spectra(results: Results) -> Section:
    lines = []
    for kind in results.kinds:
        mine = [s for s in results.spectra if s.kind == kind and s.values and s.values[0] > 0]
        if not mine:
            continue
        places = mine[0].places
        same = [s for s in mine if s.places == places]
        columns = [sorted(s.values[i] / s.values[0] for s in same) for i in range(len(places))]
        middle = [column[len(column) // 2] for column in columns]
        band = ([column[0] for column in columns], [column[-1] for column in columns])
        lines.append(Line(kind, places, middle, band if len(same) > 1 else None))
    picture = line_chart(
        "spectra",
        "Singular values of each kind of matrix over the largest: the median of the layers, and their range.",
        lines,
        Axis("place in the spectrum", base=10),
        Axis("singular value / largest", base=10, low=1e-3),
        title="Spectra",
        markers=False,
    )
    ranks = sorted(results.spectra[0].shares)
    table = Table(
        ("kind of matrix", "matrix", *(f"k = {rank}" for rank in ranks)),
        [
            (kind, _shapes(results, kind), *(_percent(results.energy(kind, rank)) for rank in ranks))
            for kind in results.kinds
        ],
        "The share of the energy (the sum of the squares of all entries) that the top k triplets hold.",
        left=2,
    )
    text = ("The stacked matrix of a group is decomposed as the split does it: q, k and v are one matrix.",)
    return Section("Spectra", text, (picture,), (table,))


def _cost(results: Results, advice: Recommendation) -> Section:
    costs = [cost for cost in results.costs if cost.rank]
    ranks = [cost.rank for cost in costs]
    lines = [Line(kind, ranks, [100 * cost.kinds[kind] for cost in costs]) for kind in results.kinds]
    lines.append(Line(_kind(ALL), ranks, [100 * cost.macs_share for cost in costs]))
    picture = line_chart(
        "cost",
        "The vault's multiply-adds for one token over those of the unprotected layer, when every group is "
        "split with rank k. The dashed line is the recommended recipe.",
        lines,
        Axis("rank k", base=2, ticks=ranks),
        Axis("% of the multiply-adds", low=0),
        title="What a rank costs the vault",
        levels=(("recipe", 100 * advice.report.vault_macs_share),),
    )
    table = Table(
        (
            "rank",
            "multiply-adds",
            "share",
            "of it low rank",
            "rotations",
            "checks, rounding",
            "bytes",
            "share",
        ),
        [
            (
                f"{cost.rank}",
                f"{cost.macs:,}",
                _percent(cost.macs_share),
                f"{cost.low_rank:,}",
                f"{cost.rotations:,}",
                f"{cost.checks:,}",
                f"{cost.bytes:,}",
                _percent(cost.bytes_share),
            )
            for cost in results.costs
        ],
        "The vault with one rank everywhere, 12 bits, the fast basis. Rank 0: what hiding and checking take.",
    )
    return Section("What it costs", (), (picture,), (table,))


def _how(results: Results) -> Section:
    text = [
        f"Perplexity is exp of the mean loss over {results.tokens:,} tokens in windows of {results.window} "
        f"that do not overlap, in float32, on {results.device}. All figures are on the same tokens, so that "
        "they compare with each other and not with those of another text.",
        "No weight is edited: behind each linear layer the part A B x that the vault would keep is taken "
        "from its output. What the vault would keep whole (embeddings, norms, biases) is left as it is.",
        "A high perplexity says that the model needs that part as it stands; it does not say how much "
        "training an attacker needs to do without it.",
    ]
    if results.whole:
        names = ", ".join(results.whole[:5]) + (" ..." if len(results.whole) > 5 else "")
        text.append(f"These modules cannot be split and stay in the vault whatever the recipe: {names}.")
    return Section("How this was measured", text)


# --- numbers -------------------------------------------------------------------------------------------


def _kind(kind: str) -> str:
    return "all kinds" if kind == ALL else kind


def _shown(results: Results, row: Sequence[Measurement]) -> list[float]:
    """Perplexities as they are drawn."""
    return [min(m.perplexity, BEYOND * results.vocabulary) for m in row]


def _perplexity_axis(results: Results) -> Axis:
    return Axis("perplexity", base=10, low=results.base.perplexity * 0.8)


def _levels(results: Results) -> tuple[tuple[str, float], ...]:
    return ("whole model", results.base.perplexity), ("uniform guess", float(results.vocabulary))


def _damage(results: Results, kind: str, rank: int) -> str:
    return _number(next(m.perplexity for m in results.table("kind", kind) if m.rank == rank))


def _shapes(results: Results, kind: str) -> str:
    shapes = dict.fromkeys(f"{s.rows} x {s.columns}" for s in results.spectra if s.kind == kind)
    return ", ".join(list(shapes)[:3])


def _number(value: float) -> str:
    """A perplexity: 21.6, 1,234, 3.1e+09."""
    if math.isinf(value):
        return "infinite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
