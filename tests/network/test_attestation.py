"""Evidence: what it is bound to, and what is refused."""

from __future__ import annotations

import hashlib
import os
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import AttestationError, InputError
from sliplm.network.attestation import (
    BINDING_BYTES,
    MAX_EVIDENCE,
    NullAttester,
    NullVerifier,
    SoftwareAttester,
    SoftwareVerifier,
    binding,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PARTS = st.binary(min_size=32, max_size=32)
ROLES = st.sampled_from(["vault", "worker"])


def test_binding_written_out() -> None:
    label, role = b"sliplm/1/attestation binding", b"worker"
    spki, nonce = os.urandom(32), os.urandom(32)
    text = b"".join(struct.pack("<I", len(part)) + part for part in (label, role, spki, nonce))
    assert binding("worker", spki, nonce) == hashlib.sha512(text).digest()
    assert BINDING_BYTES == 64  # TDX's report data, and SEV-SNP's


@given(ROLES, PARTS, PARTS, ROLES, PARTS, PARTS)
def test_binding_tells_everything_apart(
    role: str, spki: bytes, nonce: bytes, other_role: str, other_spki: bytes, other_nonce: bytes
) -> None:
    same = (role, spki, nonce) == (other_role, other_spki, other_nonce)
    assert (binding(role, spki, nonce) == binding(other_role, other_spki, other_nonce)) == same
    assert len(binding(role, spki, nonce)) == BINDING_BYTES


@pytest.mark.parametrize(("spki", "nonce"), [(31, 32), (32, 31), (33, 31), (0, 64), (64, 0)])
def test_parts_of_other_lengths(spki: int, nonce: int) -> None:
    with pytest.raises(InputError):
        binding("vault", bytes(spki), bytes(nonce))


def test_null() -> None:
    bound = binding("vault", bytes(32), bytes(32))
    NullVerifier().verify(NullAttester().evidence(bound), bound)
    with pytest.raises(AttestationError, match="set a verifier"):
        NullVerifier().verify(b"x", bound)


@given(PARTS, st.binary(min_size=1, max_size=1024))
def test_software(nonce: bytes, measurement: bytes) -> None:
    attester, verifier = SoftwareAttester(KEY, measurement), SoftwareVerifier(KEY.public_key(), [measurement])
    bound = binding("worker", bytes(32), nonce)
    evidence = attester.evidence(bound)
    assert len(evidence) <= MAX_EVIDENCE
    verifier.verify(evidence, bound)
    for other in (binding("vault", bytes(32), nonce), binding("worker", b"\1" * 32, nonce)):
        with pytest.raises(AttestationError, match="another connection"):
            verifier.verify(evidence, other)
    with pytest.raises(AttestationError, match="not an allowed one"):
        SoftwareVerifier(KEY.public_key(), [measurement + b"x"]).verify(evidence, bound)


@given(st.data())
def test_no_altered_evidence_passes(data: st.DataObject) -> None:
    bound = binding("worker", bytes(32), bytes(32))
    evidence = bytearray(SoftwareAttester(KEY, b"release 1").evidence(bound))
    evidence[data.draw(st.integers(0, len(evidence) - 1))] ^= data.draw(st.integers(1, 255))
    verifier = SoftwareVerifier(KEY.public_key(), [b"release 1", bytes(evidence[64:])])
    with pytest.raises(AttestationError):
        verifier.verify(bytes(evidence), bound)


@given(st.binary(max_size=2000))
def test_any_bytes(evidence: bytes) -> None:
    verifier = SoftwareVerifier(KEY.public_key(), [evidence[64:]])
    with pytest.raises(AttestationError):
        verifier.verify(evidence, bytes(64))


def test_key_of_another() -> None:
    bound = binding("worker", bytes(32), bytes(32))
    evidence = SoftwareAttester(Ed25519PrivateKey.generate(), b"release 1").evidence(bound)
    with pytest.raises(AttestationError, match="not signed by the known key"):
        SoftwareVerifier(KEY.public_key(), [b"release 1"]).verify(evidence, bound)


@pytest.mark.parametrize("length", [0, 1025])
def test_measurements_of_other_lengths(length: int) -> None:
    with pytest.raises(InputError):
        SoftwareAttester(KEY, bytes(length))


def test_no_secret_in_repr() -> None:
    assert repr(SoftwareAttester(KEY, b"release 1")) == "SoftwareAttester(key hidden)"
