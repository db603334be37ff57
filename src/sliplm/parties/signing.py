"""Who made a worker share: its signature, a Sigstore bundle, made and judged by the library model-signing.

    worker/model.sig     over the names and sha256 of manifest.json and share.safetensors

The library signs and judges a list of files and digests.  It is given those that `open_worker` found, so
that what was signed, or judged, is what is used (M56), and nothing is read twice.  A vault needs none of
this: its own manifest names the share's digests, and every product is checked.  It is for the worker's
operator, and for whoever passes a share on.
"""

from __future__ import annotations

import contextlib
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sliplm import durable
from sliplm.errors import CredentialError, InputError, ShareError, SignatureError
from sliplm.filesystem import because
from sliplm.network.authority import AUTHORITY_NAME
from sliplm.network.keys import KEY, check_mode
from sliplm.network.trust import check_unwritable
from sliplm.reading import read_bounded
from sliplm.shares.share import MANIFEST, SIGNATURE, WorkerShare

PUBLIC: Final = "public.pem"
MAX_SIGNATURE_BYTES: Final = 1 << 20
MAX_KEY_BYTES: Final = 1 << 20

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"


def make_key(folder: Path) -> None:
    """Make a key that signs shares: folder/key.pem (mode 0600; EC, P-256); folder/public.pem is for others.

    Raises CredentialError if the folder exists or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        folder.mkdir(mode=0o700, parents=True)
        durable.replace(folder / KEY, private)
        durable.replace(folder / PUBLIC, public)
    except FileExistsError as error:
        raise CredentialError(
            f"{folder} exists: keys are never overwritten, choose another folder"
        ) from error
    except OSError as error:
        raise CredentialError(
            f"a key cannot be written to {folder} {because(error, folder, 'check its rights')}"
        ) from error


def sign(share: WorkerShare, key: Path, certificate: Path | None = None) -> Path:
    """Sign an opened share; returns the signature's path, in the share's folder.

    Args:
        key: a private key (EC, P-256, P-384 or P-521) as PEM, mode 0600.
        certificate: of that key, to be judged by the authority that signed it.

    Raises CredentialError: the key or certificate cannot be used; ShareError: the folder cannot be written;
    InputError: the library is missing.
    """
    library = _library()
    check_mode(key)
    try:
        config = library.signing.Config()
        if certificate is None:
            config.use_elliptic_key_signer(private_key=key)
        else:
            config.use_certificate_signer(
                private_key=key, signing_certificate=certificate, certificate_chain=[certificate]
            )
    except Exception as error:  # whatever the library makes of a file that is no such key
        raise CredentialError(
            f"{key} cannot sign ({type(error).__name__}: {error}): it takes an EC key without a "
            "passphrase, and its own certificate if any; make a key with `slip keys signing FOLDER`"
        ) from error
    path = share.path / SIGNATURE
    with tempfile.TemporaryDirectory(prefix="slip-sign-") as own:
        made = Path(own) / SIGNATURE
        config.set_hashing_config(_listing(library, share)).sign(share.path, made)
        try:
            durable.replace(path, made.read_bytes())
            path.chmod(stat.S_IMODE((share.path / MANIFEST).stat().st_mode))  # whoever may read the share
        except OSError as error:
            raise ShareError(
                f"{path} cannot be written {because(error, path.parent, 'check its rights')}"
            ) from error
    return path


def check(share: WorkerShare, signed_by: Path) -> None:
    """Judge the signature of an opened share.

    Args:
        signed_by: whom to believe, as PEM: a public key, or the certificate of an authority.

    Raises SignatureError: there is none, it is another key's, or the share is not the one that was signed;
    CredentialError: what was given to believe is no such thing, or others can write it; InputError: the
    library is missing.
    """
    library = _library()
    trusted = _trusted(signed_by)
    path = share.path / SIGNATURE
    claim = _claim(path)
    with tempfile.TemporaryDirectory(
        prefix="slip-verify-"
    ) as own:  # what the library reads is what was read here
        copy, anchor = Path(own) / SIGNATURE, Path(own) / PUBLIC
        copy.write_bytes(claim)
        anchor.write_bytes(trusted)
        try:
            config = library.verifying.Config().set_hashing_config(_listing(library, share))
            if _CERTIFICATE in trusted:
                config.use_certificate_verifier(certificate_chain=[anchor])
            else:
                config.use_elliptic_key_verifier(public_key=anchor)
        except Exception as error:
            raise CredentialError(
                f"{signed_by} is no public key or certificate that can be used ({error}): an EC key as PEM, "
                "see `slip keys signing`"
            ) from error
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where the library warns
                config.verify(share.path, copy)
        except Exception as error:  # a claim of any bytes, and of many kinds of refusal
            raise SignatureError(
                f"{path} does not show that {share.path} was signed by {signed_by} "
                f"({_reason(error, claim, trusted)}): copy the share and its signature from its "
                "owner again, and serve nothing else"
            ) from error


def _claim(path: Path) -> bytes:
    try:
        claim = read_bounded(path, MAX_SIGNATURE_BYTES)
    except FileNotFoundError as error:
        raise SignatureError(
            f"{path.parent} is not signed: there is no {path.name}. Ask its owner for `slip sign`"
        ) from error
    except OSError as error:
        raise SignatureError(f"{path} cannot be read ({error.strerror}); copy it again") from error
    if len(claim) > MAX_SIGNATURE_BYTES:
        raise SignatureError(f"{path} is longer than {MAX_SIGNATURE_BYTES} bytes: this is no signature")
    return claim


def _trusted(path: Path) -> bytes:
    """The bytes of a public key, or of certificates none of which is the authority of a link's keys."""
    if not path.exists():
        raise CredentialError(f"{path} does not exist: give the signer's public.pem, or his authority's")
    check_unwritable(path)
    try:
        data = read_bounded(path, MAX_KEY_BYTES)
        found = x509.load_pem_x509_certificates(data) if _CERTIFICATE in data else []
    except (OSError, ValueError) as error:
        raise CredentialError(f"{path} cannot be read ({error}): give a public key or certificate") from error
    for certificate in found:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if any(name.value == AUTHORITY_NAME for name in names):
            raise CredentialError(
                f"{path} is the authority of the link: each of its workers could sign. "
                "Give the signer's own key"
            )
    return data


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(f"signatures need {error.name}: pip install 'sliplm[signing]'") from error
    return model_signing  # type: ignore[no-any-return,unused-ignore]


def _listing(library: Any, share: WorkerShare) -> Any:
    """The library's reader of folders, but reading nothing: the digests are those of the opened share."""
    listed = library.manifest
    how = listed.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
    )
    items = [
        how.new_item(name, listed.hashing.Digest("sha256", bytes.fromhex(record.sha256)))
        for name, record in share.digests.items()
    ]

    class Listing(library.hashing.Config):  # type: ignore[misc,name-defined,unused-ignore]
        def hash(self, *_: object, **__: object) -> Any:
            return listed.Manifest(share.path.name, items, how)

    return Listing()


def _reason(error: Exception, claim: bytes, trusted: bytes) -> str:
    """Why a claim shows nothing, where the library only fails: it is judged by the other kind of anchor."""
    under = _CERTIFICATE in trusted
    if not under and b'"x509CertificateChain"' in claim:
        return "it was signed under a certificate: name the authority that stands for it"
    if under and b'"publicKey"' in claim:
        return "it was signed with a key alone: name the signer's public key"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:300]}..."
