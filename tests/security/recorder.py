"""A tap on the line: it passes all bytes on between a vault and a worker, and keeps what the worker sees."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sliplm.protocol.frames import HEADER_BYTES, Kind, parse_header


@dataclass
class Transcript:
    """What came from the vault, in order.

    Attributes:
        frames: (kind, group, rows, payload bytes) of every frame.
        messages: (group, uint32 [rows, n]) of every MULTIPLY.
    """

    frames: list[tuple[Kind, int, int, int]] = field(default_factory=list)
    messages: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def elements(self) -> int:
        """Field elements seen."""
        return sum(message.size for _, message in self.messages)

    def read(self, data: bytearray) -> None:
        """Take whole frames off the front of the data."""
        place = 0
        while len(data) - place >= HEADER_BYTES:
            header = parse_header(data[place : place + HEADER_BYTES])
            end = place + HEADER_BYTES + header.length
            if len(data) < end:
                break
            self.frames.append((header.kind, header.group, header.rows, header.length))
            if header.kind is Kind.MULTIPLY:
                payload = np.frombuffer(bytes(data[place + HEADER_BYTES : end]), "<u4")
                self.messages.append((header.group, payload.reshape(header.rows, -1)))
            place = end
        del data[:place]


@contextlib.contextmanager
def tapped(worker: str, path: Path, transcript: Transcript) -> Iterator[str]:
    """Listen at `path` for vaults, and pass them on to the worker at the Unix address; gives our address."""
    threads: list[threading.Thread] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                if select.select([listener], [], [], 0.1)[0]:
                    near = listener.accept()[0]
                    threads.append(threading.Thread(target=_pass_on, args=(near, worker, transcript, ended)))
                    threads[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"unix:{path}"
        finally:
            ended.set()
            for thread in [acceptor, *threads]:
                thread.join(20)


def _pass_on(near: socket.socket, worker: str, transcript: Transcript, ended: threading.Event) -> None:
    """One vault's connection, until either side ends it."""
    with near, socket.socket(socket.AF_UNIX) as far:
        far.connect(worker.removeprefix("unix:"))
        other, seen = {near: far, far: near}, bytearray()
        while not ended.is_set():
            for end in select.select([near, far], [], [], 0.1)[0]:
                data = end.recv(2**20)
                if not data:
                    return
                if end is near:
                    seen += data
                    transcript.read(seen)
                with contextlib.suppress(BrokenPipeError):
                    other[end].sendall(data)


@contextlib.contextmanager
def worker_process(share: Path, path: Path) -> Iterator[str]:
    """`slip worker` in a process of its own on a Unix socket; gives its address."""
    command = [sys.executable, "-m", "sliplm", "worker", str(share), "--listen", f"unix:{path}", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "the worker did not start"
            yield f"unix:{path}"
        finally:
            process.terminate()
