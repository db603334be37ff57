"""`slip ledger`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from sliplm.cli.options import Json, Key
from sliplm.cli.screen import console, print_json, printable, say
from sliplm.shares import ledger
from sliplm.shares.keysource import find
from sliplm.shares.ledger import Entry, Ledger

app = typer.Typer(help="Which models you split before.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Which models you split before.

    Two different shares of one model show together what each of them hides. So every split is noted under the
    key that seals its vault, and the same model or a close relative is refused.
    """


@app.command("list")
def list_entries(key: Key = None, json: Json = False) -> None:
    """Show the splits that were noted under your key.

    Example: slip ledger list
    """
    own = Ledger(find(key))
    entries, damaged = own.entries()
    if json:
        print_json({"ledger": str(own.folder), "splits": list(map(_document, entries)), "damaged": damaged})
        return
    if not entries and not damaged:
        say(f"{own.folder} has no split under this key.")
        return
    table = Table("id", "date", "model", "groups", "recipe", "folder", box=None, pad_edge=False)
    table.columns[-1].overflow = "fold"
    for entry in entries:
        words = (entry.split_id[:8], entry.date[:10], entry.source, str(len(entry.groups)), entry.recipe)
        table.add_row(*(Text(printable(word)) for word in (*words, entry.folder)))
    for split_id in damaged:
        table.add_row(split_id[:8], "", Text("damaged", style="red"))
    console().print(table)


@app.command("forget")
def forget(
    split_id: Annotated[str, typer.Argument(help="The id from `slip ledger list`, or its first digits.")],
    key: Key = None,
    json: Json = False,
) -> None:
    """Forget a split whose worker share is destroyed wherever it was.

    Example: slip ledger forget 1a2b3c4d
    """
    gone = Ledger(find(key)).forget(split_id)
    if json:
        print_json({"forgotten": gone})
        return
    say(f"forgotten: split {gone[:8]}. If a copy of its worker share is left, that model is split twice.")


@app.command("add")
def add(
    vault: Annotated[Path, typer.Argument(help="A vault folder that a split wrote.")],
    key: Key = None,
    json: Json = False,
) -> None:
    """Note a vault that was split on another machine.

    Example: slip ledger add out/vault
    """
    entry = ledger.add(vault, key)
    if json:
        print_json(_document(entry))
        return
    say(printable(f"noted: {entry}"))


def _document(entry: Entry) -> dict[str, object]:
    fields = ("split_id", "date", "source", "recipe", "folder")
    return {name: getattr(entry, name) for name in fields} | {"groups": len(entry.groups)}
