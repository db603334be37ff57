"""Which models were split before: a second share of one model must not go out unnoticed (SPEC section 8).

    LEDGER/lock                     held while an entry is written
    LEDGER/passphrase.json          the salt for owners who seal with a passphrase (`ownership`)
    LEDGER/OWNER/SPLIT_ID.entry     one split, sealed

LEDGER is `places.ledger()`.  Everything of one owner hangs on one secret:

    secret      derive(owner's key, "ledger"), or Argon2id(passphrase, the folder's salt)
    OWNER       the first 16 bytes of derive(secret, "ledger owner"), in hexadecimal: entries under other keys
                lie in other folders, and cost nothing
    an entry    a sealed blob (`sealing`) under derive(secret, "ledger entries"), label "ledger/" + SPLIT_ID
    sketches    of all groups that went to a worker, under derive(secret, "ledger sketch")

The same entry lies in the vault's folder, sealed with its data key.  It holds the key of its sketches, so
that it can be compared under another owner's key too (`add`).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sliplm import durable, places
from sliplm.arithmetic.field import derive_key
from sliplm.errors import LedgerError, SealError
from sliplm.filesystem import readable
from sliplm.secrecy import Secret
from sliplm.shares.keysource import Key, KeySpec, find
from sliplm.shares.manifest import Hex, Name, Several, Size, SplitId
from sliplm.shares.ownership import bounded, owner_secret, writing
from sliplm.shares.recipe import Recipe
from sliplm.shares.sealing import open_bytes, seal_blob
from sliplm.shares.share import LEDGER, open_sealed_file
from sliplm.shares.sketch import Floats, Likeness, Sketch, likeness, of_weights

VAULT_FILE: Final = LEDGER
"""The entry of a split, in its vault's folder."""

MAX_ENTRY_BYTES: Final = 64 << 20

_ENTRY = re.compile(r"([0-9a-f]{32})\.entry")
_PREFIX = re.compile("[0-9a-f]{4,32}")

Values = Annotated[str, Field(pattern="^[A-Za-z0-9+/]{683}=$")]  # 128 float32, little-endian, in base64


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class GroupEntry(_Model):
    """The sketch of one group."""

    name: Name
    rows: Size
    columns: Size
    values: Values = Field(repr=False)

    @classmethod
    def of(cls, one: Sketch) -> Self:
        """As it is written."""
        values = base64.b64encode(one.values.astype("<f4").tobytes()).decode()
        return cls(name=one.name, rows=one.rows, columns=one.columns, values=values)

    @property
    def sketch(self) -> Sketch:
        """As it is compared."""
        values = np.frombuffer(base64.b64decode(self.values), "<f4")
        return Sketch(self.name, self.rows, self.columns, values)


class Entry(_Model):
    """One split.

    Attributes:
        date: when its shares were complete: UTC, ISO 8601.
        source: the name of the checkpoint's folder.
        recipe: in words.
        folder: where the shares were written.
        sketch_key: under which the groups were sketched.
    """

    format: Literal["sliplm-ledger"] = "sliplm-ledger"
    version: Literal[1] = 1
    split_id: SplitId
    date: str = Field(max_length=40)
    source: str = Field(max_length=4096)
    recipe: str = Field(max_length=1024)
    folder: str = Field(max_length=4096)
    sketch_key: Hex = Field(repr=False)
    groups: Several[GroupEntry] = Field(repr=False)

    @property
    def sketches(self) -> list[Sketch]:
        """Of all groups that went to a worker."""
        return [group.sketch for group in self.groups]

    def sealed(self, key: bytes, label: str) -> bytes:
        """Its bytes on a disk."""
        return b"".join(seal_blob(key, label, [self.model_dump_json().encode()]))

    def __str__(self) -> str:
        return (
            f"split {self.split_id[:8]} of {self.date[:10]} ({self.source}, {self.recipe}, in {self.folder})"
        )


def default_folder() -> Path:
    """The owner's own ledger; it may not exist yet.  Raises: PlaceError."""
    return places.ledger()


class Ledger(Secret):
    """The entries of one owner.

    Args:
        owner: what seals the owner's vaults.  The bytes of a key count, not where it comes from.
        folder: where the ledger lies; None for the default.

    Raises:
        LedgerError, CredentialError: as `ownership.owner_secret`.
    """

    def __init__(self, owner: Key, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self._owner = owner
        secret = derive_key(owner_secret(owner, self.folder), "ledger")
        self.own = self.folder / derive_key(secret, "ledger owner").hex()[:32]
        self.sketch_key = derive_key(secret, "ledger sketch")
        self._entry_key = derive_key(secret, "ledger entries")

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, keys hidden)"

    def entries(self) -> tuple[list[Entry], list[str]]:
        """The owner's entries, oldest first, and the ids of those that are damaged.

        Raises:
            LedgerError: the folder cannot be read.
        """
        good, damaged = [], []
        for split_id in self._ids():
            try:
                good.append(self._read(split_id))
            except (SealError, ValidationError, OSError):
                damaged.append(split_id)
        return sorted(good, key=lambda entry: entry.date), damaged

    def refuse_kin(self, sketches: Mapping[bytes, list[Sketch]], split_id: str) -> None:
        """Refuse a model of which the ledger has a relative.

        Args:
            sketches: of the model, by their key; entries under none of these keys are left out.
            split_id: of the split under way, which is no relative of itself.

        Raises:
            LedgerError: there is one, or entries are damaged, so that nobody can say.
        """
        entries, damaged = self.entries()
        damaged = [other for other in damaged if other != split_id]
        if damaged:
            first = damaged[0]
            raise LedgerError(
                f"{self._path(first)} is damaged, so nobody can say whether it was this model that was split "
                f"then; restore the file; or, if it was not, slip ledger forget {first[:8]}; or go on with "
                "i_know=True (slip split --i-know)"
            )
        found = [
            (entry, likeness(sketches[key], entry.sketches))
            for entry in entries
            if entry.split_id != split_id and (key := bytes.fromhex(entry.sketch_key)) in sketches
        ]
        close = sorted((pair for pair in found if pair[1].close), key=lambda pair: pair[1].distance or 0.0)
        if close:
            raise LedgerError(_refusal(close), tuple(entry.split_id for entry, _ in close))

    def record(self, entry: Entry, sketches: Mapping[bytes, list[Sketch]], *, i_know: bool) -> None:
        """Write an entry, durably, unless a relative was split meanwhile; one that is there is replaced.

        Raises:
            LedgerError: as `refuse_kin`, unless `i_know`; or it cannot be written.
        """
        with self._locked():
            if not i_know:
                self.refuse_kin(sketches, entry.split_id)
            durable.replace(self._path(entry.split_id), entry.sealed(self._entry_key, _label(entry.split_id)))

    def check_room(self) -> None:
        """Find out before the work begins that an entry can be written.

        Raises:
            LedgerError: it cannot.
        """
        with self._locked():
            probe = self.own / ".probe"
            durable.replace(probe, bytes(4096))
            durable.remove(probe)

    def forget(self, prefix: str) -> str:
        """Remove the entry whose split id begins with `prefix`, at least 4 digits; returns the id.

        Raises:
            LedgerError: there is none, or more than one; or it cannot be removed.
        """
        found = [one for one in self._ids() if one.startswith(prefix) and _PREFIX.fullmatch(prefix)]
        if len(found) != 1:
            raise LedgerError(
                f"{len(found) or 'no'} entries of this key begin with {prefix!r}; give at least 4 digits of "
                "an id that slip ledger list shows"
            )
        with self._locked():
            durable.remove(self._path(found[0]))
            durable.sync_folder(self.own)
        return found[0]

    def _ids(self) -> list[str]:
        try:
            names = [path.name for path in self.own.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.own} cannot be read ({error.strerror}); correct its permissions, or name "
                f"another folder in {places.LEDGER}"
            ) from error
        return sorted(match[1] for match in map(_ENTRY.fullmatch, names) if match)

    def _path(self, split_id: str) -> Path:
        return self.own / f"{split_id}.entry"

    def _read(self, split_id: str) -> Entry:
        """Raises: OSError, SealError, ValidationError."""
        data = bounded(self._path(split_id), MAX_ENTRY_BYTES)
        return Entry.model_validate_json(open_bytes(self._entry_key, _label(split_id), data))

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other writers out; the owner's folder is there inside.  Raises: LedgerError."""
        return writing(self.folder, self.own, self._owner)


@dataclass(frozen=True, repr=False)
class Registration(Secret):
    """The entry of a split that is under way.

    Attributes:
        entry: goes into the vault's folder now, and into the ledger by `record`.
    """

    ledger: Ledger
    entry: Entry
    sketches: Mapping[bytes, list[Sketch]]
    i_know: bool

    def record(self) -> None:
        """Make the entry durable: before the worker's folder is published.

        Raises:
            LedgerError: it cannot be written; or a relative was split while this split was under way.
        """
        entry = self.entry.model_copy(update={"date": _now()})
        self.ledger.record(entry, self.sketches, i_know=self.i_know)


def register(
    ledger: Ledger,
    weights: Iterable[tuple[str, Floats]],
    *,
    split_id: str,
    source: str,
    recipe: Recipe,
    folder: Path,
    i_know: bool,
) -> Registration:
    """Sketch a model that is to be split, and refuse it if the ledger has a relative.

    Args:
        weights: name and stacked weight of every group that will go to a worker, one in memory at a time.
        i_know: the owner knows what two shares show together: nothing is compared.

    Raises:
        LedgerError: a relative was split before; entries are damaged; the ledger cannot be written.
    """
    ledger.check_room()
    known = [] if i_know else ledger.entries()[0]
    keys = [ledger.sketch_key, *(bytes.fromhex(entry.sketch_key) for entry in known)]
    if not i_know:
        ledger.refuse_kin({}, split_id)  # damage is found before the weights are read
    sketches = of_weights(weights, keys)
    if not i_know:
        ledger.refuse_kin(sketches, split_id)
    entry = Entry(
        split_id=split_id,
        date=_now(),
        source=readable(source)[:4096],
        recipe=in_words(recipe),
        folder=readable(folder.absolute())[:4096],
        sketch_key=ledger.sketch_key.hex(),
        groups=tuple(GroupEntry.of(one) for one in sketches[ledger.sketch_key]),
    )
    return Registration(ledger, entry, sketches, i_know)


def add(vault: Path, key: KeySpec, folder: Path | None = None) -> Entry:
    """Copy the entry that lies in a vault's folder into the ledger of its owner.

    For a vault that was split on another machine, or sealed anew with another key.

    Raises:
        CredentialError, SealError, ShareError: as `share.open_sealed_file`.
        LedgerError: the ledger cannot be written.
    """
    owner = find(key)
    data = open_sealed_file(vault, VAULT_FILE, owner, MAX_ENTRY_BYTES)
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError as error:
        raise LedgerError(f"{vault / VAULT_FILE} is of a release that this one does not know") from error
    Ledger(owner, folder).record(entry, {}, i_know=True)
    return entry


def in_words(recipe: Recipe) -> str:
    """A recipe in a few words."""
    rules = f", {len(recipe.rules)} rules" if recipe.rules else ""
    return f"rank {recipe.rank}, {recipe.precision} bits, {recipe.rotation}{rules}"


def _refusal(close: list[tuple[Entry, Likeness]]) -> str:
    entry, how = close[0]
    more = f"; and {len(close) - 1} more entries are close" if len(close) > 1 else ""
    what = "these weights were" if how.same else "a close relative of this model was"
    return (
        f"{what} split before: {entry}; {how}{more}. Two different shares of one model show together what "
        "each of them hides. Use the earlier split. If its worker folder is destroyed wherever it was: slip "
        f"ledger forget {entry.split_id[:8]}. If you accept that both are out: i_know=True (slip split "
        "--i-know)"
    )


def _label(split_id: str) -> str:
    return f"ledger/{split_id}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
