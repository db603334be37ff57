"""The two artefacts on disk: the vault's share (secret) and the worker's share (assume it is public).

    vault/   seal.json   manifest.json   share.safetensors   model.safetensors   config.json   tokenizer files
    worker/  manifest.json   share.safetensors   (model.sig, where it was signed)

What the tensors in them are: `contents`.

A manifest holds the sha256 of every other file of its folder, but not of `seal.json`, which authenticates the
manifest; the vault's also holds those of the worker's two files, which binds the pair.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from sliplm.arithmetic.field import derive_key
from sliplm.errors import MismatchError, RecipeError, SealError, ShareError
from sliplm.reading import open_regular, read_bounded
from sliplm.secrecy import Secret
from sliplm.shares.contents import group_secrets, sealed_spec, secret_specs, worker_spec
from sliplm.shares.folders import Side, check_folder, side_of, wrong_folder
from sliplm.shares.keysource import KeySpec
from sliplm.shares.listed import AGAIN, ListedFiles, beside
from sliplm.shares.manifest import (
    MAX_GROUPS,
    FileRecord,
    Member,
    VaultManifest,
    WorkerManifest,
)
from sliplm.shares.recipe import problems
from sliplm.shares.sealing import (
    SEAL,
    check_manifest,
    open_blob,
    open_bytes,
    open_seal,
    read_seal,
)
from sliplm.shares.splitting import GroupSecrets
from sliplm.shares.tensorfile import NUMPY, HeaderLimit, TensorEntry, TensorSpec, map_file, read_header

MANIFEST = "manifest.json"
SHARE = "share.safetensors"
MODEL = "model.safetensors"
CONFIG = "config.json"
LEDGER = "ledger.sealed"
SIGNATURE = "model.sig"  # of a worker share: `parties.signing`
MAX_MANIFEST_BYTES = 512 * MAX_GROUPS  # 32 MiB: a group takes some 450 where names are long
MAX_MANIFEST_ITEMS = 20 * MAX_GROUPS
MAX_OBJECT_ITEMS = 100


@dataclass(frozen=True, repr=False)
class VaultShare(Secret):
    """The vault's share, in memory; a group's index is its place in `manifest.groups`.

    Attributes:
        files: verified bytes of the small files that lie beside the sealed ones, `config.json` among them.
    """

    path: Path
    manifest: VaultManifest
    groups: dict[str, GroupSecrets]
    members: dict[str, tuple[Member, ...]]
    data_key: bytes
    files: Mapping[str, bytes]

    def pool_key(self, label: str) -> bytes:
        """A 32-byte secret of this split for masks on disk, one for each label."""
        return derive_key(self.data_key, f"pool/{label}")

    @property
    def split_id(self) -> str:
        return self.manifest.split_id

    @property
    def pool_name(self) -> str:
        """The name of this vault's pools: the split id, which the vaults of one public base have in common,
        or there a name of its own.
        """
        return (
            self.split_id if self.manifest.base is None else derive_key(self.data_key, "pool name")[:16].hex()
        )

    def __repr__(self) -> str:
        return f"VaultShare({str(self.path)!r}, groups={len(self.groups)}, secrets hidden)"


@dataclass(frozen=True)
class WorkerShare:
    """The worker's share, memory-mapped; a group's index is its place in `names`."""

    path: Path
    manifest: WorkerManifest
    matrices: dict[str, npt.NDArray[Any]]
    digests: dict[str, FileRecord]

    @property
    def split_id(self) -> str:
        return self.manifest.split_id

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.manifest.groups)

    def __repr__(self) -> str:
        return f"WorkerShare({str(self.path)!r}, groups={len(self.matrices)})"


def open_vault(path: Path | str, key: KeySpec = None) -> VaultShare:
    """Open and verify a vault folder; the secrets are decrypted into memory.

    Args:
        key: what seals it, see `keysource`; None takes the user's key file.

    Raises:
        CredentialError: the key cannot be had.
        SealError: the key is another one, or sealed bytes were altered.
        ShareError: a file is missing, truncated, altered or not a share; the message names it.
    """
    path = Path(path)
    _, manifest, data_key = verified_manifest(path, key)
    specs = {spec.name: spec for group in manifest.groups for spec in secret_specs(group)}
    with ListedFiles(
        path, manifest.files, required=(SHARE, MODEL, CONFIG), large=(SHARE, MODEL, LEDGER),
        besides=(MANIFEST, SEAL),
    ) as files:  # fmt: skip
        tensors = {spec.name: np.empty(spec.shape, NUMPY[spec.dtype]) for spec in specs.values()}
        open_tensors(path / SHARE, data_key, specs, {name: array.data for name, array in tensors.items()})
        return VaultShare(
            path=path,
            manifest=manifest,
            groups={group.name: group_secrets(group, tensors) for group in manifest.groups},
            members={group.name: group.members for group in manifest.groups},
            data_key=data_key,
            files=files.small,
        )


def open_sealed_file(path: Path | str, name: str, key: KeySpec, limit: int) -> bytes:
    """The plain bytes of one small sealed file of a vault folder, which is authenticated like the rest.

    Folders of release 0.2 are read too: the ledger must know what they show.

    Args:
        limit: bytes above which it is refused unread.

    Raises:
        CredentialError: the key cannot be had.
        SealError: the key is another one, or sealed bytes were altered.
        ShareError: the folder has no such file, or it cannot be read.
    """
    path = Path(path)
    _, manifest, data_key = verified_manifest(path, key, old=True)
    expected = manifest.files.get(name)
    if expected is None or expected.bytes > limit:
        raise ShareError(f"{path} has no {name}: it was made by a release of sliplm that wrote none")
    with ListedFiles(path, {name: expected}, required=(), large=(), besides=None) as files:
        return open_bytes(data_key, name, files.small[name])


def open_worker(path: Path | str) -> WorkerShare:
    """Open and verify a worker folder; the matrices are int8 or int16 [m,n], read-only, memory-mapped.

    Raises:
        ShareError: a file is missing, truncated, altered or not a share; the message names it.
    """
    path = Path(path)
    data, manifest = _read_manifest(path / MANIFEST, WorkerManifest)
    specs = {group.name: worker_spec(group) for group in manifest.groups}
    with ListedFiles(
        path, manifest.files, required=(SHARE,), large=(SHARE,), besides=(MANIFEST, SIGNATURE)
    ) as files:  # the map stays when the file is closed
        matrices = map_file(files.file(SHARE), _header(path / SHARE, files.file(SHARE), specs))
    own = FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return WorkerShare(
        path=path,
        manifest=manifest,
        matrices={group.name: matrices[group.name] for group in manifest.groups},
        digests={MANIFEST: own, **manifest.files},
    )


def check_pair(vault: VaultShare, worker: WorkerShare) -> None:
    """Check that two shares come from one split.

    Raises:
        MismatchError: they do not.
    """
    if vault.split_id != worker.split_id:
        raise MismatchError(
            f"{vault.path} and {worker.path} come from different splits "
            f"({vault.split_id[:8]} and {worker.split_id[:8]}); use the two folders that one split wrote"
        )
    files = vault.manifest.worker_files | {
        f"worker-{number}/{name}": record
        for number, shard in enumerate(vault.manifest.shards, 1)
        for name, record in shard.files.items()
    }
    for name, record in files.items():
        if worker.digests.get(name) != record:
            raise MismatchError(
                f"{worker.path / name} is not the file that was written with {vault.path}; copy it again"
            )


def verified_manifest(path: Path, key: KeySpec, *, old: bool = False) -> tuple[bytes, VaultManifest, bytes]:
    """The manifest of a vault folder that its seal authenticates, as bytes and as read, and the data key.

    Args:
        old: those of version 2 will do.

    Raises:
        CredentialError, SealError, ShareError: as `open_vault`.
    """
    data, manifest = _read_manifest(path / MANIFEST, VaultManifest, old=old)
    seal = read_seal(path)
    data_key = open_seal(path, key, seal)
    try:
        check_manifest(path, seal, data_key, data)
    except SealError:
        other = beside(path / MANIFEST, path)  # a revision was cut off after its last word
        if not os.path.lexists(other):
            raise
        try:
            data, manifest = _read_manifest(other, VaultManifest, old=old)
            check_manifest(path, seal, data_key, data)
        except ShareError:
            data = b""
        if not data:
            raise
    return data, manifest, data_key


def read_vault_manifest(path: Path | str) -> VaultManifest:
    """The manifest of a vault folder, without reading or verifying anything else.

    Raises:
        ShareError: there is none, or it is not valid.
    """
    return _read_manifest(Path(path) / MANIFEST, VaultManifest)[1]


def record(path: Path) -> FileRecord:
    """Length and digest of a file, read in chunks.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(bytes=file.tell(), sha256=digest)


def open_tensors(
    path: Path, data_key: bytes, specs: Mapping[str, TensorSpec], out: Mapping[str, memoryview]
) -> None:
    """Decrypt the tensors `specs` of a file of the vault, each into its place.

    The file is opened once, and each tensor is authenticated as it is decrypted.

    Args:
        specs: what the manifest says of all tensors of this file.
        out: writable bytes for each of them, of its length.

    Raises:
        SealError: sealed bytes were altered, or are not those of this tensor.
        ShareError: the file cannot be read, or does not hold exactly these tensors.
    """
    try:
        with open_regular(path) as file:
            entries = _header(path, file, {name: sealed_spec(spec) for name, spec in specs.items()})
            for name, entry in entries.items():
                file.seek(entry.start)
                open_blob(data_key, f"{path.name}/{name}", file, entry.nbytes, out[name])
    except OSError as error:
        raise ShareError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error


def sliplm_version() -> str:
    """The installed version, as manifests record it."""
    try:
        return version("sliplm")
    except PackageNotFoundError:
        return "0+unknown"


M = TypeVar("M", VaultManifest, WorkerManifest)


def _read_manifest(path: Path, kind: type[M], *, old: bool = False) -> tuple[bytes, M]:
    side: Side = "vault" if kind is VaultManifest else "worker"
    if side_of(path.parent) not in (None, side):
        check_folder(path.parent, side)
    try:
        data = read_bounded(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise ShareError(
            wrong_folder(path.parent, side)
            if isinstance(error, FileNotFoundError | NotADirectoryError)
            else f"{path} cannot be read ({error.strerror}); {AGAIN}"
        ) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ShareError(f"{path} is longer than {MAX_MANIFEST_BYTES} bytes: this is no manifest")
    _outline(path, data, kind, old=old)
    try:
        manifest = kind.model_validate_json(data)
    except (ValidationError, RecipeError) as error:
        text = problems(error) if isinstance(error, ValidationError) else str(error)
        raise ShareError(f"{path} is not a valid manifest; {AGAIN}:\n{text}") from error
    names = [group.name for group in manifest.groups]
    if len(set(names)) != len(names):
        raise ShareError(f"{path} names a group twice; {AGAIN}")
    return data, manifest


def _outline(path: Path, data: bytes, kind: type[BaseModel], *, old: bool) -> None:
    """Refuse what would make validation list errors by the million, or copy all of it into each of them."""
    if data.count(b",") > MAX_MANIFEST_ITEMS:
        raise ShareError(f"{path} has more than {MAX_MANIFEST_ITEMS} entries: this is no manifest")
    try:
        found = json.loads(data, object_pairs_hook=_small)
    except (ValueError, RecursionError) as error:
        raise ShareError(f"{path} is not a valid manifest; {AGAIN}:\n{error}") from error
    if isinstance(found, dict) and found.get("version") in (1, 2) and not (old and found["version"] == 2):
        raise ShareError(
            f"{path} was made by an older release of sliplm, whose default basis can be told from a random "
            "one: split again with --i-know, and count the old worker share as published (SECURITY.md)"
        )
    fields = found if isinstance(found, dict) else {}
    wanted = kind.model_fields["format"].default
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    lines = [f"{name}: this field is required" for name in required if name not in fields]
    if lines:
        text = "\n".join([f"format: should be {wanted!r}", *lines])
        raise ShareError(f"{path} is not a valid manifest; {AGAIN}:\n{text}")


def _small(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_OBJECT_ITEMS:
        raise ValueError(f"an object with more than {MAX_OBJECT_ITEMS} fields")
    return dict(pairs)


def _header(path: Path, file: BufferedReader, specs: Mapping[str, TensorSpec]) -> dict[str, TensorEntry]:
    try:
        entries = read_header(path, file, limit=HeaderLimit.of(specs.values()))
    except (OSError, ValueError) as error:
        raise ShareError(f"{path} cannot be used: {error}; {AGAIN}") from error
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if found != {name: (spec.dtype, spec.shape) for name, spec in specs.items()}:
        raise ShareError(f"{path} does not hold the tensors that its manifest names; split again")
    if any(entry.start % np.dtype(NUMPY[entry.dtype]).itemsize for entry in entries.values()):
        raise ShareError(f"{path} holds tensors that are not aligned; split again")
    return entries
