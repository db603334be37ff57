"""Connections that carry frames: TLS 1.3 over TCP, Unix sockets, and a pair in memory.

Sockets never block, and every wait has a deadline, a value of time.monotonic(), that covers all the reads or
writes of one call: a peer that drips bytes gains nothing.  A connection takes memory only for a length
that the protocol has accepted, at most one frame in each direction.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

from sliplm import forks
from sliplm.closing import Closing
from sliplm.errors import (
    CredentialError,
    SlipError,
    WireError,
    WorkerTimeout,
    WorkerUnavailable,
)
from sliplm.network import keys
from sliplm.network.complaints import translate
from sliplm.network.patience import Patience, pollfd, readable
from sliplm.protocol.frames import HEADER_BYTES

_PEER: Final = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED
_RECORD: Final = 16384  # bytes of the longest TLS record
_UNIX_BUFFER: Final = 2**20
_KEEPALIVE: Final = (  # a connection that a network has forgotten ends within seconds, also in use
    (socket.TCP_KEEPIDLE, 15),  # seconds without traffic, then a probe
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 5000),  # milliseconds for which sent bytes may stay unacknowledged
)
_NOTHING: Final = memoryview(b"")
_FAREWELL: Final = 1.0  # seconds for the last words to reach a peer
LOOK: Final = 0.005  # seconds of frames one after the other without a look at what else ends a wait
_WOULD_WAIT: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

EventT_co = TypeVar("EventT_co", covariant=True)


class Reader(Protocol[EventT_co]):
    """What `Connection.receive` needs of a side of the protocol."""

    def header(self, data: memoryview, /) -> int:
        """How many payload bytes follow."""

    def payload(self, data: memoryview, /) -> EventT_co:
        """The event."""


class Connection(Closing):
    """Frames over one socket, for one thread; only `abort` may come from another.

    After any error but InputError the connection is useless: close it.

    Attributes:
        identity: who the peer is by its certificate; None on a Unix socket.
        own: who we are to the peer; None on a Unix socket.
        mark: what tells the peer from others for good: the SHA-256 of its public key, or of its process on a
            Unix socket; empty for a peer in this very process.
        marks: this, and what stands for its certificate, where there are such.
        place: device and inode of the Unix socket that was connected to.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        identity: keys.Identity | None = None,
        own: keys.Identity | None = None,
    ) -> None:
        self.identity = identity
        self.own = own
        self.mark = _process_mark(sock) if identity is None else identity.spki
        self.marks = tuple(filter(None, (self.mark, b"" if identity is None else identity.mark)))
        self.place: tuple[int, int] | None = None
        self._sock = sock
        self._secure = sock if isinstance(sock, ssl.SSLSocket) else None
        self._peer = peer
        self._start = memoryview(bytearray(_RECORD))
        self._body = memoryview(bytearray(0))
        self._first = memoryview(bytearray(_RECORD))
        self._patience = Patience()
        self._watched = pollfd(sock.fileno())
        self._looked = -math.inf  # when `wait` looked last at what else ends it
        self._doors: dict[int, select.poll] = {}  # with that
        sock.setblocking(False)
        forks.watch(self)

    def __repr__(self) -> str:
        return f"Connection({self._peer})"

    @property
    def peer(self) -> str:
        """Who is at the other end, for messages."""
        return self._peer

    def send(self, header: bytes, payload: memoryview | None = None, *, deadline: float) -> None:
        """Send one frame; `payload` is a C-contiguous view of bytes or of elements.

        Raises WorkerTimeout, WorkerUnavailable, CredentialError, WireError.
        """
        self._send_frame(header, _NOTHING if payload is None else payload.cast("B"), deadline)

    def _send_frame(self, header: bytes, body: memoryview, deadline: float) -> None:
        if not body:
            self._send_all(memoryview(header), deadline)
            return
        size = len(header)
        # Header and payload share the first record; the rest leaves without a copy.
        taken = min(len(body), _RECORD - size)
        self._first[:size] = header
        self._first[size : size + taken] = body[:taken]
        self._send_all(self._first[: size + taken], deadline)
        if taken < len(body):
            self._send_all(body[taken:], deadline)

    def receive(self, side: Reader[EventT_co], *, deadline: float) -> EventT_co:
        """Read one frame and return the event that `side` makes of it.

        The event's payload is a view that lives until the next call.
        Raises what `receive_exactly` and the side raise.
        """
        got = self._receive_some(self._start, deadline)
        try:
            return self._receive_rest(got, side, deadline)
        except WorkerUnavailable as error:
            error.torn = True
            raise

    def wait(self, idle: float, wake: int) -> bool:
        """Wait until a frame begins (True), or the descriptor `wake` is readable (False, whatever came).  For
        that it looks every LOOK seconds while frames come.

        Raises WorkerTimeout after `idle` seconds.
        """
        awake, now = self._stay_awake(), time.monotonic()
        if self._decrypted() or (awake and now - self._looked <= LOOK):
            return True
        ready = self._door(wake).poll(idle * 1000)
        self._looked = time.monotonic()
        if not awake:
            self._patience.slept(now)
        if not ready:
            raise WorkerTimeout(f"{self._peer} did not answer within the limit", self._peer)
        return all(handle != wake for handle, _ in ready)

    def _door(self, wake: int) -> select.poll:
        """What waits for the socket, and for another descriptor."""
        if (poll := self._doors.get(wake)) is None:
            poll = self._doors[wake] = select.poll()
            poll.register(self._sock, select.POLLIN)
            poll.register(wake, select.POLLIN)
        return poll

    def _receive_rest(self, got: int, side: Reader[EventT_co], deadline: float) -> EventT_co:
        """The frame whose first `got` bytes lie in `_start`: mostly the whole of a short one."""
        while got < HEADER_BYTES:
            got += self._receive_some(self._start[got:], deadline)
        length = side.header(self._start[:HEADER_BYTES])
        here = got - HEADER_BYTES
        if here > length:  # nobody speaks out of turn in this protocol
            raise WireError(f"{self._peer} sent more than one frame at once")
        if length <= _RECORD - HEADER_BYTES:
            body = self._start[HEADER_BYTES : HEADER_BYTES + length]
        else:
            if length > len(self._body):
                self._body = memoryview(bytearray(length))
            body = self._body[:length]
            body[:here] = self._start[HEADER_BYTES:got]
        if here < length:
            self.receive_exactly(body[here:], deadline)
        return side.payload(body)

    def receive_exactly(self, view: memoryview, deadline: float) -> None:
        """Fill `view`.  Raises WorkerTimeout, WorkerUnavailable, CredentialError, WireError."""
        while len(view):
            view = view[self._receive_some(view, deadline) :]

    def _receive_some(self, view: memoryview, deadline: float) -> int:
        try:
            began = time.monotonic()
            if began >= deadline:
                raise TimeoutError
            awake = self._stay_awake()
            while True:
                try:
                    count = self._sock.recv_into(view)
                    break
                except _WOULD_WAIT as error:
                    self._sleep_until(error, select.POLLIN, deadline)
            if not awake:
                self._patience.slept(began)
        except (OSError, ValueError) as error:
            raise translate(error, self._peer) from error
        if not count:
            raise WorkerUnavailable(f"{self._peer} closed the connection", self._peer)
        return count

    def _stay_awake(self) -> bool:
        """Wait awake for something to read, where that has paid lately; whether it came."""
        return self._decrypted() or self._patience.judge(readable(self._watched, self._patience.spin))

    def _decrypted(self) -> bool:
        """Whether there is something to read that poll does not see."""
        return self._secure is not None and self._secure.pending() > 0

    def _sleep_until(self, reason: OSError, otherwise: int, deadline: float) -> None:
        """Until the socket is ready for what it could not do at once; TLS may have to write in order to read.

        Raises TimeoutError.
        """
        events: dict[type[OSError], int] = {
            ssl.SSLWantReadError: select.POLLIN,
            ssl.SSLWantWriteError: select.POLLOUT,
        }
        poll = select.poll()
        poll.register(self._sock, events.get(type(reason), otherwise))
        if not poll.poll(1000 * remaining(deadline)):
            raise TimeoutError

    def _send_all(self, view: memoryview, deadline: float) -> None:
        try:
            while len(view):
                try:
                    view = view[self._sock.send(view) :]
                except _WOULD_WAIT as error:
                    self._sleep_until(error, select.POLLOUT, deadline)
        except (OSError, ValueError) as error:
            raise self._last_words(translate(error, self._peer)) from error

    def _last_words(self, error: SlipError) -> SlipError:
        """A peer that refuses our certificate says so and hangs up: what it said explains the error."""
        if isinstance(error, WorkerUnavailable):
            try:
                self._receive_some(memoryview(bytearray(1)), time.monotonic() + _FAREWELL)
            except CredentialError as refusal:
                return refusal
            except SlipError:
                pass
        return error

    def finish(self) -> None:
        """Close after a last frame, and give the peer a second to read it.

        Closing at once with unread bytes would reset the connection and destroy that frame.
        """
        _linger(self._sock)

    def abort(self) -> None:
        """From any thread: end the connection; whoever waits on it gets WorkerUnavailable."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # not SSLSocket's, which drops its state

    def left_behind(self) -> None:
        """In a forked child: close its copy of the socket, and say nothing on it."""
        if (handle := self._sock.detach()) >= 0:
            os.close(handle)

    def close(self) -> None:
        """Close; harmless when closed already."""
        self.abort()
        self._sock.close()


def _process_mark(sock: socket.socket) -> bytes:
    """SHA-256 of the process that opened a Unix socket: its number and when it began; empty if that is us,
    or not to be known.
    """
    if sock.family != socket.AF_UNIX:
        return b""
    try:
        pid, _, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if pid in (0, os.getpid()):
            return b""
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return b""
    return hashlib.sha256(f"process/{boot}/{pid}/{began}".encode()).digest()


def pair() -> tuple[Connection, Connection]:
    """Two connections to each other, in memory: (vault's, worker's)."""
    left, right = socket.socketpair()
    enlarge(left)
    enlarge(right)
    return Connection(left, "pair"), Connection(right, "pair")


def handshake(
    raw: socket.socket, context: keys.Context, theirs: keys.Role, peer: str, deadline: float
) -> Connection:
    """TLS, then the check that the peer has the role `theirs`."""
    secure: socket.socket = raw
    try:
        raw.settimeout(remaining(deadline))
        wrapped = context.wrap_socket(raw, server_side=theirs == "vault", do_handshake_on_connect=False)
        secure = wrapped
        wrapped.settimeout(remaining(deadline))
        wrapped.do_handshake()
        identity = keys.check_role(wrapped, theirs)
    except (OSError, ValueError) as error:
        if isinstance(error, TimeoutError):
            secure.close()
        else:
            _linger(secure)  # the alert that says why must arrive
        raise translate(error, peer) from error
    except CredentialError:
        secure.close()
        raise
    return Connection(wrapped, peer, identity, context.own)


def _linger(sock: socket.socket) -> None:
    """Close for writing, swallow what still comes for a second at most, close."""
    deadline = time.monotonic() + _FAREWELL
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        scratch = bytearray(_RECORD)
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not socket.socket.recv_into(sock, scratch):
                break
    sock.close()


@contextlib.contextmanager
def closing_on_error(sock: socket.socket) -> Iterator[None]:
    """Close the socket if the block fails."""
    try:
        yield
    except BaseException:
        sock.close()
        raise


def keep_alive(sock: socket.socket) -> None:
    """Small frames leave at once, and a peer that vanished is noticed; a Unix socket's end is told anyway."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def enlarge(sock: socket.socket) -> None:
    """Room for a whole frame in a Unix socket; TCP's buffers grow by themselves, and further."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _UNIX_BUFFER)


def remaining(deadline: float) -> float:
    """Seconds until then.  Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
