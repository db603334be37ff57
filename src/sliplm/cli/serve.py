"""`slip serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sliplm.cli import options
from sliplm.cli.options import Json, Key
from sliplm.cli.screen import Waiting, print_json, quiet, say, showing_warnings
from sliplm.cli.vaults import checked, opened, tokenizer_of, vault_of
from sliplm.errors import InputError
from sliplm.shares.keysource import find

_SERVER, _ROOM = "The server", "Its memory"


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

    Example: slip serve out/vault --worker "gpu.example:7400?keys=keys/vault" --clients clients
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"the server needs {error.name}: pip install 'sliplm[serve]'") from error
    told = None if traces is None else _collector(traces)
    vault = vault_of(out)
    if clients is not None and audit is None:
        audit = clients / "audit.jsonl"
    chosen: dict[str, Any] = {
        "share": share, "dealers": dealer or [], "pool": pool, "anchor": anchor, "fallback": fallback,
        "audit": audit, "pad_to": pad_to, "inputs": inputs, "key": key,
    }  # fmt: skip
    with Waiting() as waiting, showing_warnings(waiting.say):
        waiting.on("loading torch and transformers")
        quiet()
        made = checked(vault, tokenizer)
        if key is not None:
            waiting.over()  # a passphrase may be asked for
            chosen["key"] = find(key)
        from sliplm.engines.transformers.batching import Room
        from sliplm.serving.run import Where

        where = Where(*_host_port(listen), tls_cert, tls_key)
        _serve(out, vault, worker or [], chosen, made, waiting, where, clients, no_tls, name,
               Room(cache_tokens, batch_tokens, batch_requests), told, json)  # fmt: skip


def _serve(
    out: Path, vault: Path, workers: list[str], chosen: dict[str, Any], tokenizer: Any, waiting: Waiting,
    where: Any, folder: Path | None, plain: bool, name: str | None, room: Any, traces: Any, json: bool,
) -> None:  # fmt: skip
    from sliplm.engines.transformers.batching import Batch
    from sliplm.serving import run
    from sliplm.serving.clients import Clients
    from sliplm.serving.desk import Desk
    from sliplm.serving.figures import Figures
    from sliplm.serving.limits import Limits
    from sliplm.serving.served import Served

    known = None if folder is None else Clients(folder)
    listening = run.bind(where, keys=known is not None, plain=plain)
    waiting.on("opening the vault")
    with listening, opened(out, vault, workers, chosen) as model, Batch(model, room) as batch:
        served = Served(name or out.resolve().name, model, tokenizer or tokenizer_of(model), batch)
        limits = Limits(_alerting(model.slip.audit))
        if chosen["audit"] is not None:
            run.replay(chosen["audit"], limits)
        waiting.over()
        run.log_lines()
        address = run.url(where, listening)
        run.serve(Desk(served, known, limits, Figures(served), traces), where, listening,
                  lambda: _ready(served.name, address, json=json))  # fmt: skip


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
