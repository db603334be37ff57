"""`slip attack`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from json import dumps as encode
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from sliplm.cli.options import Json, Ray
from sliplm.cli.screen import console, number, percent, print_json, quiet
from sliplm.engines.progress import spinner
from sliplm.errors import InputError
from sliplm.filesystem import readable, utf8_name
from sliplm.shares.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from rich.status import Status
    from torch import Tensor

    from sliplm.attacks.basing import BasisStudy
    from sliplm.attacks.case import Placement
    from sliplm.attacks.fitting import Study
    from sliplm.attacks.relatives import Relative
    from sliplm.attacks.runs import Run, Runs
    from sliplm.attacks.scene import Scene
    from sliplm.attacks.summary import Cell, Summary
    from sliplm.attacks.text import Text as WindowedText
    from sliplm.attacks.training import Access

TUNED = "tuned"


def command(
    model: Annotated[Path, typer.Argument(help="The checkpoint that you mean to split.")],
    out: Annotated[
        Path, typer.Argument(help="A folder for results, continued if it is there; it will hold your splits.")
    ],
    *,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="A split of your own to attack, beside plain, default and haar; repeatable.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these splits, such as plain,default.")
    ] = None,
    placement: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHERE",
            help="What is protected: all, FIRST-LAST for blocks (0-3), last-N; repeatable (all).",
        ),
    ] = None,
    access: Annotated[
        str,
        typer.Option(metavar="KINDS", help="text, logits, hidden (also hidden states behind the blocks)."),
    ] = "text,logits",
    attack: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Only these attacks; repeatable (all).")
    ] = None,
    relative: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A public relative of the model; or 5% for a copy with so much noise; or tuned, for a "
            "fine-tune on source code that is made here; repeatable.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(metavar="LIST", help="Tokens for the attacker, in percent of the model's parameters."),
    ] = "0.1%,1%",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of the best attack of each split.")] = 3,
    keep: Annotated[
        int, typer.Option(min=1, help="Attacks of each split that go on to the next budget.")
    ] = 2,
    text: Annotated[
        Path | None, typer.Option(help="A text in UTF-8; by default a thousand articles of Wikipedia.")
    ] = None,
    window: Annotated[int, typer.Option(min=8, help="Tokens that the attacker reads at once.")] = 256,
    held_out: Annotated[
        int, typer.Option(min=1, help="Such stretches kept for choosing, and as many for the test.")
    ] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes, spread over the GPUs, which several keep busy.")
    ] = 1,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Only what the attacks know before they train: quick.")
    ] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Also attack 11, on one matrix and a CPU: about a quarter of an hour."),
    ] = False,
    basis: Annotated[
        bool,
        typer.Option("--basis", help="Also attacks 12 to 14, on one matrix and a CPU: a few minutes."),
    ] = False,
    minutes: Annotated[float | None, typer.Option(help="Begin no run after so long.")] = None,
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Attack splits of your own model, and show what a thief would get.

    Numbered attacks (docs/red-team.md) meet each split beside an attacker who has no share at all. Rel.Black
    is the accuracy that the best of them restores over the best without a share: 1.00 says that the share was
    of no use. OUT holds the splits that were made for this: treat it like a vault.

    Training wants a GPU: a model of 135 M parameters takes minutes for each placement on one. On a CPU,
    --untrained shows what a thief has before he trains. With --ray, --jobs tasks run at once on the cluster,
    with --device cuda on a card each; all its machines must see MODEL and OUT under the same path.

    Example: slip attack ~/models/SmolLM2-135M-Instruct out --placement 0-3 --device cuda --jobs 4
    """
    quiet()
    import torch

    from sliplm.attacks.a13_null import need_flint
    from sliplm.attacks.campaign import lines, standard_recipes
    from sliplm.attacks.device import devices
    from sliplm.attacks.folder import AGAIN
    from sliplm.attacks.relatives import check_related
    from sliplm.attacks.runner import run
    from sliplm.attacks.runs import Runs
    from sliplm.attacks.schedule import Plan
    from sliplm.attacks.text import Text as WindowedText
    from sliplm.cluster.onray import executor
    from sliplm.engines.transformers.layout import check_reads_text

    check_reads_text(model)
    if basis:
        need_flint()
    deadline = time.time() + 60 * minutes if minutes is not None else math.inf
    recipes = standard_recipes() | dict(_named_recipe(given) for given in recipe or [])
    if only is not None:
        kept = only.split(",")
        if unknown := set(kept) - set(recipes):
            raise InputError(
                f"--only {only}: there is no split {min(unknown)}; there are {', '.join(recipes)}"
            )
        recipes = {name: given for name, given in recipes.items() if name.removesuffix(AGAIN) in kept}
    kin = dict(_named_relative(given, out) for given in relative or [])
    budgets = tuple(sorted({_share("--budget", part) for part in budget.split(",")}))
    if untrained:  # what is known before training is the same for all
        budgets = budgets[:1]
    check_related(model, kin)
    places = [_placement(given, model) for given in placement or ["all"]]
    kinds = [_access(kind) for kind in access.split(",")]
    plan = Plan(
        lines(tuple(recipes), places, kinds, tuple(kin), attack),
        budgets,
        seeds,
        keep,
        deadline,
        untrained,
    )
    elsewhere = [torch.device("cuda" if device == "cuda" else "cpu")]  # this machine may have no card
    where = devices(device if ray is None else "auto", jobs)
    screen = console(json=json)
    file = out / "runs.jsonl"
    with executor(ray, cards=int(device == "cuda"), width=jobs) as there:
        with screen.status("reading the text", spinner=spinner(screen)) as status:
            windows = WindowedText.of(_tokens(model, text), window, held_out)
            opened = _prepared(model, out, windows, recipes, kin, where[0], status)
        with _Bar(len(plan.lines)) as bar:
            complete = run(opened, plan, file, bar.report, where if ray is None else elsewhere, there)
            fitted = bar.fit(model, out) if fit else None
            based = bar.basis(model, out) if basis else None
    _finish(model, out, Runs(file), screen, fitted, based, complete=complete, json=json)


def _prepared(
    model: Path,
    out: Path,
    windows: WindowedText,
    recipes: dict[str, Recipe],
    kin: dict[str, Relative],
    device: torch.device,
    status: Status,
) -> Callable[[torch.device], Scene]:
    """Make the splits, and the fine-tune if one is asked for; how a process opens them."""
    from sliplm.attacks.folder import claim, prepare
    from sliplm.attacks.relatives import tune
    from sliplm.attacks.scene import Scene

    claim(out, model, windows)
    splits = out / "splits"
    prepare(model, splits, recipes, lambda done, of: status.update(f"splits: {done} of {of}"))
    if TUNED in kin and not (out / TUNED).exists():
        status.update("fine-tuning a relative")
        tune(model, out / TUNED, device)
    # in a process of another machine the current folder is another one
    kin = {name: kind.resolve() if isinstance(kind, Path) else kind for name, kind in kin.items()}
    return partial(Scene, model.resolve(), splits.resolve(), windows, recipes, relatives=kin)


def _finish(
    model: Path,
    out: Path,
    runs: Runs,
    screen: Console,
    fitted: Study | None,
    based: BasisStudy | None,
    *,
    complete: bool,
    json: bool,
) -> None:
    """Table on the screen; attack.json, page and pictures in the folder."""
    from sliplm.attacks.pages import write_report
    from sliplm.attacks.summary import document, summarise

    found = summarise(runs.done.values())
    result = document(found, fitted, based, complete=complete)
    (out / "attack.json").write_text(encode(result, indent=1) + "\n", encoding="utf-8")
    page = write_report(
        out, readable(model.resolve().name), found, complete=complete, fitted=fitted, based=based
    )
    screen.print(_tables(found))
    screen.print(Text(f"{page}\n{out / 'attack.json'}", style="dim"), soft_wrap=True)
    if not complete:
        screen.print("[yellow]time was up before the end: the same command continues[/yellow]")
    if json:
        print_json(result)


def _tables(found: Summary) -> Group:
    """For each placement and what the attacker has, a table that fits 80 columns."""
    title = "What a thief restores"
    if found.original is not None:
        title += (
            f" (the original: perplexity {found.original.perplexity:.1f}, "
            f"next token right {percent(found.original.accuracy)})"
        )
    places: dict[str, list[Cell]] = {}
    for cell in found.cells:
        has = cell.access + (f", a relative: {cell.relative}" if cell.relative else "")
        places.setdefault(f"protected: {cell.placement}; he has: {has}", []).append(cell)
    return Group(Text(title, style="bold"), *(_table(place, cells) for place, cells in places.items()))


def _table(place: str, cells: list[Cell]) -> Table:
    from sliplm.attacks import ATTACKS
    from sliplm.attacks.pages import LIMIT

    names = {attack.number: attack.name for attack in ATTACKS}
    table = Table(title=f"\n{place}", title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column, width in (("tokens", 6), ("split", 8), ("best attack", 12)):
        table.add_column(column, min_width=width)
    for column, width in (("with the share", 14), ("without", 14), ("Rel.Black", 18)):
        table.add_column(column, justify="right", min_width=width)
    for cell in cells:
        best, black, ratio = cell.best, cell.black, cell.relative_to_black
        style = "red" if ratio.low > LIMIT else "green" if ratio.low < ratio.high <= LIMIT else ""
        table.add_row(
            number(best.tokens or black.tokens),
            cell.recipe,
            f"{best.line[0]} {names[best.line[0]]}",
            f"{_perplexity(best.perplexity.mean)} {percent(best.accuracy.mean)}",
            f"{_perplexity(black.perplexity.mean)} {percent(black.accuracy.mean)}",
            Text(f"{ratio.mean:.2f}, {cell.spread}", style),
        )
    return table


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


class _Bar:
    """How many lines are done, and the last run."""

    def __init__(self, lines: int) -> None:
        self._bar = Progress(
            TextColumn("attacking"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed} runs on " + f"{lines} lines"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}", style="dim", markup=False, table_column=Column(ratio=1)),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, last="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def fit(self, model: Path, out: Path) -> Study:
        """Run attack 11."""
        from sliplm.attacks.fitting import TRIALS, fit_study

        def progress(done: int) -> None:
            self._bar.update(self._task, last=f"11 on one matrix: {done} of {TRIALS} trials")

        return fit_study(model, out, progress)

    def basis(self, model: Path, out: Path) -> BasisStudy:
        """Run attacks 12 to 14."""
        from sliplm.attacks.basing import basis_study

        return basis_study(model, out, lambda line: self._bar.update(self._task, last=line))

    def report(self, run: Run) -> None:
        """A run is finished."""
        number, recipe, placement, access, relative = run.line
        last = (
            f"{number} on {recipe} {placement} {access} {relative}: perplexity {_perplexity(run.perplexity)}"
        )
        self._bar.update(self._task, advance=1, last=last)


# --- what was asked for ----------------------------------------------------------------------------------


def _named_recipe(given: str) -> tuple[str, Recipe]:
    name, _, file = given.partition("=")
    if not name.isidentifier() or not file:
        raise InputError(f"--recipe {given}: give a short name and a file, such as mine=recipe.json")
    return name, Recipe.read(file)


def _named_relative(given: str, out: Path) -> tuple[str, Relative]:
    if given == TUNED:
        return given, out / TUNED
    if given.endswith("%"):
        return given, _share("--relative", given)
    name, _, folder = given.partition("=")
    if not name or not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"--relative {given}: give NAME=DIR, the folder of a checkpoint, a distance as 5%, or tuned"
        )
    return name, Path(folder)


def _share(option: str, given: str) -> float:
    try:
        share = float(given.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not given.strip().endswith("%") or not 0 < share < math.inf:
        raise InputError(f"{option} {given}: give percentages above 0, such as 0.1%")
    return share


def _placement(given: str, model: Path) -> Placement:
    from sliplm.attacks.case import Placement, layers
    from sliplm.engines.transformers.layout import read_config

    if given == "all":
        return Placement("all", None)
    depth = read_config(model).get_text_config().num_hidden_layers
    first, _, last = given.partition("-")
    if last.isdecimal():
        low, high = (depth - int(last), depth - 1) if first == "last" else (int(first or -1), int(last))
        if 0 <= low <= high < depth:
            return layers(given, range(low, high + 1), depth)
    raise InputError(f"--placement {given}: give all, blocks such as 0-3 of 0-{depth - 1}, or last-4")


def _access(given: str) -> Access:
    if given not in ("text", "logits", "hidden"):
        raise InputError(f"--access {given}: choose from text, logits, hidden")
    return given  # type: ignore[return-value]


def _tokens(model: Path, file: Path | None) -> Tensor:
    from transformers import AutoTokenizer

    from sliplm.attacks.text import tokenise
    from sliplm.engines.transformers.layout import read_config
    from sliplm.examples.text import wikipedia
    from sliplm.sensitivity.text import read_text

    try:
        text = wikipedia() if file is None else read_text(file)
    except OSError as error:
        raise InputError(f"the example's text cannot be had ({error}): name one with --text") from error
    try:
        with utf8_name(model) as named:
            tokenizer = AutoTokenizer.from_pretrained(named, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{model} has no tokenizer that can be used: give a complete checkpoint") from error
    tokens = tokenise(tokenizer, text)
    known = getattr(read_config(model).get_text_config(), "vocab_size", None)
    if known is not None and len(tokens) and int(tokens.max()) >= known:
        raise InputError(
            f"the tokenizer of {model} makes tokens up to {int(tokens.max())}, and the model has {known}: "
            "give the folder the tokenizer that belongs to the model"
        )
    return tokens
