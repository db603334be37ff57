"""A party's key folder: who it is, whom it trusts, and whom no longer.

    certificate.pem   this party's certificate, with its role and its name
    key.pem           the certificate's private key, mode 0600
    authority.pem     the one authority whose certificates count
    revoked.pem       that authority's list of the certificates that count no longer (an X.509 CRL)

`authority` makes these folders.  A certificate says a role and a name and no host name: workers move, so
addresses are not checked, the authority and the role are.  The role stands there twice: as extended key
usage (a vault is a TLS client, a worker a TLS server), which OpenSSL enforces during the handshake, and as
a subject alternative name "sliplm:vault" or "sliplm:worker", which `check_role` compares after it.  So a
worker's certificate opens no worker.  No system authority is trusted.

OpenSSL refuses a revoked peer during the handshake; a `Revocations` tells of peers that were revoked later.
A folder without a list that the authority has signed is refused: nobody can unrevoke by deleting a file.

TLS is 1.3 only.  Session tickets are off: every connection proves its key anew.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import re
import ssl
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sliplm.errors import CredentialError
from sliplm.filesystem import chmod_advice
from sliplm.network.trust import check_unwritable, only_grows
from sliplm.reading import is_private, read_bounded

Role = Literal["vault", "worker", "dealer"]
Serving = Literal["worker", "dealer"]
"""Who is asked: online for products, or ahead for masks, and never one party for both."""

CERTIFICATE: Final = "certificate.pem"
KEY: Final = "key.pem"
AUTHORITY: Final = "authority.pem"
REVOKED: Final = "revoked.pem"
MAX_FILE_BYTES: Final = 16 << 20
POLL: Final = 0.25  # seconds between two looks at the list of the revoked

ROLES: Final[tuple[Role, ...]] = ("vault", "worker", "dealer")
_NAME: Final = re.compile(r"[a-z0-9-]{1,63}")
_INIT: Final = "make keys with `slip keys init FOLDER`"

_MALFORMED: Final = (  # what cryptography raises for bytes that are no proper certificate or list
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
)

logger = logging.getLogger(__name__)


class Identity(NamedTuple):
    """Who a certificate says that its holder is.

    Attributes:
        serial: the certificate's number with its authority.
        fingerprint: SHA-256 of the certificate, 32 bytes.
        spki: SHA-256 of the public key (its SubjectPublicKeyInfo), 32 bytes: what evidence is bound to.
    """

    name: str
    role: Role
    serial: int
    fingerprint: bytes
    spki: bytes

    @property
    def mark(self) -> bytes:
        """What `mark` says of this certificate."""
        return mark(self.serial)

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """The identity in a certificate.  Raises CredentialError if it has not one role and one name."""
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found = names.get_values_for_type(x509.UniformResourceIdentifier)
        except _MALFORMED:
            found = []
        roles = [role for role in ROLES if role_uri(role) in found]
        called = [uri.removeprefix(name_uri("")) for uri in found if uri.startswith(name_uri(""))]
        if len(roles) != 1 or len(called) != 1 or not is_name(called[0]):
            raise CredentialError(f"a certificate without one role and one name is not ours: {_INIT}")
        try:
            public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        except _MALFORMED as error:
            raise CredentialError(f"a certificate's public key cannot be read ({error}): {_INIT}") from error
        return cls(called[0], roles[0], certificate.serial_number, fingerprint(certificate), _sha256(public))


class Context(ssl.SSLContext):
    """TLS settings, and whose they are."""

    own: Identity


def context(folder: Path, role: Role) -> Context:
    """The TLS settings of `role`, from the key folder of a party.

    What they refuse is as of now: make them anew for each connection, or keep a `Credentials`.
    Raises CredentialError: a file is missing or damaged, the key is readable by others, the certificate
    has expired, is revoked or is for the other role, the list of the revoked is another authority's.
    """
    folder = Path(folder)
    own = _check_own(folder, role)
    if own.serial in _read_revoked(folder):
        raise CredentialError(f"the certificate in {folder} is revoked: ask its owner for `slip keys rotate`")
    made = Context(ssl.PROTOCOL_TLS_CLIENT if role == "vault" else ssl.PROTOCOL_TLS_SERVER)
    made.check_hostname = False  # workers move: the role in the certificate counts, see above
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_3
    if role != "vault":
        made.num_tickets = 0
    try:
        made.load_cert_chain(folder / CERTIFICATE, folder / KEY)
        made.load_verify_locations(folder / AUTHORITY)
        made.load_verify_locations(folder / REVOKED)
    except (OSError, ssl.SSLError) as error:
        raise CredentialError(f"the keys in {folder} cannot be used ({error}): {_INIT}") from error
    made.own = own
    return made


def serving_role(folder: Path) -> Serving:
    """Whether a key folder makes a worker or a dealer.  Raises CredentialError for a vault's."""
    role = Identity.of(load_certificate(Path(folder) / CERTIFICATE)).role
    if role == "vault":
        raise CredentialError(
            f"{folder} does not hold a worker's certificate: use the folder 'worker' or 'dealer'"
        )
    return role


def check_role(peer: ssl.SSLSocket, role: Role) -> Identity:
    """Who the peer of a finished handshake is.  Raises CredentialError unless it has the role."""
    try:
        found = Identity.of(x509.load_der_x509_certificate(peer.getpeercert(binary_form=True) or b""))
    except _MALFORMED as error:
        raise CredentialError(f"the peer's certificate cannot be read ({error})") from error
    if found.role != role:
        raise CredentialError(
            f"the peer's certificate ({found.role} {found.name}, serial {found.serial:x}, sha256 "
            f"{found.fingerprint.hex()}) is not a {role}'s: give each party its own key folder"
        )
    return found


class Credentials:
    """The TLS settings of a role, made again when a file of the key folder changes; safe between threads.

    So a revocation counts from the next handshake on, and new keys are taken up without a restart.
    Raises CredentialError, as `context`.
    """

    def __init__(self, folder: Path, role: Role) -> None:
        self.folder = Path(folder).absolute()
        self._role: Role = role
        self._guard = threading.Lock()
        self._seen = self._stamps()
        self._context = context(self.folder, role)

    def __repr__(self) -> str:
        return f"Credentials({str(self.folder)!r}, {self._role})"

    def context(self) -> Context:
        """The settings as of now.  Raises CredentialError, as `context`."""
        with self._guard:
            seen = self._stamps()
            if seen != self._seen:
                self._context = context(self.folder, self._role)
                self._seen = seen
            return self._context

    def _stamps(self) -> list[tuple[int, ...]]:
        return [_stamp(self.folder / name) for name in (CERTIFICATE, KEY, AUTHORITY, REVOKED)]


class Revocations:
    """The serial numbers that a key folder's list names, kept up to date; safe between threads.

    Raises CredentialError: the list is missing, damaged, out of date or another authority's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder).absolute()
        self._serials: frozenset[int] = frozenset()
        self._seen: tuple[int, ...] = ()
        self.refresh()

    def __repr__(self) -> str:
        return f"Revocations({str(self._folder)!r}, {len(self._serials)} revoked)"

    def __contains__(self, serial: object) -> bool:
        return serial in self._serials

    @property
    def serials(self) -> frozenset[int]:
        """All that the list names."""
        return self._serials

    def refresh(self) -> None:
        """Read the list again if its file has changed.

        Raises CredentialError as at the start; what was known then still counts.
        """
        seen = _stamp(self._folder / REVOKED)
        if seen != self._seen:
            self._serials = _read_revoked(self._folder)
            self._seen = seen

    def watch(self, act: Callable[[], None], stopped: threading.Event) -> None:
        """Refresh every POLL seconds until `stopped`, and call `act` after each look, changed or not.

        A look that fails is logged once, and `act` is called all the same: no file brings a peer back.
        A thread of the caller's runs this:

            Thread(target=revocations.watch, args=(self._cut, self._stopped), daemon=True).start()
        """
        said = ""
        while not stopped.wait(POLL):
            trouble = ""
            try:
                self.refresh()
            except CredentialError as error:
                trouble = str(error)
                if trouble != said:
                    logger.warning("%s", trouble)
            said = trouble
            act()


def mark(serial: int) -> bytes:
    """What stands for a certificate where all that is kept has 32 bytes: SHA-256 over its serial number."""
    return _sha256(f"certificate/{serial:x}".encode())


def role_uri(role: Role) -> str:
    """How a certificate says its role."""
    return f"sliplm:{role}"


def name_uri(name: str) -> str:
    """How a certificate says its name."""
    return f"sliplm:name:{name}"


def is_name(text: str) -> bool:
    """1 to 63 of a-z, 0-9 and the hyphen."""
    return _NAME.fullmatch(text) is not None


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of a certificate's DER form, 32 bytes."""
    return _sha256(certificate.public_bytes(Encoding.DER))


def load_certificate(path: Path) -> x509.Certificate:
    """A certificate from its PEM file.  Raises CredentialError."""
    try:
        return x509.load_pem_x509_certificate(read_bounded(path, MAX_FILE_BYTES))
    except (OSError, *_MALFORMED) as error:
        raise CredentialError(_no_keys(path.parent, error)) from error


def _no_keys(folder: Path, why: object) -> str:
    """What a folder is not; it may be the one above."""
    if (folder / "authority").is_dir():
        return f"{folder} has a folder for each party: give that of this one, such as {folder / 'worker'}"
    return f"{folder} is not a key folder ({why}): {_INIT}"


def check_mode(path: Path) -> None:
    """Raise CredentialError if a private key's file is missing or others can use it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise CredentialError(f"{path} is no regular file of a key: restore it from a copy, or {_INIT}")
        private = is_private(path, status)
    except OSError as error:
        raise CredentialError(_no_keys(path.parent, error)) from error
    if not private:
        raise CredentialError(f"{path} is readable by others: {chmod_advice(path, '600')}, or make new keys")


def _check_own(folder: Path, role: Role) -> Identity:
    """Say what is wrong with our own files in words better than OpenSSL's."""
    check_mode(folder / KEY)
    check_unwritable(folder / CERTIFICATE)
    certificate = load_certificate(folder / CERTIFICATE)
    own = Identity.of(certificate)
    if own.role != role:
        raise CredentialError(f"{folder} does not hold a {role}'s certificate: use the folder {role!r}")
    if certificate.not_valid_after_utc < now():
        raise CredentialError(
            f"the certificate in {folder} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: if this "
            "machine's clock is right, make new keys with `slip keys rotate`"
        )
    if certificate.not_valid_before_utc > now():
        raise CredentialError(
            f"the certificate in {folder} is not valid before "
            f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: set this machine's clock"
        )
    return own


def _read_revoked(folder: Path) -> frozenset[int]:
    """The serial numbers in the folder's list, if its own authority has signed it."""
    path = folder / REVOKED
    for trusted in (folder / AUTHORITY, path):
        check_unwritable(trusted)
    authority = load_certificate(folder / AUTHORITY)
    try:
        listed = x509.load_pem_x509_crl(read_bounded(path, MAX_FILE_BYTES))
        signed = listed.issuer == authority.subject and listed.is_signature_valid(
            authority.public_key()  # type: ignore[arg-type]  # a key that signs nothing raises TypeError
        )
    except (OSError, *_MALFORMED) as error:
        raise _unusable(path, error) from error
    if not signed:
        raise _unusable(path, "another authority's, or altered")
    if listed.next_update_utc is None or listed.next_update_utc < now():
        raise _unusable(path, "out of date, or this machine's clock is wrong")
    if listed.last_update_utc > now():
        raise _unusable(path, "not valid yet: set this machine's clock")
    serials = frozenset(entry.serial_number for entry in listed)
    if not only_grows(fingerprint(authority), serials):
        raise _unusable(path, "older than one that was in force here: what was revoked stays revoked")
    return serials


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError as error:
        raise CredentialError(
            _no_keys(path.parent, error)
            if (path.parent / "authority").is_dir()
            else f"{path} is missing ({error.strerror}): restore it, or {_INIT}"
        ) from error
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _unusable(path: Path, why: object) -> CredentialError:
    return CredentialError(
        f"the list of revoked certificates {path} cannot be used ({why}): copy revoked.pem from the "
        f"authority's folder, or {_INIT}"
    )


def now() -> datetime.datetime:
    """The time, with its zone."""
    return datetime.datetime.now(datetime.UTC)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
