"""What several replicas know together: what each client has had, at whichever of them.

All append to one audit record, and each reads in it what the others let in, before it lets in anything itself
and while nobody else may.  So limits of a day and of all time hold whoever serves a client, also when he is
handed from one that died to another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sliplm import durable
from sliplm.errors import InputError
from sliplm.filesystem import because
from sliplm.parties.audit import AuditLog
from sliplm.parties.chain import FIRST, Told
from sliplm.serving.limits import ASKED, BEGUN, Limits
from sliplm.serving.refusals import Refusal, busy
from sliplm.serving.run import check_unaltered

_PATIENCE: Final = 2.0  # seconds that a request waits for its turn
_AGAIN: Final = 0.002  # seconds until it asks again

logger = logging.getLogger(__name__)


class Together:
    """The accounts of one replica, as the record of all has them.

    Args:
        audit: that all replicas append to.
        path: its file; who lets something in locks another beside it.
        limits: the accounts, so far empty.
        noted: the hash of a line that the file must have, or this machine sees another file.

    Raises: InputError: it was altered, is another file, or cannot be locked.
    """

    def __init__(self, audit: AuditLog, path: Path, limits: Limits, noted: str) -> None:
        self._audit, self._limits = audit, limits
        self._lock_file = path.with_name(f".{path.name}.lock")
        self._seen = noted == FIRST
        self._noted = noted
        self._lines: deque[Mapping[str, Any]] = deque()
        self._tell: Told = limits.replay
        check_unaltered(path, audit.follow(self._told))
        self._tell = self._lines.append  # from here on in threads of all kinds
        if not self._seen:
            raise InputError(
                f"{path} is not the audit record that the command sees: replicas on several machines need "
                "one file, on a file system that they share, for budgets rest on it"
            )
        try:
            os.close(durable.lock(self._lock_file, wait=True))
        except OSError as error:
            raise InputError(
                f"{self._lock_file} cannot be locked {because(error, path, 'name another with --audit')}"
            ) from error

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Until the block ends no other replica lets anything in, and all that they have is counted.

        Raises: Refusal.
        """
        descriptor = await self._lock()
        try:
            try:
                self._audit.catch_up()
            except InputError as error:
                raise _uncounted(error) from error
            while self._lines:
                self._limits.replay(self._lines.popleft())
            yield
        finally:
            os.close(descriptor)

    async def _lock(self) -> int:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return durable.lock(self._lock_file, wait=False)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise busy() from None
            except OSError as error:
                raise _uncounted(error) from error
            await asyncio.sleep(_AGAIN)

    def _told(self, line: Mapping[str, Any]) -> None:
        self._seen = self._seen or line.get("hash") == self._noted
        if line.get("event") in (BEGUN, ASKED):
            self._tell(line)


def _uncounted(error: Exception) -> Refusal:
    logger.error("what clients have had cannot be read: %s", error)
    return Refusal(503, "what you have had cannot be counted now: ask again", kind="server_error",
                   code="uncounted", retry=5)  # fmt: skip
