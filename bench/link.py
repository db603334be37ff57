"""What an exchange costs beside its arithmetic: a link, and a worker process that has its answer ready.

One masked row of 576 elements goes out, one of 3,072 comes back, by `Link.exchange` and `Worker.serve`, so
with all of the protocol's Python on both sides; the three kinds of address take turns.  Beside them a bare
pair of Unix sockets with the same bytes, and nothing else.

    python bench/link.py [--rounds 10] [--exchanges 500]
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from sliplm.network import authority
from sliplm.network.attestation import NullAttester, NullVerifier
from sliplm.network.link import Link
from sliplm.parties.worker import Worker

SPLIT = "ab" * 16
ROWS, COLUMNS = 3072, 576


class Ready:
    """A matrix whose product is known."""

    shape, kernel = (ROWS, COLUMNS), "none"

    def __init__(self) -> None:
        self._answer = np.zeros((1, ROWS), np.uint32)

    def product(self, x: Any, out: Any = None) -> Any:
        """The same zeros each time."""
        return self._answer


def serve(address: str, keys: str) -> None:
    """A worker that computes nothing, until it is killed."""
    share = SimpleNamespace(split_id=SPLIT, names=("w",), matrices={"w": np.zeros((ROWS, COLUMNS), np.int8)})
    worker = Worker(cast(Any, share), threads=1)
    worker._matrices = [Ready()]
    worker.serve(address, Path(keys), lambda where: print(where, flush=True))


@contextmanager
def another(*words: str) -> Iterator[str]:
    """This file as a process, and its first line."""
    process = subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        yield cast(Any, process.stdout).readline().strip()
    finally:
        process.terminate()
        process.wait()


@contextmanager
def linked(address: str) -> Iterator[Callable[[], None]]:
    """One exchange by a link."""
    link = Link(address, SPLIT, [(ROWS, COLUMNS)], 30.0, lambda *_: None, NullAttester(), NullVerifier())
    x = np.zeros((1, COLUMNS), np.uint32)

    def exchange() -> None:
        with link:
            link.exchange([(0, 1)], x, lambda: None)

    try:
        yield exchange
    finally:
        link.close()


def echo(path: str) -> None:
    """The other end of `bare`."""
    answer = bytes(4 * ROWS)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        print(flush=True)
        while sock.recv(4 * COLUMNS, socket.MSG_WAITALL):
            sock.sendall(answer)


@contextmanager
def bare(folder: Path) -> Iterator[Callable[[], None]]:
    """The same bytes over a blocking Unix socket."""
    question = bytes(4 * COLUMNS)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(folder / "bare"))
        door.listen()
        with another("--echo", str(folder / "bare")), door.accept()[0] as sock:

            def exchange() -> None:
                sock.sendall(question)
                sock.recv(4 * ROWS, socket.MSG_WAITALL)

            yield exchange


def timed(exchange: Callable[[], None], count: int) -> list[float]:
    """Microseconds of each of `count` exchanges, after a few to warm up."""
    for _ in range(20):
        exchange()
    found = []
    for _ in range(count):
        start = time.perf_counter_ns()
        exchange()
        found.append((time.perf_counter_ns() - start) / 1000)
    return found


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--exchanges", type=int, default=500)
    parser.add_argument("--serve", nargs=2)
    parser.add_argument("--echo")
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    if given.echo:
        echo(given.echo)
        return
    from rich.table import Table

    from _common import console, finish, machine  # torch, which the other ends need not have

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority.init(folder / "keys")
        ways: dict[str, Callable[[], None]] = {}
        for name, where in (("TLS", "127.0.0.1:0"), ("unix", f"unix:{folder}/u"), ("shm", f"shm:{folder}/s")):
            address = stack.enter_context(another("--serve", where, str(folder / "keys" / "worker")))
            address += f"?keys={folder / 'keys' / 'vault'}" if name == "TLS" else ""
            ways[name] = stack.enter_context(linked(address))
        ways["bare socket"] = stack.enter_context(bare(folder))
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, exchange in ways.items():
                times[name] += timed(exchange, given.exchanges)
    table = Table(title="microseconds an exchange, 2.3 KB out and 12.3 KB back")
    for heading in ("link", "median", "99 of 100"):
        table.add_column(heading, justify="left" if heading == "link" else "right")
    results = {}
    for name, found in times.items():
        middle, high = statistics.median(found), statistics.quantiles(found, n=100)[-1]
        results[name] = {"median": round(middle, 1), "p99": round(high, 1)}
        table.add_row(name, f"{middle:.1f}", f"{high:.1f}")
    console.print(table)
    finish(
        {"bench": "link", "machine": machine(), "exchanges": given.rounds * given.exchanges, "us": results}
    )


if __name__ == "__main__":
    main()
