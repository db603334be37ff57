"""`slip split`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sliplm.cli.screen import (
    console,
    number,
    percent,
    print_json,
    quiet,
    size,
    split_with_progress,
)
from sliplm.errors import RecipeError
from sliplm.recipe import Recipe

if TYPE_CHECKING:
    from sliplm.counts import SplitReport


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder with safetensors weights.")],
    out: Annotated[Path, typer.Argument(help="Where to write the folders vault and worker.")],
    *,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Singular triplets of each matrix that stay in the vault (16).")
    ] = None,
    precision: Annotated[
        int | None, typer.Option(min=4, max=12, help="Bits of the worker's integers (12); 8 is faster.")
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(help="How the basis is hidden (fast): fast, haar (provable, slow), none (to compare)."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe in JSON or TOML; the options above override its fields.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="What seals the vault share: file:PATH, env:NAME, command:CMD, passphrase. By default your "
            "key file ~/.config/sliplm/key, which is made if there is none.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Split a model into OUT/vault, which stays with you, and OUT/worker, which may go anywhere.

    Run it on a machine that you trust. A run that was interrupted continues where it stopped. OUT/vault is
    sealed: whoever has it still needs the key.

    Example: slip split ~/models/SmolLM2-135M-Instruct out --rank 16

    Example: slip split ~/models/SmolLM2-135M-Instruct out --key passphrase
    """
    chosen = _recipe(recipe, rank=rank, precision=precision, rotation=rotation)
    quiet()
    report = split_with_progress(model, out, chosen, key)
    _show(console(json=json), out, report)
    if json:
        print_json(report.model_dump(mode="json"))


def _recipe(file: Path | None, **options: Any) -> Recipe:
    given = {name: value for name, value in options.items() if value is not None}
    if options["rotation"] not in (None, "fast", "haar", "none"):
        raise RecipeError(f"--rotation {options['rotation']}: choose fast, haar or none")
    if file is None:
        return Recipe(**given)
    return Recipe(**(dict(Recipe.read(file)) | given))


def _show(screen: Console, out: Path, report: SplitReport) -> None:
    from sliplm.engines.transformers.load import can_generate

    screen.print(f"{report.exchanges} groups of linear layers were split.\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    kept = f"secret, sealed: {size(report.kept_bytes)} kept whole, the rest shares of the split matrices"
    table.add_row(Text(str(out / "vault")), size(report.vault_bytes), kept)
    table.add_row(Text(str(out / "worker")), size(report.worker_bytes), "integers that may be public")
    share = f"of the {number(report.plain_macs)} multiply-adds that a token takes in linear layers"
    table.add_row("vault's work", percent(report.vault_macs_share), share)
    out_bytes, back = report.bytes_to_worker, report.bytes_from_worker
    traffic = f"a token in {report.exchanges} exchanges: {size(out_bytes)} out, {size(back)} back"
    table.add_row("link", size(out_bytes + back), traffic)
    errors = [group.error for group in report.groups if group.error is not None]
    if errors:
        table.add_row("rounding", f"{max(errors):.1e}", "largest relative error of a matrix")
    directions = max((group.svd_error or 0.0 for group in report.groups), default=0.0)
    table.add_row("directions", f"{directions:.1e}", "largest error of the kept singular directions")
    screen.print(table)
    if any(group.placement == "split" and group.rotation == "none" for group in report.groups):
        warning = "rotation none: the removed part can be restored from this share. Do not give it away."
        screen.print(f"\n{warning}", style="bold red", soft_wrap=True)
    hint = f"slip generate {out} --prompt 'Hello'" if can_generate(out / "vault") else f'sliplm.open("{out}")'
    screen.print(f"\nTry it: {hint}", style="dim", markup=False, soft_wrap=True)
