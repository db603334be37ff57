"""What every request passes before a byte of its body is read: who asks, and how much may come.

Health, readiness and the console's empty page are open to everybody.  Everything else needs a key, where the
server has clients; what the console shows needs one everywhere.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

from sliplm.serving.clients import ANYBODY, Client, Clients
from sliplm.serving.refusals import Refusal, busy, failed, too_many

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST: Final = 2 << 20
"""Bytes of a body."""

OPEN_AT_ONCE: Final = 512
"""Requests that are read or answered at a time: each may hold a body in memory."""

OF_ONE: Final = OPEN_AT_ONCE // 2
"""The same of one client, so that no one keeps out the others."""

METRICS: Final = "/metrics"
PAGE: Final = ("/console", "/console/page.js", "/console/page.css")
"""The console's page, which holds nothing and asks for a key."""

STATE: Final = "/console/state"
"""What it shows."""

OPEN: Final = frozenset(("/health", "/ready", *PAGE))
CLIENT, REQUEST_ID = "sliplm.client", "sliplm.request"
"""Where the scope has them."""

Refused = Callable[[Client | None, Refusal], None]

logger = logging.getLogger(__name__)


class Door:
    """ASGI middleware.

    Args:
        clients: None serves anybody.
        refused: told of whoever has no key, or comes with too much.
    """

    def __init__(self, app: App, clients: Clients | None, refused: Refused) -> None:
        self._app, self._clients, self._refused = app, clients, refused
        self._inside: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # never a client's own, for it names what is computed; a replica is told which
        scope.setdefault(REQUEST_ID, secrets.token_hex(12))
        started, client = False, None

        async def told(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                named = (b"x-request-id", scope[REQUEST_ID].encode())
                message["headers"] = [*message.get("headers", ()), named]
            await send(message)

        try:
            client = scope[CLIENT] = self._client(scope)
            with self._place(scope, client):
                await self._app(scope, _bounded(scope, receive), told)
        except Refusal as refusal:
            self._refused(client, refusal)
            if started:
                raise
            await respond(refusal, told)
        except Exception as error:
            logger.exception("a request failed")
            if started:
                raise
            await respond(failed(error), told)

    @contextmanager
    def _place(self, scope: Scope, client: Client) -> Iterator[None]:
        """A request's place inside; who watches needs none.  Raises: Refusal."""
        if scope["path"] in (*OPEN, METRICS, STATE):
            yield
            return
        if self._inside.total() >= OPEN_AT_ONCE:
            raise busy()
        if self._clients is not None and self._inside[client.name] >= OF_ONE:
            raise too_many(OF_ONE)
        self._inside[client.name] += 1
        try:
            yield
        finally:
            self._inside[client.name] -= 1

    def _client(self, scope: Scope) -> Client:
        """Who asks.  Raises: Refusal for nobody that we know, or who may not ask this."""
        path = scope["path"]
        if path in OPEN:
            return ANYBODY
        client = ANYBODY if self._clients is None else self._clients.find(_key(scope))
        if client is None:
            raise Refusal(401, "no such key: name yours as a bearer token", code="invalid_api_key")
        allowed = client.watch if path == METRICS else client.console if path == STATE else client.ask
        if not allowed:
            why = "your key is not for this" if self._clients else "this is for servers with --clients"
            raise Refusal(403, why, kind="permission_error", code="not_allowed")
        return client


async def respond(refusal: Refusal, send: Send) -> None:
    """Answer with a refusal; the connection ends with it, for what is left of the body is not read."""
    body = json.dumps(refusal.body()).encode()
    headers = {**refusal.headers, "content-type": "application/json", "content-length": str(len(body))}
    if refusal.status in (401, 403, 413, 429, 503):
        headers["connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _key(scope: Scope) -> str:
    """The bearer token of a request; empty where there is none, or several."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    kind, _, token = found[0].decode("latin-1").partition(" ") if len(found) == 1 else ("", "", "")
    return token.strip() if kind.lower() == "bearer" else ""


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """`receive` of a body that is not too long; one that says so is not read.  Raises: Refusal."""
    named = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if named.isdigit() and int(named) > MOST:
        raise _too_large()
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MOST:
            raise _too_large()
        return message

    return bounded


def _too_large() -> Refusal:
    return Refusal(413, f"a body has at most {MOST} bytes", code="body_too_large")
