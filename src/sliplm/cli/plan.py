"""`slip plan`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sliplm.cli.options import Json
from sliplm.cli.screen import console, number, percent, print_json, quiet, size
from sliplm.engines.progress import cut, named
from sliplm.errors import InputError

if TYPE_CHECKING:
    from sliplm.planning.planner import Recommendation
    from sliplm.sensitivity.results import Results
    from sliplm.sensitivity.variants import Grid

STAGES = {"spectra": "decomposing", "model": "loading", "losses": "measuring"}


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder with safetensors weights.")],
    out: Annotated[Path, typer.Argument(help="Where to write the report, the recipe and unfinished work.")],
    *,
    vault_macs: Annotated[
        str | None,
        typer.Option(
            metavar="N|%",
            help="The vault's multiply-adds a token at most: 5% of the model's, or 8M. Without it, what rank "
            "16 everywhere takes.",
        ),
    ] = None,
    vault_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="N|%", help="The vault share's size at most: 200MB, or 40% of both shares together."
        ),
    ] = None,
    exchanges: Annotated[
        int | None,
        typer.Option(min=0, help="Exchanges a token at most: more groups then stay whole in the vault."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text to measure on; by default English Wikipedia, which is fetched once."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens to measure on: 8192 on a GPU, 2048 on a CPU, where a model of 135 M parameters "
            "then takes about ten minutes on two cores.",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...", help="Ranks to measure: 1,2,4,8,16,32,64 on a GPU, 1,4,16,64 on a CPU."
        ),
    ] = None,
    layer_ranks: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...", help="Ranks to measure layer by layer: 1,4,16,64 on a GPU, 16 on a CPU."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option(
            "--offload/--no-offload",
            help="Read the weights from the disk as they are needed; by default if the model in float32 does "
            "not fit into free memory.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure what a model loses without the top of its matrices, and recommend a recipe for a budget.

    Writes OUT/plan.html, its pictures, OUT/plan.json and OUT/recipe.json, which slip split --recipe takes.
    Run it on a machine that you trust: OUT/.work holds the most sensitive part of the weights in clear. A
    run that was interrupted goes on where it stopped, and another budget for the same model takes seconds.

    Example: slip plan ~/models/SmolLM2-135M-Instruct plan --vault-macs 10%

    Example: slip plan ~/models/SmolLM2-135M-Instruct plan --exchanges 60 --vault-bytes 200MB
    """
    from sliplm.planning.planner import Budget, parse_amount
    from sliplm.report import need
    from sliplm.sensitivity.opening import device_named
    from sliplm.sensitivity.run import Wish, plan

    need()
    quiet()
    budget = Budget(
        macs=None if vault_macs is None else parse_amount(vault_macs),
        bytes=None if vault_bytes is None else parse_amount(vault_bytes),
        exchanges=exchanges,
    )
    place = device_named(device)
    wish = Wish(
        budget=budget,
        tokens=tokens or (8192 if place.type == "cuda" else 2048),
        grid=_grid(place.type, ranks, layer_ranks),
        device=place,
        offload=offload,
    )
    with _Bar() as bar:
        made = plan(model, out, _text(text), wish, bar.update)
    screen = console(json=json)
    _show(screen, made.results, made.advice)
    screen.print(f"\n{len(made.files)} files in {out}:", style="dim", markup=False)
    screen.print(Text(", ".join(file.name for file in made.files)), style="dim", soft_wrap=True)
    recipe = shlex.quote(str(out / "recipe.json"))
    screen.print(Text(f"slip split {shlex.quote(str(model))} SPLIT --recipe {recipe}"), soft_wrap=True)
    if json:
        print_json(made.document)


def _text(file: Path | None) -> str:
    from sliplm.sensitivity.text import read_text

    if file is not None:
        return read_text(file)
    from sliplm.examples.text import wikipedia

    return wikipedia()


def _grid(kind: str, ranks: str | None, layer_ranks: str | None) -> Grid:
    from sliplm.sensitivity.variants import COARSE, FINE, Grid

    usual = FINE if kind == "cuda" else COARSE
    return Grid(
        ranks=usual.ranks if ranks is None else _numbers("--ranks", ranks),
        layer_ranks=usual.layer_ranks if layer_ranks is None else _numbers("--layer-ranks", layer_ranks),
        steps=usual.steps,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise InputError(f"{option} {text}: write numbers with commas between, such as 1,4,16")
    return tuple(sorted({int(piece) for piece in text.split(",")}))


# --- on the screen -----------------------------------------------------------------------------------------


def _show(screen: Console, results: Results, advice: Recommendation) -> None:
    base, guess = results.base.perplexity, results.vocabulary
    screen.print(f"[bold]Perplexity without the top k[/]: {base:.2f} with it, {guess:,} for a uniform guess")
    screen.print(_removals(results))
    screen.print("[bold]Recommended[/]")
    screen.print(_recipe(results, advice))
    report = advice.report
    costs = Table.grid(padding=(0, 2))
    costs.add_column(style="bold")
    costs.add_column(justify="right")
    costs.add_column()
    work = f"{number(report.vault_macs.total)} of {number(report.plain_macs)} multiply-adds a token"
    costs.add_row("vault's work", percent(report.vault_macs_share), work)
    costs.add_row("vault's bytes", percent(report.vault_bytes_share), size(report.vault_bytes))
    payload = size(report.bytes_to_worker + report.bytes_from_worker)
    costs.add_row("exchanges", f"{report.exchanges}", f"a token, {payload} of payload")
    screen.print(costs)


def _removals(results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("kind of matrix")
    for measured in results.everything():
        table.add_column(f"k = {measured.rank}", justify="right")
    for kind in ("all", *results.kinds):
        row = results.table("kind", kind)
        table.add_row(Text(kind), *(_perplexity(measured.perplexity) for measured in row))
    return table


def _recipe(results: Results, advice: Recommendation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("kind of matrix")
    for title in ("groups", "rank", "whole in the vault", "max |v|"):
        table.add_column(title, justify="right")
    for choice in advice.choices:
        whole = choice.in_vault == choice.groups
        entry = results.localisation(choice.kind)
        table.add_row(Text(choice.kind), f"{choice.groups}", "" if whole else f"{choice.rank}",
                      f"{choice.in_vault}" if choice.in_vault else "",
                      "" if entry is None else f"{entry:.2f}")  # fmt: skip
    return table


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


class _Bar:
    """What is being done, how far it is and the time left; on stderr."""

    def __init__(self) -> None:
        screen = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            *named(screen),
            console=screen,
            disable=not screen.is_terminal,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, stage="", name="")
        self._stage = ""

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int, name: str) -> None:
        """As `sensitivity.run.plan` calls it."""
        if stage != self._stage:
            self._bar.reset(self._task, stage=STAGES[stage], name=cut(name))
            self._stage = stage
        self._bar.update(self._task, completed=done, total=total, name=cut(name))
