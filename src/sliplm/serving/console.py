"""The console: a page to talk to the model, and to see what a worker sees of it.

The page is three files without a secret; it asks for a key, which it keeps in its memory only, sends as other
clients do, and forgets with the tab.  What it shows comes from one route, for keys that may see it.
"""

from __future__ import annotations

import asyncio
import time
from importlib import resources
from typing import Any, Final

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from sliplm.parties.standing import Status
from sliplm.serving.clients import Client
from sliplm.serving.desk import Desk
from sliplm.serving.door import CLIENT, PAGE, STATE

_KINDS: Final = ("text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8")
_FILES: Final = ("page.html", "page.js", "page.css")
_REASON: Final = 400  # characters

HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Of the page: nothing runs or is loaded but its own files, no text becomes markup, nobody frames it."""


def add_routes(app: FastAPI, desk: Desk) -> None:
    """The page's files, and what it shows."""
    folder = resources.files("sliplm.serving") / "console_page"
    for path, name, kind in zip(PAGE, _FILES, _KINDS, strict=True):
        _add_file(app, path, (folder / name).read_bytes(), kind)

    async def state(request: Request, since: int = Query(0, ge=0, lt=2**53)) -> Response:
        client: Client = request.scope[CLIENT]
        shown = desk.samples.look(since, bare=client.activations)
        found = await asyncio.to_thread(_state, desk)
        return JSONResponse(
            {**found, **shown, "activations": client.activations, "ask": client.ask},
            headers={name: HEADERS[name] for name in ("cache-control", "x-content-type-options")},
        )

    app.add_api_route(STATE, state, include_in_schema=False)


def _add_file(app: FastAPI, path: str, data: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(data, media_type=kind, headers=HEADERS)

    app.add_api_route(path, file, include_in_schema=False)


def _state(desk: Desk) -> dict[str, Any]:
    """How everything stands; no figure here is of a single request."""
    served, vault, now = desk.served, desk.served.model.slip, time.time()
    counters, load, rows = vault.counters.as_dict(), served.batch.load, vault.mask_rows()
    return {
        "models": served.names,
        "parties": [
            _party(role, status, now)
            for role, force in (("worker", vault.workers), ("dealer", vault.dealers))
            for status in force
        ],
        "masks": {"rows": sum(rows.values()), "least": min(rows.values()), "bytes": vault.mask_bytes(),
                  "groups": len(rows)},
        "load": {"running": load.running, "waiting": load.waiting, "cache": round(load.cache, 4)},
        "counters": {name: counters[name] for name in _COUNTERS},
    }  # fmt: skip


_COUNTERS: Final = (
    "exchanges", "retries", "bytes_sent", "bytes_received", "rows", "rows_dealt", "rows_dealt_late",
    "seconds_dealing",
)  # fmt: skip


def _party(role: str, status: Status, now: float) -> dict[str, Any]:
    since = None if status.verified is None else round(max(0.0, now - status.verified), 1)
    return {
        "role": role, "address": status.address.partition("?")[0], "state": status.state,
        "reason": status.reason[:_REASON], "served": status.served, "verified": since,
        "wrong": status.wrong, "quarantines": status.quarantines,
    }  # fmt: skip
