"""The audit record: who lied, stalled, vanished or came back, and who asked how much, a line of JSON each.

A record names the worker or dealer by its address and by its certificate (name, serial number and
fingerprint, where there is one), a client by its name, says what happened, and holds no secret: no message,
mask, product, prompt or answer.  Each line of the file carries a hash of all before it (`chain`).
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import stat
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from sliplm.errors import InputError
from sliplm.filesystem import because
from sliplm.parties.chain import Head, Running, Told, read_on, running, sealed

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
    "begun",  # a client's request was let in, and has taken what it may need
    "asked",  # a client had an answer, or a part of one
    "refused",  # a client had none
    "alert",  # a client has used much of its budget
    "serving",  # several replicas begin, which write here together
]

_KEPT: Final = 1000  # records in memory
_USUAL: Final = ("dealt", "begun", "asked", "serving")
_APPENDING: Final = (  # a FIFO that nobody reads is refused, not waited for
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
    detail: Mapping[str, Any] | None = None


class AuditLog:
    """Records of one vault: the last thousand in memory, all of them in a file if one is named.

    Args:
        path: appended to, made with mode 0600; None keeps them in memory only.  Several processes may append
            to one file.
        told: each line that the file has already, and whatever others append.

    Attributes:
        counts: how often each event was recorded by this process.

    Raises InputError if the file cannot be opened.
    """

    def __init__(self, path: Path | str | None = None, told: Told = lambda line: None) -> None:
        self._path = None if path is None else Path(path)
        self._records: deque[Record] = deque(maxlen=_KEPT)
        self.counts: Counter[Event] = Counter()
        self._lock = threading.Lock()
        self._inode, self._head, self._told = -1, Head(), told
        self._append(None)

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
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an event, and log it.  A file that cannot be written is logged too: requests go on.

        Args:
            detail: names and numbers.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = Record(now, event, role, address, peer, group, reason, detail)
        line = {name: value for name, value in asdict(record).items() if name != "detail" or value}
        with self._lock:
            self._records.append(record)
            self.counts[event] += 1
            try:
                self._append(line)
            except InputError as error:
                logger.error("%s", error)  # noqa: TRY400
        level = logging.INFO if event in _USUAL else logging.WARNING
        logger.log(level, "%s %s %s: %s", role, address, event, reason, extra={"fields": line})

    def follow(self, told: Told) -> Head:
        """Tell of each line that the file has, and from here on of those that others append; those of this
        record itself are told only if they are there already.

        Args:
            told: called in whichever thread writes or catches up.

        Returns: where the chain ends, or is broken.

        Raises: InputError.
        """
        with self._lock:
            self._inode, self._told = -1, told
            self._append(None)
            return self._head

    def catch_up(self) -> None:
        """Read what others have appended.  Raises: InputError."""
        with self._lock:
            self._append(None)

    @property
    def head(self) -> str:
        """The hash of the file's last line, to be noted elsewhere."""
        return self._head.hash

    def _append(self, line: Mapping[str, Any] | None) -> None:
        if self._path is None:
            return
        try:
            with os.fdopen(os.open(self._path, _APPENDING, 0o600), "wb") as found:
                if not stat.S_ISREG(os.fstat(found.fileno()).st_mode):
                    # a terminal, say: nothing to read, nothing to chain
                    found.write(b"" if line is None else json.dumps(line).encode() + b"\n")
                    return
                same = os.open(f"/proc/self/fd/{found.fileno()}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            with os.fdopen(same, "r+b") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(same, fcntl.LOCK_EX)  # another process may append to it
                before = self._caught_up(file)
                if line is not None:
                    data, own = sealed(line, before)
                    file.write(data)
                    file.flush()
                    end, lines = os.fstat(same).st_size, self._head.lines + 1
                    self._head = self._head._replace(hash=own, at=end, lines=lines)
        except OSError as error:
            raise InputError(
                f"the audit file {self._path} cannot be written {because(error, self._path, 'name another')}"
            ) from error

    def _caught_up(self, file: BinaryIO) -> Running:
        """Read what others have appended; the running hash of the next line.  An unfinished line, which a
        crash has left, is ended.
        """
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._head.at:  # another file: a chain of its own
            self._inode, self._head = status.st_ino, Head()
        if status.st_size == self._head.at:
            return running(self._head.hash)
        file.seek(self._head.at)
        self._head, before = read_on(file, self._head, self._told)
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
            before.update(b"\n")
        return before
