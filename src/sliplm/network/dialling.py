"""The vault's end of a connection: to a worker or dealer at an address."""

from __future__ import annotations

import contextlib
import socket
import time

from sliplm.errors import CredentialError, PassingCredentialError
from sliplm.network import keys
from sliplm.network.addresses import TcpAddress, UnixAddress, parse_address
from sliplm.network.complaints import translate
from sliplm.network.memory import offer, prepare_for
from sliplm.network.transport import (
    Connection,
    closing_on_error,
    enlarge,
    handshake,
    keep_alive,
    remaining,
)


def connect(address: str, timeout: float, role: keys.Serving = "worker") -> Connection:
    """Connect to a party of this role within `timeout` seconds.

    Raises InputError (the address), CredentialError (our keys, or the peer's), WorkerUnavailable,
    WorkerTimeout, WireError (whoever answers does not speak TLS 1.3).  A worker that refuses *our*
    certificate says so only when we first read from it (TLS 1.3): CredentialError comes from there.
    """
    target = parse_address(address)
    prepare_for(target)
    deadline = time.monotonic() + timeout
    if isinstance(target, UnixAddress):
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with closing_on_error(sock):
                enlarge(sock)
                sock.settimeout(remaining(deadline))
                sock.connect(str(target.path))
        except OSError as error:
            raise translate(error, str(target)) from error
        connection = offer(sock, str(target), deadline) if target.memory else Connection(sock, str(target))
        with contextlib.suppress(OSError):  # unlinked meanwhile: then nobody else can connect to it
            found = target.path.stat()
            connection.place = found.st_dev, found.st_ino
        return connection
    folder = target.folder()
    try:
        context = keys.context(folder, "vault")
    except CredentialError as error:
        raise PassingCredentialError(str(error)) from error
    return handshake(_dial(target, deadline), context, role, str(target), deadline)


def _dial(target: TcpAddress, deadline: float) -> socket.socket:
    """A TCP connection to the first of the host's addresses that answers, each with its part of the time."""
    failure: Exception = OSError("the name has no address")
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise translate(error, str(target)) from error
    for tried, (family, kind, number, _, where) in enumerate(found):
        try:
            sock = socket.socket(family, kind, number)
            with closing_on_error(sock):
                sock.settimeout(remaining(deadline) / (len(found) - tried))
                sock.connect(where)
                keep_alive(sock)
        except OSError as error:
            failure = error
        else:
            return sock
    raise translate(failure, str(target)) from failure
