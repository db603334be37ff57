"""The owner's private authority: it makes key folders, and takes certificates back.

    folder/authority/   certificate.pem  key.pem  issued.json  revoked.pem     stays with the owner, offline
    folder/NAME/        certificate.pem  key.pem  authority.pem  revoked.pem   goes to the party, see `keys`

issued.json lists every certificate ever signed; revoked.pem is an X.509 CRL that is made from it, so the
one is always right again after the other is: a command that was cut short is simply run again.  A new
certificate is listed before it is written (none can be in use that cannot be revoked), and a revocation is
listed before it is published.

The list of the revoked is written to the authority and to every party's folder under `folder`; whoever runs
a party on another machine copies revoked.pem there, where it counts within a second.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError

from sliplm import durable
from sliplm.durable import replace
from sliplm.errors import CredentialError, InputError
from sliplm.filesystem import because
from sliplm.network import keys
from sliplm.network.keys import AUTHORITY, CERTIFICATE, KEY, REVOKED, Role, fingerprint, now
from sliplm.reading import read_bounded

DAYS: Final = 365
AUTHORITY_DAYS: Final = 3650  # the authority outlives what it signs: certificates are rotated under it
ISSUED: Final = "issued.json"
AUTHORITY_NAME: Final = "sliplm authority"
MAX_REGISTER_BYTES: Final = 1 << 28

_SKEW: Final = datetime.timedelta(hours=2)  # clocks of two machines differ
_HOME: Final = "authority"
_USAGE: Final = {
    "vault": ExtendedKeyUsageOID.CLIENT_AUTH,
    "worker": ExtendedKeyUsageOID.SERVER_AUTH,
    "dealer": ExtendedKeyUsageOID.SERVER_AUTH,
}

_Hex = Annotated[str, StringConstraints(pattern="^[0-9a-f]+$", max_length=64)]


class Issued(BaseModel):
    """A certificate that the authority has signed; `serial` and `fingerprint` (SHA-256) in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,63}$")]
    role: Role
    serial: _Hex
    fingerprint: _Hex
    not_after: AwareDatetime
    revoked: AwareDatetime | None = None


class _Register(BaseModel):
    """issued.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    certificates: tuple[Issued, ...] = ()


class _Signer(NamedTuple):
    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def home(self) -> Path:
        return self.folder / _HOME

    def __repr__(self) -> str:
        return f"_Signer({str(self.folder)!r}, key hidden)"


def init(folder: Path, days: int = DAYS) -> None:
    """Make a private authority under `folder`, with a party "vault", a "worker" and a "dealer".

    Their certificates expire after `days`, the authority after AUTHORITY_DAYS or `days`, whichever is later.
    Directories have mode 0700 and files 0600 from their first moment.
    Raises InputError (days), CredentialError if something is there already or cannot be written.
    """
    folder = Path(folder)
    _check_days(days)
    key = ec.generate_private_key(ec.SECP256R1())
    signer = _Signer(folder, _authority(key, max(days, AUTHORITY_DAYS)), key)
    with _writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (_HOME, *_USAGE):
            (folder / name).mkdir(mode=0o700)
        replace(signer.home / KEY, _private_pem(key))
        replace(signer.home / CERTIFICATE, _pem(signer.certificate))
        _write_register(signer.home, _Register())
        _publish(signer, _Register())
        for role in keys.ROLES:
            _sign(signer, role, role, days)


def issue(folder: Path, role: Role, name: str, days: int = DAYS) -> Path:
    """Make the key folder folder/NAME of one more party; returns it.

    The certificate expires after `days`, or with the authority if that is earlier.
    Raises InputError (days, role, name), CredentialError: the name has a folder or a certificate already, or
    the authority's folder cannot be used.
    """
    _check_days(days)
    role_of(role)
    if not keys.is_name(name) or name == _HOME:
        raise InputError(f"a name is 1 to 63 of a-z, 0-9 and -, and not {_HOME!r}: {name!r} is none")
    with _open(folder) as signer:
        if any(entry.name == name for entry in _read_register(signer.home).certificates):
            raise CredentialError(f"{name} has a certificate: renew it with `slip keys rotate`")
        (signer.folder / name).mkdir(mode=0o700)
        _sign(signer, role, name, days)
        return signer.folder / name


def role_of(text: str) -> Role:
    """A role from its name.  Raises InputError."""
    for role in keys.ROLES:
        if role == text:
            return role
    raise InputError(f"a party is a vault, a worker or a dealer, not {text!r}")


def issued(folder: Path) -> tuple[Issued, ...]:
    """Every certificate that the authority under `folder` has signed, in order.  Raises CredentialError."""
    return _read_register(Path(folder) / _HOME).certificates


def revoke(folder: Path, which: str) -> tuple[Issued, ...]:
    """Take back the certificates of a name, or the one of a serial number in hexadecimal; returns them.

    Revoking once more changes nothing but writes the lists again.
    Raises InputError (no such certificate), CredentialError.
    """
    with _open(folder) as signer:
        register = _read_register(signer.home)
        found = [entry for entry in register.certificates if entry.name == which] or [
            entry for entry in register.certificates if entry.serial == which.lower()
        ]
        if not found:
            raise InputError(f"no certificate has the name or serial {which!r}: see `slip keys list`")
        return _revoke(signer, register, {entry.serial for entry in found})


def rotate(folder: Path, name: str, days: int = DAYS) -> Issued:
    """Give a name a new key and certificate, and revoke its earlier ones; returns the new one.

    The old key is overwritten.  Raises InputError (days, no such name), CredentialError.
    """
    _check_days(days)
    with _open(folder) as signer:
        old = [entry for entry in _read_register(signer.home).certificates if entry.name == name]
        if not old:
            raise InputError(f"no certificate has the name {name!r}: see `slip keys list`")
        (signer.folder / name).mkdir(mode=0o700, exist_ok=True)
        made = _sign(signer, old[-1].role, name, days)
        _revoke(signer, _read_register(signer.home), {entry.serial for entry in old})
        return made


def _sign(signer: _Signer, role: Role, name: str, days: int) -> Issued:
    """A new key and certificate in folder/NAME, which exists."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _leaf(signer, role, name, key, days)
    made = Issued(
        name=name,
        role=role,
        serial=f"{certificate.serial_number:x}",
        fingerprint=fingerprint(certificate).hex(),
        not_after=certificate.not_valid_after_utc,
    )
    register = _read_register(signer.home)
    _write_register(signer.home, _Register(certificates=(*register.certificates, made)))
    home = signer.folder / name
    replace(home / AUTHORITY, _pem(signer.certificate))
    replace(home / REVOKED, _crl(signer, register))
    replace(home / KEY, _private_pem(key))
    replace(home / CERTIFICATE, _pem(certificate))
    return made


def _revoke(signer: _Signer, register: _Register, serials: set[str]) -> tuple[Issued, ...]:
    moment = now().replace(microsecond=0)
    changed = tuple(
        entry.model_copy(update={"revoked": entry.revoked or moment}) if entry.serial in serials else entry
        for entry in register.certificates
    )
    register = _Register(certificates=changed)
    _write_register(signer.home, register)
    _publish(signer, register)
    return tuple(entry for entry in changed if entry.serial in serials)


def _publish(signer: _Signer, register: _Register) -> None:
    """Write the list of the revoked to the authority and to every party that is still here."""
    listed = _crl(signer, register)
    replace(signer.home / REVOKED, listed)
    for name in dict.fromkeys(entry.name for entry in register.certificates):
        if (signer.folder / name).is_dir():
            replace(signer.folder / name / REVOKED, listed)


# certificates


def _crl(signer: _Signer, register: _Register) -> bytes:
    revoked = [entry for entry in register.certificates if entry.revoked is not None]
    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(now() - _SKEW)  # a party whose clock is behind must not find it too new
        .next_update(signer.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(len(revoked)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False
        )
    )
    for entry in revoked:
        taken = x509.RevokedCertificateBuilder().serial_number(int(entry.serial, 16))
        made = made.add_revoked_certificate(taken.revocation_date(entry.revoked or now()).build())
    return made.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name = _common_name(AUTHORITY_NAME)
    end = now() + datetime.timedelta(days=days)
    made = _builder(name, name, key.public_key(), key.public_key(), end)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return made.add_extension(_key_usage(signs=True), critical=True).sign(key, hashes.SHA256())


def _leaf(
    signer: _Signer, role: Role, name: str, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    end = min(now() + datetime.timedelta(days=days), signer.certificate.not_valid_after_utc)
    subject, issuer = _common_name(f"sliplm {role}"), signer.certificate.subject
    made = _builder(subject, issuer, key.public_key(), signer.key.public_key(), end)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_key_usage(signs=False), critical=True)
    made = made.add_extension(x509.ExtendedKeyUsage([_USAGE[role]]), critical=True)
    uris = [x509.UniformResourceIdentifier(uri) for uri in (keys.role_uri(role), keys.name_uri(name))]
    made = made.add_extension(x509.SubjectAlternativeName(uris), critical=False)
    return made.sign(signer.key, hashes.SHA256())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _check_days(days: int) -> None:
    if not 1 <= days <= 36500:
        raise InputError(f"certificates live for 1 to 36500 days, not {days}")


# files


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[_Signer]:
    """The authority under `folder`, for this process alone."""
    folder = Path(folder)
    home = folder / _HOME
    _check_signing_key(home / KEY)
    certificate = keys.load_certificate(home / CERTIFICATE)
    try:
        key = serialization.load_pem_private_key(read_bounded(home / KEY, keys.MAX_FILE_BYTES), None)
    except (OSError, ValueError, TypeError) as error:
        raise CredentialError(
            f"the authority's key {home / KEY} cannot be used: restore it from a copy"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CredentialError(
            f"{home / KEY} is not the key of {home / CERTIFICATE}: restore both from a copy"
        )
    if certificate.not_valid_after_utc < now():
        raise CredentialError(f"the authority in {folder} expired: make a new one with `slip keys init`")
    with _writing(folder), _locked(home):
        yield _Signer(folder, certificate, key)


def _check_signing_key(path: Path) -> None:
    """Refuse one that anybody else can use: what signs all others stays in its owner's hands, in no mount."""
    with contextlib.suppress(OSError):  # `check_mode` says what is missing
        if path.stat().st_mode & 0o077:
            raise CredentialError(f"{path} signs certificates and is open to others: chmod 600 it")
    keys.check_mode(path)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    try:
        with durable.locked_folder(home, wait=False):
            yield
    except BlockingIOError as error:
        raise CredentialError(f"another `slip keys` works in {home}: try again when it is done") from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """The operating system's refusals in our words."""
    try:
        yield
    except FileExistsError as error:
        raise CredentialError(
            f"{error.filename} exists: keys are never overwritten, choose another folder or name"
        ) from error
    except OSError as error:
        raise CredentialError(
            f"keys cannot be written to {folder} {because(error, folder, 'check its rights')}"
        ) from error


def _read_register(home: Path) -> _Register:
    try:
        return _Register.model_validate_json(read_bounded(home / ISSUED, MAX_REGISTER_BYTES))
    except (OSError, ValidationError) as error:
        raise CredentialError(
            f"{home / ISSUED} cannot be read ({type(error).__name__}): name the folder that `slip keys init` "
            "made, or restore the file from a copy"
        ) from error


def _write_register(home: Path, register: _Register) -> None:
    replace(home / ISSUED, register.model_dump_json(indent=1).encode() + b"\n")


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
