"""The working folder of a plan: finished measurements, so that a killed run goes on, and factors.

`OUT/.work/journal` is a text of JSON lines: first which checkpoint it is about, then one line for each
finished measurement, with a digest of the text it was made on.  The folder stays: another budget for the same
model then takes seconds.  Its factors are the secret part of the weights in clear, so that its mode is 0700.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sliplm import durable
from sliplm.errors import MismatchError, ShareError
from sliplm.sensitivity.removal import Loss
from sliplm.sensitivity.variants import Variant
from sliplm.shares.tensorfile import write_error

WORK = ".work"


class Work:
    """The folder, held by one process at a time.

    Args:
        checkpoint: what tells one checkpoint from another.
        text: digest of the tokens; measurements on other tokens are kept, and not used.

    Raises:
        MismatchError: the folder belongs to another checkpoint.
        ShareError: another process is at work there, or it cannot be written.
    """

    def __init__(self, out: Path, checkpoint: object, text: str) -> None:
        self.folder, self._text = out / WORK, text
        self._path = self.folder / "journal"
        self.losses: dict[str, Loss] = {}
        key = json.loads(json.dumps(checkpoint))
        try:
            out.mkdir(parents=True, exist_ok=True)
            durable.make_folder(self.folder)
            self._lock = durable.lock(self.folder / "lock", wait=False)
        except BlockingIOError as error:
            raise ShareError(
                f"another process makes a plan in {out}; wait or choose another folder"
            ) from error
        except OSError as error:
            raise write_error(self.folder, 0, error) from error
        try:
            self._read(out, key)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
            if not self._path.stat().st_size:
                self._append({"checkpoint": key})
        except OSError as error:
            os.close(self._lock)
            raise write_error(self._path, 0, error) from error
        except BaseException:
            os.close(self._lock)
            raise

    def add(self, variant: Variant, loss: Loss) -> None:
        """Note a measurement.  Raises: ShareError."""
        self._append({"text": self._text, "variant": variant.key, "mean": loss.mean, "tokens": loss.tokens})
        self.losses[variant.key] = loss

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    def _read(self, out: Path, key: Any) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_bytes().split(b"\n")
        if lines[-1]:  # what follows the last line end was cut off by a crash
            os.truncate(self._path, sum(len(line) + 1 for line in lines[:-1]))
        if len(lines) == 1:
            return
        try:
            if json.loads(lines[0])["checkpoint"] != key:
                raise MismatchError(
                    f"{out} holds the plan of another checkpoint, or this one has changed since; choose "
                    f"another folder, or remove {self.folder}"
                )
            for line in lines[1:-1]:
                entry = json.loads(line)
                if entry["text"] == self._text:
                    self.losses[entry["variant"]] = Loss(float(entry["mean"]), int(entry["tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ShareError(f"{self._path} is damaged; remove {self.folder} to begin again") from error

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            os.write(self._file, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise write_error(self._path, 0, error) from error
