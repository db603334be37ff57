"""`slip quarantine`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from sliplm import places
from sliplm.cli.options import Json
from sliplm.cli.screen import console, print_json, printable, say
from sliplm.errors import InputError
from sliplm.parties.quarantine import FILE, Quarantine

app = typer.Typer(help="Workers and dealers that lied to your vaults.", no_args_is_help=True)


def _own() -> Quarantine:
    """The user's record; unlike a vault, this command is nothing without one.  Raises: PlaceError."""
    return Quarantine(places.anchors() / FILE)


@app.callback()
def group() -> None:
    """Workers and dealers that lied to your vaults.

    Whoever gave a wrong product is not asked again by any of your vaults, also after a restart, until you say
    so.
    """


@app.command("list")
def list_entries(json: Json = False) -> None:
    """Show who lied.

    Example: slip quarantine list
    """
    own = _own()
    entries = own.entries()
    if json:
        print_json({"file": str(own.path), "quarantined": [entry.model_dump() for entry in entries]})
        return
    if not entries:
        say("Nobody was caught lying.")
        return
    table = Table("address", "key", "role", "date", "reason", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    table.columns[-1].overflow = "fold"
    for entry in entries:
        words = (entry.address, (entry.spki or "")[:16], entry.role, entry.time[:10], entry.reason)
        table.add_row(*(Text(printable(word)) for word in words))
    console().print(table)


@app.command("clear")
def clear(
    address: Annotated[str, typer.Argument(help="The address from `slip quarantine list`.")],
    json: Json = False,
) -> None:
    """Trust a worker or dealer again, whose fault you found and mended.

    Example: slip quarantine clear gpu.example:7400
    """
    gone = _own().clear(address)
    if not gone:
        raise InputError(f"{address} is not quarantined: see `slip quarantine list`")
    if json:
        print_json({"cleared": [entry.model_dump() for entry in gone]})
        return
    say(printable(f"cleared: {address}. Vaults that run have to be told: model.slip.rejoin(address)."))
