"""Connections through memory that vault and worker share on one host, with a Unix socket as their door.

The vault makes the memory and passes it through the socket, which decides who may connect, as it does
without memory.  Afterwards the socket carries no frames: a byte on it wakes whoever sleeps, and its end is
the end of the connection.  What the memory holds, and why it is safe to read: `ring`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import time
import weakref
from functools import cache
from typing import Any, Final

import numpy as np

from sliplm.errors import WireError, WorkerTimeout, WorkerUnavailable
from sliplm.network import ring
from sliplm.network.addresses import TcpAddress, UnixAddress
from sliplm.network.complaints import translate
from sliplm.network.patience import SPIN, Patience, pollfd, readable
from sliplm.network.transport import LOOK, Connection, closing_on_error, remaining

_DOOR: Final = struct.Struct("<8sIQ8x")  # as long as a header: a worker that expects one refuses it in words
_MAGIC: Final = b"SLIPMEM\0"
_OFFER: Final = _DOOR.pack(_MAGIC, 1, ring.SIZE)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_BELLS: Final = 4096  # bytes that are swallowed at once
_FAILED: Final = ctypes.c_void_p(-1).value


class MemoryConnection(Connection):
    """A `Connection` whose frames go through shared memory.

    Args:
        sock: the door, connected; this object's from now on.
        area: ring.SIZE bytes that the peer cannot shrink.
        vault: which side this is.
    """

    def __init__(self, sock: socket.socket, peer: str, area: Area, *, vault: bool) -> None:
        super().__init__(sock, peer)
        self._area = area  # not let go of by `close`: another thread may be in the middle of a call
        self._words = ring.side(area.address, vault=vault)
        self._bell = self._words.data[ring.BELL :]
        self._room = Patience()
        self._over = False
        self._vault, self._handed = vault, -1
        self._looked = time.monotonic()
        self._hinge = select.poll()
        self._hinge.register(sock, select.POLLIN)
        self._start_bytes = np.frombuffer(self._start, np.uint8)

    def wait(self, idle: float, wake: int) -> bool:
        poll = self._door(wake)
        now, rung = time.monotonic(), False
        deadline = now + idle
        while True:
            if rung:  # who rings before there is anything sends it soon
                came = self._sound(ring.arrived(self._words, SPIN)) > 0
            else:
                came = self._patience.judge(self._sound(ring.arrived(self._words, self._patience.spin)))
            if came and now - self._looked <= LOOK:
                return True
            ready = poll.poll(0) if came else self._sleep(poll, ring.FOR_BYTES, deadline)
            rung = bool(ready)
            self._looked = now = time.monotonic()
            if ready:
                self._answer_door(ready)
                if any(handle == wake for handle, _ in ready):
                    return False
            if came or self._over:
                return True  # `receive` says that it is over

    def abort(self) -> None:
        self._over = True
        super().abort()

    def rouse(self) -> None:
        """From any thread: wake a peer that sleeps for bytes, before there are any."""
        if ring.sleeps(self._words):
            with contextlib.suppress(OSError):  # whoever has hung up is noticed at the door
                self._sock.send(b"\0")

    def hand_over(self, handle: int) -> None:
        """The vault: pass a descriptor through the door; it stays the caller's.  Raises WorkerUnavailable."""
        try:
            socket.send_fds(self._sock, [b"\0"], [handle])
        except OSError as error:
            raise translate(error, self._peer) from error

    def handed_over(self, deadline: float) -> int:
        """The worker: the descriptor that came through the door last, to be closed by the caller.

        Raises WorkerTimeout, WorkerUnavailable.
        """
        while self._handed < 0:
            if self._over:
                raise self._closed()
            left = deadline - time.monotonic()
            if left <= 0 or not (ready := self._hinge.poll(left * 1000)):
                raise self._late()
            self._answer_door(ready)
        handle, self._handed = self._handed, -1
        return handle

    def close(self) -> None:
        super().close()
        self._drop_handed()

    def left_behind(self) -> None:
        super().left_behind()
        self._drop_handed()

    def _drop_handed(self) -> None:
        handle, self._handed = self._handed, -1
        if handle >= 0:
            os.close(handle)

    def _send_frame(self, header: bytes, body: memoryview, deadline: float) -> None:
        first, rest = np.frombuffer(header, np.uint8), np.frombuffer(body, np.uint8)
        done, whole = 0, len(first) + len(rest)
        while not self._over:
            got = self._sound(ring.put(self._words, first, rest, done, self._room.spin))
            done = got & ring.COUNT
            if self._bell[0]:
                self._ring()
            if done == whole:
                return
            if not self._room.judge(got >> 32):
                self._answer_door(self._sleep(self._hinge, ring.FOR_ROOM, deadline))
            elif time.monotonic() >= deadline:
                raise self._late()
        raise self._closed()

    def _receive_some(self, view: memoryview, deadline: float) -> int:
        out = self._start_bytes if view is self._start else np.frombuffer(view, np.uint8)
        if self._look() >= deadline:
            raise self._late()
        while True:
            got = self._sound(ring.get(self._words, out, self._patience.spin))
            if self._patience.judge(got >> 32):
                if self._bell[0]:
                    self._ring()
                return got & ring.COUNT
            if self._over:
                raise self._closed()
            self._answer_door(self._sleep(self._hinge, ring.FOR_BYTES, deadline))

    def _sleep(self, poll: select.poll, reason: int, deadline: float) -> list[tuple[int, int]]:
        """Until the peer rings or has hung up, or what else `poll` knows; what is ready.

        Raises WorkerTimeout.
        """
        began = time.monotonic()
        if began >= deadline:  # also while it rings without end
            raise self._late()
        try:
            if not ring.lie_down(self._words, reason):
                return poll.poll(0)
            ready = poll.poll((deadline - began) * 1000)
        finally:
            ring.get_up(self._words)
        if not ready:
            raise self._late()
        self._patience.slept(began)
        return ready

    def _look(self) -> float:
        """Look at the door once in a while, also where frames come so fast that nobody sleeps; the time."""
        now = time.monotonic()
        if now - self._looked > LOOK:
            self._looked = now
            self._answer_door(self._hinge.poll(0))
        return now

    def _answer_door(self, ready: list[tuple[int, int]]) -> None:
        """Swallow what rang; note it if the peer, or `abort`, has shut the door."""
        if not ready:
            return
        try:
            gone = not self._hear()
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            ring.finish(self._words)
            self._over = True

    def _hear(self) -> bytes:
        """What rang.  A worker keeps the last descriptor that comes with it, a vault none."""
        if self._vault:
            return self._sock.recv(_BELLS)
        rang, handles, _, _ = socket.recv_fds(self._sock, _BELLS, 1, socket.MSG_CMSG_CLOEXEC)
        if handles:
            self._drop_handed()
            self._handed = handles[0]
        return rang

    def _ring(self) -> None:
        """Wake the peer.  Where the door takes no more, enough bytes lie there to do so."""
        self._bell[0] = 0
        with contextlib.suppress(OSError):  # whoever has hung up is noticed at the door
            self._sock.send(b"\0")

    def _sound(self, result: int) -> int:
        if result == ring.SCRIBBLED:
            raise WireError(f"{self._peer} wrote what cannot be into the shared memory")
        return result

    def _late(self) -> WorkerTimeout:
        return WorkerTimeout(f"{self._peer} did not answer within the limit", self._peer)

    def _closed(self) -> WorkerUnavailable:
        return WorkerUnavailable(f"{self._peer} closed the connection", self._peer)


class Area:
    """Shared bytes of a descriptor, mapped as long as this object lives.  Raises OSError."""

    def __init__(self, handle: int) -> None:
        libc, rights = _libc(), mmap.PROT_READ | mmap.PROT_WRITE
        found = libc.mmap(None, ring.SIZE, rights, mmap.MAP_SHARED, handle, 0)  # mmap.mmap keeps a descriptor
        if found == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.address = int(found)
        weakref.finalize(self, libc.munmap, found, ring.SIZE).atexit = False

    def __repr__(self) -> str:
        return "Area()"


def prepare_for(target: TcpAddress | UnixAddress) -> None:
    """Compile what waits on such an address, before there is a deadline."""
    if isinstance(target, UnixAddress) and target.memory:
        ring.prepare()
    readable(pollfd(-1), 0)


def offer(sock: socket.socket, peer: str, deadline: float) -> Connection:
    """The vault's end on a connected Unix socket: make memory, and pass it; through the socket where this
    machine has none to share.

    Raises WorkerTimeout, WorkerUnavailable, WireError; the socket is then closed.
    """
    with closing_on_error(sock):
        try:
            handle, area = _make()
        except OSError:
            return Connection(sock, peer)
        try:
            sock.settimeout(remaining(deadline))
            socket.send_fds(sock, [_OFFER], [handle])
            answer = _exactly(sock, len(_OFFER), deadline)
        except OSError as error:
            raise translate(error, peer) from error
        finally:
            os.close(handle)
        if answer != _OFFER:
            raise WireError(f"{peer} shares no memory: is its address given with `unix:`?")
        return MemoryConnection(sock, peer, area, vault=True)


def accept(sock: socket.socket, peer: str, deadline: float) -> Connection:
    """The worker's end on an accepted Unix socket: take the vault's memory, if it offers any.

    Raises as `offer`; the socket is then closed.
    """
    with closing_on_error(sock):
        try:
            sock.settimeout(remaining(deadline))
            if sock.recv(len(_MAGIC), socket.MSG_PEEK) != _MAGIC:
                return Connection(sock, peer)
            said, handles, _, _ = socket.recv_fds(sock, len(_OFFER), 1, socket.MSG_CMSG_CLOEXEC)
            try:
                if said != _OFFER or not handles or not _fits(handles[0]):
                    raise WireError(f"{peer} offered memory that cannot be used")
                area = Area(handles[0])
            finally:
                for handle in handles:
                    os.close(handle)
            sock.settimeout(remaining(deadline))
            sock.sendall(_OFFER)
        except OSError as error:
            raise translate(error, peer) from error
        return MemoryConnection(sock, peer, area, vault=False)


def _make() -> tuple[int, Area]:
    """A descriptor of fresh memory that nobody can shrink, and the memory.  Raises OSError."""
    if not hasattr(os, "memfd_create"):
        raise OSError("no memory without a name here")
    handle = os.memfd_create("sliplm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(handle, ring.SIZE)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        return handle, Area(handle)
    except BaseException:
        os.close(handle)
        raise


def _fits(handle: int) -> bool:
    """Whether a stranger's descriptor is memory of the right size, in which no read can fail: it cannot be
    shrunk, is no file, and needs no huge pages, of which there may be none left.
    """
    try:
        seals = fcntl.fcntl(handle, fcntl.F_GET_SEALS)
    except OSError:  # no memory
        return False
    found = os.fstat(handle)
    return seals & _SEALS == _SEALS and (found.st_size, found.st_blksize) == (ring.SIZE, mmap.PAGESIZE)


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    said = b""
    while len(said) < count:
        sock.settimeout(remaining(deadline))
        more = sock.recv(count - len(said))
        if not more:
            raise ConnectionResetError("it hung up")
        said += more
    return said


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
