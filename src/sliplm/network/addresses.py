"""Addresses as text.

"127.0.0.1:7400?keys=/folder" (TCP is always TLS with client certificates, see `keys`) or
"unix:/path/to.sock" (no TLS: the socket file's permissions decide who may connect), or
"shm:/path/to.sock" (the same socket, and frames in memory that both processes share, see `memory`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from sliplm.errors import CredentialError, InputError

_UNIX_PATH: Final = 107  # bytes


class TcpAddress(NamedTuple):
    """A TCP address with the folder of the keys for it."""

    host: str
    port: int
    keys: Path | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def folder(self) -> Path:
        """The keys' folder.  Raises CredentialError where the address names none."""
        if self.keys is None:
            raise CredentialError(f"{self} is given without keys: write {self}?keys=FOLDER")
        return self.keys


class UnixAddress(NamedTuple):
    """The path of a Unix socket, and whether frames go through shared memory beside it."""

    path: Path
    memory: bool = False

    def __str__(self) -> str:
        return f"{'shm' if self.memory else 'unix'}:{self.path}"


def anchored(address: str) -> str:
    """The same address from wherever this process goes: relative paths are made absolute now.

    Raises InputError, and CredentialError where keys are missing: our mistake, and no peer's.
    """
    target = parse_address(address)
    if isinstance(target, UnixAddress):
        there = target._replace(path=target.path.absolute())
        return str(there) if fits(there.path) else address
    return f"{target}?keys={target.folder().absolute()}"


def parse_address(text: str) -> TcpAddress | UnixAddress:
    """An address from its text.  Raises InputError."""
    kind, _, path = text.partition(":")
    if kind in ("unix", "shm"):
        if not path or "\0" in path or not fits(path):
            raise InputError("the path of a Unix socket has 1 to 107 bytes")
        return UnixAddress(Path(path), kind == "shm")
    place, mark, folder = text.partition("?keys=")
    host, colon, port = place.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not (host and colon and digits and int(port) < 65536) or bool(mark) != bool(folder):
        raise InputError(f"{text!r} is not an address: write HOST:PORT?keys=FOLDER, unix:/path or shm:/path")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise InputError(f"{host!r} is no name of a host ({error}): write HOST:PORT?keys=FOLDER") from error
    if "\0" in text:
        raise InputError("an address holds no NUL")
    return TcpAddress(host, int(port), Path(folder) if folder else None)


def fits(path: Path | str) -> bool:
    """Whether a Unix socket can have this path."""
    return len(os.fsencode(path)) <= _UNIX_PATH
