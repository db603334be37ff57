"""Whose a ledger's entries are: the secret of an owner, and the salt for those who have a passphrase.

    LEDGER/passphrase.json          salt and numbers of Argon2id, for all owners who seal with a passphrase
    LEDGER/OWNER/passphrase.json    a copy, in the folder of each such owner

What comes out of Argon2id, which hashes its numbers along, names the owner's folder and makes its keys.  So a
file that was changed or lost would make another owner of the same passphrase, who has split nothing yet: the
copies tell, before any work is done.  The numbers are those of a release and no others: less work would make
guesses cheap, and more would take memory on somebody else's word.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sliplm import durable, places
from sliplm.arithmetic.field import new_key
from sliplm.errors import LedgerError
from sliplm.filesystem import because
from sliplm.reading import read_bounded
from sliplm.shares.keysource import Key
from sliplm.shares.manifest import Hex
from sliplm.shares.sealing import Argon2Numbers, default_numbers, stretch

FILE: Final = "passphrase.json"
MAX_FILE_BYTES: Final = 4096


class _Salt(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["sliplm-ledger-passphrase"] = "sliplm-ledger-passphrase"
    version: Literal[1] = 1
    argon2id: Argon2Numbers
    salt: Hex


def owner_secret(owner: Key, ledger: Path) -> bytes:
    """32 bytes that stand for an owner; of a passphrase, stretched with the ledger's salt, made if need be.

    Raises:
        LedgerError: the salt cannot be read or made, or is not what the folders there were named with.
        CredentialError: a passphrase cannot be stretched here.
    """
    if owner.kind == "key":
        return owner.secret
    path = ledger / FILE
    try:
        data = bounded(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        _check_copies(ledger, None)
        data = _new(path)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror}); correct its permissions") from error
    try:
        found = _Salt.model_validate_json(data)
    except ValidationError as error:
        raise LedgerError(
            f"{path} is damaged: restore it from a backup or from a copy in a folder beside it; or remove "
            "both, and what was sealed with a passphrase is forgotten"
        ) from error
    if found.argon2id != default_numbers():
        raise LedgerError(
            f"{path} asks for other work than a passphrase needs ({found.argon2id.model_dump()}): somebody "
            "changed it; restore it from a backup or from a copy in a folder beside it"
        )
    _check_copies(ledger, found)
    return stretch(owner.secret, bytes.fromhex(found.salt), found.argon2id)


@contextlib.contextmanager
def writing(ledger: Path, own: Path | None, owner: Key) -> Iterator[None]:
    """Keep other writers out of a ledger; the owner's folder is there inside, if he has one, with the copy.

    Raises:
        LedgerError: it cannot be written.
    """
    try:
        durable.make_folder(own or ledger)
        guard = durable.lock(ledger / "lock", wait=True)
        try:
            if own is not None and owner.kind != "key" and not (own / FILE).exists():
                durable.replace(own / FILE, bounded(ledger / FILE, MAX_FILE_BYTES))
            yield
        finally:
            os.close(guard)
    except OSError as error:
        raise LedgerError(
            f"no share goes out without an entry, and the ledger {ledger} cannot be written "
            f"{because(error, ledger, 'make room there')}, or name another folder in {places.LEDGER}; then "
            "run the same command again: finished work is kept"
        ) from error


def bounded(path: Path, limit: int) -> bytes:
    """All bytes of a file.  Raises: OSError; it is longer."""
    data = read_bounded(path, limit)
    if len(data) > limit:
        raise OSError(None, f"longer than {limit} bytes")
    return data


def _new(path: Path) -> bytes:
    with writing(path.parent, None, Key("key", b"", "")):
        if not path.exists():  # another process may have been faster
            salt = _Salt(argon2id=default_numbers(), salt=new_key().hex())
            durable.replace(path, salt.model_dump_json(indent=1).encode())
        return bounded(path, MAX_FILE_BYTES)


def _check_copies(ledger: Path, found: _Salt | None) -> None:
    """Raise LedgerError if a folder there was named with another salt; one that is damaged tells nothing."""
    for copy in sorted(ledger.glob(f"{'[0-9a-f]' * 32}/{FILE}")):
        with contextlib.suppress(OSError, ValidationError):
            if _Salt.model_validate_json(bounded(copy, MAX_FILE_BYTES)) != found:
                path = ledger / FILE
                raise LedgerError(
                    f"{path} is {'missing' if found is None else 'not the one'} that the folders there were "
                    f"named with, so their splits would be forgotten: cp {shlex.quote(str(copy))} "
                    f"{shlex.quote(str(path))}; or, to forget them, remove the folder {copy.parent}"
                )
