"""The vault share at rest: nothing of it lies on a disk in clear.

`seal.json` in the vault folder holds the data key, wrapped under the owner's key (`keysource`), and a MAC of
the manifest under a key derived from it, so that every digest in the manifest is authenticated too:

    owner's key    32 bytes, or Argon2id(passphrase, salt, numbers in the header)
    wrapping key, check = HKDF-SHA256(owner's key, salt, "sliplm/1/seal"), 64 bytes
    wrapped        AES-256-GCM(wrapping key, nonce 0, data key; the header's other fields are authenticated)

The salt is fresh at every wrapping, so each wrapping key is used once.  `check` commits to the owner's key:
no seal opens under two passphrases, and a wrong key is told apart from altered bytes.

A sealed blob is a 32-byte random salt and then the plain bytes in chunks of 64 KiB, each with a tag of 16
bytes: AES-256-GCM under HKDF-SHA256(data key, salt, "sliplm/1/blob/" + label), nonce = chunk number (11
bytes, big endian) || 1 for the last chunk, else 0.  This is STREAM (Hoang, Reyhanitabar, Rogaway, Vizar 2015)
as C2SP's age v1 has it: chunks cannot be cut off, reordered or repeated, and the label keeps a blob in its
place.  Whatever is written again has a fresh salt, so no (key, nonce) serves twice.

The data key is in the vault's memory while it runs: Python cannot wipe it, and the system may swap it out.
"""

from __future__ import annotations

import hmac
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sliplm import durable
from sliplm.arithmetic.field import derive_key, new_key
from sliplm.errors import CredentialError, SealError, ShareError
from sliplm.filesystem import because
from sliplm.reading import read_bounded
from sliplm.shares.folders import wrong_folder
from sliplm.shares.keysource import Key, KeySpec, find

SEAL = "seal.json"
SALT_BYTES = 32
TAG_BYTES = 16
CHUNK_BYTES = 64 << 10
MAX_SEAL_BYTES = 16 << 10
PASSPHRASE_MEMORY_KIB = 256 << 10
PASSPHRASE_ITERATIONS, PASSPHRASE_LANES = 3, 4

_SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES
_CHUNKS_AT_ONCE = 16
_AGAIN = "copy the vault folder again, or split again"

Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Hex48 = Annotated[str, Field(pattern="^[0-9a-f]{96}$")]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Argon2Numbers(_Model):
    """What Argon2id takes (RFC 9106); the bounds hold before it takes any memory."""

    memory_kib: int = Field(ge=128, le=1 << 20)
    iterations: int = Field(ge=1, le=16)
    lanes: int = Field(ge=1, le=16)


class Seal(_Model):
    """`seal.json`.  `manifest` is the MAC of the manifest; null while a split is under way."""

    format: Literal["sliplm-seal"] = "sliplm-seal"
    version: Literal[1] = 1
    kind: Literal["key", "passphrase"]
    argon2id: Argon2Numbers | None
    salt: Hex32
    check: Hex32
    wrapped: Hex48
    manifest: Hex32 | None

    @model_validator(mode="after")
    def _numbers_of_a_passphrase(self) -> Self:
        if (self.kind == "passphrase") != (self.argon2id is not None):
            raise ValueError("argon2id belongs to kind passphrase, and to no other")
        return self

    def authenticated(self) -> bytes:
        """The fields that `wrapped` authenticates, in one spelling."""
        fields = self.model_dump(mode="json", exclude={"wrapped", "manifest"})
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


class _Readable(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


# --- the seal of a folder --------------------------------------------------------------------------------


def make_seal(folder: Path, key: KeySpec) -> bytes:
    """Write `seal.json` for a fresh data key into a vault folder that is being made; returns the data key.

    Raises:
        CredentialError: the key cannot be had.
        ShareError: the file cannot be written.
    """
    data_key = new_key()
    _write(folder, _wrap(data_key, find(key, new=True), None))
    return data_key


def open_seal(folder: Path, key: KeySpec, seal: Seal | None = None) -> bytes:
    """The data key of a vault folder, 32 bytes.

    Args:
        seal: what `read_seal` said, if it was read already.

    Raises:
        CredentialError: the key cannot be had.
        SealError: there is no seal, it is of another key, or it was altered.
    """
    seal = read_seal(folder) if seal is None else seal
    if key is None and seal.kind == "passphrase":
        raise SealError(f'{folder} is sealed with a passphrase: give the key "passphrase"')
    found = find(key)
    if found.kind != seal.kind:
        raise SealError(
            f"{folder} is sealed with a {seal.kind}, and a {found.kind} was given; give the other"
        )
    wrapping, check = _wrapping_keys(seal, found)
    if not hmac.compare_digest(check, bytes.fromhex(seal.check)):
        raise SealError(
            f"{folder} is sealed with another key than that from {found.source}; give the right one"
        )
    try:
        return AESGCM(wrapping).decrypt(bytes(12), bytes.fromhex(seal.wrapped), seal.authenticated())
    except InvalidTag:
        raise SealError(f"{folder / SEAL} was altered or damaged; {_AGAIN}") from None


def read_seal(folder: Path) -> Seal:
    """How a vault folder is sealed; no key is needed, and nothing is verified.

    Raises:
        SealError: there is no `seal.json`, or it is not valid.
    """
    path = folder / SEAL
    try:
        data = read_bounded(path, MAX_SEAL_BYTES)
    except OSError as error:
        wrong = wrong_folder(folder, "vault")
        raise SealError(wrong or f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    if len(data) > MAX_SEAL_BYTES:
        raise SealError(f"{path} is longer than {MAX_SEAL_BYTES} bytes: this is no seal; {_AGAIN}")
    try:
        return Seal.model_validate_json(data)
    except ValidationError as error:
        fields = sorted({".".join(map(str, item["loc"])) or "the whole" for item in error.errors()})
        raise SealError(f"{path} is not a valid seal ({', '.join(fields)}); {_AGAIN}") from error


def seal_manifest(folder: Path, data_key: bytes, manifest: bytes) -> None:
    """Add the MAC of the manifest's bytes to the seal: the last step of a split.

    Raises:
        SealError, ShareError: as `read_seal`; the file cannot be written.
    """
    seal = read_seal(folder)
    _write(folder, seal.model_copy(update={"manifest": _manifest_mac(data_key, manifest).hex()}))


def check_manifest(folder: Path, seal: Seal, data_key: bytes, manifest: bytes) -> None:
    """Check the MAC of the manifest's bytes.

    Raises:
        SealError: they are not what was sealed.
    """
    if seal.manifest is None:
        raise SealError(f"{folder} was not finished: run the same split again")
    if not hmac.compare_digest(bytes.fromhex(seal.manifest), _manifest_mac(data_key, manifest)):
        raise SealError(f"{folder / 'manifest.json'} is not the one that was sealed with {SEAL}; {_AGAIN}")


def reseal(vault_dir: Path | str, key: KeySpec, new_key: KeySpec) -> Key:
    """Wrap the data key of a vault folder under another key, in one step that a crash cannot halve.

    The data key stays: whoever has the old key *and* a copy of the old `seal.json` can still open this vault.
    Against that, split again.

    Returns: the new key.

    Raises:
        CredentialError: one of the keys cannot be had.
        SealError: `key` is not the one that sealed it.
        ShareError: the file cannot be written; the old seal is whole.
    """
    folder = Path(vault_dir)
    data_key = open_seal(folder, key)
    found = find(new_key, new=True)
    with durable.locked_folder(folder):  # the manifest's MAC may be changed meanwhile
        _write(folder, _wrap(data_key, found, read_seal(folder).manifest))
    return found


def _wrap(data_key: bytes, key: Key, manifest: str | None) -> Seal:
    numbers = default_numbers() if key.kind == "passphrase" else None
    blank = Seal(
        kind=key.kind, argon2id=numbers, salt=new_key().hex(), check="0" * 64, wrapped="0" * 96,
        manifest=manifest,
    )  # fmt: skip
    wrapping, check = _wrapping_keys(blank, key)
    seal = blank.model_copy(update={"check": check.hex()})
    wrapped = AESGCM(wrapping).encrypt(bytes(12), data_key, seal.authenticated())
    return seal.model_copy(update={"wrapped": wrapped.hex()})


def default_numbers() -> Argon2Numbers:
    """What this release takes for a new passphrase."""
    return Argon2Numbers(
        memory_kib=PASSPHRASE_MEMORY_KIB, iterations=PASSPHRASE_ITERATIONS, lanes=PASSPHRASE_LANES
    )


def _wrapping_keys(seal: Seal, key: Key) -> tuple[bytes, bytes]:
    """The key that wraps the data key, and the value that commits to the owner's key."""
    salt = bytes.fromhex(seal.salt)
    secret = key.secret if seal.argon2id is None else stretch(key.secret, salt, seal.argon2id)
    both = HKDF(algorithm=SHA256(), length=64, salt=salt, info=b"sliplm/1/seal").derive(secret)
    return both[:32], both[32:]


def stretch(passphrase: bytes, salt: bytes, numbers: Argon2Numbers) -> bytes:
    """A key of 32 bytes from a passphrase: Argon2id.

    Raises:
        CredentialError: this machine cannot, for want of memory or of the algorithm.
    """
    try:
        return Argon2id(
            salt=salt, length=32, iterations=numbers.iterations, lanes=numbers.lanes,
            memory_cost=numbers.memory_kib,
        ).derive(passphrase)  # fmt: skip
    except UnsupportedAlgorithm as error:
        raise CredentialError("this build of cryptography has no Argon2id: use a key instead") from error
    except MemoryError as error:
        raise CredentialError(f"a passphrase takes {numbers.memory_kib} KiB of memory: make room") from error


def _manifest_mac(data_key: bytes, manifest: bytes) -> bytes:
    return hmac.digest(derive_key(data_key, "manifest"), manifest, "sha256")


def _write(folder: Path, seal: Seal) -> None:
    path = folder / SEAL
    try:
        durable.replace(path, seal.model_dump_json(indent=1).encode(), lasting=False)
    except OSError as error:
        raise ShareError(
            f"{path}: cannot be written {because(error, path, 'make room or check the folder')}"
        ) from error


# --- sealed blobs ----------------------------------------------------------------------------------------


def sealed_bytes(plain: int) -> int:
    """Bytes of a sealed blob of `plain` bytes; at least one chunk, which may be empty."""
    return SALT_BYTES + plain + TAG_BYTES * max(1, -(-plain // CHUNK_BYTES))


def seal_blob(data_key: bytes, label: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Seal bytes that come in pieces of any length; yields the sealed blob piece by piece.

    Memory: one piece and a chunk.
    """
    salt = new_key()
    yield salt
    cipher = AESGCM(_blob_key(data_key, salt, label))
    number, waiting = 0, bytearray()
    for piece in pieces:
        view = memoryview(piece)
        while view:
            if len(waiting) == CHUNK_BYTES:  # more follows, so this chunk is not the last
                yield cipher.encrypt(_nonce(number, last=False), waiting, None)
                number, waiting = number + 1, bytearray()
            taken = CHUNK_BYTES - len(waiting)
            waiting += view[:taken]
            view = view[taken:]
    yield cipher.encrypt(_nonce(number, last=True), waiting, None)


def open_blob(data_key: bytes, label: str, source: _Readable, sealed: int, out: memoryview) -> None:
    """Read a sealed blob of `sealed` bytes from a file's position on, and put its plain bytes into `out`.

    Nothing of a chunk reaches `out` before its tag was checked.

    Raises:
        SealError: the length is not that of len(out) plain bytes, the file ends, or the bytes were altered
            or are those of another place or vault.
        OSError: the file cannot be read.
    """
    view = out.cast("B") if out.nbytes else memoryview(bytearray())  # an empty one cannot be cast
    if sealed != sealed_bytes(len(view)):
        raise SealError(f"{label}: {sealed} bytes are not {len(view)} sealed ones; {_AGAIN}")
    cipher = AESGCM(_blob_key(data_key, bytes(_read(source, bytearray(SALT_BYTES), label)), label))
    left, number, done = sealed - SALT_BYTES, 0, 0
    buffer = bytearray(min(left, _CHUNKS_AT_ONCE * _SEALED_CHUNK))
    while left:
        part = _read(source, memoryview(buffer)[: min(left, len(buffer))], label)
        left -= len(part)
        for first in range(0, len(part), _SEALED_CHUNK):
            chunk = part[first : first + _SEALED_CHUNK]
            last = not left and first + len(chunk) == len(part)
            try:
                plain = cipher.decrypt(_nonce(number, last=last), chunk, None)
            except InvalidTag:
                raise SealError(f"{label} was altered, or sealed for another place; {_AGAIN}") from None
            view[done : done + len(plain)] = plain
            number, done = number + 1, done + len(plain)


def open_bytes(data_key: bytes, label: str, sealed: bytes) -> bytes:
    """The plain bytes of a small sealed blob.

    Raises:
        SealError: it was altered or cut off, or is that of another place or key.
    """
    chunks = -(-max(0, len(sealed) - SALT_BYTES) // _SEALED_CHUNK)
    out = bytearray(max(0, len(sealed) - SALT_BYTES - TAG_BYTES * chunks))
    open_blob(data_key, label, io.BytesIO(sealed), len(sealed), memoryview(out))
    return bytes(out)


def _read(source: _Readable, buffer: bytearray | memoryview, label: str) -> memoryview:
    """Fill the buffer from the file."""
    view, done = memoryview(buffer), 0
    while done < len(view):
        got = source.readinto(view[done:])
        if not got:
            raise SealError(f"{label} is cut off; {_AGAIN}")
        done += got
    return view


def _blob_key(data_key: bytes, salt: bytes, label: str) -> bytes:
    info = b"sliplm/1/blob/" + label.encode()
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(data_key)


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
