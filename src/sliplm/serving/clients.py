"""Who may ask: the clients' keys, as hashes, and what each of them may have.

`FOLDER/clients.json` holds no key.  A key is 256 random bits, which nobody guesses, so one SHA-256 hides it
as well as a slow hash would.  A server looks for a new file several times a second: a client that is taken
back gets nothing from then on, also of an answer that it was just getting.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sliplm import durable
from sliplm.errors import CredentialError, InputError
from sliplm.filesystem import because
from sliplm.network.trust import check_unwritable
from sliplm.reading import read_bounded

FILE: Final = "clients.json"
AUDIT: Final = "audit.jsonl"
PREFIX: Final = "slip-"

_MOST_BYTES: Final = 16 << 20
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

logger = logging.getLogger(__name__)

Positive = Annotated[int, Field(ge=1)]


class Client(BaseModel):
    """One client and its policy.

    Attributes:
        name: for people, logs and figures.
        sha256: of its key, in hexadecimal.
        created, revoked: UTC, ISO 8601.
        minute, day: tokens of prompts and answers that it may have in a minute, in a day (UTC); None: any.
        budget: tokens that it may have in all, ever.
        logprobs: how many of the likeliest tokens it may see with each; None: no probabilities at all.
        echo: whether it may have the probabilities of its own text.
        watch: whether it may read the server's figures.
        ask: whether it may ask the model.
        console: whether it may open the console.
        activations: whether it sees true activations there, of everybody's requests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]
    created: str
    revoked: str | None = None
    minute: Positive | None = None
    day: Positive | None = None
    budget: Positive | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    watch: bool = False
    ask: bool = True
    console: bool = False
    activations: bool = False

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.activations and not self.console:
            raise PydanticCustomError("policy", "activations are shown on the console only: allow that too")
        return self


ANYBODY: Final = Client(name="anybody", sha256="0" * 64, created="", watch=True)
"""Whoever reaches a server without keys, which listens on its own machine only."""


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)] = 1
    clients: list[Client] = []


class Clients:
    """The clients of a folder, as they are now.

    Raises: CredentialError for a file that is missing, damaged, or that others can write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._state: tuple[int, ...] | None = None
        self._clients: tuple[Client, ...] = ()
        self._state, self._clients = self._stat(), tuple(_read(self._path).clients)

    def __repr__(self) -> str:
        return f"Clients({len(self._clients)})"

    def find(self, key: str) -> Client | None:
        """Whose key it is, unless it was taken back.  How long it takes tells nothing of any key."""
        digest, found = _digest(key), None
        for client in self._clients:
            if hmac.compare_digest(client.sha256, digest):
                found = client
        return None if found is None or found.revoked else found

    def stands(self, client: Client) -> bool:
        """Whether this client may still have answers."""
        return any(each.sha256 == client.sha256 and not each.revoked for each in self._clients)

    def refresh(self) -> None:
        """Read the file again if it is another one.  Where it cannot be read nobody is a client."""
        state = self._stat()
        if state == self._state and state is not None:
            return
        self._state = state
        try:
            self._clients = tuple(_read(self._path).clients)
        except CredentialError as error:
            if self._clients:
                logger.error("nobody is served: %s", error)  # noqa: TRY400
            self._clients = ()

    def _stat(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def add(folder: Path, name: str, **policy: object) -> str:
    """Make a client; its key, which is nowhere else.

    Args:
        policy: fields of `Client`.

    Raises: InputError for a name that is no name or taken, or a policy that makes no sense.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"a client's name is 1 to 63 of a-z, 0-9, '.', '_' and '-', not {name!r}")
    key = PREFIX + secrets.token_urlsafe(32)
    with _changing(folder) as stored:
        if any(client.name == name and not client.revoked for client in stored.clients):
            raise InputError(f"there is a client {name} already: revoke it first, or take another name")
        try:
            made = {"name": name, "sha256": _digest(key), "created": _now(), **policy}
            stored.clients.append(Client.model_validate(made))
        except ValidationError as error:
            raise InputError(f"no such policy: {error.errors(include_input=False)[0]['msg']}") from error
    return key


def revoke(folder: Path, name: str) -> Client:
    """Take a client's key back.  Raises: InputError for one that is not there."""
    with _changing(folder) as stored:
        for i, client in enumerate(stored.clients):
            if client.name == name and not client.revoked:
                stored.clients[i] = client.model_copy(update={"revoked": _now()})
                return stored.clients[i]
        raise InputError(f"there is no client {name} with a key: see `slip clients list`")


def listed(folder: Path) -> list[Client]:
    """All clients that ever were.  Raises: CredentialError."""
    return _read(folder / FILE).clients


@contextmanager
def _changing(folder: Path) -> Iterator[_Stored]:
    try:
        durable.make_folder(folder)
        with durable.locked_folder(folder):
            path = folder / FILE
            stored = _read(path) if path.exists() else _Stored()
            yield stored
            durable.replace(path, stored.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        why = because(error, folder, "name another folder")
        raise InputError(f"the clients in {folder} cannot be changed {why}") from error


def _read(path: Path) -> _Stored:
    if path.exists():
        check_unwritable(path)
    try:
        return _Stored.model_validate_json(read_bounded(path, _MOST_BYTES))
    except OSError as error:
        raise CredentialError(
            f"{path} cannot be read ({error.strerror}): make a client, `slip clients add {path.parent} NAME`"
        ) from error
    except ValueError as error:  # pydantic's too
        raise CredentialError(f"{path} is damaged: restore it") from error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
