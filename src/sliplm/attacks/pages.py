"""The report of a campaign: what a thief restores, in pictures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sliplm.attacks import ATTACKS
from sliplm.attacks.a11_fit import Trial
from sliplm.attacks.basing import BasisStudy
from sliplm.attacks.campaign import NONE
from sliplm.attacks.fitting import Study
from sliplm.attacks.former import DEFAULT, FORMER
from sliplm.attacks.summary import Cell, Point, Summary
from sliplm.report.figures import Axis, Line, Picture, line_chart, save_png
from sliplm.report.page import Section, Table, write_page

LIMIT = 1.05  # Rel.Black up to which a share is said to be of no use
_NAMES = {attack.number: attack.name for attack in ATTACKS}
_ORDER = ("plain", "default", "haar")
_BLACK = "no share"

_Place = tuple[str, str, str]  # placement, access, relative


def write_report(
    out: Path,
    name: str,
    found: Summary,
    *,
    complete: bool,
    fitted: Study | None = None,
    based: BasisStudy | None = None,
) -> Path:
    """Write `out/attack.html` and its pictures.

    Args:
        name: of the model.
        fitted: the study of attack 11, if it was run.
        based: those of attacks 12 to 14.

    Raises:
        ReportError: jinja2 or matplotlib is not installed.
        ShareError: a file cannot be written.
    """
    places: dict[_Place, list[Cell]] = {}
    for cell in found.cells:
        places.setdefault((cell.placement, cell.access, cell.relative), []).append(cell)
    sections = [_place(place, cells, found) for place, cells in places.items()]
    studies = ([] if fitted is None else [_fit(fitted)]) + ([] if based is None else [_basis(based)])
    sections = [_table(found.cells), *sections, *studies, _points(found.points), _words()]
    for section in sections:
        for picture in section.pictures:
            save_png(picture, out)
    page = out / "attack.html"
    write_page(page, f"What a thief gets of {name}", _lead(found, complete=complete), sections)
    return page


def _lead(found: Summary, *, complete: bool) -> list[str]:
    lead = []
    if found.original is not None:
        lead.append(
            f"The original has a perplexity of {found.original.perplexity:.1f} on the test text and guesses "
            f"{found.original.accuracy:.1%} of its tokens. The best attack on each split stands beside the "
            "best attacker who has no share at all. Where both do as well, the share was of no use."
        )
    worst = max((cell for cell in found.cells if cell.recipe == "default"), default=None, key=_ratio)
    if worst is not None:
        lead.append(
            f"On the default recipe the largest ratio is {worst.relative_to_black.mean:.2f}: attack "
            f"{_attack(worst.best)}, protected: {worst.placement}, the attacker has "
            f"{_has(worst.access, worst.relative)}, {worst.best.tokens or worst.black.tokens:,} tokens."
        )
    if not complete:
        lead.append("Time was up before the end of the campaign: what is missing here was not run.")
    return lead


def _ratio(cell: Cell) -> float:
    return cell.relative_to_black.mean


def _table(cells: Sequence[Cell]) -> Section:
    rows = []
    for cell in cells:
        ratio = cell.relative_to_black
        rows.append(
            (
                cell.placement,
                _short(cell.access, cell.relative),
                cell.recipe,
                _attack(cell.best),
                f"{cell.best.tokens or cell.black.tokens:,}",
                f"{_perplexity(cell.best.perplexity.mean)}, {cell.best.accuracy.mean:.1%}",
                f"{_perplexity(cell.black.perplexity.mean)}, {cell.black.accuracy.mean:.1%}",
                f"{ratio.mean:.2f}",
                cell.spread,
            )
        )
    columns = (
        "protected", "has", "split", "best attack", "tokens", "perplexity, right", _BLACK,
        "Rel.Black", "95 %",
    )  # fmt: skip
    text = (
        "Rel.Black is the share of tokens that the restored model guesses right, over that of the attacker "
        "without a share. 1.00 is the aim. The interval is over the seeds of both.",
    )
    return Section("Rel.Black", text, tables=(Table(columns, rows, left=4),))


def _place(place: _Place, cells: Sequence[Cell], found: Summary) -> Section:
    placement, access, relative = place
    recipes = sorted({cell.recipe for cell in cells}, key=_rank)
    lines = [_line(recipe, [cell.best for cell in cells if cell.recipe == recipe]) for recipe in recipes]
    blacks = {cell.budget: cell.black for cell in cells}
    lines.append(_line(_BLACK, list(blacks.values())))
    level = [] if found.original is None else [("the original", found.original.accuracy)]
    name = "-".join(part.replace(" ", "-").replace("%", "-percent") for part in place if part)
    picture: Picture = line_chart(
        f"restored-{name}",
        f"Tokens guessed right after the best attack; protected: {placement}; the attacker has "
        f"{_has(access, relative)}. The band is the 95 % interval over seeds.",
        lines,
        Axis("tokens that the attacker has", base=10),
        Axis("next tokens guessed right", low=0),
        title=f"Protected: {placement}. The attacker has {_has(access, relative)}.",
        levels=level,
    )
    return Section(f"Protected: {placement}; the attacker has {_has(access, relative)}", pictures=(picture,))


def _line(label: str, points: Sequence[Point]) -> Line:
    ordered = sorted(points, key=lambda point: point.budget)
    return Line(
        label,
        [max(1, point.tokens) for point in ordered],
        [point.accuracy.mean for point in ordered],
        ([point.accuracy.low for point in ordered], [point.accuracy.high for point in ordered]),
    )


def _points(points: Sequence[Point]) -> Section:
    rows = [
        (
            point.line[2],
            _short(point.line[3], point.line[4]),
            "none" if point.line[1] == NONE else point.line[1],
            _attack(point),
            point.variant,
            f"{point.rate:g}",
            f"{point.tokens:,}",
            _perplexity(point.perplexity.mean),
            f"{point.accuracy.mean:.1%}",
            f"{len(point.accuracies)}",
        )
        for point in sorted(
            points, key=lambda point: (point.line[2:], point.budget, point.line[1], point.line)
        )
    ]
    columns = (
        "protected", "has", "share", "attack", "variant", "learning rate", "tokens",
        "perplexity", "right", "seeds",
    )  # fmt: skip
    text = (
        "Variant and learning rate are those that did best on the validation text; all figures are of the "
        "test text.",
    )
    return Section("Every attack", text, tables=(Table(columns, rows, left=5),))


def _fit(found: Study) -> Section:
    n = found.trials[0].n
    told = [trial for trial in found.trials if trial.given == 1.0 and trial.kind == FORMER]
    today = {trial.closeness: _read_as(trial) for trial in found.trials if trial.kind == DEFAULT}
    ranks = sorted({trial.rank for trial in told})
    close = sorted({trial.closeness for trial in told})
    read = {(trial.rank, trial.closeness): _read_as(trial) for trial in told}
    rows: list[tuple[str, ...]] = [
        (f"{rank}, release 0.2", *(read.get((rank, closeness), "") for closeness in close)) for rank in ranks
    ]
    rows.append(("0, today's", *(today.get(closeness, "") for closeness in close)))
    first = [t for t in found.trials if t.kind == FORMER and t.rank == 0 and t.closeness == min(close)]
    signs = {t.given: t for t in first}
    guesses = [(f"{t.given:.0%}", f"{t.right:.0%}", _read_as(t)) for _, t in sorted(signs.items())]
    text = (
        f"On the upper left {n} x {n} of {found.group}: what an attacker reads of the difference between "
        "the victim and a copy that is this close, if he is told all the signs that singular vectors leave "
        "open. 0 % is what the share's spectrum alone gives.",
        f"He is not told. Of this matrix ({found.width} wide, rank 16 removed) he would have to guess "
        f"{found.guess} signs at once before anything shows whether they are right.",
    )
    return Section(
        "Fitting the fast transform to a relative",
        text,
        tables=(
            Table(("rank removed, transform", *(f"{100 * closeness:g} % off" for closeness in close)), rows),
            Table(
                ("signs told", "right in the end", "read"),
                guesses,
                f"Nothing removed, a copy {100 * min(close):g} % off: the rest of the signs searched for.",
            ),
        ),
    )


def _read_as(trial: Trial) -> str:
    return f"{max(0.0, 1 - trial.error):.0%}"


def _basis(found: BasisStudy) -> Section:
    lattice = [
        (s.kind, f"{s.splits}", f"{s.below:.1%}", f"{s.smallest:.2g}", f"{s.deviation:.1f}")
        for s in found.lattice
    ]
    null = [
        (f.kind, f"{f.dead}", f"{f.null}", f"{f.integers}", f"{f.columns} of {f.dead * f.splits}")
        for f in found.null
    ]
    columns = [
        (k.kind, f"{k.known}", f"{k.peeled:.0%}", f"{k.told:.1f}", f"{k.overlap:.3f}", f"{k.blind:.1f}")
        for k in found.columns
    ]
    text = (
        f"On {found.lattice[0].width} columns of {found.group}, split again and again: as the product does, "
        "with a Haar matrix, which shows nothing but singular values, and as release 0.2 did, which these "
        "attacks broke. What is above the Haar lines would be a leak.",
    )
    return Section(
        "What shows the secret basis",
        text,
        tables=(
            Table(
                ("split", "splits", "p < 0.001", "smallest p", "apart from chance"),
                lattice,
                "12: a lattice in the smallest singular vector; the last column in standard deviations.",
            ),
            Table(
                ("split", "dead inputs", "null space", "integer vectors", "columns found"),
                null,
                "13: columns of the secret basis in the null space.",
            ),
            Table(
                ("split", "columns known", "peeled", "blocks told", "blocks overlap", "first value"),
                columns,
                "14: what known columns give; 0 known: the share alone. Chance is 1 for blocks told, 0 for "
                "the first value.",
            ),
        ),
    )


def _words() -> Section:
    return Section(
        "What was tried",
        [f"{attack.number}. {attack.title}." for attack in ATTACKS]
        + [
            "The attacker is granted more than a worker has: the row scales, the names and places of all "
            "layers, the rank. Where only some layers are protected he has all others in clear.",
            "A split that stands here has withstood these attacks at these budgets, no more. Proven is one "
            "thing: a share with the rotation haar shows singular values and nothing else.",
        ],
    )


def _attack(point: Point) -> str:
    return f"{point.line[0]} {_NAMES.get(point.line[0], '')}"


def _short(access: str, relative: str) -> str:
    return access + (f", {relative}" if relative else "")


def _has(access: str, relative: str) -> str:
    names = {"text": "text alone", "logits": "the victim's logits", "hidden": "logits and hidden states"}
    return names.get(access, access) + (f", a relative ({relative})" if relative else "")


def _rank(recipe: str) -> tuple[int, str]:
    return (_ORDER.index(recipe) if recipe in _ORDER else len(_ORDER), recipe)


def _perplexity(value: float) -> str:
    return f"{value:,.1f}" if value < 1e5 else f"{value:.1e}"
