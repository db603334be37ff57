"""Where the key that seals a vault share comes from.

    None                    the user's key file (`places.key_file`); the first split makes it
    bytes                   the 32 bytes of the key
    "file:PATH"             a file of 64 hexadecimal digits, as `openssl rand -hex 32` prints them
    "env:NAME"              the same in the environment
    "command:CMD ARGS"      the same from a command's output (a key service, a password manager); no shell
    "passphrase"            asked for on the terminal; the key is made from it by Argon2id (`sealing`)
    "passphrase:env:NAME", "passphrase:file:PATH"

Python cannot wipe memory: copies of a key or passphrase stay in the process until their memory is used again.
Nothing here writes them anywhere but into the key file.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import select
import shlex
import stat
import subprocess
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sliplm import durable, places
from sliplm.errors import CredentialError, PlaceError
from sliplm.filesystem import because, chmod_advice
from sliplm.reading import is_private

KEY_BYTES = 32
COMMAND_SECONDS = 60.0
MAX_SECRET_BYTES = 4096  # of a key file, a command's output, a passphrase

_HOW = (
    'give "file:PATH", "env:NAME", "command:CMD", "passphrase", "passphrase:env:NAME", '
    '"passphrase:file:PATH", or the 32 bytes themselves'
)
_HEX = re.compile(rb"[0-9a-fA-F]{64}")


@dataclass(frozen=True, repr=False, eq=False)
class Key:
    """A key of 32 bytes, or a passphrase that one is made from.

    Attributes:
        kind: which of the two.
        secret: the key, or the passphrase in UTF-8.
        source: where it comes from, for messages.
        made: the key file was made just now, and no copy of it exists.
    """

    kind: Literal["key", "passphrase"]
    secret: bytes
    source: str
    made: bool = False

    def __repr__(self) -> str:
        return f"Key({self.kind} from {self.source}, hidden)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # transformers copies configurations; the secret need not multiply

    def __reduce__(self) -> str:
        raise CredentialError(
            "a key is not written to disk or sent to another process; name its source there"
        )


KeySpec = str | bytes | Key | None


def checked(key: KeySpec) -> str | Key | None:
    """The same with its form checked and raw bytes hidden in a `Key`; nothing is read or asked for yet.

    Raises:
        CredentialError: it is of no form that is listed above.
    """
    if key is None or isinstance(key, Key):
        return key
    if isinstance(key, bytes):
        if len(key) != KEY_BYTES:
            raise CredentialError(f"a sealing key has {KEY_BYTES} bytes, not {len(key)}; {_HOW}")
        return Key("key", key, "32 bytes given")
    if isinstance(key, str):
        kind, _, rest = key.partition(":")
        if kind == "passphrase" and rest:
            kind, _, rest = rest.partition(":")
            if kind in ("env", "file") and rest:
                return key
        elif key == "passphrase" or (kind in ("file", "env", "command") and rest.strip()):
            return key
    raise CredentialError(
        f"the sealing key is given in a form that is not known (and not shown here); {_HOW}"
    )


def find(key: KeySpec, *, new: bool = False, limit: float = COMMAND_SECONDS) -> Key:
    """Get the key or passphrase from where it is kept.

    Args:
        new: it will seal something new: a missing default key file is made, a passphrase is asked for twice.
        limit: seconds that a command may take.

    Raises:
        CredentialError: it is missing, malformed, readable by others, or its command fails.
        PlaceError: without a home folder there is no default key file.
    """
    key = checked(key)
    if isinstance(key, Key):
        return key
    if key is None:
        return _default(new)
    kind, _, rest = key.partition(":")
    if kind == "passphrase":
        return _passphrase(rest, new)
    if kind == "file":
        path = places.expanded(rest)
        return Key("key", _hex(_read_private(path), str(path)), str(path))
    if kind == "env":
        return Key("key", _hex(_environment(rest), f"${rest}"), f"${rest}")
    return _from_command(rest, limit)


def described(key: KeySpec) -> str:
    """Where a key comes from, in words for a person: no secret, and no arguments of a command.

    Raises:
        CredentialError: it is of no form that is listed above.
    """
    key = checked(key)
    if key is None:
        return f"the key from {default_path()}"
    if isinstance(key, Key):
        return f"the {key.kind} from {key.source}"
    kind, _, rest = key.partition(":")
    if kind == "passphrase":
        return f"the passphrase from {rest or 'the terminal'}"
    return f"the key from {_program(rest) if kind == 'command' else key}"


def new_key_file() -> str:
    """What its owner is told of a key file that was made just now, and that an earlier one may be lost."""
    told = f"{default_path()} was made just now. Keep a copy of it: without it the vault share is lost."
    with contextlib.suppress(PlaceError):
        earlier = places.ledger()
        if any(earlier.glob("*/*.entry")):
            told += (
                f" {earlier} has splits under another key. If that one was in this file, put it back: the "
                "vaults that it sealed do not open with the new one, and their models can be split again "
                "unnoticed."
            )
    return told


def default_path() -> Path:
    """The user's own key file; it may not exist yet.  Raises: PlaceError."""
    return places.key_file()


# --- files and the environment -------------------------------------------------------------------------


def _default(new: bool) -> Key:
    path = default_path()
    made = False
    if not os.path.lexists(path):
        if not new:
            raise CredentialError(
                f"there is no key file {path}: put the one that sealed this vault there, or {_HOW}"
            )
        made = _make(path)
    return Key("key", _hex(_read_private(path), str(path)), str(path), made)


def _make(path: Path) -> bool:
    """Write a fresh key; False if another process was faster.  The file appears whole, and only once."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        durable.make_folder(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(unfinished, flags, 0o600), "wb") as file:
                file.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
                file.flush()
                durable.sync(file.fileno())
            try:
                os.link(unfinished, path)  # unlike a rename, it replaces nothing
            except FileExistsError:
                raise
            except OSError:  # no links there: whoever reads it meanwhile may find half of it, and says so
                with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                    file.write(unfinished.read_bytes())
                    file.flush()
                    durable.sync(file.fileno())
            durable.sync_folder(path.parent, lasting=False)
        finally:
            unfinished.unlink(missing_ok=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise CredentialError(
            f"the key file {path} cannot be made {because(error, path, 'check the rights of its folder')}, "
            f"or name another file in {places.KEY_FILE}, or {_HOW}"
        ) from error
    return True


def _read_private(path: Path) -> bytes:
    """A small regular file that nobody but its owner, us, can read or write."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
        try:
            _check_private(path, os.fstat(descriptor))
            data = os.read(descriptor, MAX_SECRET_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CredentialError(f"{path} cannot be read ({error.strerror}); {_HOW}") from error
    return _bounded(data, str(path))


def _check_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CredentialError(f"{path} is no regular file; {_HOW}")
    if status.st_uid not in (0, os.geteuid()):
        raise CredentialError(f"{path} belongs to another user; make a copy of your own, with mode 0600")
    if not is_private(path, status):
        raise CredentialError(f"{path} is open to group or others: {chmod_advice(path, '600')}")


def _environment(name: str) -> bytes:
    value = os.environb.get(os.fsencode(name))
    if value is None:
        raise CredentialError(f"the environment has no {name}: set it, or {_HOW}")
    return _bounded(value, f"${name}")


def _bounded(data: bytes, source: str) -> bytes:
    if len(data) > MAX_SECRET_BYTES:
        raise CredentialError(f"{source} holds more than {MAX_SECRET_BYTES} bytes: this is no key")
    return data


def _hex(text: bytes, source: str) -> bytes:
    text = text.strip()
    if not _HEX.fullmatch(text):
        raise CredentialError(
            f"{source} does not hold 64 hexadecimal digits, as `openssl rand -hex 32` prints them"
        )
    return bytes.fromhex(text.decode())


# --- passphrases -----------------------------------------------------------------------------------------


def _passphrase(where: str, new: bool) -> Key:
    kind, _, rest = where.partition(":")
    if kind == "env":
        return _as_passphrase(_environment(rest), f"${rest}")
    if kind == "file":
        path = places.expanded(rest)
        return _as_passphrase(_read_private(path).rstrip(b"\r\n"), str(path))
    return _as_passphrase(_ask(new), "the terminal")


def _as_passphrase(text: bytes, source: str) -> Key:
    try:
        normal = unicodedata.normalize("NFC", text.decode()).encode()  # keyboards differ in how they compose
    except UnicodeDecodeError:
        raise CredentialError(f"the passphrase from {source} is not UTF-8; give another one") from None
    if not normal:
        raise CredentialError(f"the passphrase from {source} is empty; give another one")
    return Key("passphrase", _bounded(normal, source), source)


def _ask(twice: bool) -> bytes:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        raise CredentialError(
            "a passphrase is needed and there is no terminal to ask on; give passphrase:file:PATH or "
            "passphrase:env:NAME"
        ) from error
    try:
        first = getpass.getpass("Passphrase of the vault share: ")
        if twice and getpass.getpass("The same again: ") != first:
            raise CredentialError("the two passphrases differ; run the command again")
        return first.encode()
    except UnicodeError as error:
        raise CredentialError(
            "what was typed is no text in the encoding of this terminal: set LC_ALL=C.UTF-8, or give "
            "passphrase:file:PATH"
        ) from error
    except (EOFError, OSError) as error:
        raise CredentialError("no passphrase was given; run the command again") from error


# --- commands --------------------------------------------------------------------------------------------


def _program(command: str) -> str:
    return f"the command {_words(command)[0]}"


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise CredentialError("the key command has an open quote; correct it") from error
    if not words:
        raise CredentialError(f"the key command is empty; {_HOW}")
    return words


def _from_command(command: str, limit: float) -> Key:
    source = _program(command)
    try:
        process = subprocess.Popen(
            _words(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        )
    except (OSError, ValueError) as error:
        raise CredentialError(f"{source} cannot be started; check its path") from error
    try:
        text = _output(process, source, time.monotonic() + limit)
    finally:
        process.kill()  # of one that has ended: nothing
        process.wait()
    return Key("key", _hex(text, f"the output of {source}"), source)


def _output(process: subprocess.Popen[bytes], source: str, deadline: float) -> bytes:
    """All that the process writes until it ends well; bounded in bytes and in time."""
    text = b""
    with process.stdout as stream:  # type: ignore[union-attr]  # PIPE was asked for
        while select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = stream.read(MAX_SECRET_BYTES + 1 - len(text))
            text = _bounded(text + part, f"the output of {source}")
            if not part:
                break
        else:
            raise CredentialError(f"{source} gave no key within the time limit; see why it waits")
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise CredentialError(f"{source} did not end within the time limit; see why it waits") from error
    if status:
        raise CredentialError(f"{source} failed with status {status}; see what it says on stderr")
    return text
