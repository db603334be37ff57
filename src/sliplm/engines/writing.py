"""Both shares of a model, written, whatever engine it is of: the end of every split (SPEC section 8)."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from sliplm import durable
from sliplm.cluster.tasks import HERE, Executor, in_order
from sliplm.engines.journal import PARTIAL, Journal
from sliplm.engines.progress import Update, shown
from sliplm.engines.public import Layout, PublicFiles, is_worker_folder
from sliplm.engines.source import Source, stack
from sliplm.errors import (
    CheckpointError,
    LedgerError,
    RecipeError,
    SealError,
    ShareError,
    SlipWarning,
)
from sliplm.planning.counts import SplitReport, report_for
from sliplm.shares.contents import sealed_spec, secret_specs, worker_spec
from sliplm.shares.grouptask import carry_out
from sliplm.shares.keysource import Key, KeySpec, checked, find, new_key_file
from sliplm.shares.ledger import VAULT_FILE, Ledger, Registration, register
from sliplm.shares.manifest import (
    MAX_GROUPS,
    FileRecord,
    KeptTensor,
    VaultManifest,
    WorkerGroup,
    public_split_id,
)
from sliplm.shares.sealing import SEAL, make_seal, open_seal, seal_blob, seal_manifest
from sliplm.shares.share import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MODEL,
    SHARE,
    read_vault_manifest,
    record,
    sliplm_version,
)
from sliplm.shares.splitter import Splitter
from sliplm.shares.tensorfile import SafetensorsWriter, TensorSpec, free_bytes, write_error


def refuse_existing(out: Path) -> None:
    """Refuse a folder that holds a split already; one that is unfinished is continued.

    Raises:
        ShareError: it does.
    """
    if not (out / PARTIAL).exists():
        _refuse(out)


def write_split(
    plan: Source,
    out: Path,
    key: KeySpec,
    progress: Update | None,
    *,
    i_know: bool = False,
    ledger: Path | str | None = None,
    splitter: Callable[[], Splitter],
    shards: int = 1,
    executor: Executor = HERE,
) -> SplitReport:
    """Write both shares of a model.

    Args:
        splitter: what splits groups, made in each process that splits some.
        executor: who carries out the splitting of groups.
        key, progress, i_know, ledger, shards: as `sliplm.split` takes them.

    Raises:
        CheckpointError, ClusterError, CredentialError, LedgerError, RecipeError, SealError, ShareError: as
            `sliplm.split`.
    """
    key = checked(key)
    layout = Layout(plan.groups({}), shards)
    depends = plan.key if shards == 1 else [plan.key, {"shards": shards}]
    with Journal(out, depends, secrets.token_hex(16)) as journal:
        if not journal.done:
            _refuse(out)
            _check_count(plan, shards)
            owner = find(key, new=not _sealed(journal))
            if owner.made:
                warnings.warn(new_key_file(), SlipWarning, stacklevel=3)
            data_key = _data_key(plan, journal, owner, layout)
            # two shares of a public base show nothing together
            hides = bool(plan.split) and not plan.public
            entry = _registered(plan, journal, owner, ledger, i_know) if hides else None
            with shown(progress, out) as update:
                made_by = splitter, executor
                _write_shares(plan.shuffled(data_key), journal, data_key, layout, entry, made_by, update)
            if entry is not None:
                entry.record()  # before anything is published: a crash in between costs nothing
            journal.finish()
        elif (journal.folder / "vault").exists():
            _continued(journal, key)
        _publish(journal.folder, out)
        journal.remove()
    return report_for(read_vault_manifest(out / "vault"))


def _refuse(out: Path) -> None:
    for name in _finished(out):
        raise ShareError(f"{out / name} exists; remove it or choose another folder")


def _finished(folder: Path) -> list[str]:
    """The shares that lie in a folder, the vault's last."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in found if is_worker_folder(name)] + [name for name in found if name == "vault"]


def _check_count(plan: Source, shards: int) -> None:
    """Refuse, before the work, what could not be opened after it.  Raises: RecipeError."""
    groups = plan.groups({})
    length = sum(len(entry.model_dump_json()) for entry in (*groups, *plan.kept_groups()))
    length += sum(len(spec.name) + 80 for spec in plan.kept_specs()) + 512 * shards
    if len(groups) > MAX_GROUPS or length + 128 * len(groups) > MAX_MANIFEST_BYTES:
        raise RecipeError(
            f"this recipe makes {len(groups)} groups with {length} bytes of names and numbers; a split has "
            f"at most {MAX_GROUPS} groups and {MAX_MANIFEST_BYTES} bytes: keep some whole by a rule with "
            'placement="vault"'
        )


def _registered(
    plan: Source, journal: Journal, owner: Key, ledger: Path | str | None, i_know: bool
) -> Registration:
    """The entry of this split, unless its model was split before.

    Raises: LedgerError; what this run has begun is removed then.
    """
    try:
        return register(
            Ledger(owner, None if ledger is None else Path(ledger)),
            ((group.name, stack(plan.read, group)) for group, _ in plan.split),
            split_id=journal.split_id,
            source=plan.model.name,
            recipe=plan.recipe,
            folder=journal.folder.parent,
            i_know=i_know,
        )
    except LedgerError:
        if not journal.resumed:
            journal.remove()
        raise


# --- writing ---------------------------------------------------------------------------------------------


def _sealed(journal: Journal) -> bool:
    """Whether there is an earlier run to continue."""
    return journal.resumed and (journal.folder / "vault" / SEAL).exists()


def _data_key(plan: Source, journal: Journal, key: Key, layout: Layout) -> bytes:
    """What seals the vault share: an earlier run's, if there is something to continue, else a fresh one."""
    vault = journal.folder / "vault"
    if _sealed(journal):
        return _continued(journal, key)
    journal.errors.clear()  # what was sealed with a key that is gone cannot be continued
    if not journal.resumed:
        _check_room(journal.folder, [*_secret_specs(plan), *_public_specs(plan), *_sealed_kept(plan)])
    try:
        vault.mkdir(mode=0o700, exist_ok=True)
        for name in layout.folders:
            (journal.folder / name).mkdir(mode=0o755, exist_ok=True)
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


def _write_shares(
    plan: Source,
    journal: Journal,
    data_key: bytes,
    layout: Layout,
    entry: Registration | None,
    made_by: tuple[Callable[[], Splitter], Executor],
    progress: Update,
) -> None:
    vault = journal.folder / "vault"
    resume = journal.resumed
    with (
        _sealed_writer(vault / SHARE, _secret_specs(plan), resume=resume) as secret_file,
        PublicFiles(journal.folder, layout, plan.groups({}), resume=resume) as public_file,
        _sealed_writer(vault / MODEL, _sealed_kept(plan), resume=False) as kept_file,
    ):
        if not (secret_file.resumed and public_file.resumed):
            journal.errors.clear()  # without both files there is nothing to continue
        for spec in plan.kept_specs():
            _write_sealed(kept_file, data_key, spec.name, plan.kept_bytes(spec.name))
        kept_file.sync()
        _split_groups(plan, journal, data_key, secret_file, public_file, made_by, progress)
    for name, data in plan.companions().items():
        if "/" in name:
            (vault / name).parent.mkdir(mode=0o700, exist_ok=True)
        _write_file(vault / name, data, 0o600)
    if entry is not None:
        _write_file(vault / VAULT_FILE, entry.entry.sealed(data_key, VAULT_FILE), 0o600)
    _write_manifests(plan, journal, data_key, layout)


def _public_specs(plan: Source) -> list[TensorSpec]:
    """The tensors of the worker's share."""
    return [worker_spec(group) for group in plan.groups({})]


def _secret_specs(plan: Source) -> list[TensorSpec]:
    """The tensors of the vault's share, as they lie on the disk."""
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
    public: PublicFiles,
    made_by: tuple[Callable[[], Splitter], Executor],
    progress: Update,
) -> None:
    total = sum(group.rows * group.columns for group, _ in plan.split)
    done = 0
    found = {group.name: group for group in plan.groups({})}
    splitter, executor = made_by
    missing = [(group, choice) for group, choice in plan.split if group.name not in journal.errors]
    with executor.pool(splitter, carry_out) as pool:
        results = in_order(pool, (plan.task(group, choice) for group, choice in missing))
        for group, _ in plan.split:
            progress(done, total, group.name)
            done += group.rows * group.columns
            if group.name in journal.errors:
                continue
            made = next(results)
            if not all(map(math.isfinite, made.errors)):
                raise CheckpointError(
                    f"{group.name} holds values so large that sums of their squares leave float32: scale "
                    f'them, or keep it whole by Rule(pattern="{group.name}", placement="vault")'
                )
            public.write(group.name, made.w)
            arrays = {**made.secrets, **plan.adapter_arrays(group, found[group.name])}
            for name, array in arrays.items():
                _write_sealed(secret, data_key, name, [array.tobytes()])
            secret.sync()
            journal.finish_group(group.name, made.errors)
    progress(total, total, "")


def _write_manifests(plan: Source, journal: Journal, data_key: bytes, layout: Layout) -> None:
    groups = plan.groups(journal.errors)
    seen = tuple(WorkerGroup(name=g.name, rows=g.rows, columns=g.columns, dtype=g.dtype) for g in groups)
    vault, workers = journal.folder / "vault", [journal.folder / name for name in layout.folders]
    files = [_records(worker) for worker in workers]
    split_id = public_split_id(seen, *(f[SHARE] for f in files)) if plan.public else journal.split_id
    for worker, public in zip(workers, layout.manifests(seen, split_id, files), strict=True):
        _write_file(worker / MANIFEST, public.model_dump_json().encode(), 0o644)
    manifest = VaultManifest(
        split_id=split_id,
        sliplm=sliplm_version(),
        source=plan.model,
        base=plan.base_model,
        adapters=plan.adapter_names,
        recipe=plan.recipe,
        groups=groups,
        kept=plan.kept_groups(),
        kept_tensors=tuple(KeptTensor(name=s.name, dtype=s.dtype, shape=s.shape) for s in plan.kept_specs()),
        kept_bytes=sum(spec.nbytes for spec in _sealed_kept(plan)),
        attention=plan.attention,
        files=_records(vault),
        **layout.known([_records(worker) | {MANIFEST: record(worker / MANIFEST)} for worker in workers]),
    )
    text = manifest.model_dump_json().encode()
    _write_file(vault / MANIFEST, text, 0o600)
    seal_manifest(vault, data_key, text)


def _publish(partial: Path, out: Path) -> None:
    """Move the complete folders into place; a crash in between is made good by the next call."""
    try:
        for name in _finished(partial):
            for folder in (*filter(Path.is_dir, (partial / name).iterdir()), partial / name):
                durable.sync_folder(folder, lasting=False)
            (partial / name).rename(out / name)
        durable.sync_folder(out, lasting=False)
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
            durable.set_mode(file.fileno(), mode)
            file.write(data)
            file.flush()
            durable.sync(file.fileno())
    except OSError as error:
        raise write_error(path, len(data), error) from error


def _records(folder: Path) -> dict[str, FileRecord]:
    names = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return {
        name: record(file)
        for name, file in names.items()
        if name not in (MANIFEST, SEAL) and not name.startswith(".")
    }
