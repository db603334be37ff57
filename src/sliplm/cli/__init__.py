"""The command `slip`: thin commands, one file each; what they do lives in the library.

May import everything; nothing imports it.  Begin with `split`; `screen` has what all commands print.

An error of sliplm becomes one red line on stderr and exit status 2; with --json the last line on stdout
is a JSON document {"error": CLASS, "message": TEXT}.  Ctrl-C ends with status 130, SIGTERM with 143,
SIGHUP with 129; what was open is closed by then.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from sliplm.cli import (
    attack,
    deal,
    demo,
    generate,
    inspect,
    keys,
    ledger,
    plan,
    quarantine,
    reseal,
    split,
    worker,
)
from sliplm.errors import SlipError
from sliplm.shares.share import sliplm_version

CLOSING = 15.0  # seconds that a command has to close what it opened

OWNER, RUN, TRY = "For the model's owner", "To run a split model", "To try it"


class _Commands(TyperGroup):
    """Says so when Ctrl-C ends a command; whatever the command had open is closed by then."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="slip",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sliplm {sliplm_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a model on hardware that must not learn its weights.

    The owner splits a model once. The vault, which he trusts, keeps the small secret part; the worker
    holds the rest and computes on masked numbers.

    Start with: slip demo
    """


app.command("demo", rich_help_panel=TRY)(demo.command)
app.command("plan", rich_help_panel=OWNER)(plan.command)
app.command("split", rich_help_panel=OWNER)(split.command)
app.command("attack", rich_help_panel=OWNER)(attack.command)
app.command("inspect", rich_help_panel=OWNER)(inspect.command)
app.command("reseal", rich_help_panel=OWNER)(reseal.command)
app.add_typer(ledger.app, name="ledger", rich_help_panel=OWNER)
app.add_typer(keys.app, name="keys", rich_help_panel=RUN)
app.add_typer(quarantine.app, name="quarantine", rich_help_panel=RUN)
app.command("worker", rich_help_panel=RUN)(worker.command)
app.command("deal", rich_help_panel=RUN)(deal.command)
app.command("generate", rich_help_panel=RUN)(generate.command)


def _end_in_order() -> None:
    """Have signals end a command as an error does: what it has open is closed, keys made for it are deleted.

    `timeout` and others send a signal twice at once: the second must not cut the closing short.
    """
    last = -math.inf

    def end(number: int, _: object) -> None:
        nonlocal last
        if time.monotonic() - last > CLOSING:
            last = time.monotonic()
            sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's wish stands
            signal.signal(number, end)


def main() -> None:
    """Run the command line."""
    # torch's idle threads would spin in the way of a worker on this machine; read when torch is loaded, later
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _end_in_order()
    try:
        app()
    except SlipError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": type(error).__name__, "message": str(error)}) + "\n")
        sys.exit(2)
