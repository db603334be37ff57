"""Options that most commands have, each in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Key = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="What seals your vaults, as slip split takes it; by default your key file."
    ),
]

Workers = Annotated[
    list[str] | None,
    typer.Option("--worker", help="Address of a worker, as slip worker serves it, with ?keys=FOLDER for TLS. "
    "May be given several times: requests are spread over them, and they stand in for each other. "
    "Without it, a worker is started here."),
]  # fmt: skip

Share = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="The worker folder that masks are dealt from; by default the one "
    "beside the vault folder, or none with --dealer or --pool.", rich_help_panel="Masks"),
]  # fmt: skip

Dealers = Annotated[
    list[str] | None,
    typer.Option("--dealer", metavar="ADDRESS", help="A worker that deals the masks, and does not collude "
    "with the others. May be given several times.", rich_help_panel="Masks"),
]  # fmt: skip

Pool = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Masks dealt ahead by slip deal.", rich_help_panel="Masks"),
]

Anchor = Annotated[
    str | None,
    typer.Option(metavar="COMMAND", help="The pool's anchor, as slip deal took it.", rich_help_panel="Masks"),
]

Fallback = Annotated[
    Literal["fail", "here"],
    typer.Option(help="When no worker is left: fail, or compute here from --share, slowly.",
                 rich_help_panel="Workers that fail"),
]  # fmt: skip

Audit = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append a line of JSON for each lie, loss and return.",
                 rich_help_panel="Workers that fail"),
]  # fmt: skip

PadTo = Annotated[
    int,
    typer.Option(min=1, help="Pad prompts to a multiple of so many tokens, so that workers do not see "
    "their length."),
]  # fmt: skip

Inputs = Annotated[
    int,
    typer.Option(min=1, max=2, help="2: what rounding leaves of an input follows as a second row, for "
    "twice the masks and traffic. For models of which rows lost precision."),
]  # fmt: skip

Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Have the machines of a Ray cluster do it: HOST:PORT of its head, "
    "or auto. They see secrets: only your own. pip install 'sliplm[cluster]'."),
]  # fmt: skip

SIGNED_BY = typer.Option(
    metavar="FILE",
    help="Who must have signed it: a public key (public.pem of slip keys signing), or the certificate of an "
    "authority for signers.",
)

Tokenizer = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A folder with the tokenizer; by default the vault's own."),
]
