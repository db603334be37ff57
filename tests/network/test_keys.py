"""Key folders: what is refused, whom they name, and who is revoked."""

from __future__ import annotations

import base64
import datetime
import hashlib
import queue
import shutil
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sliplm.errors import CredentialError
from sliplm.network import authority, keys


def forge(folder: Path, out: Path, role: str, expired: bool = False) -> Path:
    """A key folder of the same authority with both key usages, the given role, and perhaps no time left."""
    signing = x509.load_pem_x509_certificate((folder / "authority" / "certificate.pem").read_bytes())
    signer = serialization.load_pem_private_key((folder / "authority" / "key.pem").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    uris = [f"sliplm:{role}", "sliplm:name:forged"]
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")]))
        .issuer_name(signing.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=-1 if expired else 1))
        .add_extension(both, critical=False)
        .add_extension(names, critical=False)
        .add_extension(identifier, critical=False)
        .sign(signer, hashes.SHA256())
    )
    out.mkdir()
    shutil.copyfile(folder / "authority" / "revoked.pem", out / "revoked.pem")
    (out / "authority.pem").write_bytes(signing.public_bytes(serialization.Encoding.PEM))
    (out / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (out / "key.pem").touch(0o600)
    (out / "key.pem").write_bytes(private)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fresh keys."""
    authority.init(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.mark.parametrize("role", ["vault", "worker"])
def test_context(folder: Path, role: keys.Role) -> None:
    made = keys.context(folder / role, role)
    assert made.minimum_version is made.maximum_version is ssl.TLSVersion.TLSv1_3
    assert made.verify_mode is ssl.CERT_REQUIRED
    assert made.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    assert len(made.get_ca_certs()) == 1  # the private authority alone
    assert (made.own.name, made.own.role) == (role, role)


@pytest.mark.parametrize("mode", [0o660, 0o604, 0o610, 0o666])
def test_key_that_others_can_use(folder: Path, mode: int) -> None:
    (folder / "vault" / "key.pem").chmod(mode)
    with pytest.raises(CredentialError, match="readable by others"):
        keys.context(folder / "vault", "vault")


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "authority.pem", "revoked.pem"])
@pytest.mark.parametrize("damage", [None, b"", b"not a certificate"])
def test_missing_and_damaged_files(folder: Path, name: str, damage: bytes | None) -> None:
    path = folder / "worker" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(CredentialError, match="slip keys init"):
        keys.context(folder / "worker", "worker")


def test_key_of_another_certificate(folder: Path) -> None:
    shutil.copyfile(folder / "vault" / "key.pem", folder / "worker" / "key.pem")
    with pytest.raises(CredentialError, match="cannot be used"):
        keys.context(folder / "worker", "worker")


def test_folder_of_the_other_role(folder: Path) -> None:
    with pytest.raises(CredentialError, match="use the folder 'vault'"):
        keys.context(folder / "worker", "vault")


def test_expired(folder: Path, tmp_path: Path) -> None:
    old = forge(folder, tmp_path / "old", "vault", expired=True)
    with pytest.raises(CredentialError, match="expired"):
        keys.context(old, "vault")


def serial(folder: Path) -> int:
    """The number of a folder's certificate."""
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes()).serial_number


def test_identity(folder: Path) -> None:
    certificate = x509.load_pem_x509_certificate((folder / "worker" / "certificate.pem").read_bytes())
    der = certificate.public_bytes(serialization.Encoding.DER)
    public = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    prints = hashlib.sha256(der).digest(), hashlib.sha256(public).digest()
    found = keys.Identity.of(certificate)
    assert found == ("worker", "worker", certificate.serial_number, *prints)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["sliplm:vault"],
        ["sliplm:name:a"],
        ["sliplm:vault", "sliplm:worker", "sliplm:name:a"],
        ["sliplm:vault", "sliplm:name:a", "sliplm:name:b"],
        ["sliplm:vault", "sliplm:name:"],
        ["sliplm:vault", "sliplm:name:A"],
        ["sliplm:vault", "sliplm:name:" + 64 * "a"],
    ],
)
def test_certificates_without_one_role_and_one_name(uris: list[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 7, now, now + datetime.timedelta(days=1))
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    with pytest.raises(CredentialError, match="one role and one name"):
        keys.Identity.of(made.sign(key, hashes.SHA256()))


def test_own_certificate_revoked(folder: Path) -> None:
    authority.revoke(folder, "worker")
    with pytest.raises(CredentialError, match="is revoked"):
        keys.context(folder / "worker", "worker")
    keys.context(folder / "vault", "vault")


def test_list_of_another_authority(folder: Path, tmp_path: Path) -> None:
    authority.init(tmp_path / "others")
    shutil.copyfile(tmp_path / "others" / "authority" / "revoked.pem", folder / "vault" / "revoked.pem")
    for use in (lambda: keys.context(folder / "vault", "vault"), lambda: keys.Revocations(folder / "vault")):
        with pytest.raises(CredentialError, match=r"another authority's.*copy revoked\.pem"):
            use()


def test_altered_list(folder: Path) -> None:
    """Not one bit of it can change."""
    path = folder / "vault" / "revoked.pem"
    authority.revoke(folder, "worker")
    der = x509.load_pem_x509_crl(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    whole = path.read_bytes()
    for place in range(0, len(der), 7):
        altered = bytearray(der)
        altered[place] ^= 1 << place % 8
        lines = base64.encodebytes(bytes(altered))
        path.write_bytes(b"-----BEGIN X509 CRL-----\n" + lines + b"-----END X509 CRL-----\n")
        with pytest.raises(CredentialError):
            keys.Revocations(folder / "vault")
    path.write_bytes(whole)
    assert serial(folder / "worker") in keys.Revocations(folder / "vault")


def test_list_that_is_out_of_date(folder: Path) -> None:
    """Of the right authority, and its time is over: perhaps somebody keeps a newer one back."""
    signer = serialization.load_pem_private_key((folder / "authority" / "key.pem").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    signing = x509.load_pem_x509_certificate((folder / "authority" / "certificate.pem").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    old = x509.CertificateRevocationListBuilder(
        signing.subject, now - datetime.timedelta(days=2), now - datetime.timedelta(days=1)
    ).sign(signer, hashes.SHA256())
    (folder / "vault" / "revoked.pem").write_bytes(old.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(CredentialError, match="out of date"):
        keys.Revocations(folder / "vault")


def test_revocations_follow_the_file(folder: Path) -> None:
    path = folder / "vault" / "revoked.pem"
    revocations, worker = keys.Revocations(folder / "vault"), serial(folder / "worker")
    assert worker not in revocations
    authority.revoke(folder, "worker")
    assert worker not in revocations  # it reads when it is told to
    revocations.refresh()
    assert worker in revocations
    assert repr(revocations).endswith("1 revoked)")
    for damage in (b"", b"-----BEGIN X509 CRL-----", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        for _ in range(2):
            with pytest.raises(CredentialError):
                revocations.refresh()
            assert worker in revocations  # no file brings it back
    shutil.copyfile(folder / "authority" / "revoked.pem", path)
    revocations.refresh()
    assert worker in revocations


def test_watch(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It acts while the list is good, damaged (said once) and good again, and stops when told."""
    revocations, worker = keys.Revocations(folder / "vault"), serial(folder / "worker")
    looks, stopped = queue.Queue[bool](), threading.Event()
    watch = threading.Thread(
        target=revocations.watch, args=(lambda: looks.put(worker in revocations), stopped)
    )
    watch.start()
    try:
        assert looks.get(timeout=20) is False
        (folder / "vault" / "revoked.pem").write_bytes(b"")
        for _ in range(4):
            looks.get(timeout=20)
        assert len(caplog.records) == 1
        authority.revoke(folder, "worker")
        while not looks.get(timeout=20):
            pass
    finally:
        stopped.set()
        watch.join(20)
    assert not watch.is_alive()
    assert len(caplog.records) == 1


def test_credentials_are_those_on_disk(folder: Path) -> None:
    held = keys.Credentials(folder / "worker", "worker")
    first = held.context()
    assert held.context() is first
    authority.rotate(folder, "worker")
    second = held.context()
    assert second is not first
    assert (second.own.serial, second.own.name) == (serial(folder / "worker"), "worker")
    assert second.own.spki != first.own.spki
    (folder / "worker" / "revoked.pem").unlink()
    with pytest.raises(CredentialError):
        held.context()
