"""A checkpoint folder -> the vault's folder and the worker's folder (SPEC, the split)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sliplm.counts import SplitReport, report_for
from sliplm.engines.groups import Group
from sliplm.engines.source import Source
from sliplm.engines.transformers.journal import PARTIAL, Journal
from sliplm.engines.transformers.plan import make_plan
from sliplm.errors import SealError, ShareError
from sliplm.keysource import KeySpec, checked
from sliplm.manifest import (
    FileRecord,
    KeptTensor,
    VaultManifest,
    WorkerGroup,
    WorkerManifest,
)
from sliplm.recipe import Recipe
from sliplm.sealing import SEAL, make_seal, open_seal, seal_blob, seal_manifest
from sliplm.share import (
    MANIFEST,
    MODEL,
    SHARE,
    read_vault_manifest,
    record,
    sealed_spec,
    secret_specs,
    secret_tensors,
    sliplm_version,
    worker_spec,
)
from sliplm.splitting import split_group
from sliplm.tensorfile import SafetensorsWriter, TensorSpec, free_bytes, write_error

Progress = Callable[[int, int, str], None]
"""Called with the weights done, the weights in all, and the name of the group that comes next."""


def split(
    model_dir: Path | str,
    out_dir: Path | str,
    recipe: Recipe | None = None,
    *,
    key: KeySpec = None,
    progress: Progress | None = None,
) -> SplitReport:
    """Split a checkpoint into `out_dir/vault` (secret, sealed) and `out_dir/worker` (assume it is public).

    Memory: about the largest group in float32, a few times; never the model.  A run that was killed, or that
    met a full disk, is continued by the same call: finished groups are kept in `out_dir/.partial`.

    Args:
        model_dir: a Hugging Face checkpoint folder with safetensors weights.
        out_dir: made if missing; must not hold a `vault` or `worker` yet.
        recipe: how to split; Recipe() if None.
        key: what seals the vault share, see `keysource`; None takes the user's key file, and makes it if
            there is none.  **Without it the vault share is lost.**
        progress: called before each group and at the end.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of no kind that can be split.
        UnsplittableError: modules hold matrices that cannot be split, and the recipe does not place them in
            the vault.
        RecipeError: a rank above a group's, or a rule that matches nothing.
        CredentialError: the key cannot be had.
        SealError: an earlier run that is to be continued was sealed with another key.
        ShareError: the folders exist, or the disk is full or cannot be written.
    """
    out, key = Path(out_dir), checked(key)
    if not (out / PARTIAL).exists():
        refuse_existing(out)
    return write_split(make_plan(Path(model_dir), recipe or Recipe()), out, key, progress)


def write_split(plan: Source, out: Path, key: KeySpec, progress: Progress | None) -> SplitReport:
    """Write both shares of a model, whatever engine it is of; the end of every split.

    Raises:
        CheckpointError, CredentialError, SealError, ShareError: as `split`.
    """
    with Journal(out, plan.key, secrets.token_hex(16)) as journal:
        if not journal.done:
            refuse_existing(out)
            data_key = _data_key(plan, journal, key)
            _write_shares(plan, journal, data_key, progress or (lambda done, total, name: None))
            journal.finish()
        elif (journal.folder / "vault").exists():
            _continued(journal, key)
        _publish(journal.folder, out)
        journal.remove()
    return report_for(read_vault_manifest(out / "vault"))


def refuse_existing(out: Path) -> None:
    """Raise ShareError if a folder holds a split already."""
    for name in ("vault", "worker"):
        if (out / name).exists():
            raise ShareError(f"{out / name} exists; remove it or choose another folder")


# --- writing ---------------------------------------------------------------------------------------------


def _data_key(plan: Source, journal: Journal, key: KeySpec) -> bytes:
    """What seals the vault share: an earlier run's, if there is something to continue, else a fresh one."""
    vault, worker = journal.folder / "vault", journal.folder / "worker"
    if journal.resumed and (vault / SEAL).exists():
        return _continued(journal, key)
    journal.errors.clear()  # what was sealed with a key that is gone cannot be continued
    if not journal.resumed:
        _check_room(journal.folder, [*_secret_specs(plan), *_public_specs(plan), *_sealed_kept(plan)])
    try:
        vault.mkdir(mode=0o700, exist_ok=True)
        worker.mkdir(mode=0o755, exist_ok=True)
        (vault / SHARE).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(vault, 0, error) from error
    return make_seal(vault, key)


def _continued(journal: Journal, key: KeySpec) -> bytes:
    try:
        return open_seal(journal.folder / "vault", key)
    except SealError as error:
        raise SealError(
            f"{error}; or remove {journal.folder}, the unfinished split, to begin again"
        ) from error


def _write_shares(plan: Source, journal: Journal, data_key: bytes, progress: Progress) -> None:
    vault, worker = journal.folder / "vault", journal.folder / "worker"
    resume = journal.resumed
    with (
        _sealed_writer(vault / SHARE, _secret_specs(plan), resume=resume) as secret_file,
        SafetensorsWriter(worker / SHARE, _public_specs(plan), mode=0o644, resume=resume) as public_file,
        _sealed_writer(vault / MODEL, _sealed_kept(plan), resume=False) as kept_file,
    ):
        if not (secret_file.resumed and public_file.resumed):
            journal.errors.clear()  # without both files there is nothing to continue
        for spec in plan.kept_specs():
            _write_sealed(kept_file, data_key, spec.name, plan.kept_bytes(spec.name))
        kept_file.sync()
        _split_groups(plan, journal, data_key, secret_file, public_file, progress)
    for name, data in plan.companions().items():
        _write_file(vault / name, data, 0o600)
    _write_manifests(plan, journal, data_key, vault, worker)


def _public_specs(plan: Source) -> list[TensorSpec]:
    return [worker_spec(group) for group in plan.groups({})]


def _secret_specs(plan: Source) -> list[TensorSpec]:
    return [sealed_spec(spec) for group in plan.groups({}) for spec in secret_specs(group)]


def _sealed_kept(plan: Source) -> list[TensorSpec]:
    return [sealed_spec(spec) for spec in plan.kept_specs()]


def _sealed_writer(path: Path, specs: list[TensorSpec], *, resume: bool) -> SafetensorsWriter:
    return SafetensorsWriter(path, specs, resume=resume, metadata={"format": "pt", "sealed": "sliplm/1"})


def _write_sealed(file: SafetensorsWriter, data_key: bytes, name: str, pieces: Iterable[bytes]) -> None:
    offset = 0
    for sealed in seal_blob(data_key, f"{file.path.name}/{name}", pieces):
        file.write_bytes(name, sealed, offset)
        offset += len(sealed)


def _split_groups(
    plan: Source,
    journal: Journal,
    data_key: bytes,
    secret: SafetensorsWriter,
    public: SafetensorsWriter,
    progress: Progress,
) -> None:
    total = sum(group.rows * group.columns for group, _ in plan.split)
    done = 0
    for group, choice in plan.split:
        progress(done, total, group.name)
        done += group.rows * group.columns
        if group.name in journal.errors:
            continue
        part = split_group(
            group.name,
            _stack(plan, group),
            rank=choice.rank,
            precision=choice.precision,
            rotation=choice.rotation,
        )
        public.write(group.name, part.w)
        for name, array in secret_tensors(part.secrets).items():
            _write_sealed(secret, data_key, name, [array.tobytes()])
        public.sync()
        secret.sync()
        journal.finish_group(group.name, (part.error, part.svd_error))
    progress(total, total, "")


def _stack(plan: Source, group: Group) -> npt.NDArray[np.float32]:
    """The members' weights under each other: float32 [rows, columns]."""
    stacked = np.empty((group.rows, group.columns), dtype=np.float32)
    first = 0
    for member in group.members:
        weight = plan.read(member.weight)
        weight = weight.T if member.transposed else weight.reshape(member.rows, member.columns)
        stacked[first : first + member.rows] = weight
        first += member.rows
    return stacked


def _write_manifests(plan: Source, journal: Journal, data_key: bytes, vault: Path, worker: Path) -> None:
    groups = plan.groups(journal.errors)
    public = WorkerManifest(
        split_id=journal.split_id,
        groups=tuple(WorkerGroup(name=g.name, rows=g.rows, columns=g.columns, dtype=g.dtype) for g in groups),
        files=_records(worker),
    )
    _write_file(worker / MANIFEST, public.model_dump_json(indent=1).encode(), 0o644)
    manifest = VaultManifest(
        split_id=journal.split_id,
        sliplm=sliplm_version(),
        source=plan.model,
        recipe=plan.recipe,
        groups=groups,
        kept=plan.kept_groups(),
        kept_tensors=tuple(KeptTensor(name=s.name, dtype=s.dtype, shape=s.shape) for s in plan.kept_specs()),
        kept_bytes=sum(spec.nbytes for spec in _sealed_kept(plan)),
        attention=plan.attention,
        files=_records(vault),
        worker_files=_records(worker) | {MANIFEST: record(worker / MANIFEST)},
    )
    text = manifest.model_dump_json(indent=1).encode()
    _write_file(vault / MANIFEST, text, 0o600)
    seal_manifest(vault, data_key, text)


def _publish(partial: Path, out: Path) -> None:
    """Move both complete folders into place; a crash in between is made good by the next call."""
    try:
        for name in ("worker", "vault"):
            if (partial / name).exists():
                _sync_folder(partial / name)
                (partial / name).rename(out / name)
        _sync_folder(out)
    except OSError as error:
        raise write_error(out, 0, error) from error


def _check_room(folder: Path, specs: list[TensorSpec]) -> None:
    needed, free = sum(spec.nbytes for spec in specs), free_bytes(folder)
    if needed > free:
        raise ShareError(
            f"the two shares need {needed} bytes, but only {free} are free in {folder}; "
            "make room or choose another folder"
        )


def _write_file(path: Path, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, len(data), error) from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _records(folder: Path) -> dict[str, FileRecord]:
    return {
        file.name: record(file)
        for file in sorted(folder.iterdir())
        if file.name not in (MANIFEST, SEAL) and not file.name.startswith(".")
    }
