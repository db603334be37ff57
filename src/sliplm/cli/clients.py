"""`slip clients`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sliplm.cli.options import Json
from sliplm.cli.screen import console, print_json, say
from sliplm.serving import clients

app = typer.Typer(help="Who may ask a server, and how much.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(help="The folder that slip serve --clients takes.")]


@app.callback()
def group() -> None:
    """Who may ask a server, and how much.

    Each client has a key of its own. The folder keeps its hash and its limits; running servers see a change
    within a second.
    """


@app.command("add")
def add(
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="The client's name: 1 to 63 of a-z, 0-9, '.', '_' and '-'.")],
    *,
    minute: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Tokens a minute, of prompts and answers.")
    ] = None,
    day: Annotated[int | None, typer.Option(min=1, metavar="TOKENS", help="Tokens a day (UTC).")] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Tokens ever, also under later keys.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, max=20, metavar="N", help="Let it see probabilities, of the N likeliest tokens too."
        ),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Let it see those of its own text.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="A key for /metrics, which asks the model nothing.")
    ] = False,
    console: Annotated[bool, typer.Option("--console", help="Let it open the console, at /console.")] = False,
    activations: Annotated[
        bool,
        typer.Option("--activations", help="Let it see true activations there, of everybody's requests."),
    ] = False,
    json: Json = False,
) -> None:
    """Make a client's key, and print it: it is nowhere else.

    Probabilities tell much of a model, and activations of what others ask: give neither to anybody who need
    not have them.

    Example: slip clients add clients alice --minute 20000 --day 500000 --budget 10000000

    Example: slip clients add clients operator --console --activations
    """
    key = clients.add(
        folder, name, minute=minute, day=day, budget=budget, logprobs=logprobs, echo=echo, watch=watch,
        ask=not watch, console=console, activations=activations,
    )  # fmt: skip
    if json:
        print_json({"client": name, "key": key})
        return
    say(key)
    say(f"This is {name}'s key. It is not kept: hand it over now.", err=True)


@app.command("list")
def list_clients(folder: _Folder, json: Json = False) -> None:
    """Show all clients that ever were, and their limits.

    Example: slip clients list clients
    """
    found = clients.listed(folder)
    if json:
        print_json({"clients": [client.model_dump(exclude={"sha256"}) for client in found]})
        return
    table = Table("name", "state", "a minute", "a day", "ever", "may", box=None, pad_edge=False)
    for client in found:
        limits = [f"{limit:,}" if limit else "any" for limit in (client.minute, client.day, client.budget)]
        may = ["ask"] if client.ask else []
        may += [f"logprobs {client.logprobs}"] if client.logprobs is not None else []
        may += [word for word in ("echo", "watch", "console", "activations") if getattr(client, word)]
        table.add_row(client.name, "revoked" if client.revoked else "good", *limits, ", ".join(may))
    console().print(table)


@app.command("revoke")
def revoke(
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="The client's name.")],
    json: Json = False,
) -> None:
    """Take a client's key back: within a second it gets nothing more, also of an answer that it is getting.

    Example: slip clients revoke clients alice
    """
    gone = clients.revoke(folder, name)
    if json:
        print_json({"revoked": gone.name})
        return
    say(f"revoked: {gone.name}")
