"""`slip sign` and `slip verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.options import SIGNED_BY, Json
from sliplm.cli.screen import print_json, say

_Share = Annotated[Path, typer.Argument(help="The worker folder that a split wrote.")]


def sign(
    share: _Share,
    *,
    key: Annotated[
        Path, typer.Option(help="Your private key: key.pem of `slip keys signing`, or any EC key.")
    ],
    certificate: Annotated[
        Path | None, typer.Option(help="That key's certificate, where an authority of yours stands for it.")
    ] = None,
    json: Json = False,
) -> None:
    """Sign a worker folder, so that who serves it knows whose it is; writes model.sig into it.

    Example: slip sign out/worker --key signer/key.pem
    """
    from sliplm.parties import signing
    from sliplm.shares.share import open_worker

    made = signing.sign(open_worker(share), key, certificate)
    if json:
        print_json({"signature": str(made)})
        return
    say(f"{made} says that {share} is yours.")


def verify(share: _Share, *, signed_by: Annotated[Path, SIGNED_BY], json: Json = False) -> None:
    """Check every byte of a worker folder, and its signature.

    Example: slip verify out/worker --signed-by public.pem
    """
    from sliplm.parties import signing
    from sliplm.shares.share import open_worker

    found = open_worker(share)
    signing.check(found, signed_by)
    if json:
        print_json({"share": str(share), "split_id": found.split_id, "signed_by": str(signed_by)})
        return
    say(f"{share} is whole, and signed by {signed_by}.")
