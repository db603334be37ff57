"""The server as a process: its socket, who may reach it, TLS, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple

import uvicorn

from sliplm.errors import CredentialError, InputError
from sliplm.filesystem import because
from sliplm.parties.chain import Head, read_on
from sliplm.reading import open_regular
from sliplm.serving.door import App
from sliplm.serving.limits import Limits
from sliplm.serving.patience import Patient

BACKLOG: Final = 2048
_ENDING: Final = 10  # seconds that answers under way have when the server ends
_FILES: Final = 65536


class Where(NamedTuple):
    """Where to listen.

    Attributes:
        host, port: port 0 takes a free one.
        certificate, key: files in PEM form, or both None for no TLS.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


def bind(where: Where, *, keys: bool, plain: bool) -> socket.socket:
    """A listening socket.

    Args:
        keys: whether clients need one.
        plain: whether somebody answers for there being no TLS.

    Raises: InputError for an address that others reach, without keys, or without TLS; or one in use.
    """
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"there is no address {where.host!r}: {error}") from error
    family, _, _, _, address = found[0]
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        if not keys:
            raise InputError(
                f"others reach {where.host}, and it would answer anybody: make keys with `slip clients add "
                "FOLDER NAME` and give --clients FOLDER"
            )
        if where.certificate is None and not plain:
            raise InputError(
                f"others reach {where.host}, and keys and prompts would cross the network in clear: give "
                "--tls-cert and --tls-key, or --no-tls behind something that does TLS"
            )
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise InputError(f"{where.host}:{where.port} cannot be listened on: {error.strerror}") from error
    return made


def url(where: Where, listening: socket.socket) -> str:
    """What clients take as their base URL."""
    host, port = listening.getsockname()[:2]
    scheme = "http" if where.certificate is None else "https"
    return f"{scheme}://[{host}]:{port}/v1" if ":" in host else f"{scheme}://{host}:{port}/v1"


def serve(
    app: App,
    watch: Callable[[], Coroutine[Any, Any, None]],
    where: Where,
    listening: socket.socket,
    ready: Callable[[], None],
) -> None:
    """Serve until a signal says to end.

    Args:
        app: what answers.
        watch: runs beside it, from the server's start to its end.
        ready: called once requests are taken.

    Raises: CredentialError for a certificate or key that cannot be used.
    """
    _more_files()
    context = None if where.certificate is None else _tls(where.certificate, where.key)
    config = uvicorn.Config(
        _with_watch(app, watch, ready), http=Patient, ws="none", lifespan="on", log_config=None,
        access_log=False, server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=_ENDING,
        proxy_headers=False, ssl_context_factory=None if context is None else lambda *_: context,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])


def replay(audit: Path, limits: Limits) -> None:
    """Count what the audit record says that clients have had.  Raises: InputError: it was altered."""
    try:
        with open_regular(audit) as file:
            head, _ = read_on(file, Head(), limits.replay)
    except OSError as error:
        raise InputError(f"{audit} cannot be read {because(error, audit, 'name another')}") from error
    check_unaltered(audit, head)


def check_unaltered(audit: Path, head: Head) -> None:
    """Raise InputError for an audit record whose chain is broken."""
    if head.broken is not None:
        raise InputError(
            f"{audit} was altered: line {head.broken} does not follow from those before it. Budgets rest on "
            "it: put it away, find out who did it, and begin another"
        )


def log_lines(level: int = logging.INFO) -> None:
    """Have the log written to stderr, a line of JSON each.  No line holds a prompt, an answer or a key."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sliplm").setLevel(level)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(
            timespec="milliseconds"
        )
        line: dict[str, Any] = {
            "time": when, "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _with_watch(app: App, watch: Callable[[], Coroutine[Any, Any, None]], ready: Callable[[], None]) -> Any:
    """The application with its watch beside it."""
    state: dict[str, asyncio.Task[None]] = {}

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                state["watch"] = asyncio.create_task(watch())
                await send({"type": "lifespan.startup.complete"})
                ready()
            else:
                state["watch"].cancel()
                await send({"type": "lifespan.shutdown.complete"})
                return

    return asgi


def _tls(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise CredentialError(f"{certificate} and its key cannot be used: {error}") from error
    return context


def _more_files() -> None:
    """Let the process have as many descriptors as it may: a connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if most > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
