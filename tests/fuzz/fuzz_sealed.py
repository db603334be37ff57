"""Fuzz target: seal.json, sealed files and single blobs of a vault; only what was sealed ever opens."""

from __future__ import annotations

import contextlib
import io

from folders import KEY, scratch, vault_folder
from sliplm.errors import SlipError
from sliplm.shares.contents import secret_specs
from sliplm.shares.sealing import SEAL, open_blob, open_seal, seal_blob, sealed_bytes
from sliplm.shares.share import MODEL, SHARE, open_tensors, open_vault, read_vault_manifest

MAX_LEN = 8192

_VAULT = vault_folder(scratch() / "vault")
_FILES = (SEAL, SHARE, MODEL)
_HONEST = {name: (_VAULT / name).read_bytes() for name in _FILES}
_DATA_KEY = open_seal(_VAULT, KEY)
_MANIFEST = read_vault_manifest(_VAULT)
_SPECS = {
    SHARE: {spec.name: spec for group in _MANIFEST.groups for spec in secret_specs(group)},
    MODEL: {tensor.name: tensor.spec for tensor in _MANIFEST.kept_tensors},
}
_BLOB = b"".join(seal_blob(_DATA_KEY, "blob", [bytes(100)]))


def _opened(name: str) -> dict[str, bytes]:
    places = {spec.name: bytearray(spec.nbytes) for spec in _SPECS[name].values()}
    open_tensors(
        _VAULT / name, _DATA_KEY, _SPECS[name], {key: memoryview(place) for key, place in places.items()}
    )
    return {key: bytes(place) for key, place in places.items()}


_PLAIN = {name: _opened(name) for name in _SPECS}


def target(data: bytes) -> None:
    """The first byte says what the rest is: the seal, a file, or a blob."""
    choice, data = data[:1], data[1:]
    if choice == b"b":
        with contextlib.suppress(SlipError):
            out = bytearray(100)
            open_blob(_DATA_KEY, "blob", io.BytesIO(data), len(data), memoryview(out))
            assert data == _BLOB and len(data) == sealed_bytes(100)
        return
    name = _FILES[choice[0] % 3 if choice else 0]
    (_VAULT / name).write_bytes(data)
    try:
        with contextlib.suppress(SlipError):
            open_vault(_VAULT, KEY)
            assert name == SEAL or data == _HONEST[name], "altered bytes were opened"
        if name != SEAL:
            with contextlib.suppress(SlipError):  # as if the digest were right: the tags have to say it
                assert _opened(name) == _PLAIN[name]
    finally:
        (_VAULT / name).write_bytes(_HONEST[name])


def seeds() -> list[bytes]:
    """The honest files, and numbers for Argon2id that would take all memory."""
    seal = _HONEST[SEAL].replace(b'"kind": "key"', b'"kind": "passphrase"')
    huge = seal.replace(
        b'"argon2id": null', b'"argon2id": {"memory_kib": 4294967295, "iterations": 1, "lanes": 1}'
    )
    return [bytes([number]) + _HONEST[name] for number, name in enumerate(_FILES)] + [
        b"b" + _BLOB, b"b" + _BLOB[:-1], b"b", b"\0" + seal, b"\0" + huge, b"\0{}",
    ]  # fmt: skip
