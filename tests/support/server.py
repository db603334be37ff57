"""`slip serve` as a process of its own, and workers that can be made slow."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from openai import OpenAI

from rogues import Asked, Connection, Honest, WorkerSide, send
from sliplm.arithmetic.field import P

LIMIT = 120.0


class Paced(Honest):
    """As slow as it is told, and as honest."""

    pause = 0.0
    lies = False

    def _answer(self, connection: Connection, side: WorkerSide, asked: Asked) -> None:
        time.sleep(self.pause)
        y = self._matrices[asked.group].product(self.inputs(asked))
        self.messages.clear()
        if self.lies:
            y = y.copy()
            y[0, 0] = (int(y[0, 0]) + 1) % P
        send(connection, side.product(1), y)


class Server:
    """A running server.

    Attributes:
        url: its base, as clients take it.
        port: where it listens.
        name: of its model.
    """

    def __init__(self, process: subprocess.Popen[bytes], ready: dict[str, Any], log: Path) -> None:
        self.process, self.url, self.name, self._log = process, ready["url"], ready["serving"], log
        self.root = self.url.removesuffix("/v1")
        self.port = int(self.root.rpartition(":")[2])
        self.clients: list[OpenAI] = []  # closed with it

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log.read_text()

    def client(self, key: str = "none") -> OpenAI:
        """OpenAI's own, which asks once."""
        self.clients.append(OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=LIMIT))
        return self.clients[-1]

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        """A GET of something beside the API."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.get(self.root + path, headers=headers, timeout=LIMIT)

    def post(self, path: str, body: Any, key: str | None = None, **options: Any) -> httpx.Response:
        """A POST of JSON, or of bytes as they are."""
        headers = {"content-type": "application/json"}
        headers |= {} if key is None else {"authorization": f"Bearer {key}"}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=data, headers=headers, timeout=LIMIT, **options)

    def figure(self, name: str, key: str | None = None) -> float:
        """The sum of a figure over its labels."""
        lines = self.get("/metrics", key).text.splitlines()
        found = [line.rpartition(" ")[2] for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(map(float, found))

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), LIMIT)


@contextmanager
def slip_serve(out: Path, folder: Path, *options: str, workers: Sequence[str] = ()) -> Iterator[Server]:
    """Serve a split; its log lies in `folder`."""
    command = [
        sys.executable,
        "-m",
        "sliplm",
        "serve",
        str(out),
        "--listen",
        "127.0.0.1:0",
        "--json",
        *options,
    ]
    for worker in workers:
        command += ["--worker", worker]
    log = folder / "server.log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=os.environ.copy())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(b"{"), log.read_text()
        server = Server(process, json.loads(line), log)
        try:
            yield server
        finally:
            for client in server.clients:
                client.close()
    finally:
        process.terminate()
        try:
            process.wait(LIMIT)
        finally:
            process.kill()
            if process.stdout is not None:
                process.stdout.close()


def until(true: Callable[[], bool]) -> None:
    """Wait for a condition, with a limit."""
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
