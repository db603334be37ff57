"""`slip split`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sliplm.cli.options import Json, Ray
from sliplm.cli.screen import (
    add_difference,
    console,
    key_option,
    number,
    percent,
    print_json,
    quiet,
    size,
    split_with_progress,
    warn_of_tail,
)
from sliplm.errors import RecipeError
from sliplm.shares.keysource import described
from sliplm.shares.recipe import Recipe
from sliplm.shares.shards import worker_folders
from sliplm.shares.share import SHARE

if TYPE_CHECKING:
    from sliplm.planning.counts import SplitReport


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder with safetensors weights.")],
    out: Annotated[Path, typer.Argument(help="Where to write the folders vault and worker.")],
    *,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Singular triplets of each matrix, or of its difference to --base, that "
        "stay in the vault (16)."),
    ] = None,
    precision: Annotated[
        int | None, typer.Option(min=4, max=12, help="Bits of the worker's integers (12); 8 is faster.")
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(help="How the basis is hidden (fast): fast, haar (provable, slow), none (to compare)."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The public model that this one was trained from, or this one "
        "itself: the worker's share is then the base alone, and the vault holds the difference.",
        rich_help_panel="A fine-tune of a public model"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FOLDER", help="A LoRA adapter, as peft saves it; by default it has its "
        "folder's name. May be given several times.", rich_help_panel="A fine-tune of a public model"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="In the place of --rank: keep this part, up to 1, of the energy of each matrix's "
        "difference.", rich_help_panel="A fine-tune of a public model"),
    ] = None,
    tail_to_worker: Annotated[
        bool,
        typer.Option("--tail-to-worker", help="Give the worker what the rank leaves out of the difference. "
        "Whoever has the base reads it.", rich_help_panel="A fine-tune of a public model"),
    ] = False,
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
    public: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A public model that this one may come from: says how close it is. May be repeated.",
        ),
    ] = None,
    shards: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Write OUT/worker-1 to OUT/worker-N, for workers that each "
        "hold a part of the matrices: all of them may be too many for one."),
    ] = 1,
    i_know: Annotated[
        bool,
        typer.Option(
            "--i-know",
            help="Split a model again, or a relative: two shares show what they differ by.",
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(help="Where matrices are decomposed: auto (a GPU if PyTorch sees one), cpu, cuda, or a "
        "card as cuda:1, which then holds secrets."),
    ] = "auto",
    ray: Ray = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Split a model into OUT/vault, which stays with you, and OUT/worker, which may go anywhere.

    Run it on a machine that you trust. A run that was interrupted continues where it stopped. OUT/vault is
    sealed: whoever has it still needs the key. A model that was split before, or a close relative of one, is
    refused: `slip ledger list` shows what was.

    Example: slip split ~/models/SmolLM2-135M-Instruct out --rank 16

    Example: slip split ~/models/SmolLM2-135M-Instruct out --key passphrase

    Example: slip split base out --base base --adapter fr=adapters/french

    Example: slip split my-finetune out --base base --energy 0.99

    Example: slip split ~/models/Llama-2-7b-hf out --shards 2
    """
    if rank is not None and energy is not None:
        raise RecipeError("--rank and --energy both decide how much is kept: give one of them")
    chosen = _recipe(
        recipe, rank=rank, precision=precision, rotation=rotation, energy=energy,
        tail="worker" if tail_to_worker else None,
    )  # fmt: skip
    quiet()
    warned: list[str] = []
    report = split_with_progress(
        model, out, chosen, key, warned=warned, public=public or (), i_know=i_know,
        base=base, adapters=_adapters(adapter or []), device=device, shards=shards, ray=ray,
    )  # fmt: skip
    _show(console(json=json), out, report, key)
    if json:
        print_json(report.model_dump(mode="json") | {"warnings": warned})


def _recipe(file: Path | None, **options: Any) -> Recipe:
    given = {name: value for name, value in options.items() if value is not None}
    if options["rotation"] not in (None, "fast", "haar", "none"):
        raise RecipeError(f"--rotation {options['rotation']}: choose fast, haar or none")
    if file is None:
        return Recipe(**given)
    read = Recipe.read(file)
    # only what the file sets: with a base it matters what was asked for
    return Recipe(**({name: getattr(read, name) for name in read.model_fields_set} | given))


def _adapters(options: list[str]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER, by name."""
    found: dict[str, Path] = {}
    for option in options:
        name, sign, folder = option.partition("=")
        path = Path(folder if sign else option)
        name = name if sign else path.resolve().name
        if name in found:
            raise RecipeError(f"two adapters are called {name}: name one of them otherwise, as NAME=FOLDER")
        found[name] = path
    return found


def _seen(report: SplitReport) -> str:
    if report.base is None:
        return "integers that may be public"
    return f"{report.base}, rounded to integers" + (" with your tail in it" if report.tail == "worker" else
                                                    ": nothing of yours")  # fmt: skip


def _show(screen: Console, out: Path, report: SplitReport, key: str | None) -> None:
    from sliplm.engines.transformers.companions import has_tokenizer
    from sliplm.engines.transformers.load import can_generate

    screen.print(f"{report.exchanges} groups of linear layers were split.\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    kept = f"secret, sealed: {size(report.kept_bytes)} kept whole, the rest shares of the split matrices"
    table.add_row(Text(str(out / "vault")), size(report.vault_bytes), kept)
    workers = [folder.name for folder in worker_folders(out)]
    for name in workers:
        held = report.worker_bytes if len(workers) == 1 else (out / name / SHARE).stat().st_size
        table.add_row(Text(str(out / name)), size(held), _seen(report))
    share = f"of the {number(report.plain_macs)} multiply-adds that a token takes in linear layers"
    table.add_row("vault's work", percent(report.vault_macs_share), share)
    out_bytes, back = report.bytes_to_worker, report.bytes_from_worker
    traffic = f"a token in {report.exchanges} exchanges: {size(out_bytes)} out, {size(back)} back"
    table.add_row("link", size(out_bytes + back), traffic)
    errors = [group.error for group in report.groups if group.error is not None]
    if errors:
        table.add_row("rounding", f"{max(errors):.1e}", "largest relative error of a matrix")
    directions = max((group.svd_error or 0.0 for group in report.groups), default=0.0)
    if report.base is None or report.left_out is not None:
        table.add_row("directions", f"{directions:.1e}", "largest error of the kept singular directions")
    add_difference(table, report)
    screen.print(table)
    warn_of_tail(screen, report)
    unhidden = any(group.placement == "split" and group.rotation == "none" for group in report.groups)
    if report.base is None and unhidden:
        warning = "rotation none: the removed part can be restored from this share. Do not give it away."
        screen.print(f"\n{warning}", style="bold red", soft_wrap=True)
    for name, how in report.public.items():
        if not how.close:
            screen.print(f"\nagainst {name}: {how}", style="dim", markup=False, soft_wrap=True)
    if not can_generate(out / "vault"):
        hint = f"sliplm.open({str(out)!r})"
    else:
        hint = f"slip generate {shlex.quote(str(out))} --prompt 'Hello'{key_option(key)}"
        if not has_tokenizer(out / "vault"):
            hint += " --tokenizer FOLDER (the checkpoint has no tokenizer)"
    screen.print(f"\nTry it: {hint}", markup=False, soft_wrap=True)
    go = f"{out / workers[0]} goes to the worker."
    if len(workers) > 1:
        go = f"{out / workers[0]} to {workers[-1]} go to one worker each, or to several that stand in for it."
    screen.print(
        f"On another machine than this one the vault needs {out / 'vault'} and {described(key)}; {go}",
        style="dim", markup=False,
    )  # fmt: skip
