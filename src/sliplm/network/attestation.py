"""Evidence of what runs at the other end, bound to one connection; pure, no sockets.

Each side draws a nonce.  The other side's evidence must cover `binding` of its role, of the public key
that it has shown in TLS's handshake, and of that nonce: evidence of yesterday, of another machine's key or
of the other role does not fit.  A binding has 64 bytes, as the report data of Intel TDX and AMD SEV-SNP.

An `Attester` for such hardware puts the binding into the report data of a quote and returns the quote; its
`Verifier` checks the quote's signature chain and measurements, and that the report data is the binding.
Neither is part of this version.  Here are the two that need no hardware.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Collection
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sliplm.errors import AttestationError, InputError, OwnEvidenceError, PassingCredentialError

MAX_EVIDENCE: Final = 64 * 2**10  # bytes
BINDING_BYTES: Final = 64
NO_SPKI: Final = bytes(32)  # on a Unix socket no key is shown

_SIGNATURE_BYTES: Final = 64
_MAX_MEASUREMENT: Final = 1024
_BINDING_LABEL: Final = b"sliplm/1/attestation binding"
_EVIDENCE_LABEL: Final = b"sliplm/1/software evidence"


class Attester(Protocol):
    """Makes evidence of what runs here."""

    def evidence(self, binding: bytes) -> bytes:
        """Evidence, at most MAX_EVIDENCE bytes, that covers the 64 bytes of `binding`."""


class Verifier(Protocol):
    """Judges evidence of what runs at the other end."""

    def verify(self, evidence: bytes, binding: bytes) -> None:
        """Raise AttestationError unless the evidence is good, and covers `binding`."""


def binding(role: str, spki_sha256: bytes, nonce: bytes) -> bytes:
    """SHA-512 over who shows evidence, and for which challenge: 64 bytes.

    Args:
        role: of the side that shows it, "vault" or "worker".
        spki_sha256: SHA-256 of that side's public key in TLS, NO_SPKI on a Unix socket.
        nonce: the other side's 32 fresh bytes.

    Raises InputError.
    """
    if len(spki_sha256) != 32 or len(nonce) != 32:
        raise InputError("a binding is over a SHA-256 of 32 bytes and a nonce of 32 bytes")
    return hashlib.sha512(_fields(_BINDING_LABEL, role.encode(), spki_sha256, nonce)).digest()


def own_evidence(attester: Attester, binding: bytes, deadline: float) -> bytes:
    """Evidence of ours, by `deadline`, a value of time.monotonic().

    Raises OwnEvidenceError for whatever goes wrong: it is no fault of the peer's.
    """
    try:
        made = bytes(memoryview(attester.evidence(binding)))
    except Exception as error:  # an attester may be a program, a device, a service
        raise OwnEvidenceError(
            f"our own evidence cannot be made ({type(error).__name__}: {error}): mend the attester"
        ) from error
    if len(made) > MAX_EVIDENCE:
        raise OwnEvidenceError(
            f"our own evidence has {len(made)} bytes, and {MAX_EVIDENCE} fit: mend the attester"
        )
    if time.monotonic() > deadline:
        raise OwnEvidenceError("our own evidence took longer than the limit of a wait: mend the attester")
    return made


def judge(verifier: Verifier, evidence: bytes, binding: bytes) -> None:
    """Judge the peer's evidence.

    Raises AttestationError if it is refused; PassingCredentialError if the verifier itself fails, which says
    nothing of the peer.
    """
    try:
        verifier.verify(evidence, binding)
    except AttestationError:
        raise
    except Exception as error:
        raise PassingCredentialError(
            f"the peer's evidence cannot be judged here ({type(error).__name__}: {error}): mend the verifier"
        ) from error


class NullAttester:
    """Shows nothing."""

    def evidence(self, binding: bytes) -> bytes:
        """Nothing."""
        return b""


class NullVerifier:
    """Asks for nothing: the certificate alone counts."""

    def verify(self, evidence: bytes, binding: bytes) -> None:
        """Raise AttestationError if there is evidence: whoever shows it expects it to be judged."""
        if evidence:
            raise AttestationError("the peer shows evidence, and nobody here can judge it: set a verifier")


class SoftwareAttester:
    """Signs a measurement with an Ed25519 key.

    This proves possession of the key, and NOT what hardware or code runs: whoever reads the key can claim
    any measurement.  It is for trying the exchange out, and for keys that hardware guards.

    Args:
        measurement: what to claim, 1 to 1024 bytes.

    Raises InputError.
    """

    def __init__(self, key: Ed25519PrivateKey, measurement: bytes) -> None:
        if not 1 <= len(measurement) <= _MAX_MEASUREMENT:
            raise InputError(f"a measurement has 1 to {_MAX_MEASUREMENT} bytes")
        self._key, self._measurement = key, measurement

    def __repr__(self) -> str:
        return "SoftwareAttester(key hidden)"

    def evidence(self, binding: bytes) -> bytes:
        """The signature (64 bytes), then the measurement."""
        return self._key.sign(_signed(self._measurement, binding)) + self._measurement


class SoftwareVerifier:
    """Accepts what a `SoftwareAttester` of the key signs, if the measurement is allowed.

    What it believes, whoever holds the key can make: see there.
    """

    def __init__(self, key: Ed25519PublicKey, allowed: Collection[bytes]) -> None:
        self._key, self._allowed = key, frozenset(allowed)

    def verify(self, evidence: bytes, binding: bytes) -> None:
        """Raise AttestationError unless the key has signed an allowed measurement and this binding."""
        if not _SIGNATURE_BYTES < len(evidence) <= _SIGNATURE_BYTES + _MAX_MEASUREMENT:
            raise AttestationError("the peer's evidence is missing or malformed: start it with an attester")
        signature, measurement = evidence[:_SIGNATURE_BYTES], evidence[_SIGNATURE_BYTES:]
        try:
            self._key.verify(signature, _signed(measurement, binding))
        except InvalidSignature as error:
            raise AttestationError(
                "the peer's evidence is not signed by the known key for this connection: "
                "it is forged, or of another connection"
            ) from error
        if measurement not in self._allowed:
            raise AttestationError(
                "the peer's measurement is not an allowed one: allow it, or update the peer"
            )


def _signed(measurement: bytes, binding: bytes) -> bytes:
    if len(binding) != BINDING_BYTES:
        raise InputError(f"a binding has {BINDING_BYTES} bytes")
    return _fields(_EVIDENCE_LABEL, measurement, binding)


def _fields(*fields: bytes) -> bytes:
    """Each field with its length before it, so that no two lists of fields read the same."""
    return b"".join(struct.pack("<I", len(field)) + field for field in fields)
