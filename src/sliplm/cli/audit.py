"""`slip audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.options import Json
from sliplm.cli.screen import print_json, say
from sliplm.errors import InputError
from sliplm.filesystem import because
from sliplm.parties.chain import verify

app = typer.Typer(help="The audit record of vaults and servers.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """The audit record of vaults and servers."""


@app.command("verify")
def check(
    file: Annotated[Path, typer.Argument(help="What --audit named.")],
    head: Annotated[
        str | None,
        typer.Option(
            metavar="HASH", help="A hash that was noted before: the record must still hold its line."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check that no line was changed, left out or put in between, by each line's hash of all before it.

    Note the hash that it prints somewhere else: whoever can write the file can also write it anew, or cut
    off its end, and only a noted hash shows that.

    Example: slip audit verify clients/audit.jsonl
    """
    try:
        found, seen = verify(file, head)
    except OSError as error:
        raise InputError(f"{file} cannot be read {because(error, file, 'name another')}") from error
    if found.broken is not None:
        raise InputError(f"{file} was altered: line {found.broken} does not follow from those before it")
    if not seen:
        raise InputError(f"{file} was altered: it has no line whose hash is {head}")
    if json:
        print_json({"lines": found.lines, "without_hash": found.bare, "head": found.hash})
        return
    bare = f", and {found.bare} without a hash of their own" if found.bare else ""
    say(f"{found.lines} lines{bare}: none was altered since it was written. Note: {found.hash}")
