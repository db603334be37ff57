"""What a split has already done, so that it survives being killed.

`.partial/journal` is a text of JSON lines: first what the split depends on, then one line per finished group,
written only when the group's tensors are on the disk, then `{"done": true}`.  It holds no secret.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sliplm.engines.source import Errors
from sliplm.errors import ShareError
from sliplm.shares.tensorfile import write_error

PARTIAL = ".partial"


class Journal:
    """The working folder of a split and its journal; held by one process at a time.

    Work of an earlier run is kept if its `key` (whatever the result depends on) is the same, else removed.

    Attributes:
        folder: `out_dir/.partial`, 0700.
        split_id: of the earlier run, or the one given.
        errors: finished group -> its `Errors`.
        done: both shares were complete when the earlier run ended.

    Raises:
        ShareError: another process is splitting into this folder, or it cannot be written.
    """

    def __init__(self, out_dir: Path, key: object, split_id: str) -> None:
        self.folder = out_dir / PARTIAL
        self.path = self.folder / "journal"
        self.split_id, self.errors, self.done = split_id, dict[str, Errors](), False
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise write_error(self.folder, 0, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.resumed = self._read(json.loads(json.dumps(key)))
            if not self.resumed:
                self._clear()
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not self.resumed:
                self._append({"key": key, "split_id": split_id})
        except BlockingIOError as error:
            os.close(self._lock)
            raise ShareError(f"another process splits into {out_dir}; wait or choose another") from error
        except OSError as error:
            os.close(self._lock)
            raise write_error(self.path, 0, error) from error

    def finish_group(self, name: str, errors: Errors) -> None:
        """Note a group whose tensors are on the disk."""
        self._append({"group": name, "errors": errors})
        self.errors[name] = errors

    def finish(self) -> None:
        """Note that both shares are complete and on the disk."""
        self._append({"done": True})
        self.done = True

    def remove(self) -> None:
        """Remove the working folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    def _read(self, key: Any) -> bool:
        """Take over an earlier run; False if there is none that fits."""
        try:
            lines = self.path.read_bytes().split(b"\n")
            head = json.loads(lines[0])
            if head["key"] != key:
                return False
            self.split_id = str(head["split_id"])
            for line in lines[1:-1]:  # what follows the last line end was cut off by a crash
                entry = json.loads(line)
                self.done = self.done or entry.get("done", False)
                if "group" in entry:
                    self.errors[entry["group"]] = tuple(float(error) for error in entry["errors"])
            if lines[-1]:
                os.truncate(self.path, sum(len(line) + 1 for line in lines[:-1]))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            self.errors, self.done = {}, False
            return False
        return True

    def _clear(self) -> None:
        for item in self.folder.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != "lock":
                item.unlink()

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            os.write(self._file, json.dumps(entry).encode() + b"\n")
            os.fsync(self._file)
        except OSError as error:
            raise write_error(self.path, 0, error) from error
