"""The command `slip`: thin commands, one file each; what they do lives in the library.

May import everything; nothing imports it.  Begin with `split`; `screen` has what all commands print.

An error of sliplm becomes one red line on stderr and exit status 2, and so does a wrong command line; with
--json the last line on stdout is then a JSON document {"error": CLASS, "message": TEXT}.  Ctrl-C ends with
status 130, SIGTERM with 143, SIGHUP with 129; what was open is closed by then.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from sliplm.cli import (
    attack,
    audit,
    clients,
    deal,
    demo,
    generate,
    inspect,
    keys,
    ledger,
    plan,
    quarantine,
    reseal,
    serve,
    sign,
    split,
    worker,
)
from sliplm.cli.screen import print_json, say, settle_streams
from sliplm.errors import SlipError
from sliplm.filesystem import because
from sliplm.shares.share import sliplm_version

USAGE = 2  # exit status where the command line is wrong, and of every error of ours
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
    pretty_exceptions_enable=False,  # a traceback is Python's own, which shows no variables: they are secret
    pretty_exceptions_show_locals=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"sliplm {sliplm_version()}")
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
app.command("sign", rich_help_panel=OWNER)(sign.sign)
app.add_typer(ledger.app, name="ledger", rich_help_panel=OWNER)
app.add_typer(keys.app, name="keys", rich_help_panel=RUN)
app.add_typer(quarantine.app, name="quarantine", rich_help_panel=RUN)
app.command("worker", rich_help_panel=RUN)(worker.command)
app.command("verify", rich_help_panel=RUN)(sign.verify)
app.command("deal", rich_help_panel=RUN)(deal.command)
app.command("generate", rich_help_panel=RUN)(generate.command)
app.command("serve", rich_help_panel=RUN)(serve.command)
app.add_typer(clients.app, name="clients", rich_help_panel=RUN)
app.add_typer(audit.app, name="audit", rich_help_panel=RUN)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Have signals end a command as an error does: what it has open is closed, keys made for it are deleted.

    `timeout` and others send a signal twice at once: the second must not cut the closing short.  A caller in
    Python has his own handlers back afterwards, unless a signal ends the process.
    """
    last = -math.inf

    def end(number: int, _: object) -> None:
        nonlocal last
        if time.monotonic() - last > CLOSING:
            last = time.monotonic()
            sys.exit(128 + number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGHUP)
        ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup's stands
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours if last == -math.inf else ():
            signal.signal(number, signal.SIG_DFL)


def _report(kind: str, message: str) -> None:
    """With --json an error is a document on stdout too, the last line there."""
    if "--json" in sys.argv:
        print_json({"error": kind, "message": message})


def main() -> None:
    """Run the command line."""
    settle_streams()
    with _ending_in_order():
        try:
            app()
        except (SlipError, OSError) as error:
            text = _of_the_system(error) if isinstance(error, OSError) else str(error)
            Console(stderr=True).print(Text(f"error: {text}", style="red"), soft_wrap=True)
            _report(type(error).__name__, text)
            sys.exit(USAGE)
        except SystemExit as ended:
            wrong: Any = ended.__context__  # what was wrong with the command line, if that was it
            if ended.code == USAGE and hasattr(wrong, "format_message"):
                _report("UsageError", wrong.format_message())
            raise


def _of_the_system(error: OSError) -> str:
    """What went wrong with a file or connection, where nobody knew better."""
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    what = "a file or connection failed" if named is None else str(named)
    return f"{what} {because(error, named or Path.cwd(), 'see what is wrong there')}"
