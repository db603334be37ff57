"""Connections over real sockets: frames arrive whole, and every failure is a typed error within its limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import stat
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import CredentialError, InputError, SlipError, WireError, WorkerTimeout, WorkerUnavailable
from sliplm.network import authority, keys
from sliplm.network.addresses import TcpAddress, UnixAddress, parse_address
from sliplm.network.dialling import connect
from sliplm.network.listener import Listener, listen
from sliplm.network.memory import MemoryConnection
from sliplm.network.patience import CROWDED
from sliplm.network.transport import Connection, pair
from sliplm.protocol.frames import WELCOME_BYTES, Header, Kind, pack_header
from sliplm.protocol.vault_side import Product, VaultSide
from sliplm.protocol.worker_side import Multiply, WorkerSide
from test_keys import forge

SPLIT_ID = "ab" * 16
SHAPES = [(3, 5), (3000, 1000)]


def soon(seconds: float = 20.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of one authority."""
    made = tmp_path_factory.mktemp("transport") / "keys"
    authority.init(made)
    return made


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of another authority."""
    made = tmp_path_factory.mktemp("transport") / "keys"
    authority.init(made)
    return made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for the other end."""
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.fixture
def tls(folder: Path) -> Iterator[Listener]:
    """A worker's listener on loopback."""
    with listen("127.0.0.1:0", folder / "worker") as made:
        yield made


@pytest.fixture
def plain() -> Iterator[socket.socket]:
    """A TCP listener without TLS, for servers that misbehave."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(20)
        yield made


def serve(listener: Listener) -> Connection:
    """The worker's end of the next connection."""
    sock = listener.accept()
    assert sock is not None
    return listener.secure(sock, soon())


@contextlib.contextmanager
def joined(way: str, folder: Path, tmp_path: Path) -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a connection of each sort: (vault's, worker's)."""
    if way == "pair":
        left, right = pair()
        with left, right:
            yield left, right
        return
    address = "127.0.0.1:0" if way == "tls" else f"{way}:{tmp_path}/socket"
    with listen(address, folder / "worker") as listener, ThreadPoolExecutor(1) as pool:
        right_end = pool.submit(serve, listener)
        suffix = f"?keys={folder}/vault" if way == "tls" else ""
        with connect(listener.address + suffix, 20) as left, right_end.result(20) as right:
            yield left, right


def pour(connection: Connection) -> None:
    """Send until that fails."""
    while True:
        connection.send(bytes(28), memoryview(bytes(2**20)), deadline=soon())


every_way = pytest.mark.parametrize("way", ["pair", "unix", "shm", "tls"])


@every_way
def test_frames_of_all_sizes(way: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    vault, worker = VaultSide(SPLIT_ID, SHAPES), WorkerSide(SPLIT_ID, SHAPES)

    def work(connection: Connection) -> None:
        connection.receive(worker, deadline=soon())
        connection.send(worker.welcome(bytes(32)), deadline=soon())
        for _ in range(4):
            asked = connection.receive(worker, deadline=soon())
            assert isinstance(asked, Multiply)
            y = os.urandom(4 * asked.rows * SHAPES[asked.group][0])
            sent.append((bytes(asked.payload), y))
            connection.send(worker.product(7), memoryview(y), deadline=soon())

    sent: list[tuple[bytes, bytes]] = []
    with joined(way, folder, tmp_path) as (left, right):
        other = pool.submit(work, right)
        left.send(vault.hello(bytes(32)), deadline=soon())
        left.receive(vault, deadline=soon())
        for group, rows in (
            (0, 1),
            (1, 1),
            (1, 70),
            (0, 2),
        ):  # 20 bytes to 840 KB: less and more than a record
            x = os.urandom(4 * rows * SHAPES[group][1])
            left.send(
                vault.multiply(group, rows),
                memoryview(x).cast("I", (rows, SHAPES[group][1])),
                deadline=soon(),
            )
            answer = left.receive(vault, deadline=soon())
            assert isinstance(answer, Product)
            assert answer.micros == 7
            assert sent[-1] == (x, bytes(answer.payload))
        other.result(20)


@every_way
def test_peer_leaves(way: str, folder: Path, tmp_path: Path) -> None:
    with joined(way, folder, tmp_path) as (left, right):
        right.close()
        right.close()
        with pytest.raises(WorkerUnavailable):
            left.receive_exactly(memoryview(bytearray(1)), soon())


@every_way
def test_peer_leaves_in_the_middle_of_a_frame(way: str, folder: Path, tmp_path: Path) -> None:
    side = VaultSide(SPLIT_ID, SHAPES)
    side.hello(bytes(32))
    with joined(way, folder, tmp_path) as (left, right):
        right.send(pack_header(Header(Kind.WELCOME, 0, 0, 0, 0, WELCOME_BYTES)) + bytes(10), deadline=soon())
        right.close()
        with pytest.raises(WorkerUnavailable):
            left.receive(side, deadline=soon())


@every_way
def test_silent_peer(way: str, folder: Path, tmp_path: Path) -> None:
    side = WorkerSide(SPLIT_ID, SHAPES)
    with joined(way, folder, tmp_path) as (left, right):
        with pytest.raises(WorkerTimeout):
            left.receive_exactly(memoryview(bytearray(1)), soon(0.1))
        with pytest.raises(WorkerTimeout):
            left.receive_exactly(memoryview(bytearray(1)), soon(-1))
        with pytest.raises(WorkerTimeout):
            right.receive(side, deadline=soon(0.1))
        left.send(b"SLIP", deadline=soon())
        with pytest.raises(WorkerTimeout):
            right.receive(side, deadline=soon(0.1))


@every_way
def test_wait_ends_with_a_frame_a_wake_or_the_time(
    way: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    wake, waker = socket.socketpair()
    with wake, waker, joined(way, folder, tmp_path) as (left, right):
        with pytest.raises(WorkerTimeout):
            right.wait(0.1, wake.fileno())
        waiting = pool.submit(right.wait, 20, wake.fileno())
        left.send(b"SLIP", deadline=soon())
        assert waiting.result(20)
        right.receive_exactly(memoryview(bytearray(4)), soon())
        waiting = pool.submit(right.wait, 20, wake.fileno())
        left.close()
        assert waiting.result(20)  # reading tells that it is over
        waker.send(b"x")
        end = soon()
        while right.wait(20, wake.fileno()):  # whatever else came, but looked for seldom
            assert time.monotonic() < end


@every_way
def test_whoever_fell_asleep_waits_awake_again(way: str, folder: Path, tmp_path: Path) -> None:
    """After the core was somebody else's nobody waits awake; once frames come quickly, both do."""
    with joined(way, folder, tmp_path) as (left, right), socket.socket() as never:
        end, wake, byte = soon(), never.fileno(), memoryview(bytearray(1))
        for reads in (lambda: right.wait(20, wake), lambda: None):
            right._patience.judge(CROWDED)
            while right._patience.spin == 0:
                assert time.monotonic() < end
                later = threading.Timer(0.0002, left.send, [b"x"], {"deadline": end})
                later.start()
                reads()
                right.receive_exactly(byte, end)
                later.join()


def test_whoever_is_roused_waits_awake_for_what_is_near(
    folder: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """However little patience is left; being roused is no frame, and does no harm to one who is awake."""
    rung, (never, wake) = threading.Event(), socket.socketpair()
    with never, wake, joined("shm", folder, tmp_path) as (left, right):
        assert isinstance(left, MemoryConnection)
        assert isinstance(right, MemoryConnection)
        left.rouse()  # nobody sleeps
        right._patience.judge(CROWDED)
        heard = right._answer_door

        def note(ready: list[tuple[int, int]]) -> None:
            heard(ready)
            if ready:
                rung.set()

        right._answer_door = note  # type: ignore[method-assign]
        waiting, end = pool.submit(right.wait, 20, wake.fileno()), soon()
        while not rung.is_set():
            left.rouse()
            assert time.monotonic() < end
        assert not waiting.done()
        left.send(b"x", deadline=end)
        assert waiting.result(20)
        byte = memoryview(bytearray(1))
        right.receive_exactly(byte, end)
        assert bytes(byte) == b"x"
    left.rouse()  # nor is anybody there


@every_way
def test_who_is_at_the_other_end(way: str, folder: Path, tmp_path: Path) -> None:
    with joined(way, folder, tmp_path) as (left, right):
        if way != "tls":
            assert (left.identity, left.own, right.identity, right.own) == (None, None, None, None)
            return
        assert left.identity == right.own == keys.context(folder / "worker", "worker").own
        assert right.identity == left.own == keys.context(folder / "vault", "vault").own


@every_way
def test_peer_that_drips(way: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Bytes keep coming, each well within the limit; the whole frame would take for ever."""
    over = threading.Event()

    def drip(connection: Connection) -> None:
        with contextlib.suppress(SlipError):
            while not over.wait(0.01):
                connection.send(b"x", deadline=soon())

    with joined(way, folder, tmp_path) as (left, right):
        other = pool.submit(drip, right)
        with pytest.raises(WorkerTimeout):
            left.receive_exactly(memoryview(bytearray(2**20)), soon(0.3))
        over.set()
        other.result(20)


def test_tls_record_that_drips(plain: socket.socket, folder: Path, pool: ThreadPoolExecutor) -> None:
    over = threading.Event()

    def drip() -> None:
        with plain.accept()[0] as sock, contextlib.suppress(OSError):
            sock.sendall(b"\x16\x03\x03\x40\x00\x02")
            while not over.wait(0.01):
                sock.sendall(b"\0")

    other = pool.submit(drip)
    with pytest.raises(WorkerTimeout):
        connect(f"127.0.0.1:{plain.getsockname()[1]}?keys={folder}/vault", 0.3)
    over.set()
    other.result(20)


@every_way
def test_peer_that_does_not_read(way: str, folder: Path, tmp_path: Path) -> None:
    with joined(way, folder, tmp_path) as (left, _), pytest.raises(WorkerTimeout):
        left.send(bytes(28), memoryview(bytes(2**26)), deadline=soon(0.3))


@every_way
@pytest.mark.parametrize("length", [2**26, 2**32 - 1])
def test_length_is_refused_before_memory_is_taken(
    way: str, length: int, folder: Path, tmp_path: Path
) -> None:
    vault, worker = VaultSide(SPLIT_ID, SHAPES), WorkerSide(SPLIT_ID, SHAPES)
    header = bytearray(pack_header(Header(Kind.HELLO, 0, 0, 0, 0, 16)))
    header[24:] = length.to_bytes(4, "little")
    vault.hello(bytes(32))
    with joined(way, folder, tmp_path) as (left, right):
        left.send(bytes(header), deadline=soon())
        tracemalloc.start()
        try:
            with pytest.raises(WireError):
                right.receive(worker, deadline=soon())
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


@every_way
def test_bytes_without_end(way: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with joined(way, folder, tmp_path) as (left, right):
        other = pool.submit(pour, left)
        with pytest.raises(WireError):
            right.receive(WorkerSide(SPLIT_ID, SHAPES), deadline=soon())
        right.close()
        assert isinstance(other.exception(20), WorkerUnavailable)


@every_way
def test_abort_wakes_the_reader(way: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with joined(way, folder, tmp_path) as (left, _):
        reader = pool.submit(left.receive_exactly, memoryview(bytearray(1)), soon())
        time.sleep(0.05)
        left.abort()
        with pytest.raises(WorkerUnavailable):
            reader.result(20)


@every_way
def test_last_frame_arrives_although_bytes_were_left_unread(
    way: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with joined(way, folder, tmp_path) as (left, right):
        left.send(bytes(1000), deadline=soon())
        right.send(b"last", deadline=soon())
        other = pool.submit(right.finish)
        got = bytearray(4)
        left.receive_exactly(memoryview(got), soon())
        left.close()
        other.result(20)
        assert got == b"last"


# who may talk to whom


def refused(listener: Listener, client: Callable[[], object]) -> BaseException:
    """What the worker's end raises while the client does its worst."""
    with ThreadPoolExecutor(1) as pool:
        end: Future[Connection] = pool.submit(serve, listener)
        with contextlib.suppress(OSError, SlipError):
            client()
        error = end.exception(20)
    assert error is not None
    return error


def raw(listener: Listener) -> socket.socket:
    """A TCP connection to the listener."""
    where = parse_address(listener.address)
    assert isinstance(where, TcpAddress)
    return socket.create_connection((where.host, where.port), 20)


def attack(listener: Listener, context: ssl.SSLContext) -> None:
    """A TLS client with settings of its own, which reads what comes."""
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with raw(listener) as sock, context.wrap_socket(sock) as secure:
        secure.recv(1)


def test_client_of_another_authority(tls: Listener, others: Path, folder: Path, tmp_path: Path) -> None:
    """It trusts the worker's authority, so the refusal is the worker's, and comes with the first read."""
    mixed = tmp_path / "mixed"
    forge(others, mixed, "vault")
    for name in ("authority.pem", "revoked.pem"):
        shutil.copyfile(folder / "vault" / name, mixed / name)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(serve, tls)
        refusal = pytest.raises(CredentialError, match="refuses our certificate")
        with connect(f"{tls.address}?keys={mixed}", 20) as connection, refusal:
            connection.receive_exactly(memoryview(bytearray(1)), soon())
        assert isinstance(end.exception(20), CredentialError)


def test_refusal_explains_a_failed_send(tls: Listener, others: Path, folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    forge(others, mixed, "vault")
    for name in ("authority.pem", "revoked.pem"):
        shutil.copyfile(folder / "vault" / name, mixed / name)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(serve, tls)
        refusal = pytest.raises(CredentialError, match="refuses our certificate")
        with connect(f"{tls.address}?keys={mixed}", 20) as connection, refusal:
            pour(connection)
        assert isinstance(end.exception(20), CredentialError)


def test_worker_of_another_authority(tls: Listener, others: Path) -> None:
    def client() -> None:
        with pytest.raises(CredentialError, match="one `slip keys init`"):
            connect(f"{tls.address}?keys={others}/vault", 20)

    assert isinstance(refused(tls, client), CredentialError)


def test_worker_certificate_opens_no_worker(tls: Listener, folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / "worker" / "certificate.pem", folder / "worker" / "key.pem")
    assert isinstance(refused(tls, lambda: attack(tls, context)), CredentialError)


def test_role_counts_where_key_usage_allows_both(tls: Listener, folder: Path, tmp_path: Path) -> None:
    forged = forge(folder, tmp_path / "forged", "worker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(forged / "certificate.pem", forged / "key.pem")
    error = refused(tls, lambda: attack(tls, context))
    assert isinstance(error, CredentialError)
    assert "not a vault's" in str(error)


def test_vault_certificate_makes_no_worker(
    plain: socket.socket, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    forged = forge(folder, tmp_path / "forged", "vault")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(forged / "certificate.pem", forged / "key.pem")

    def pretend() -> None:
        sock = plain.accept()[0]
        with contextlib.suppress(OSError), sock, context.wrap_socket(sock, server_side=True) as secure:
            secure.recv(1)

    other = pool.submit(pretend)
    with pytest.raises(CredentialError, match="not a worker's"):
        connect(f"127.0.0.1:{plain.getsockname()[1]}?keys={folder}/vault", 20)
    other.result(20)


def test_revoked_client(tls: Listener, folder: Path, tmp_path: Path) -> None:
    """A thief of a vault's keys, with an older list: the worker's list counts."""
    authority.issue(folder, "vault", "stolen")
    shutil.copytree(folder / "stolen", tmp_path / "stolen")
    authority.revoke(folder, "stolen")
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(serve, tls)  # which was there before the revocation
        refusal = pytest.raises(CredentialError, match=r"refuses our certificate.*revoked")
        with connect(f"{tls.address}?keys={tmp_path}/stolen", 20) as connection, refusal:
            connection.receive_exactly(memoryview(bytearray(1)), soon())
        error = end.exception(20)
    assert isinstance(error, CredentialError)
    assert "is revoked" in str(error)


def test_revoked_worker(folder: Path, tmp_path: Path) -> None:
    authority.issue(folder, "worker", "gone")
    shutil.copytree(folder / "gone", tmp_path / "gone")
    authority.revoke(folder, "gone")

    def client() -> None:
        with pytest.raises(CredentialError, match="is revoked"):
            connect(f"{listener.address}?keys={folder}/vault", 20)

    with listen("127.0.0.1:0", tmp_path / "gone") as listener:
        assert isinstance(refused(listener, client), CredentialError)


def test_worker_whose_list_is_damaged_takes_nobody(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "worker", tmp_path / "worker")

    def client() -> None:
        with connect(f"{listener.address}?keys={folder}/vault", 20):
            pass

    with listen("127.0.0.1:0", tmp_path / "worker") as listener:
        (tmp_path / "worker" / "revoked.pem").write_bytes(b"")
        assert "cannot be used" in str(refused(listener, client))
        shutil.copyfile(folder / "worker" / "revoked.pem", tmp_path / "worker" / "revoked.pem")
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(serve, listener)
            client()
            end.result(20).close()


def test_client_without_a_certificate(tls: Listener) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert isinstance(refused(tls, lambda: attack(tls, context)), CredentialError)


def test_client_of_tls_1_2(tls: Listener, folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / "vault" / "certificate.pem", folder / "vault" / "key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert isinstance(refused(tls, lambda: attack(tls, context)), WireError)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"SLIP" + bytes(24), os.urandom(4096)])
def test_client_without_tls(tls: Listener, said: bytes) -> None:
    def client() -> None:
        with raw(tls) as sock:
            sock.sendall(said)
            while sock.recv(4096):
                pass

    assert isinstance(refused(tls, client), WireError)


def test_client_that_leaves_at_once(tls: Listener) -> None:
    assert isinstance(refused(tls, lambda: raw(tls).close()), WorkerUnavailable)


def test_server_without_tls(plain: socket.socket, folder: Path, pool: ThreadPoolExecutor) -> None:
    def greet() -> None:
        with plain.accept()[0] as sock:
            sock.sendall(b"220 mail.example ESMTP\r\n")
            sock.recv(4096)

    other = pool.submit(greet)
    with pytest.raises(WireError, match="does not speak TLS"):
        connect(f"127.0.0.1:{plain.getsockname()[1]}?keys={folder}/vault", 20)
    other.result(20)


# addresses


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:7400?keys=/a b/?c", TcpAddress("127.0.0.1", 7400, Path("/a b/?c"))),
        ("worker.example:0", TcpAddress("worker.example", 0, None)),
        ("[::1]:7400?keys=k", TcpAddress("::1", 7400, Path("k"))),
        ("unix:/run/slip.sock", UnixAddress(Path("/run/slip.sock"))),
    ],
)
def test_addresses(text: str, found: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == found
    assert str(found) == text.partition("?")[0]


@pytest.mark.parametrize(
    "text",
    ["", ":", ":1", "host", "host:", "host:x", "host:65536", "host:-1", "::1:7400", "host:1?keys=",
     "host:1?key=k", "host:\u0661", "unix:", "unix:" + "x" * 108, "unix:a\0b"],
)  # fmt: skip
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        parse_address(text)


@given(st.text() | st.text("[]:?=1keysunix/. "))
def test_any_address(text: str) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse_address(text), TcpAddress | UnixAddress)


def test_nobody_listens(folder: Path, tmp_path: Path) -> None:
    with listen("127.0.0.1:0", folder / "worker") as listener:
        address = listener.address
    with pytest.raises(WorkerUnavailable, match="is the worker running") as caught:
        connect(f"{address}?keys={folder}/vault", 20)
    assert caught.value.address == address
    with pytest.raises(WorkerUnavailable, match="is the worker running"):
        connect(f"unix:{tmp_path}/nothing", 20)
    with pytest.raises(WorkerUnavailable):
        connect(f"no-such-host.invalid:1?keys={folder}/vault", 20)


def test_tcp_needs_keys(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CredentialError, match="keys=FOLDER"):
        connect("127.0.0.1:1", 20)
    with pytest.raises(CredentialError, match="slip keys init"):
        listen("127.0.0.1:0")
    with pytest.raises(CredentialError, match="slip keys init"):
        listen("127.0.0.1:0", tmp_path)
    with pytest.raises(CredentialError, match="use the folder 'vault'"):
        connect(f"127.0.0.1:1?keys={folder}/worker", 20)


def test_port_in_use(tls: Listener, folder: Path) -> None:
    with pytest.raises(WorkerUnavailable, match="choose another address"):
        listen(tls.address, folder / "worker")


def test_unix_socket_is_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen(f"unix:{path}") as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(WorkerUnavailable, match="answers at"):
            listen(listener.address)
        assert path.exists()
    assert not path.exists()


def test_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with listen(f"unix:{path}"), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


def test_successor_keeps_its_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = listen(f"unix:{path}")
    path.unlink()
    with listen(f"unix:{path}"):
        first.close()
        assert path.exists()


def test_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkerUnavailable, match="a file, not a socket"):
        listen(f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(WorkerUnavailable, match="choose another address"):
        listen(f"unix:{tmp_path}/no/folder")


def test_stop_wakes_accept(tls: Listener, pool: ThreadPoolExecutor) -> None:
    waiting = pool.submit(tls.accept)
    time.sleep(0.05)
    tls.stop()
    assert waiting.result(20) is None
    tls.close()
    tls.stop()
