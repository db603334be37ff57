"""Faults of our own and of the network's are no guilt of the peer's, and pass."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sliplm.errors import (
    CredentialError,
    InputError,
    PassingCredentialError,
    SlipError,
    WorkerTimeout,
    WorkerUnavailable,
)
from sliplm.network import authority, keys
from sliplm.network.addresses import TcpAddress, anchored, parse_address
from sliplm.network.complaints import translate
from sliplm.network.dialling import _dial, connect
from sliplm.network.listener import listen
from sliplm.network.transport import keep_alive
from sliplm.parties.standing import verdict

LIMIT = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority.init(tmp_path / "keys")
    return tmp_path / "keys"


def test_a_key_file_that_is_away_is_our_own_fault_and_passes(folder: Path) -> None:
    with listen("127.0.0.1:0", folder / "worker") as listener:
        address = f"{listener.address}?keys={folder / 'vault'}"
        key = folder / "vault" / keys.KEY
        key.rename(folder / "away")
        with pytest.raises(PassingCredentialError) as caught:
            connect(address, LIMIT)
        assert verdict(caught.value)[1] == "lost"
        (folder / "away").rename(key)
        accepted = threading.Thread(target=_serve_one, args=(listener,))
        accepted.start()
        connect(address, LIMIT).close()
        accepted.join(LIMIT)


def _serve_one(listener: Any) -> None:
    sock = listener.accept()
    assert sock is not None
    listener.secure(sock, time.monotonic() + LIMIT).close()


@pytest.mark.parametrize("hours", [-1, 24 * 365 * 50])
def test_a_wrong_clock_is_called_a_clock(folder: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    real = keys.now()
    monkeypatch.setattr(keys, "now", lambda: real + datetime.timedelta(hours=hours - 24 * (hours < 0)))
    with pytest.raises(PassingCredentialError, match="clock") as caught:
        connect(f"127.0.0.1:9?keys={folder / 'vault'}", LIMIT)
    assert verdict(caught.value)[1] == "lost"


@pytest.mark.parametrize("code", [9, 10, 11, 12])
def test_dates_of_the_peers_certificate_point_at_the_clocks(code: int) -> None:
    error = ssl.SSLCertVerificationError("x")
    error.verify_code, error.verify_message = code, "certificate is not yet valid"
    found = translate(error, "peer")
    assert isinstance(found, PassingCredentialError) and "clock" in str(found)


@pytest.mark.parametrize("role", ["vault", "worker"])
@pytest.mark.parametrize("hours", [1, 3])
def test_clocks_that_differ_are_no_matter_or_called_clocks_on_both_sides(
    folder: Path, monkeypatch: pytest.MonkeyPatch, role: Any, hours: int
) -> None:
    """Keys that were made just now by a clock that is ahead of the one of OpenSSL."""
    real = keys.now
    with monkeypatch.context() as patch:
        for module in (keys, authority):
            patch.setattr(module, "now", lambda: real() + datetime.timedelta(hours=hours, minutes=1))
        authority.issue(folder, role, "ahead")
        names = {"vault": "vault", "worker": "worker", role: "ahead"}
        said: list[SlipError] = []

        def serve() -> None:
            try:
                _serve_one(listener)
            except SlipError as error:
                said.append(error)

        with listen("127.0.0.1:0", folder / names["worker"]) as listener:
            serving = threading.Thread(target=serve)
            serving.start()
            try:
                with closing(connect(f"{listener.address}?keys={folder / names['vault']}", LIMIT)) as there:
                    there.receive_exactly(memoryview(bytearray(1)), time.monotonic() + LIMIT)
            except SlipError as error:
                said.append(error)
            serving.join(LIMIT)
    dated = [str(error) for error in said if isinstance(error, CredentialError)]
    assert len(dated) == (0 if hours == 1 else len(said)) and said
    assert all("compare the clocks" in each for each in dated)
    assert all(
        isinstance(error, PassingCredentialError) for error in said if isinstance(error, CredentialError)
    )


def test_relative_keys_survive_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    address = anchored("127.0.0.1:9?keys=vault")
    socket_there = anchored("unix:w.sock")
    monkeypatch.chdir("/")
    assert address == f"127.0.0.1:9?keys={folder / 'vault'}"
    assert socket_there == f"unix:{folder / 'w.sock'}"


@pytest.mark.parametrize("host", ["gpu..example", "a" * 64 + ".example", ".example"])
def test_a_name_that_is_none_is_an_input_error(host: str) -> None:
    with pytest.raises(InputError, match="name of a host"):
        parse_address(f"{host}:7400?keys=k")


def test_localhost_listens_on_every_family(folder: Path) -> None:
    found = {row[0] for row in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with listen("localhost:0", folder / "worker") as listener:
        port = int(listener.address.rpartition(":")[2])
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            if family in found:
                with closing(socket.socket(family)) as sock:
                    sock.settimeout(LIMIT)
                    sock.connect((host, port))
                    accepted = listener.accept()
                    assert accepted is not None
                    accepted.close()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts nothing: its queue is full, so that connecting to it hangs."""
    with socket.socket() as full:
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        held = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
            held.append(sock)
        yield full.getsockname()[1]
        for sock in held:
            sock.close()


def test_every_address_of_a_name_has_its_part_of_the_time(
    folder: Path, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as good:
        good.bind(("127.0.0.1", silent))
        good.listen()
        rows = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, silent)) for host in ("127.0.0.2", "127.0.0.1")
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: rows)

        with _dial(TcpAddress("two", silent, None), time.monotonic() + 4.0) as sock:
            assert sock.getpeername()[0] == "127.0.0.1"


def test_connections_are_kept_alive(folder: Path) -> None:
    with socket.socket() as sock:
        keep_alive(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 10_000


def test_a_network_that_gave_up_is_no_slow_worker() -> None:
    assert isinstance(
        translate(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), "p"), WorkerUnavailable
    )
    assert isinstance(translate(TimeoutError("timed out"), "p"), WorkerTimeout)


def test_no_descriptor_left_is_a_typed_error(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, hard))
        with contextlib.suppress(OSError):
            while len(held) < 1000:
                held.append(os.dup(0))
        with pytest.raises(OSError, match="open files"):
            os.dup(0)
        for address in (f"127.0.0.1:9?keys={folder / 'vault'}", f"unix:{folder}/none"):
            with pytest.raises((PassingCredentialError, WorkerUnavailable)) as caught:
                connect(address, LIMIT)
            assert verdict(caught.value)[1] == "lost"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
