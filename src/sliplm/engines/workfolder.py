"""A folder of unfinished work, and the journal that says what of it is done, so that a killed run goes on.

`FOLDER/journal` is a text of JSON lines: first what the work depends on, then one line for each finished
piece.  A line is on the disk when it counts as written, and so must be the piece that it is about.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sliplm import durable
from sliplm.closing import Closing
from sliplm.errors import ShareError
from sliplm.reading import open_regular
from sliplm.shares.tensorfile import write_error

LOCK = "lock"


class WorkFolder(Closing):
    """Held by one process at a time, until `close`.

    Args:
        folder: made if missing, 0700; those above it as any other.
        doing: what another process does that has it, for the error.

    Raises:
        ShareError: another process has it, or it cannot be written.
    """

    def __init__(self, folder: Path, doing: str) -> None:
        self.folder, self.path = folder, folder / "journal"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            durable.make_folder(folder)
            self._lock = durable.lock(folder / LOCK, wait=False)
        except BlockingIOError as error:
            raise ShareError(f"another process {doing}; wait or choose another folder") from error
        except OSError as error:
            raise write_error(folder, 0, error) from error

    def close(self) -> None:
        """Let another process have it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """What a constructor still has to do: the folder is free again if it fails.  Raises: ShareError."""
        try:
            yield
        except OSError as error:
            self.close()
            raise write_error(self.path, 0, error) from error
        except BaseException:
            self.close()
            raise

    def _entries(self) -> list[Any]:
        """All lines of the journal, none if there is no journal.  Raises: OSError, ValueError."""
        if not self.path.exists():
            return []
        with open_regular(self.path) as file:
            *lines, rest = file.read().split(b"\n")
        if rest:  # what follows the last line end was cut off by a crash
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
        return [json.loads(line) for line in lines]

    def _append(self, entry: dict[str, Any]) -> None:
        """Write a line.  Raises: ShareError."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, json.dumps(entry).encode() + b"\n")
                durable.sync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise write_error(self.path, 0, error) from error
