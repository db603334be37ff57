"""Connections that do nothing are ended: before a request, in the midst of one, while nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from server import LIMIT
from sliplm.serving import patience

ended = threading.Event()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers /small at once; else sends until nobody is there."""
    while (await receive()).get("more_body"):
        pass
    small = scope["path"] == "/small"
    headers = [(b"content-length", b"2")] if small else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.create_task(receive())
    while not small and not gone.done():
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)
    gone.cancel()
    await send({"type": "http.response.body", "body": b"ok"})
    if not small:
        ended.set()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    before = patience.ASKING, patience.READING
    patience.ASKING, patience.READING = 0.5, 0.5  # type: ignore[misc]
    config = uvicorn.Config(app, http=patience.Patient, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(LIMIT)
            patience.ASKING, patience.READING = before  # type: ignore[misc]
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /small HTTP/1.1\r\nHo",
        b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab",
        b"GET /small HTTP/1.1\r\nHost: x\r\n\r\nGET /small HTTP/1.1\r\nHo",
    ],
)
def test_half_a_request_is_not_waited_for(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), LIMIT) as sock:
        sock.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1000):
                pass  # it ends, within the socket's limit


def test_who_reads_nothing_is_left(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), LIMIT) as sock:
        sock.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(10)
        assert ended.wait(LIMIT)
