"""Workers with real shares behind real sockets and in processes of their own."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fakecard import cards
from sliplm.arithmetic.field import P, new_key, uniform_rows
from sliplm.errors import (
    AttestationError,
    CredentialError,
    InputError,
    MismatchError,
    ShareError,
    WorkerFault,
    WorkerUnavailable,
)
from sliplm.network import authority, keys
from sliplm.network.addresses import TcpAddress, parse_address
from sliplm.network.attestation import SoftwareAttester, SoftwareVerifier, binding
from sliplm.network.dialling import connect
from sliplm.network.transport import Connection, handshake, pair
from sliplm.parties.local_worker import LocalWorker
from sliplm.parties.seats import MAX_CONNECTIONS, MAX_STRANGERS
from sliplm.parties.worker import Worker
from sliplm.protocol.frames import Header, Kind, Party, pack_header
from sliplm.protocol.side import FRAME_BYTES
from sliplm.protocol.vault_side import Accept, Product, VaultSide, Welcome
from sliplm.protocol.worker_side import WorkerSide
from sliplm.shares.manifest import FileRecord, WorkerGroup, WorkerManifest
from sliplm.shares.share import WorkerShare, open_worker
from sliplm.shares.tensorfile import SafetensorsWriter, TensorSpec

SPLIT_ID = "5a" * 16
LIMIT = 60.0

Matrices = dict[str, npt.NDArray[Any]]


def integer_type(w: npt.NDArray[Any]) -> Literal["I8", "I16"]:
    """The file's name of the matrix's type."""
    return "I8" if w.dtype == np.int8 else "I16"


def write_share(folder: Path, matrices: Matrices) -> Path:
    """A worker folder, as a split writes it."""
    folder.mkdir()
    specs = [TensorSpec(name, integer_type(w), w.shape) for name, w in matrices.items()]
    with SafetensorsWriter(folder / "share.safetensors", specs) as file:
        for name, w in matrices.items():
            file.write(name, w)
    data = (folder / "share.safetensors").read_bytes()
    manifest = WorkerManifest(
        split_id=SPLIT_ID,
        groups=tuple(
            WorkerGroup(name=name, rows=w.shape[0], columns=w.shape[1], dtype=integer_type(w))
            for name, w in matrices.items()
        ),
        files={"share.safetensors": FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    """Two groups of both integer types, extremes included."""
    generator = np.random.default_rng(1)
    fast = generator.integers(-127, 128, (48, 33)).astype(np.int8)
    fine = generator.integers(-2047, 2048, (100, 257)).astype(np.int16)
    fast[0], fine[0] = -127, 2047
    return {"block.0.attn": fast, "block.0.mlp": fine}


@pytest.fixture(scope="module")
def share_dir(tmp_path_factory: pytest.TempPathFactory, matrices: Matrices) -> Path:
    """A worker folder."""
    return write_share(tmp_path_factory.mktemp("worker") / "share", matrices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys."""
    made = tmp_path_factory.mktemp("worker") / "keys"
    authority.init(made)
    return made


@pytest.fixture(scope="module")
def share(share_dir: Path) -> WorkerShare:
    """The share, opened."""
    return open_worker(share_dir)


@contextmanager
def serving(worker: Worker, address: str, folder: Path, party: str = "worker") -> Iterator[str]:
    """The worker serves in a thread; gives the address for vaults."""
    bound: list[str] = []
    listening = threading.Event()

    def ready(address: str) -> None:
        bound.append(address)
        listening.set()

    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(worker.serve, address, folder / party, ready)
        try:
            while not listening.wait(0.1):
                if end.done():
                    end.result()
            suffix = "" if bound[0].startswith(("unix:", "shm:")) else f"?keys={folder}/vault"
            yield bound[0] + suffix
        finally:
            worker.stop()
            end.result(LIMIT)


@pytest.fixture(params=["unix", "shm", "tls"])
def address(
    request: pytest.FixtureRequest, share: WorkerShare, folder: Path, tmp_path: Path
) -> Iterator[str]:
    """Where a worker serves."""
    where = "127.0.0.1:0" if request.param == "tls" else f"{request.param}:{tmp_path}/socket"
    with serving(Worker(share, threads=1), where, folder) as made:
        yield made


def soon() -> float:
    """A deadline."""
    return time.monotonic() + LIMIT


def side_of(share: WorkerShare) -> VaultSide:
    """A vault's side for the share."""
    return VaultSide(share.split_id, [share.matrices[name].shape for name in share.names])


def greet(connection: Connection, side: VaultSide) -> None:
    """HELLO and WELCOME."""
    connection.send(side.hello(bytes(32)), deadline=soon())
    connection.receive(side, deadline=soon())


def check_products(connection: Connection, side: VaultSide, share: WorkerShare, seed: int) -> None:
    """Products of both groups, compared with Python's integers."""
    generator = np.random.default_rng(seed)
    for rows in (1, 3):
        for group, name in enumerate(share.names):
            w = share.matrices[name]
            x = generator.integers(0, P, (rows, w.shape[1]), dtype=np.uint32)
            x[0, :5] = P - 1
            connection.send(side.multiply(group, rows), x.data, deadline=soon())
            answer = connection.receive(side, deadline=soon())
            assert isinstance(answer, Product)
            y = np.frombuffer(answer.payload, np.uint32).reshape(rows, w.shape[0])
            assert np.array_equal(y, x.astype(object) @ w.T.astype(object) % P)


def test_products_are_exact(address: str, share: WorkerShare) -> None:
    side = side_of(share)
    with connect(address, LIMIT) as connection:
        greet(connection, side)
        check_products(connection, side, share, 0)


def test_products_over_the_pair(share: WorkerShare) -> None:
    left, right = pair()
    worker, side = Worker(share, threads=1), side_of(share)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(worker.attend, right)
        with left:
            greet(left, side)
            check_products(left, side, share, 0)
        end.result(LIMIT)


def test_vaults_at_the_same_time(address: str, share: WorkerShare) -> None:
    def vault(seed: int) -> None:
        side = side_of(share)
        with connect(address, LIMIT) as connection:
            greet(connection, side)
            check_products(connection, side, share, seed)

    with ThreadPoolExecutor(8) as pool:
        for end in [pool.submit(vault, seed) for seed in range(16)]:
            end.result(LIMIT)


def test_bad_peers_cost_their_own_connection_only(address: str, share: WorkerShare) -> None:
    side = side_of(share)
    with connect(address, LIMIT) as good:
        greet(good, side)
        for seed, said in enumerate([b"", b"SL", b"GET / HTTP/1.1\r\n\r\n" + bytes(100), os.urandom(300)]):
            with connect(address, LIMIT) as bad:
                if said:
                    bad.send(said, deadline=soon())
            check_products(good, side, share, seed)


def test_garbage_is_answered_with_a_fault(address: str, share: WorkerShare) -> None:
    side = side_of(share)
    side.hello(bytes(32))
    with connect(address, LIMIT) as bad:
        bad.send(bytes(28), deadline=soon())
        with pytest.raises(WorkerFault, match="protocol"):
            bad.receive(side, deadline=soon())


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.MULTIPLY, 1, 2, 1, 0, 132),
        Header(Kind.MULTIPLY, 1, 0, 1, 0, 2**26),
        Header(Kind.MULTIPLY, 7, 0, 1, 0, 132),
        Header(Kind.HELLO, 0, 0, 0, 0, 16),
    ],
)
def test_questions_that_break_the_protocol(address: str, share: WorkerShare, header: Header) -> None:
    side = side_of(share)
    with connect(address, LIMIT) as bad:
        greet(bad, side)
        side.multiply(0, 1)
        bad.send(pack_header(header), deadline=soon())
        with pytest.raises(WorkerFault, match="protocol"):
            bad.receive(side, deadline=soon())


def test_vault_of_another_split(address: str, share: WorkerShare) -> None:
    side = VaultSide("00" * 16, [share.matrices[name].shape for name in share.names])
    with connect(address, LIMIT) as connection, pytest.raises(MismatchError, match="share made together"):
        greet(connection, side)


def test_product_that_fails(share: WorkerShare) -> None:
    """The vault learns that it failed, not why."""

    class Broken:
        shape = share.matrices[share.names[0]].shape

        def product(self, x: object) -> object:
            raise MemoryError("secret details")

    left, right = pair()
    worker, side = Worker(share, threads=1), side_of(share)
    worker._matrices[0] = Broken()  # type: ignore[call-overload]
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(worker.attend, right)
        with left:
            greet(left, side)
            left.send(side.multiply(0, 1), memoryview(bytes(4 * 33)), deadline=soon())
            with pytest.raises(WorkerFault, match="see its log") as caught:
                left.receive(side, deadline=soon())
        assert "secret" not in str(caught.value)
        end.result(LIMIT)


def test_too_many_connections(share: WorkerShare, folder: Path, tmp_path: Path) -> None:
    side = side_of(share)
    with (
        serving(Worker(share, threads=1), f"unix:{tmp_path}/socket", folder) as address,
        ExitStack() as stack,
    ):
        held = []
        for _ in range(MAX_CONNECTIONS):
            connection, theirs = stack.enter_context(connect(address, LIMIT)), side_of(share)
            greet(connection, theirs)
            held.append((connection, theirs))
        first, held = held[0], held[1:]
        with connect(address, LIMIT) as late:  # the longest idle one makes room for it, and no other
            greet(late, side)
            check_products(late, side, share, 0)
            with pytest.raises(WorkerUnavailable):
                check_products(*first, share, 1)
            for connection, theirs in held:
                check_products(connection, theirs, share, 2)


# dealing


def test_deals_are_exact(share: WorkerShare, folder: Path) -> None:
    """u = w r for the rows of the batch that were asked for, between ordinary products."""
    key = new_key()
    side = VaultSide(share.split_id, [share.matrices[name].shape for name in share.names], Party.DEALER)
    where = serving(Worker(share), "127.0.0.1:0", folder, "dealer")
    with where as address, connect(address, LIMIT, "dealer") as connection:
        greet(connection, side)
        for group, first, rows in ((0, 0, 1), (1, 5, 3), (0, 2**32 - 1, 1), (1, 0, 40)):
            w = share.matrices[share.names[group]]
            connection.send(side.deal(group, rows, key, first), deadline=soon())
            answer = connection.receive(side, deadline=soon())
            assert isinstance(answer, Product)
            u = np.frombuffer(answer.payload, np.uint32).reshape(rows, w.shape[0])
            r = uniform_rows(key, group, first, rows, w.shape[1])
            assert np.array_equal(u, r.astype(object) @ w.T.astype(object) % P)


# strangers


def stranger(address: str, source: str = "127.0.0.1") -> socket.socket:
    """A TCP connection that says nothing."""
    where = parse_address(address)
    assert isinstance(where, TcpAddress)
    return socket.create_connection((where.host, where.port), LIMIT, (source, 0))


def test_strangers_take_no_place_from_vaults(share: WorkerShare, folder: Path) -> None:
    served, waits, late = side_of(share), side_of(share), side_of(share)
    with serving(Worker(share, threads=1), "127.0.0.1:0", folder) as address, ExitStack() as stack:
        one = stack.enter_context(connect(address, LIMIT))
        greet(one, served)
        two = stack.enter_context(connect(address, LIMIT))  # has shown its certificate, and not greeted
        crowd = [stack.enter_context(stranger(address)) for _ in range(2 * MAX_STRANGERS)]
        assert crowd[0].recv(1) == b""  # the oldest went
        three = stack.enter_context(connect(address, LIMIT))
        for connection, side in ((one, served), (two, waits), (three, late)):
            if side is not served:
                greet(connection, side)
            check_products(connection, side, share, 0)
        crowd[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            crowd[-1].recv(1)  # the newest is still there


def test_a_crowd_from_one_address_drives_out_its_own(share: WorkerShare, folder: Path) -> None:
    side = side_of(share)
    with serving(Worker(share, threads=1), "127.0.0.1:0", folder) as address, ExitStack() as stack:
        slow = stack.enter_context(stranger(address))  # a vault on a slow line, in the midst of its handshake
        crowd = [stack.enter_context(stranger(address, "127.0.0.2")) for _ in range(2 * MAX_STRANGERS)]
        assert crowd[0].recv(1) == b""
        context = keys.context(folder / "vault", "vault")
        with handshake(slow, context, "worker", "worker", soon()) as connection:
            greet(connection, side)
            check_products(connection, side, share, 0)


# revocation


def end_of(connection: Connection) -> float:
    """When the connection was closed, with nothing in the way of a frame; on the clock of time.monotonic."""
    with pytest.raises(WorkerUnavailable):
        connection.receive_exactly(memoryview(bytearray(1)), soon())
    return time.monotonic()


def test_revoked_while_connected(share_dir: Path, share: WorkerShare, tmp_path: Path) -> None:
    """Cut off within a second, as promised, in another process; others stay; the keys open nothing more."""
    folder = tmp_path / "keys"
    authority.init(folder)
    authority.issue(folder, "vault", "lost")
    shutil.copytree(folder / "lost", tmp_path / "stolen")  # whoever has them does not take our list
    side, other = side_of(share), side_of(share)
    with LocalWorker(share_dir, threads=1, authority=folder) as worker:
        stolen = f"{worker.address.partition('?')[0]}?keys={tmp_path}/stolen"
        with connect(stolen, LIMIT) as thief, connect(worker.address, LIMIT) as honest:
            greet(thief, side)
            check_products(thief, side, share, 0)
            greet(honest, other)
            started = time.monotonic()
            authority.revoke(folder, "lost")
            assert end_of(thief) - started < 1.0
            with connect(stolen, LIMIT) as again, pytest.raises(CredentialError, match="revoked"):
                again.receive_exactly(memoryview(bytearray(1)), soon())
            check_products(honest, other, share, 1)
        assert worker._held.folder is not None
        lines = (worker._held.folder.path / "stderr").read_text().splitlines()
    assert len(lines) == 2  # one for each
    assert "sliplm.parties.seats: cut off vault lost at 127.0.0.1: it is revoked" in lines[0]
    assert "sliplm.parties.worker: refused 127.0.0.1: the certificate of" in lines[1]


def test_rotated_while_serving(share: WorkerShare, tmp_path: Path) -> None:
    """The worker takes up its new keys by itself; its old certificate counts no more."""
    folder = tmp_path / "keys"
    authority.init(folder)
    with serving(Worker(share, threads=1), "127.0.0.1:0", folder) as address:
        with connect(address, LIMIT) as before:
            first = before.identity
        made = authority.rotate(folder, "worker")
        side = side_of(share)
        with connect(address, LIMIT) as after:
            greet(after, side)
            check_products(after, side, share, 0)
            assert after.identity is not None
            assert first is not None
            assert f"{after.identity.serial:x}" == made.serial != f"{first.serial:x}"


# evidence

VAULT_KEY, WORKER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture(params=["unix", "shm", "tls"])
def attested(
    request: pytest.FixtureRequest, share: WorkerShare, folder: Path, tmp_path: Path
) -> Iterator[str]:
    """Where a worker serves that shows evidence and asks for it."""
    where = "127.0.0.1:0" if request.param == "tls" else f"{request.param}:{tmp_path}/socket"
    attester = SoftwareAttester(WORKER_KEY, b"worker 1")
    verifier = SoftwareVerifier(VAULT_KEY.public_key(), [b"vault 1"])
    with serving(Worker(share, 1, attester, verifier), where, folder) as made:
        yield made


def welcomed(connection: Connection, side: VaultSide) -> Welcome:
    """HELLO with a fresh nonce, and a WELCOME whose evidence is good for it."""
    nonce = os.urandom(32)
    connection.send(side.hello(nonce), deadline=soon())
    welcome = connection.receive(side, deadline=soon())
    assert isinstance(welcome, Welcome)
    assert welcome.wants_evidence
    spki = connection.identity.spki if connection.identity else bytes(32)
    known = SoftwareVerifier(WORKER_KEY.public_key(), [b"worker 1"])
    known.verify(welcome.evidence, binding("worker", spki, nonce))
    with pytest.raises(AttestationError):
        known.verify(welcome.evidence, binding("worker", spki, os.urandom(32)))
    return welcome


def evidence_for(connection: Connection, welcome: Welcome, measurement: bytes = b"vault 1") -> bytes:
    """The vault's."""
    spki = connection.own.spki if connection.own else bytes(32)
    return SoftwareAttester(VAULT_KEY, measurement).evidence(binding("vault", spki, welcome.nonce))


def test_evidence_of_both_sides(attested: str, share: WorkerShare) -> None:
    side = side_of(share)
    with connect(attested, LIMIT) as connection:
        welcome = welcomed(connection, side)
        connection.send(side.evidence(evidence_for(connection, welcome)), deadline=soon())
        assert connection.receive(side, deadline=soon()) == Accept()
        check_products(connection, side, share, 0)


@pytest.mark.parametrize("shown", ["none", "measurement", "old", "noise"])
def test_evidence_that_is_refused(attested: str, share: WorkerShare, shown: str) -> None:
    side, other = side_of(share), side_of(share)
    with connect(attested, LIMIT) as connection, connect(attested, LIMIT) as earlier:
        old = evidence_for(earlier, welcomed(earlier, other))  # good, for another connection
        welcome = welcomed(connection, side)
        evidence = {
            "none": b"",
            "measurement": evidence_for(connection, welcome, b"vault 0"),
            "old": old,
            "noise": os.urandom(1000),
        }[shown]
        connection.send(side.evidence(evidence), deadline=soon())
        with pytest.raises(AttestationError, match=r"refuses \(evidence\)"):
            connection.receive(side, deadline=soon())


def test_no_product_before_evidence(attested: str, share: WorkerShare) -> None:
    side, careless = side_of(share), side_of(share)
    with connect(attested, LIMIT) as connection:
        welcomed(connection, side)
        length = 4 * share.matrices[share.names[0]].shape[1]
        connection.send(pack_header(Header(Kind.MULTIPLY, 1, 0, 1, 0, length)), deadline=soon())
        careless.hello(bytes(32))
        with pytest.raises(WorkerFault, match="not allowed in state PROVING"):
            connection.receive(careless, deadline=soon())


# the end


def question(share: WorkerShare, side: VaultSide, rows: int) -> tuple[bytes, npt.NDArray[Any]]:
    """A whole frame that asks for a product of group 1, and the product."""
    w = share.matrices[share.names[1]]
    x = np.random.default_rng(rows).integers(0, P, (rows, w.shape[1]), np.uint32)
    return side.multiply(1, rows) + x.tobytes(), x.astype(object) @ w.T.astype(object) % P


def test_stop_answers_what_was_asked(share: WorkerShare, folder: Path, tmp_path: Path) -> None:
    """The worker is told to stop while it computes; the vault gets the whole product, then the end."""
    worker, side, idle = Worker(share, threads=1), side_of(share), side_of(share)
    matrix, begun, go = worker._matrices[1], threading.Event(), threading.Event()

    class Slow:
        shape = matrix.shape

        def product(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            begun.set()
            assert go.wait(LIMIT)
            return matrix.product(x)

    worker._matrices[1] = Slow()  # type: ignore[call-overload]
    with serving(worker, f"unix:{tmp_path}/socket", folder) as address:
        with connect(address, LIMIT) as connection, connect(address, LIMIT) as other:
            greet(connection, side)
            greet(other, idle)
            asked, product = question(share, side, 3)
            connection.send(asked, deadline=soon())
            assert begun.wait(LIMIT)
            worker.stop()
            end_of(other)  # nothing was asked there
            go.set()
            answer = connection.receive(side, deadline=soon())
            assert isinstance(answer, Product)
            assert np.array_equal(np.frombuffer(answer.payload, np.uint32).reshape(product.shape), product)
            end_of(connection)


@pytest.mark.cuda
@pytest.mark.skipif(not cards(), reason="needs an NVIDIA card: `make test-gpu` on a machine with one")
def test_a_worker_on_a_card(share: WorkerShare, folder: Path, tmp_path: Path) -> None:
    side, worker = side_of(share), Worker(share, device="cuda")
    with serving(worker, f"unix:{tmp_path}/socket", folder) as address, connect(address, LIMIT) as connection:
        greet(connection, side)
        check_products(connection, side, share, 0)
        asked, product = question(share, side, 500)
        connection.send(asked, deadline=soon())
        answer = connection.receive(side, deadline=soon())
        assert isinstance(answer, Product)
        assert np.array_equal(np.frombuffer(answer.payload, np.uint32).reshape(product.shape), product)


def test_sigterm_tears_no_frame(share_dir: Path, share: WorkerShare, tmp_path: Path) -> None:
    """Half a question is there when the signal comes: it is read to its end, and answered whole."""
    path, side = tmp_path / "socket", side_of(share)
    command = [sys.executable, "-m", "sliplm", "worker", str(share_dir), "--listen", f"unix:{path}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with connect(f"unix:{path}", LIMIT) as connection:
            greet(connection, side)
            asked, product = question(share, side, 2000)
            connection.send(asked[: len(asked) // 2], deadline=soon())
            unread, end = array("i", [1]), soon()
            while unread[0]:  # until the worker holds all of the first half
                assert time.monotonic() < end
                fcntl.ioctl(connection._sock, termios.TIOCOUTQ, unread)
            process.send_signal(signal.SIGTERM)
            while path.exists():  # it has stopped listening
                assert time.monotonic() < end
                time.sleep(0.01)
                with suppress(WorkerUnavailable):
                    connect(f"unix:{path}", 1.0).close()
                    continue
                break
            connection.send(asked[len(asked) // 2 :], deadline=soon())
            answer = connection.receive(side, deadline=soon())
            assert isinstance(answer, Product)
            assert np.array_equal(np.frombuffer(answer.payload, np.uint32).reshape(product.shape), product)
            end_of(connection)
        assert process.wait(LIMIT) == 0


def test_stop_ends_connections(share: WorkerShare, folder: Path, tmp_path: Path) -> None:
    worker, side = Worker(share, threads=1), side_of(share)
    where = serving(worker, f"unix:{tmp_path}/socket", folder)
    with where as address, connect(address, LIMIT) as connection:
        greet(connection, side)
        worker.stop()
        with pytest.raises(WorkerUnavailable):
            connection.receive_exactly(memoryview(bytearray(1)), soon())
    assert not (tmp_path / "socket").exists()


def test_stop_before_serve(share: WorkerShare, folder: Path) -> None:
    worker = Worker(share, threads=1)
    worker.stop()
    worker.serve("127.0.0.1:0", folder / "worker")


def test_share_without_groups(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 to 65536 groups"):
        Worker(open_worker(write_share(tmp_path / "share", {})))


def test_repr_names_the_split_only(share: WorkerShare) -> None:
    assert repr(Worker(share, threads=1)) == "Worker(split 5a5a5a5a, 2 groups)"


# processes


def gone(pid: int) -> bool:
    """The process has ended (a zombie that nobody collects counts)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_for_end(pid: int) -> None:
    """Wait until it is gone."""
    end = soon()
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_local_worker(share_dir: Path, share: WorkerShare) -> None:
    side = side_of(share)
    with LocalWorker(share_dir, threads=1) as worker:
        pid, door = worker.pid, Path(worker.address.removeprefix("shm:"))
        assert stat.S_IMODE(door.stat().st_mode) == 0o600
        assert stat.S_IMODE(door.parent.stat().st_mode) == 0o700
        with connect(worker.address, LIMIT) as connection:
            greet(connection, side)
            check_products(connection, side, share, 0)
    assert gone(pid)
    assert not door.parent.exists()
    with pytest.raises(WorkerUnavailable, match="with block"):
        worker.address  # noqa: B018
    worker.close()


def test_local_workers_of_one_authority(share_dir: Path, share: WorkerShare, tmp_path: Path) -> None:
    authority.init(tmp_path / "keys")
    authority.issue(tmp_path / "keys", "worker", "second")
    with (
        LocalWorker(share_dir, threads=1, authority=tmp_path / "keys") as one,
        LocalWorker(share_dir, threads=1, authority=tmp_path / "keys", name="second") as two,
    ):
        for worker, name in ((one, "worker"), (two, "second")):
            side = side_of(share)
            assert worker.address.endswith(f"?keys={tmp_path}/keys/vault")
            with connect(worker.address, LIMIT) as connection:
                greet(connection, side)
                assert connection.identity is not None and connection.identity.name == name
    assert (tmp_path / "keys" / "second" / "key.pem").exists()  # keys that it did not make stay


def test_local_worker_that_cannot_start(tmp_path: Path) -> None:
    worker = LocalWorker(tmp_path / "nothing")
    with pytest.raises(ShareError, match="does not exist: give the folder `worker`"), worker:
        pass
    assert worker._held.folder is None


def test_local_worker_dies_with_its_parent(share_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from sliplm.parties.local_worker import LocalWorker\n"
        "with LocalWorker(sys.argv[1], threads=1) as worker:\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(share_dir)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        assert list(tmp_path.glob("sliplm-*/s")) or list(tmp_path.glob("sliplm-*/keys/worker/key.pem"))
        parent.kill()
        parent.wait(LIMIT)
    wait_for_end(pid)
    assert not list(tmp_path.glob("sliplm-*"))  # the worker saw to it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_command(share_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "sliplm", "worker", str(share_dir), "--listen", f"unix:{path}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on unix:{path}\n"
        with connect(f"unix:{path}", LIMIT):
            process.send_signal(number)
            assert process.wait(LIMIT) == 0
    assert not path.exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in its own process."""
    command = [sys.executable, "-m", "sliplm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)


def test_errors_of_the_command(share_dir: Path, tmp_path: Path, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments, name in (
            ([str(tmp_path)], "ShareError"),
            ([str(share_dir)], "CredentialError"),
            ([str(share_dir), "--listen", "nowhere"], "InputError"),
            ([str(share_dir), "--device", "tpu"], "InputError"),
            ([str(share_dir), "--device", "cuda:63"], "CardError"),
            ([str(share_dir), "--listen", place, "--keys", str(folder / "worker")], "WorkerUnavailable"),
        ):
            device = [] if "--device" in arguments else ["--device", "cpu"]
            done = run("worker", *arguments, *device, "--json")
            assert done.returncode == 2
            document = json.loads(done.stdout.splitlines()[-1])
            assert document["error"] == name
            assert done.stderr == f"error: {document['message']}\n"


def test_keys_command(tmp_path: Path) -> None:
    made = tmp_path / "keys"
    done = run("keys", "init", str(made), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["vault"] == str(made / "vault")
    keys.context(made / "vault", "vault")
    again = run("keys", "init", str(made))
    assert (again.returncode, again.stdout) == (2, "")
    assert "never overwritten" in again.stderr


def test_frames_are_as_large_as_stated() -> None:
    """What the worker's memory statement rests on."""
    side = WorkerSide(SPLIT_ID, [(64, 32)])
    assert side.max_rows(0) * 64 * 4 <= FRAME_BYTES
