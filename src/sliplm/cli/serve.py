"""`slip serve`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import socket
from typing import Annotated, Any, NamedTuple

import typer

from sliplm.cli import options
from sliplm.cli.options import Json, Key
from sliplm.cli.screen import Waiting, print_json, quiet, say, showing_warnings
from sliplm.cli.vaults import checked, opened, tokenizer_of, vault_of
from sliplm.errors import InputError
from sliplm.shares.keysource import find

_SERVER, _ROOM, _TOGETHER = "The server", "Its memory", "Several vaults"


class _Spec(NamedTuple):
    """What one vault serves, and how: names and numbers, no secrets."""

    out: Path
    vault: Path
    workers: list[str]
    options: dict[str, Any]
    tokenizer: Path | None
    clients: Path | None
    name: str
    room: Any
    traces: str | None


def command(
    out: Annotated[Path, typer.Argument(help="A split's folder; or its vault folder, with --worker.")],
    *,
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where to listen. What others reach needs --clients, and TLS.",
                     rich_help_panel=_SERVER),
    ] = "127.0.0.1:8000",
    clients: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The clients that slip clients made; their audit record goes "
                     "there, unless --audit names another file. Without it anybody who reaches it may ask.",
                     rich_help_panel=_SERVER),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate, in PEM form.", rich_help_panel=_SERVER)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key.", rich_help_panel=_SERVER)
    ] = None,
    no_tls: Annotated[
        bool,
        typer.Option("--no-tls", help="Listen without TLS where others reach it: what stands before does it.",
                     rich_help_panel=_SERVER),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; by default the folder's name. Adapters go by theirs.",
                     rich_help_panel=_SERVER),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Send traces to an OpenTelemetry collector, by OTLP over HTTP.",
                     rich_help_panel=_SERVER),
    ] = None,
    cache_tokens: Annotated[
        int,
        typer.Option(min=64, help="Tokens of which keys and values are kept, of all requests together.",
                     rich_help_panel=_ROOM),
    ] = 8192,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens computed in one step at most.", rich_help_panel=_ROOM)
    ] = 256,
    batch_requests: Annotated[
        int, typer.Option(min=1, help="Answers computed in one step at most.", rich_help_panel=_ROOM)
    ] = 32,
    replicas: Annotated[
        int,
        typer.Option(min=1, help="Vaults that serve together, each in a process of its own, by Ray Serve; a "
                     "client keeps to one. pip install 'sliplm[replicas]'.", rich_help_panel=_TOGETHER),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Have them on the machines of a Ray cluster: HOST:PORT of its "
                     "head, or auto. They see secrets: only your own. Without it they are on this machine.",
                     rich_help_panel=_TOGETHER),
    ] = None,
    worker: options.Workers = None,
    share: options.Share = None,
    dealer: options.Dealers = None,
    pool: options.Pool = None,
    anchor: options.Anchor = None,
    fallback: options.Fallback = "fail",
    audit: options.Audit = None,
    pad_to: options.PadTo = 1,
    inputs: options.Inputs = 1,
    tokenizer: options.Tokenizer = None,
    key: Key = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Serve a split model to many at once, by OpenAI's API, until SIGTERM or Ctrl-C.

    Chats, completions and models, with streams; health at /health and /ready, figures for Prometheus at
    /metrics. Its log goes to stderr, a line of JSON each.

    Example: slip serve out

    Example: slip clients add clients alice --day 100000

    Example: slip serve out --clients clients --listen 0.0.0.0:8443 --tls-cert cert.pem --tls-key key.pem

    Example: slip serve out --clients clients --replicas 2

    Example: slip serve out/vault --worker "gpu.example:7400?keys=keys/vault" --clients clients
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"the server needs {error.name}: pip install 'sliplm[serve]'") from error
    vault, many = vault_of(out), replicas > 1 or ray is not None
    if clients is not None and audit is None:
        audit = clients / "audit.jsonl"
    if many:
        _check_together(replicas, pool, key)
    chosen: dict[str, Any] = {
        "share": share, "dealers": dealer or [], "pool": pool, "anchor": anchor, "fallback": fallback,
        "audit": audit, "pad_to": pad_to, "inputs": inputs, "key": key,
    }  # fmt: skip
    with Waiting() as waiting, showing_warnings(waiting.say):
        waiting.on("loading torch and transformers")
        quiet()
        checked(vault, tokenizer)
        if key is not None and not many:
            waiting.over()  # a passphrase may be asked for
            chosen["key"] = find(key)
        from sliplm.engines.transformers.loop import Room
        from sliplm.serving import run
        from sliplm.serving.clients import Clients

        spec = _Spec(out, vault, worker or [], chosen, tokenizer, clients, name or out.resolve().name,
                     Room(cache_tokens, batch_tokens, batch_requests), traces)  # fmt: skip
        where = run.Where(*_host_port(listen), tls_cert, tls_key)
        known = None if clients is None else Clients(clients)
        with run.bind(where, keys=known is not None, plain=no_tls) as listening:
            serve = partial(_together, replicas, ray, known) if many else _alone
            serve(spec, where, listening, waiting, json)


def _alone(spec: _Spec, where: Any, listening: socket, waiting: Waiting, json: bool) -> None:
    """Serve by one vault in this process."""
    from sliplm.serving import run
    from sliplm.serving.app import build

    waiting.on("opening the vault")
    with _desk(spec) as desk:
        if spec.options["audit"] is not None:
            run.replay(spec.options["audit"], desk.limits)
        waiting.over()
        run.log_lines()
        address = run.url(where, listening)
        run.serve(build(desk), desk.watch, where, listening, lambda: _ready(spec.name, address, json=json))


def _together(
    count: int, ray: str | None, clients: Any, spec: _Spec, where: Any, listening: socket, waiting: Waiting,
    json: bool,
) -> None:  # fmt: skip
    """Serve by several, each in a process of a Ray cluster."""
    from sliplm.cluster import onserve
    from sliplm.parties.audit import AuditLog
    from sliplm.serving import run
    from sliplm.serving.front import Front

    waiting.on(f"starting {count} replicas")
    audit = AuditLog(spec.options["audit"])
    audit.write("serving", f"{count} replicas")
    with onserve.replicas(ray, count, partial(_inside, spec, Path.cwd(), audit.head)) as group:
        asyncio.run(group.begin())
        waiting.over()
        run.log_lines()
        front, address = Front(group, clients, audit, spec.name), run.url(where, listening)
        try:
            run.serve(front.app, front.watch, where, listening, lambda: _ready(spec.name, address, json=json))
        finally:
            front.close()


@contextmanager
def _inside(spec: _Spec, folder: Path, noted: str, name: str) -> Iterator[Any]:
    """In a process of the cluster: one of several vaults."""
    from sliplm.cluster.onserve import Inside
    from sliplm.serving import run
    from sliplm.serving.app import build
    from sliplm.serving.together import Together

    quiet()
    run.log_lines()
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(
            f"a machine of the cluster has no folder {folder}: the command's is taken there"
        ) from error
    with _desk(spec) as desk:
        desk.place = {"replica": name}
        if spec.clients is not None:
            desk.turn = Together(desk.audit, spec.options["audit"], desk.limits, noted).turn

        def news() -> tuple[str | None, str | None]:
            return None if desk.served.batch.alive else "the batch has ended", desk.ready()

        yield Inside(build(desk), desk.watch, news)


@contextmanager
def _desk(spec: _Spec) -> Iterator[Any]:
    """An open vault, and all that its requests share."""
    from sliplm.engines.transformers.batching import Batch
    from sliplm.serving.clients import Clients
    from sliplm.serving.desk import Desk
    from sliplm.serving.figures import Figures
    from sliplm.serving.limits import Limits
    from sliplm.serving.served import Served

    traces = None if spec.traces is None else _collector(spec.traces)
    made = checked(spec.vault, spec.tokenizer)
    known = None if spec.clients is None else Clients(spec.clients)
    with opened(spec.out, spec.vault, spec.workers, spec.options) as model, Batch(model, spec.room) as batch:
        served = Served(spec.name, model, made or tokenizer_of(model), batch)
        desk = Desk(served, known, Limits(_alerting(model.slip.audit)), Figures(served), traces)
        try:
            yield desk
        finally:
            desk.close()


def _check_together(count: int, pool: Path | None, key: str | None) -> None:
    """Raise InputError for what several processes cannot share."""
    if pool is not None and count > 1:
        raise InputError(
            f"--pool {pool}: a mask is used once, so {count} replicas cannot share a pool: leave it out, and "
            "name dealers with --dealer"
        )
    if key == "passphrase":
        raise InputError(
            "nobody can be asked for a passphrase in a replica: give --key passphrase:file:PATH or "
            "passphrase:env:NAME, or another source that it can read"
        )


def _collector(url: str) -> Any:
    try:
        from sliplm.serving.tracing import to_collector

        return to_collector(url)
    except ImportError as error:
        raise InputError(f"traces need {error.name}: pip install 'sliplm[otel]'") from error


def _ready(name: str, address: str, *, json: bool) -> None:
    if json:
        print_json({"serving": name, "url": address})
    else:
        say(f"serving {name} at {address}")


def _alerting(audit: Any) -> Any:
    def alert(client: str, part: float) -> None:
        audit.write("alert", f"{part:.0%} of its budget is used", role="client", address=client)

    return alert


def _host_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--listen is HOST:PORT, not {listen!r}")
    return host, int(port)
