"""Fuzz target: a party's key folder with one file replaced, and evidence from a peer."""

from __future__ import annotations

import contextlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from folders import scratch
from sliplm.errors import AttestationError, SlipError
from sliplm.network import authority, keys
from sliplm.network.attestation import BINDING_BYTES, SoftwareAttester, SoftwareVerifier

MAX_LEN = 4096

_FOLDER = scratch() / "keys"
authority.init(_FOLDER)
_WORKER = _FOLDER / "worker"
_NAMES = (keys.CERTIFICATE, keys.KEY, keys.AUTHORITY, keys.REVOKED)
_FILES = {name: (_WORKER / name).read_bytes() for name in _NAMES}
_SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
_VERIFIER = SoftwareVerifier(_SIGNER.public_key(), [b"good"])
_BINDING = bytes(BINDING_BYTES)
_EVIDENCE = SoftwareAttester(_SIGNER, b"good").evidence(_BINDING)


def target(data: bytes) -> None:
    """The first byte says what the rest is."""
    choice, content = data[0] % 5 if data else 0, data[1:]
    if choice == 4:
        with contextlib.suppress(AttestationError):
            _VERIFIER.verify(content, _BINDING)
            assert content == _EVIDENCE, "evidence that the key did not make was believed"
        return
    name = _NAMES[choice]
    (_WORKER / name).write_bytes(content)
    try:
        with contextlib.suppress(SlipError):
            keys.context(_WORKER, "worker")
        with contextlib.suppress(SlipError):
            assert keys.Revocations(_WORKER) is not None
        with contextlib.suppress(SlipError):
            keys.Identity.of(keys.load_certificate(_WORKER / name))
    finally:
        (_WORKER / name).write_bytes(_FILES[name])


def seeds() -> list[bytes]:
    """The honest files, each in the place of each, and evidence."""
    files = [bytes([i]) + content for i in range(4) for content in _FILES.values()]
    return [*files, b"\4" + _EVIDENCE, b"\4", b"\4" + _EVIDENCE[:-1]]
