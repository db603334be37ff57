"""The audit record: who lied, stalled, vanished or came back, a line of JSON each.

A record names the worker or dealer by its address and by its certificate (name, serial number and
fingerprint, where there is one), says what happened, and holds no secret: no message, mask or product.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import threading
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from sliplm.errors import InputError
from sliplm.filesystem import because

Event = Literal[
    "quarantined",  # lied or broke the protocol: never asked again
    "suspended",  # stalled or refused: not asked for a while
    "lost",  # the connection broke or nobody listens
    "rejoined",  # serves again
    "drained",  # taken out by the operator
    "dealt",  # made masks for a pool on disk
    "computed here",  # no worker was left, and the vault did the product itself
    "masks dropped",  # their dealer lied or was revoked
    "masks renewed",  # a connection was made anew, or a clock jumped: masks dealt before are thrown away
    "revoked",  # its certificate was revoked while it was connected
]

_KEPT: Final = 1000  # records in memory
_APPENDING: Final = (  # a FIFO must not block
    os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One event; `peer` is the certificate's name, serial number and fingerprint, or None."""

    time: str  # UTC, ISO 8601
    event: Event
    role: str
    address: str
    peer: str | None
    group: str | None
    reason: str


class AuditLog:
    """Records of one vault: the last thousand in memory, all of them in a file if one is named.

    Args:
        path: appended to, made with mode 0600; None keeps them in memory only.

    Raises InputError if the file cannot be opened.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._records: deque[Record] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._append(b"")

    def __repr__(self) -> str:
        return f"AuditLog({len(self._records)} records, file={self._path})"

    @property
    def records(self) -> tuple[Record, ...]:
        """The last thousand records, oldest first."""
        with self._lock:
            return tuple(self._records)

    def write(
        self,
        event: Event,
        reason: str,
        *,
        role: str = "vault",
        address: str = "",
        peer: str | None = None,
        group: str | None = None,
    ) -> None:
        """Record an event, and log it.  A file that cannot be written is logged too: requests go on."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = Record(now, event, role, address, peer, group, reason)
        with self._lock:
            self._records.append(record)
            try:
                self._append(json.dumps(asdict(record)).encode() + b"\n")
            except InputError as error:
                logger.error("%s", error)  # noqa: TRY400
        level = logging.INFO if event == "dealt" else logging.WARNING
        logger.log(level, "%s %s %s: %s", role, address, event, reason)

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            handle = os.open(self._path, _APPENDING, 0o600)
            with os.fdopen(handle, "ab") as file:
                file.write(line)
        except OSError as error:
            raise InputError(
                f"the audit file {self._path} cannot be written {because(error, self._path, 'name another')}"
            ) from error
