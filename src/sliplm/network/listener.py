"""Where a worker waits for vaults: TLS over TCP, or a Unix socket; addresses as in `addresses`."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sliplm.closing import Closing
from sliplm.errors import CredentialError, WorkerUnavailable
from sliplm.network import keys
from sliplm.network.addresses import TcpAddress, UnixAddress, parse_address
from sliplm.network.complaints import why
from sliplm.network.memory import accept, prepare_for
from sliplm.network.transport import Connection, closing_on_error, enlarge, handshake, keep_alive

_BACKLOG: Final = 64


class Listener(Closing):
    """Bound, listening sockets: one for each address of the name.

    Attributes:
        address: where it listens, with the port that was chosen.
        credentials: our keys, as they are now; None on a Unix socket.
    """

    def __init__(
        self,
        socks: Sequence[socket.socket],
        address: str,
        credentials: keys.Credentials | None,
        *,
        memory: bool = False,
    ) -> None:
        self.address = address
        self.credentials = credentials
        self._memory = memory
        self._socks = {sock.fileno(): sock for sock in socks}
        self._wake, self._waker = socket.socketpair()
        self._poll = select.poll()
        for awaited in (self._wake, *socks):
            self._poll.register(awaited, select.POLLIN)
        self._path = Path(socks[0].getsockname()) if socks[0].family == socket.AF_UNIX else None
        self._inode = self._path.stat().st_ino if self._path else 0

    def __repr__(self) -> str:
        return f"Listener({self.address})"

    def accept(self) -> socket.socket | None:
        """Wait for the next peer, without speaking to it; None after `stop`."""
        while True:
            ready = [handle for handle, _ in self._poll.poll()]
            if self._wake.fileno() in ready:
                return None
            try:
                return self._socks[ready[0]].accept()[0]
            except (BlockingIOError, ConnectionError):
                continue  # the peer left before we came
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise WorkerUnavailable(
                        f"cannot accept on {self.address}: {error}", self.address
                    ) from error
                time.sleep(0.1)  # out of descriptors: those in use go back some time

    def secure(self, sock: socket.socket, deadline: float) -> Connection:
        """Turn an accepted socket into a connection to a vault; TLS's handshake happens here.

        Raises CredentialError, WireError, WorkerTimeout, WorkerUnavailable; the socket is then closed.
        """
        if self.credentials is None:
            return accept(sock, self.address, deadline) if self._memory else Connection(sock, self.address)
        with closing_on_error(sock):
            context = self.credentials.context()
        with contextlib.suppress(OSError):
            keep_alive(sock)
        return handshake(sock, context, "vault", _name_of(sock), deadline)

    def stop(self) -> None:
        """From any thread or signal handler: make `accept` return None."""
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def close(self) -> None:
        """Stop listening, and remove the Unix socket if it is still ours."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
            self._path = None
        for sock in (*self._socks.values(), self._wake, self._waker):
            sock.close()


def listen(address: str, keys_dir: Path | None = None) -> Listener:
    """Listen at an address; port 0 takes a free port.

    Raises InputError (the address), CredentialError, WorkerUnavailable (in use, or not to be bound).
    """
    target = parse_address(address)
    prepare_for(target)
    try:
        if isinstance(target, UnixAddress):
            return _listen_unix(target)
        return _listen_tcp(target, keys_dir or target.keys)
    except OSError as error:
        raise WorkerUnavailable(
            f"cannot listen on {target}: {why(error)}; choose another address", str(target)
        ) from error


def _listen_tcp(target: TcpAddress, folder: Path | None) -> Listener:
    if folder is None:
        raise CredentialError("listening on TCP needs keys: make them with `slip keys init FOLDER`")
    credentials = keys.Credentials(folder, keys.serving_role(folder))
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with contextlib.ExitStack() as opened:
        socks: list[socket.socket] = []
        missing: OSError | None = None
        port = target.port
        for family, _, _, _, where in found:
            try:
                sock = _bound(family, (where[0], port, *where[2:]), alone=len(found) == 1)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # a machine without this family
                continue
            opened.enter_context(closing_on_error(sock))
            socks.append(sock)
            port = sock.getsockname()[1]  # the same for all, also where it was chosen
        if missing is not None and not socks:
            raise missing
        return Listener(socks, str(TcpAddress(target.host, port, None)), credentials)


def _bound(family: int, where: tuple[Any, ...], *, alone: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    with closing_on_error(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    return sock


def _listen_unix(target: UnixAddress) -> Listener:
    """Bind a Unix socket that only its owner may use; take the place of one that nobody answers."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with closing_on_error(sock):
        _remove_stale(target)
        mask = os.umask(0o177)
        try:
            sock.bind(str(target.path))
        finally:
            os.umask(mask)
        enlarge(sock)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return Listener([sock], str(target), None, memory=target.memory)


def _remove_stale(target: UnixAddress) -> None:
    if not target.path.exists():
        return
    if not stat.S_ISSOCK(target.path.stat().st_mode):
        raise WorkerUnavailable(f"{target.path} is a file, not a socket: choose another path", str(target))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(target.path))
        except ConnectionRefusedError:
            target.path.unlink()
            return
    raise WorkerUnavailable(f"a worker answers at {target} already: choose another path", str(target))


def _name_of(sock: socket.socket) -> str:
    try:
        where = sock.getpeername()
    except OSError:
        return "a peer that left"
    return str(TcpAddress(where[0], where[1], None))
