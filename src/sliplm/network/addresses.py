"""Addresses as text.

"127.0.0.1:7400?keys=/folder" (TCP is always TLS with client certificates, see `keys`) or
"unix:/path/to.sock" (no TLS: the socket file's permissions decide who may connect).
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
    """The path of a Unix socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


def anchored(address: str) -> str:
    """The same address from wherever this process goes: relative paths are made absolute now.

    Raises InputError, and CredentialError where keys are missing: our mistake, and no peer's.
    """
    target = parse_address(address)
    if isinstance(target, UnixAddress):
        path = target.path.absolute()
        return f"unix:{path}" if len(os.fsencode(path)) <= _UNIX_PATH else address
    return f"{target}?keys={target.folder().absolute()}"


def parse_address(text: str) -> TcpAddress | UnixAddress:
    """An address from its text.  Raises InputError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path or len(os.fsencode(path)) > _UNIX_PATH:
            raise InputError("the path of a Unix socket has 1 to 107 bytes")
        return UnixAddress(Path(path))
    place, mark, folder = text.partition("?keys=")
    host, colon, port = place.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not (host and colon and digits and int(port) < 65536) or bool(mark) != bool(folder):
        raise InputError(f"{text!r} is not an address: write HOST:PORT?keys=FOLDER or unix:/path")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise InputError(f"{host!r} is no name of a host ({error}): write HOST:PORT?keys=FOLDER") from error
    if "\0" in text:
        raise InputError("an address holds no NUL")
    return TcpAddress(host, int(port), Path(folder) if folder else None)
