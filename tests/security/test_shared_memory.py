"""Row "shared memory": a worker process that scribbles in it, and whoever offers what is none."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import scribbler
import sliplm
from families import make
from ledger import Ledger
from scribbler import MISDEEDS, Lines
from sliplm.errors import SlipError, WireError, WorkerTimeout, WorkerUnavailable
from sliplm.network import memory, ring
from sliplm.network.dialling import connect
from sliplm.network.listener import listen
from sliplm.network.memory import MemoryConnection
from sliplm.network.transport import Connection
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol.vault_side import VaultSide
from sliplm.protocol.worker_side import WorkerSide
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker

LIMIT = 30.0
TIMEOUT = 10.0
HONEST = 3  # answers, before the misdeed
ENDS = {
    "sent": "quarantined",
    "taken": "quarantined",
    "a ring full of what lies there": "quarantined",
    "hangs up and writes on": "lost",
}
SPLIT, SHAPES = "ab" * 16, [(3, 5), (3000, 1000)]
Shares = tuple[VaultShare, WorkerShare]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("memory")
    make("llama", base / "model")
    sliplm.split(base / "model", base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def shares(folder: Path) -> Shares:
    return open_vault(folder / "vault"), open_worker(folder / "worker")


@contextlib.contextmanager
def scribbling(folder: Path, door: Path, misdeed: str) -> Iterator[str]:
    """A process that misbehaves; gives its address."""
    command = [sys.executable, scribbler.__file__, str(folder / "worker"), f"shm:{door}"]
    command += [misdeed, str(HONEST)]
    path = os.pathsep.join(part for part in sys.path if part)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield f"shm:{door}"
        finally:
            process.kill()


@contextlib.contextmanager
def honest(share: WorkerShare, door: Path) -> Iterator[str]:
    worker, ready = Worker(share, threads=1), threading.Event()
    thread = threading.Thread(target=worker.serve, args=(f"shm:{door}", None, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(LIMIT)
        yield f"shm:{door}"
    finally:
        worker.stop()
        thread.join(LIMIT)


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_worker_that_scribbles(
    misdeed: str, folder: Path, shares: Shares, tmp_path: Path, ledger: Ledger
) -> None:
    """Every product is the right one, to the bit; what cannot be is noticed within the limit."""
    local = LocalProducts(*shares)
    group = max(shares[0].groups, key=lambda name: shares[0].groups[name].m)
    rng = np.random.default_rng(1)
    harmless = "rewritten" in misdeed
    with scribbling(folder, tmp_path / "bad", misdeed) as bad:
        terms = Terms([bad], shares[1], ahead=0, timeout=TIMEOUT, fallback="here")
        with Vault(shares[0], terms) as vault:
            wrong = 0
            for turn in range(HONEST + (20 if harmless else 2)):
                x = rng.standard_normal((3, shares[0].groups[group].n)).astype(np.float32)
                wrong += not np.array_equal(vault.product(group, x), local.product(group, x))
                if turn < HONEST:
                    assert vault.workers[0].state == "up", "honest so far"
            events = [record.event for record in vault.audit.records if record.event != "masks renewed"]
    expected = [] if harmless else [ENDS.get(misdeed.partition(":")[0], "suspended")]
    ledger.record(f"shared memory: {misdeed}", 1, events[:1] == expected, wrong)
    assert wrong == 0
    assert events[:1] == expected, events


# --- one connection, closely ------------------------------------------------------------------------------


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[MemoryConnection, MemoryConnection]]:
    """The vault's end and the worker's."""
    with listen(f"shm:{tmp_path}/door") as listener, ThreadPoolExecutor(1) as pool:

        def accept() -> Connection:
            sock = listener.accept()
            assert sock is not None
            return listener.secure(sock, time.monotonic() + LIMIT)

        other = pool.submit(accept)
        with connect(f"shm:{tmp_path}/door", LIMIT) as vault, other.result(LIMIT) as worker:
            assert isinstance(vault, MemoryConnection) and isinstance(worker, MemoryConnection)
            yield vault, worker


def soon(seconds: float = LIMIT) -> float:
    return time.monotonic() + seconds


def greeted(vault: Connection, worker: Connection) -> tuple[VaultSide, WorkerSide]:
    ours, theirs = VaultSide(SPLIT, SHAPES), WorkerSide(SPLIT, SHAPES)
    vault.send(ours.hello(bytes(32)), deadline=soon())
    worker.receive(theirs, deadline=soon())
    worker.send(theirs.welcome(bytes(32)), deadline=soon())
    vault.receive(ours, deadline=soon())
    return ours, theirs


def test_what_was_received_is_out_of_reach(ends: tuple[MemoryConnection, MemoryConnection]) -> None:
    """Bytes that are judged lie in private memory: whatever is written afterwards changes none of them."""
    vault, worker = ends
    ours, theirs = greeted(vault, worker)
    for rows in (1, 80):  # in the first buffer, and in that for long frames
        x, y = os.urandom(4 * rows * SHAPES[1][1]), os.urandom(4 * rows * SHAPES[1][0])
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(vault.send, ours.multiply(1, rows), memoryview(x), deadline=soon())
            question = worker.receive(theirs, deadline=soon())
            sent.result(LIMIT)
            sent = pool.submit(worker.send, theirs.product(1), memoryview(y), deadline=soon())
            answer = vault.receive(ours, deadline=soon())
            sent.result(LIMIT)
        ctypes.memset(vault._area.address, 0xA5, ring.SIZE)
        assert bytes(answer.payload) == y  # type: ignore[union-attr]
        assert bytes(question.payload) == x  # type: ignore[union-attr]
        ctypes.memset(vault._area.address, 0, 4096)
        for end in ends:  # both begin again at nothing
            end._words[4:6] = 0


def test_our_own_counters_are_not_read_back(ends: tuple[MemoryConnection, MemoryConnection]) -> None:
    vault, worker = ends
    ours, theirs = greeted(vault, worker)
    lines = Lines(vault, vault=True)
    expected = list(lines.words)
    for value in (-1, 0, 2**62):
        lines.words[0] = lines.words[1] = lines.words[2] = value
    lines.words[:] = expected
    lines.words[1] = 2**62  # of what the vault has taken: the worker is to be misled, the vault is not
    vault.send(ours.multiply(0, 1), memoryview(bytes(20)), deadline=soon())
    worker.receive(theirs, deadline=soon())
    lines.words[1] = expected[1]
    worker.send(theirs.product(1), memoryview(bytes(12)), deadline=soon())
    vault.receive(ours, deadline=soon())


@pytest.mark.parametrize("end", [0, 1])
def test_a_peer_that_hangs_up_is_heard_though_it_writes_on(
    end: int, ends: tuple[MemoryConnection, MemoryConnection]
) -> None:
    """Without a pause in which this side would sleep."""
    hearing, leaving = ends[end], ends[1 - end]
    lines = Lines(leaving, vault=end == 1)
    leaving.abort()
    deadline, byte = soon(), memoryview(bytearray(1))

    def hear() -> None:
        while time.monotonic() < deadline:
            lines.words[0] += 1
            hearing.receive_exactly(byte, soon())

    with pytest.raises(WorkerUnavailable, match="closed"):
        hear()


def test_abort_ends_what_is_under_way_though_the_peer_writes_on(
    ends: tuple[MemoryConnection, MemoryConnection],
) -> None:
    vault, worker = ends
    lines = Lines(worker, vault=False)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            lines.words[0] += 1
            vault.receive_exactly(memoryview(bytearray(1)), soon())

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        vault.abort()
        with pytest.raises(WorkerUnavailable):
            reading.result(LIMIT)
        with pytest.raises(WorkerUnavailable):
            vault.send(bytes(28), deadline=soon())


def test_a_full_ring_has_its_limit(ends: tuple[MemoryConnection, MemoryConnection]) -> None:
    with pytest.raises(WorkerTimeout):
        ends[0].send(bytes(28), memoryview(bytes(2 * ring.RING)), deadline=soon(0.2))


def test_room_that_comes_a_byte_at_a_time_has_its_limit(
    ends: tuple[MemoryConnection, MemoryConnection],
) -> None:
    vault, worker = ends
    lines, over = Lines(worker, vault=False), threading.Event()

    def take() -> None:
        while not over.is_set():
            if lines.words[1] < Lines(vault, vault=True).words[0]:
                lines.words[1] += 1
            over.wait(0.001)

    taker = threading.Thread(target=take)
    taker.start()
    try:
        with pytest.raises(WorkerTimeout):
            vault.send(bytes(28), memoryview(bytes(2 * ring.RING)), deadline=soon(0.3))
    finally:
        over.set()
        taker.join(LIMIT)


def test_memory_cannot_be_shrunk_or_sealed_by_whoever_gets_it() -> None:
    """Else a read would kill the process (SIGBUS)."""
    handle, _ = memory._make()
    try:
        for size in (0, ring.SIZE - 1, ring.SIZE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(handle, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(handle)


# --- the door ---------------------------------------------------------------------------------------------


def sealed(size: int = ring.SIZE, seals: int = memory._SEALS, flags: int = 0) -> int:
    handle = os.memfd_create("odd", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(handle, size)
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
    return handle


def file(where: Path) -> int:
    where.write_bytes(bytes(ring.SIZE))
    return os.open(where, os.O_RDWR)


OFFERS: dict[str, Callable[[Path], list[int]]] = {
    "nothing": lambda _: [],
    "not sealed": lambda _: [sealed(seals=0)],
    "may grow": lambda _: [sealed(seals=fcntl.F_SEAL_SHRINK)],
    "may shrink": lambda _: [sealed(seals=fcntl.F_SEAL_GROW)],
    "may not be written": lambda _: [sealed(seals=memory._SEALS | fcntl.F_SEAL_WRITE)],
    "too short": lambda _: [sealed(4096)],
    "too long": lambda _: [sealed(2 * ring.SIZE)],
    "a file": lambda where: [file(where / "f")],
    "a folder": lambda where: [os.open(where, os.O_RDONLY)],
    "a pipe": lambda _: [os.pipe()[0]],
    "huge pages": lambda _: [sealed(2 * mmap.PAGESIZE * 512, flags=os.MFD_HUGETLB)],
}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("what", OFFERS)
def test_what_is_no_memory_is_refused(what: str, tmp_path: Path, ledger: Ledger) -> None:
    try:
        handles = OFFERS[what](tmp_path)
    except OSError:
        pytest.skip("none here")
    with listen(f"shm:{tmp_path}/door") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/door")
        socket.send_fds(client, [memory._OFFER], handles)
        before = descriptors()
        sock = listener.accept()
        assert sock is not None
        with pytest.raises((WireError, WorkerUnavailable)):
            listener.secure(sock, soon())
        ledger.record("shared memory: what is none, offered to a worker", 1, 1, descriptors() - before)
        assert descriptors() == before
    for handle in handles:
        os.close(handle)


def test_more_than_one_descriptor(tmp_path: Path) -> None:
    handles = [sealed() for _ in range(8)]
    with listen(f"shm:{tmp_path}/door") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/door")
        socket.send_fds(client, [memory._OFFER], handles)
        before = descriptors()
        sock = listener.accept()
        assert sock is not None
        with contextlib.suppress(SlipError):
            listener.secure(sock, soon()).close()
        assert descriptors() == before
    for handle in handles:
        os.close(handle)


def test_an_offer_cut_short(tmp_path: Path) -> None:
    handle = sealed()
    with listen(f"shm:{tmp_path}/door") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/door")
        socket.send_fds(client, [memory._OFFER[:12]], [handle])
        sock = listener.accept()
        assert sock is not None
        with pytest.raises(WireError):
            listener.secure(sock, soon())
    os.close(handle)


def test_a_vault_without_memory_uses_the_socket(
    shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(os, "memfd_create", none)
    group = next(iter(shares[0].groups))
    x = np.ones((2, shares[0].groups[group].n), np.float32)
    with honest(shares[1], tmp_path / "w") as address:
        with connect(address, LIMIT) as connection:
            assert type(connection) is Connection
        with Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault:
            assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))


def test_a_worker_that_shares_none_says_so(shares: Shares, tmp_path: Path) -> None:
    worker, ready = Worker(shares[1], threads=1), threading.Event()
    where = f"unix:{tmp_path / 'w'}"
    thread = threading.Thread(target=worker.serve, args=(where, None, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(LIMIT)
        with pytest.raises(WireError, match="shares no memory: is its address given with `unix:`"):
            connect(f"shm:{tmp_path / 'w'}", LIMIT)
    finally:
        worker.stop()
        thread.join(LIMIT)
