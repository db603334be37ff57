"""What a split has already done, so that it survives being killed.

The journal in `.partial` has a line per finished group, written only when the group's tensors are on the
disk, then `{"done": true}`.  It holds no secret.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sliplm.engines.source import Errors
from sliplm.engines.workfolder import LOCK, WorkFolder

PARTIAL = ".partial"


class Journal(WorkFolder):
    """The working folder of a split and its journal.

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
        super().__init__(out_dir / PARTIAL, f"splits into {out_dir}")
        self.split_id, self.errors, self.done = split_id, dict[str, Errors](), False
        with self._opening():
            self.resumed = self._take_up(json.loads(json.dumps(key)))
            if not self.resumed:
                self._clear()
                self._append({"key": key, "split_id": split_id})

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

    def _take_up(self, key: object) -> bool:
        """Take over an earlier run; False if there is none that fits."""
        try:
            head, *entries = self._entries()
            if head["key"] != key:
                return False
            groups = [entry for entry in entries if "group" in entry]
            errors = {entry["group"]: tuple(float(error) for error in entry["errors"]) for entry in groups}
            done = any(entry.get("done", False) for entry in entries)
            self.split_id, self.errors, self.done = str(head["split_id"]), errors, done
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def _clear(self) -> None:
        for item in self.folder.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != LOCK:
                item.unlink()
