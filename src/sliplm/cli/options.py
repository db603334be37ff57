"""Options that most commands have, each in the same words."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Key = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="What seals your vaults, as slip split takes it; by default your key file."
    ),
]
