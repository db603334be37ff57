"""The working folder of a plan: finished measurements, so that a killed run goes on, and factors.

Its journal says first which checkpoint it is about, then has one line for each finished measurement, with a
digest of the text it was made on.  The folder, `OUT/.work`, stays: another budget for the same model then
takes seconds.  Its factors are the secret part of the weights in clear, so that its mode is 0700.
"""

from __future__ import annotations

import json
from pathlib import Path

from sliplm.engines.workfolder import WorkFolder
from sliplm.errors import MismatchError, ShareError
from sliplm.sensitivity.removal import Loss
from sliplm.sensitivity.variants import Variant

WORK = ".work"


class Work(WorkFolder):
    """The folder.

    Args:
        checkpoint: what tells one checkpoint from another.
        text: digest of the tokens; measurements on other tokens are kept, and not used.

    Raises:
        MismatchError: the folder belongs to another checkpoint.
        ShareError: another process is at work there, or it cannot be written.
    """

    def __init__(self, out: Path, checkpoint: object, text: str) -> None:
        super().__init__(out / WORK, f"makes a plan in {out}")
        self._text = text
        self.losses: dict[str, Loss] = {}
        with self._opening():
            if not self._take_up(json.loads(json.dumps(checkpoint))):
                self._append({"checkpoint": checkpoint})

    def add(self, variant: Variant, loss: Loss) -> None:
        """Note a measurement.  Raises: ShareError."""
        self._append({"text": self._text, "variant": variant.key, "mean": loss.mean, "tokens": loss.tokens})
        self.losses[variant.key] = loss

    def _take_up(self, checkpoint: object) -> bool:
        """Take over what was measured; False if nothing was begun."""
        try:
            found = self._entries()
            if not found:
                return False
            if found[0]["checkpoint"] != checkpoint:
                raise MismatchError(
                    f"{self.folder.parent} holds the plan of another checkpoint, or this one has changed "
                    f"since; choose another folder, or remove {self.folder}"
                )
            for entry in found[1:]:
                if entry["text"] == self._text:
                    self.losses[entry["variant"]] = Loss(float(entry["mean"]), int(entry["tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ShareError(f"{self.path} is damaged; remove {self.folder} to begin again") from error
        return True
