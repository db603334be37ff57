"""Who was caught lying, kept when the vault's process ends: by certificate key and address.

One small file for all of a user's vaults.  Only what a peer did itself is kept: wrong products, and bytes
that break the protocol after a greeting.  What may be a slip of the owner's, such as wrong keys or another
split's worker, is forgotten with the process.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sliplm import durable, places
from sliplm.errors import InputError, PlaceError, SlipError
from sliplm.filesystem import because, readable
from sliplm.network.addresses import UnixAddress, parse_address
from sliplm.reading import read_bounded

FILE: Final = "quarantine.json"
_MOST: Final = 2**24  # bytes of the file

logger = logging.getLogger(__name__)


class Entry(BaseModel):
    """One peer that lied; `spki` is its public key's SHA-256, or none on a Unix socket."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    spki: str | None
    role: str
    time: str
    reason: str

    def why(self) -> str:
        """For an error and the record."""
        return (
            f"caught on {self.time[:10]}: {self.reason}; if you trust it again: "
            f"slip quarantine clear {shlex.quote(self.address)}"
        )


_ENTRIES: Final = TypeAdapter(list[Entry])


class Quarantine:
    """The record of all liars in one file, which is made with the first of them.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = None if path is None else path.absolute()

    def __repr__(self) -> str:
        return f"Quarantine({str(self.path)!r})"

    @classmethod
    def own(cls) -> Quarantine:
        """The user's own, beside the anchors of pools; without a place for these it keeps nothing."""
        try:
            return cls(places.anchors() / FILE)
        except PlaceError as error:
            logger.warning("who lies is forgotten when this process ends: %s", error)
            return cls()

    def entries(self) -> list[Entry]:
        """All of them, oldest first.  Raises: InputError for a file that cannot be read."""
        if self.path is None:
            return []
        try:
            data = read_bounded(self.path, _MOST)
            return _ENTRIES.validate_json(data)
        except (OSError, ValidationError) as error:
            if isinstance(error, FileNotFoundError) and not self.path.is_symlink():
                return []
            why = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise InputError(
                f"the record of quarantined workers {self.path} cannot be read ({why}): put it right, or "
                "delete it to trust everybody again"
            ) from error

    def find(self, address: str | None, spki: bytes | None) -> Entry | None:
        """The entry of this address or of this key.  Raises: as `entries`."""
        return next((entry for entry in self.entries() if _is(entry, address, spki)), None)

    def add(self, address: str, spki: bytes | None, role: str, reason: str) -> None:
        """Keep a liar.  A file that cannot be written is logged: this process still asks it nothing."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        key = None if spki is None else spki.hex()
        self.keep(Entry(address=plain(address), spki=key, role=role, time=now, reason=reason))

    def keep(self, new: Entry) -> None:
        """As `add`."""

        def added(old: list[Entry]) -> list[Entry]:
            return [*(each for each in old if (each.address, each.spki) != (new.address, new.spki)), new]

        try:
            self._change(added)
        except SlipError as error:
            logger.error("%s", error)  # noqa: TRY400

    def clear(self, address: str, spki: bytes | None = None) -> list[Entry]:
        """Trust an address, and a key, again.

        Returns: what was forgotten.

        Raises: InputError for a file that cannot be read or written.
        """
        gone: list[Entry] = []

        def left(old: list[Entry]) -> list[Entry]:
            gone[:] = [each for each in old if _is(each, address, spki)]
            return [each for each in old if each not in gone]

        if self.find(address, spki) is not None:
            self._change(left)
        return gone

    def _change(self, change: Callable[[list[Entry]], list[Entry]]) -> None:
        if self.path is None:
            return
        try:
            durable.make_folder(self.path.parent)
            with durable.locked_folder(self.path.parent):
                changed = _ENTRIES.dump_json(change(self.entries()), indent=1)
                durable.replace(self.path, changed, lasting=False)
        except OSError as error:
            raise InputError(
                f"the record of quarantined workers {self.path} cannot be written "
                f"{because(error, self.path, 'check its rights')}"
            ) from error


def plain(address: str) -> str:
    """An address without the keys that one uses there, a Unix socket's path absolute, as JSON can hold it."""
    with contextlib.suppress(InputError):
        target = parse_address(address)
        if isinstance(target, UnixAddress):
            return readable(f"unix:{target.path.absolute()}")  # with memory or without, it is the same party
        return readable(str(target))
    return readable(address)


def _is(entry: Entry, address: str | None, spki: bytes | None) -> bool:
    if spki is not None and entry.spki == spki.hex():
        return True
    return address is not None and entry.address == plain(address)
