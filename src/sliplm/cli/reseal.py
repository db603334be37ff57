"""`slip reseal`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sliplm.cli.options import Json, Key
from sliplm.cli.screen import console, print_json, quiet, showing_warnings


def command(
    vault: Annotated[Path, typer.Argument(help="The vault folder that a split wrote.")],
    *,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="A folder with new files under their usual names; "
        "what is not there stays as it is."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A file of the vault that goes. May be given several times."),
    ] = None,
    key: Key = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Change generation settings, chat templates or the tokenizer of a vault without another split.

    The files are generation_config.json, chat_template.jinja, tokenizer.json and whatever else a split
    copies; weights and code are never taken. Workers, pools and the ledger stay as they are. A vault that is
    running goes on with the old files until it is started again. To change the key: slip keys reseal.

    Example: slip reseal out/vault --from my-model

    Example: slip reseal out/vault --remove chat_template.jinja
    """
    quiet()
    from sliplm.engines.transformers.resealing import reseal

    vault = vault / "vault" if (vault / "vault").is_dir() else vault
    with showing_warnings():
        found = asdict(reseal(vault, source, key=key, remove=remove or ()))
    screen = console(json=json)
    for what in ("added", "changed", "removed"):
        for name in found[what]:
            screen.print(Text(f"{what}: {name}"), soft_wrap=True)
    if not any(found[what] for what in ("added", "changed", "removed")):
        screen.print(Text(f"{vault} has these files already: nothing was changed"), soft_wrap=True)
    if json:
        print_json({"vault": str(vault), **found})
