"""Small files of a finished vault changed, with its manifest and seal: all of it, or nothing.

Each new file, the new manifest too, is first written beside its place as `.NAME.part`, and a file that goes
is moved there.  Then `seal.json` is replaced, which has the MAC of the manifest that counts: this one step
decides.  Last everything moves into its place.  Whoever opens the vault in between (after a crash, say) finds
each listed file under one of its two names, and its digest tells which is meant: before the step the old
vault is whole, after it the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from sliplm import durable
from sliplm.closing import Closing
from sliplm.errors import SealError, ShareError
from sliplm.secrecy import Secret
from sliplm.shares.keysource import KeySpec
from sliplm.shares.listed import ListedFiles, beside
from sliplm.shares.manifest import FileRecord, VaultManifest
from sliplm.shares.sealing import SEAL, check_manifest, read_seal, seal_manifest
from sliplm.shares.share import LEDGER, MANIFEST, MODEL, SHARE, read_vault_manifest, record, verified_manifest
from sliplm.shares.tensorfile import write_error

_LARGE = (SHARE, MODEL, LEDGER)  # they stay as they are, and are not read


class Revision(Secret, Closing):
    """A vault folder that nobody else changes, until `close`.

    What an earlier revision left half way is put in order first.

    Args:
        folder: of the vault.
        key: what seals it, see `keysource`.

    Attributes:
        files: the verified small files, by name.
        manifest: verified.

    Raises:
        CredentialError, SealError, ShareError: as `share.open_vault`; or the folder cannot be written.
    """

    def __init__(self, folder: Path, key: KeySpec) -> None:
        self.folder = folder
        self._stack = ExitStack()
        read_vault_manifest(folder)  # says what a folder is not
        try:
            self._stack.enter_context(durable.locked_folder(folder))
            self._text, self.manifest, self._data_key = verified_manifest(folder, key)
            _settle(folder, self.manifest, self._text)
            small = {name: one for name, one in self.manifest.files.items() if name not in _LARGE}
            with ListedFiles(
                folder, small, required=(), large=(), besides=(MANIFEST, SEAL, *_LARGE)
            ) as listed:
                self.files = listed.small
        except OSError as error:
            self.close()
            raise write_error(folder, 0, error) from error
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Revision({str(self.folder)!r}, secrets hidden)"

    def close(self) -> None:
        self._stack.close()

    def change(self, new: Mapping[str, bytes], gone: Collection[str] = ()) -> None:
        """Write files, and remove others, of the small ones.

        Args:
            new: name -> bytes.
            gone: names of listed ones.

        Raises:
            ShareError: the folder cannot be written: nothing was changed, or all of it.
        """
        records = {name: _record_of(data) for name, data in new.items()}
        kept = {name: one for name, one in self.manifest.files.items() if name not in gone}
        manifest = self.manifest.model_copy(update={"files": dict(sorted((kept | records).items()))})
        text = manifest.model_dump_json(indent=1).encode()
        try:
            try:
                for name, data in {**new, MANIFEST: text}.items():
                    durable.write(beside(self.folder / name, self.folder), data)
                for name in gone:
                    _put_beside(self.folder, name)
                durable.sync_folder(self.folder, lasting=False)
                seal_manifest(self.folder, self._data_key, text)
            except BaseException:
                with contextlib.suppress(OSError, ShareError):  # what cannot be done now, the next one does
                    self._put_in_order(manifest, text)
                raise
            _settle(self.folder, manifest, text)
        except OSError as error:
            raise write_error(self.folder, sum(map(len, new.values())), error) from error
        self.manifest, self._text = manifest, text
        self.files = {name: data for name, data in self.files.items() if name not in gone} | dict(new)

    def _put_in_order(self, manifest: VaultManifest, text: bytes) -> None:
        """After a failure: the new files if the seal is theirs, else the old ones."""
        try:
            check_manifest(self.folder, read_seal(self.folder), self._data_key, text)
        except SealError:
            manifest, text = self.manifest, self._text
        _settle(self.folder, manifest, text)


def _settle(folder: Path, manifest: VaultManifest, data: bytes) -> None:
    """Put every file that is listed into its place, and remove what lies beside.  Raises: OSError."""
    for name, expected in {**manifest.files, MANIFEST: _record_of(data)}.items():
        path, other = folder / name, beside(folder / name, folder)
        if _is(other, expected) and not _is(path, expected):
            if path.parent != folder:
                path.parent.mkdir(mode=0o700, exist_ok=True)
            other.replace(path)
            durable.sync_folder(path.parent, lasting=False)
    for left in folder.glob(f".*{durable.PART}"):
        durable.remove(left)
    durable.sync_folder(folder, lasting=False)


def _put_beside(folder: Path, name: str) -> None:
    path = folder / name
    path.replace(beside(path, folder))
    if path.parent != folder:
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # a folder in which nothing is listed is refused


def _is(path: Path, expected: FileRecord) -> bool:
    """Whether a regular file has this length and digest."""
    try:
        return path.lstat().st_size == expected.bytes and record(path) == expected
    except OSError:
        return False


def _record_of(data: bytes) -> FileRecord:
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
