"""What an error of a socket or of TLS means: the error of ours for it, and what to do."""

from __future__ import annotations

import errno
import ssl
from typing import Final

from sliplm.errors import (
    CredentialError,
    PassingCredentialError,
    SlipError,
    WireError,
    WorkerTimeout,
    WorkerUnavailable,
)

_REVOKED: Final = 23  # OpenSSL's X509_V_ERR_CERT_REVOKED
_DATES: Final = (9, 10, 11, 12)  # OpenSSL's errors: a certificate or a list not yet valid, or no longer
_REFUSALS: Final = (  # of our certificate, by a word of OpenSSL's reason, and what to do; the last for others
    ("EXPIRED", "compare the clocks of both machines; if they are right, `slip keys rotate` makes a new one"),
    ("UNKNOWN_CA", "both key folders must come from one `slip keys init`: copy ours again, or the peer's"),
    ("REVOKED", "`slip keys rotate` makes a new one in place of a revoked one"),
    (
        "BAD_CERTIFICATE",
        "compare the clocks of both machines, for it may not be valid there yet; if they are right, use the "
        "key folder of our role, from the `slip keys init` that the peer's comes from",
    ),
    ("", "use the key folder of our role, from the `slip keys init` that the peer's comes from"),
)


def translate(error: Exception, peer: str) -> SlipError:
    """The error of ours for an error of a socket or of TLS."""
    if isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT:  # that one is the network's
        return WorkerTimeout(f"{peer} did not answer within the limit", peer)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _unverified(error, peer)
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if any(word in reason for word in ("CERT", "UNKNOWN_CA", "ACCESS_DENIED")):
            return _alerted(reason, peer)
        if not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
            return WireError(f"{peer} does not speak TLS 1.3 as agreed ({reason or error})")
    return WorkerUnavailable(f"no connection to {peer}: {why(error)}; is the worker running?", peer)


def _unverified(error: ssl.SSLCertVerificationError, peer: str) -> CredentialError:
    """Why we refuse the peer's certificate."""
    if error.verify_code in _DATES:
        return PassingCredentialError(
            f"the certificate of {peer}, or our list of the revoked, is out of its dates "
            f"({error.verify_message}): compare the clocks of both machines; if they are right, "
            "`slip keys rotate` makes new ones"
        )
    if error.verify_code == _REVOKED:
        return CredentialError(
            f"the certificate of {peer} is revoked: its owner makes a new one with `slip keys rotate`"
        )
    return CredentialError(
        f"the certificate of {peer} is refused ({error.verify_message}): "
        "both key folders must come from one `slip keys init`"
    )


def _alerted(reason: str, peer: str) -> CredentialError:
    """Why the peer refuses ours, or showed none."""
    said = reason.lower().replace("_", " ")
    if "ALERT" not in reason:
        return CredentialError(
            f"{peer} shows no certificate that counts ({said}): "
            "both key folders must come from one `slip keys init`, not have expired and not be revoked"
        )
    advice = next(advice for word, advice in _REFUSALS if word in reason)
    return PassingCredentialError(
        f"{peer} refuses our certificate ({said}), so it is ours that is wrong there: {advice}"
    )


def why(error: Exception) -> str:
    """What an error says, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
