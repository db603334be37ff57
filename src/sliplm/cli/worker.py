"""`slip worker`."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sliplm.cli.options import SIGNED_BY


class Role(StrEnum):
    """What a process on a Unix socket is."""

    worker = "worker"
    dealer = "dealer"


def command(
    share: Annotated[Path, typer.Argument(help="The worker folder that a split wrote.")],
    *,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT (TLS with client certificates), unix:/path, or shm:/path (no TLS).")
    ] = "127.0.0.1:7400",
    keys: Annotated[
        Path | None,
        typer.Option(help="A worker's or dealer's key folder; needed for TCP."),
    ] = None,
    role: Annotated[
        Role | None,
        typer.Option(help="On a Unix socket, where no key says it: worker or dealer."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores that one product may use.")] = None,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if one is there), cpu, cuda, or cards as cuda:0,cuda:1.")
    ] = "auto",
    signed_by: Annotated[Path | None, SIGNED_BY] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
    until_stdin_closes: Annotated[Path | None, typer.Option(metavar="FOLDER", hidden=True)] = None,
) -> None:
    """Serve masked products from a worker share until SIGTERM or Ctrl-C.

    With a dealer's key folder, or `--role dealer`, it deals masks and nothing else.

    Example: slip worker out/worker --listen 0.0.0.0:7400 --keys keys/worker

    Example: slip worker out/worker --keys keys/worker --signed-by public.pem
    """
    from sliplm.parties.worker import run  # numba takes a moment, which --help need not

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # a card's first start takes a while, and says so
    logging.getLogger("sliplm.arithmetic.kernels").setLevel(logging.INFO)
    run(
        share,
        listen,
        keys,
        json_ready=json,
        threads=threads,
        until_stdin_closes=until_stdin_closes,
        role=None if role is None else role.value,
        device=device,
        signed_by=signed_by,
    )
