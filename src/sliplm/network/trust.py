"""What the trust in peers hangs on: files that only their owner writes, and a list that only grows.

Whoever can write `authority.pem` decides whose certificates count; whoever can write `revoked.pem`, or its
folder, can put an older list there.  So both are refused where others can write, and within a process what
was revoked stays revoked.  Not across processes: a process that starts with an older list does not know.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Final

from sliplm.errors import CredentialError
from sliplm.filesystem import chmod_advice

_guard: Final = threading.Lock()
_revoked: Final[dict[bytes, frozenset[int]]] = {}  # by the authority's fingerprint: all that were ever listed


def check_unwritable(path: Path) -> None:
    """Refuse a file that others than its owner can write or replace.

    A folder in which everybody may write, but nobody may remove what is another's (a sticky one, as secrets
    are mounted in containers), will do for files of this user and of root; so will one that is mounted
    read-only.

    Raises:
        CredentialError: it is such a file, or missing.
    """
    try:
        status, folder = path.stat(), path.parent.stat()
        kin = {path.lstat().st_uid, status.st_uid} <= {0, os.geteuid()}
        fixed = bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)
    except OSError as error:
        raise CredentialError(
            f"{path} cannot be read ({error.strerror}): restore it, or make keys with `slip keys init FOLDER`"
        ) from error
    if not fixed and status.st_mode & 0o022:
        raise CredentialError(f"{path} can be written by others: {chmod_advice(path, 'go-w')}")
    if not fixed and folder.st_mode & 0o022 and not (folder.st_mode & stat.S_ISVTX and kin):
        raise CredentialError(
            f"{path} can be replaced by others, who can write to its folder: "
            f"{chmod_advice(path.parent, 'go-w')}"
        )


def only_grows(authority: bytes, serials: frozenset[int]) -> bool:
    """Whether a list names all that this process has seen an authority revoke; if so, it is remembered.

    Args:
        authority: the fingerprint of its certificate.
        serials: what its signed list names.
    """
    with _guard:
        if not _revoked.get(authority, frozenset()) <= serials:
            return False
        _revoked[authority] = serials
        return True
