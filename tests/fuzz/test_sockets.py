"""Any bytes to a real worker, and any bytes from a worker to a real vault, through real sockets."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folders import KEY, SHAPES, SPLIT_ID, vault_folder
from fuzz_protocol import NONCE, header_bytes
from ledger import Ledger, size
from sliplm.errors import SlipError
from sliplm.network import authority, keys
from sliplm.network.addresses import parse_address
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind, WelcomeFields
from sliplm.protocol.side import FRAME_BYTES
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker

GROUP = next(iter(SHAPES))
M, N = SHAPES[GROUP]
X = np.linspace(-1, 1, 2 * N, dtype=np.float32).reshape(2, N)

_WELCOME = wire.pack_welcome(WelcomeFields(SPLIT_ID, len(SHAPES), FRAME_BYTES, False, NONCE, b""))


class Pair(NamedTuple):
    """Both shares of a small split."""

    vault: VaultShare
    worker: WorkerShare

    def right(self) -> np.ndarray:
        """The products of X."""
        return LocalProducts(*self).product(GROUP, X)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base = tmp_path_factory.mktemp("pair")
    vault_folder(base / "vault", base / "worker")
    return Pair(open_vault(base / "vault", KEY), open_worker(base / "worker"))


header = st.builds(
    lambda kind, rest: header_bytes(Header(kind, *rest)),
    st.integers(0, 8),
    st.tuples(*[st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))] * 4, st.integers(0, 200)),
)
hello = st.just(
    header_bytes(Header(Kind.HELLO, 0, 0, 0, 0, wire.HELLO_BYTES)) + wire.pack_hello(SPLIT_ID, NONCE)
)
question = st.just(header_bytes(Header(Kind.MULTIPLY, 1, 0, 1, 0, 4 * N)) + bytes(4 * N))
welcome = st.just(header_bytes(Header(Kind.WELCOME, 0, 0, 0, 0, len(_WELCOME))) + _WELCOME)
product = st.just(header_bytes(Header(Kind.PRODUCT, 1, 0, 2, 0, 8 * M)) + bytes(8 * M))
to_worker = st.lists(st.one_of(hello, question, header, st.binary(max_size=80)), max_size=5).map(b"".join)
to_vault = st.lists(st.one_of(product, header, st.binary(max_size=80)), max_size=4).map(b"".join)


@contextlib.contextmanager
def serving(worker: Worker, address: str, folder: Path | None) -> Iterator[str]:
    """The worker in a thread; gives the address."""
    bound: list[str] = []
    ready = threading.Event()
    thread = threading.Thread(
        target=worker.serve, args=(address, folder, lambda at: (bound.append(at), ready.set()))
    )
    thread.start()
    try:
        assert ready.wait(30)
        yield bound[0]
    finally:
        worker.stop()
        thread.join(30)


def say(sock: socket.socket, data: bytes) -> None:
    """Send all, say that this was all, and read what comes."""
    with sock, contextlib.suppress(OSError):
        sock.settimeout(20)
        sock.sendall(data)
        sock.unwrap() if isinstance(sock, ssl.SSLSocket) else sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


@pytest.mark.parametrize("way", ["unix", "tcp", "tls"])
def test_a_worker_survives_any_bytes(way: str, pair: Pair, tmp_path: Path, ledger: Ledger) -> None:
    """Without a handshake ("tcp"), and with the certificate of a vault that went mad ("tls")."""
    authority.init(tmp_path / "keys")
    address = f"unix:{tmp_path}/socket" if way == "unix" else "127.0.0.1:0"
    with serving(Worker(pair.worker, threads=1), address, tmp_path / "keys" / "worker") as place:
        target = parse_address(place)
        tls = keys.context(tmp_path / "keys" / "vault", "vault") if way == "tls" else None

        def dial() -> socket.socket:
            if way == "unix":
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(str(target.path))  # type: ignore[union-attr]
                return sock
            sock = socket.create_connection((target.host, target.port))  # type: ignore[union-attr]
            return sock if tls is None else tls.wrap_socket(sock)

        tries = throw(to_worker, lambda data: say(dial(), data))
        honest = place if way == "unix" else f"{place}?keys={tmp_path}/keys/vault"
        wrong = served_wrong(pair, honest)
    ledger.record(
        "any bytes to a worker's socket", tries, tries * (not wrong), wrong, "then it serves a vault"
    )
    assert wrong == 0


def served_wrong(pair: Pair, address: str) -> int:
    """1 if the worker does not serve as it should."""
    with Vault(pair.vault, Terms([address], pair.worker, ahead=0)) as vault:
        return int(not np.array_equal(vault.product(GROUP, X), pair.right()))


@pytest.mark.parametrize("greets", [True, False])
def test_a_vault_survives_any_bytes(greets: bool, pair: Pair, tmp_path: Path, ledger: Ledger) -> None:
    """A worker that says anything: the vault has a typed error, and no product."""
    words: list[bytes] = []
    start = header_bytes(Header(Kind.WELCOME, 0, 0, 0, 0, len(_WELCOME))) + _WELCOME if greets else b""
    used = 0

    def ask(data: bytes) -> None:
        nonlocal used
        words[:] = [start + data]
        with (
            contextlib.suppress(SlipError),
            Vault(pair.vault, Terms([address], pair.worker, ahead=0, timeout=5)) as vault,
        ):
            vault.product(GROUP, X)
            used += 1

    with talking(tmp_path / "socket", words) as address:
        tries = throw(to_vault, ask)
    ledger.record("any bytes from a worker to a vault", tries, tries - used, used, "a typed error each time")
    assert used == 0


def throw(data: st.SearchStrategy[bytes], at: Callable[[bytes], None]) -> int:
    """Try examples; returns how many."""
    tries = 0

    @settings(max_examples=size(60, 3000))
    @given(data)
    def attempts(one: bytes) -> None:
        nonlocal tries
        tries += 1
        at(one)

    attempts()
    return tries


@contextlib.contextmanager
def talking(path: Path, words: list[bytes]) -> Iterator[str]:
    """A server that says `words[0]` to whoever comes, then that this was all; gives its address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                sock = listener.accept()[0]
                if not words:
                    return sock.close()
                say(sock, words[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"unix:{path}"
        finally:
            words.clear()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join(20)
