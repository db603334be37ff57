"""A checkpoint folder -> the vault's folder and the worker's folder (SPEC, the split)."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sliplm.counts import SplitReport, report_for
from sliplm.engines.transformers.checkpoint import Checkpoint
from sliplm.engines.transformers.finetune import plan_against, refuse_without_base, source_model
from sliplm.engines.transformers.journal import PARTIAL, Journal
from sliplm.engines.transformers.layout import Group
from sliplm.engines.transformers.origin import compare, warn_of_named_base, warn_of_relatives
from sliplm.engines.transformers.plan import Plan, make_plan, members, stack, stored_as
from sliplm.errors import LedgerError, SealError, ShareError
from sliplm.keysource import Key, KeySpec, checked, find
from sliplm.ledger import VAULT_FILE, Ledger, Registration, register
from sliplm.manifest import (
    FileRecord,
    KeptGroup,
    KeptTensor,
    VaultManifest,
    WorkerGroup,
    WorkerManifest,
    public_split_id,
)
from sliplm.recipe import GroupChoice, Recipe
from sliplm.sealing import SEAL, make_seal, open_seal, seal_blob, seal_manifest
from sliplm.share import (
    MANIFEST,
    MODEL,
    SHARE,
    read_vault_manifest,
    record,
    sealed_spec,
    secret_tensors,
    sliplm_version,
)
from sliplm.sketch import Likeness
from sliplm.splitting import GroupSplit, split_group
from sliplm.tensorfile import SafetensorsWriter, TensorSpec, free_bytes, write_error

Progress = Callable[[int, int, str], None]
"""Called with the weights done, the weights in all, and the name of the group that comes next."""

# files that go along with a model: how to generate, how to make tokens
_COMPANIONS = re.compile(
    r"(generation_config\.json|tokenizer[\w.-]*|[\w-]*\.model|vocab\.(json|txt)|merges\.txt|"
    r"added_tokens\.json|special_tokens_map\.json|chat_template\.(json|jinja))"
)


def split(
    model_dir: Path | str,
    out_dir: Path | str,
    recipe: Recipe | None = None,
    *,
    key: KeySpec = None,
    public: Path | str | Iterable[Path | str] = (),
    i_know: bool = False,
    ledger: Path | str | None = None,
    progress: Progress | None = None,
    base: Path | str | None = None,
    adapters: Mapping[str, Path | str] | None = None,
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
        public: checkpoint folders of one or several public models that this one may come from.  How close it
            is to each is in the report; a SlipWarning says what follows.
        i_know: split a model again of which the ledger has a share, or a close relative's.  The two shares
            together show what they differ by, which is what each of them hides.
        ledger: the folder that remembers splits; None for the owner's, see `ledger`.
        progress: called before each group and at the end.
        base: the folder of the public model that this one was trained from, or this one itself.  The worker's
            share is then the base alone, whatever was trained, and the vault holds the difference.
        adapters: by name the folders of LoRA adapters to the model, as peft saves them; only with a base.

    Raises:
        AdapterError: an adapter is incomplete, of another model or of no kind that can be kept exactly.
        CheckpointError: the checkpoint is incomplete, damaged or of no kind that can be split.
        UnsplittableError: modules hold matrices that cannot be split, and the recipe does not place them in
            the vault.
        RecipeError: a rank above a group's, a rule that matches nothing, or what has no meaning with a base,
            or without one.
        CredentialError: the key cannot be had.
        LedgerError: the same weights or a close relative were split before under this key; or the ledger
            cannot be read or written.
        SealError: an earlier run that is to be continued was sealed with another key.
        ShareError: the folders exist, or the disk is full or cannot be written.
    """
    out, key = Path(out_dir), checked(key)
    if not (out / PARTIAL).exists():
        _refuse_existing(out)
    plan = _planned(Path(model_dir), recipe or Recipe(), base, adapters or {})
    relatives = _relatives(plan, public)
    with Journal(out, plan.key, secrets.token_hex(16)) as journal:
        if not journal.done:
            _refuse_existing(out)
            owner = find(key, new=not _sealed(journal))
            data_key = _data_key(plan, journal, owner)
            entry = _registered(plan, journal, owner, ledger, i_know) if _hides(plan) else None
            _write_shares(plan, journal, data_key, entry, progress or (lambda done, total, name: None))
            if entry is not None:
                entry.record()  # before anything is published: a crash in between costs nothing
            journal.finish()
        elif (journal.folder / "vault").exists():
            _continued(journal, key)
        _publish(journal.folder, out)
        journal.remove()
    return report_for(read_vault_manifest(out / "vault")).model_copy(update={"public": relatives})


def _planned(
    model: Path, recipe: Recipe, base: Path | str | None, adapters: Mapping[str, Path | str]
) -> Plan:
    if base is not None:
        return plan_against(model, recipe, Path(base), adapters)
    refuse_without_base(recipe, adapters)
    return make_plan(model, recipe)


def _refuse_existing(out: Path) -> None:
    for name in ("vault", "worker"):
        if (out / name).exists():
            raise ShareError(f"{out / name} exists; remove it or choose another folder")


# --- one model, one split: SPEC section 8 -----------------------------------------------------------------


def _hides(plan: Plan) -> bool:
    """Whether two different worker shares of this model would show anything together: a public base never."""
    return bool(plan.split) and (plan.base is None or not plan.base.alone)


def _registered(
    plan: Plan, journal: Journal, owner: Key, ledger: Path | str | None, i_know: bool
) -> Registration:
    """The entry of this split, unless its model was split before.

    Raises: LedgerError; what this run has begun is removed then.
    """
    try:
        return register(
            Ledger(owner, None if ledger is None else Path(ledger)),
            _weights(plan, (group for group, _ in plan.split)),
            split_id=journal.split_id,
            source=plan.checkpoint.path.resolve().name,
            recipe=plan.recipe,
            folder=journal.folder.parent,
            i_know=i_know,
        )
    except LedgerError:
        if not journal.resumed:
            journal.remove()
        raise


def _relatives(plan: Plan, public: Path | str | Iterable[Path | str]) -> dict[str, Likeness]:
    """How close the model is to public ones, with the warnings that this calls for."""
    proven = all(choice.rotation == "haar" for _, choice in plan.split)
    folders = [public] if isinstance(public, str | Path) else list(public)
    plans = {str(folder): make_plan(Path(folder), Recipe(placement="vault")) for folder in folders}
    if not plans:
        if not proven and plan.base is None:
            warn_of_named_base(plan.checkpoint.path, level=3)
        return {}
    ours = _weights(plan, (group for group, _ in plan.split))
    found = compare(ours, {name: _weights(other, _whole(other)) for name, other in plans.items()})
    warn_of_relatives(found, proven=proven, level=3)
    return found


def _whole(plan: Plan) -> Iterator[Group]:
    """The groups of a public model, but for those that the checkpoint stores in another form."""
    for group in plan.whole:
        if all(stored_as(member.weight, plan.layout, plan.sources) for member in group.members):
            yield group


def _weights(plan: Plan, groups: Iterable[Group]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for group in groups:
        yield group.name, stack(plan.checkpoint, plan.layout, plan.sources, group)


# --- writing ---------------------------------------------------------------------------------------------


def _sealed(journal: Journal) -> bool:
    """Whether there is an earlier run to continue."""
    return journal.resumed and (journal.folder / "vault" / SEAL).exists()


def _data_key(plan: Plan, journal: Journal, key: Key) -> bytes:
    """What seals the vault share: an earlier run's, if there is something to continue, else a fresh one."""
    vault, worker = journal.folder / "vault", journal.folder / "worker"
    if _sealed(journal):
        return _continued(journal, key)
    journal.errors.clear()  # what was sealed with a key that is gone cannot be continued
    if not journal.resumed:
        _check_room(journal.folder, [*plan.secret_specs(), *plan.public_specs(), *_sealed_kept(plan)])
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


def _write_shares(
    plan: Plan, journal: Journal, data_key: bytes, entry: Registration | None, progress: Progress
) -> None:
    vault, worker = journal.folder / "vault", journal.folder / "worker"
    resume = journal.resumed
    with (
        _sealed_writer(vault / SHARE, plan.secret_specs(), resume=resume) as secret_file,
        SafetensorsWriter(worker / SHARE, plan.public_specs(), mode=0o644, resume=resume) as public_file,
        _sealed_writer(vault / MODEL, _sealed_kept(plan), resume=False) as kept_file,
    ):
        if not (secret_file.resumed and public_file.resumed):
            journal.errors.clear()  # without both files there is nothing to continue
        for name, key in plan.kept.items():
            _write_sealed(kept_file, data_key, name, plan.checkpoint.chunks(key))
        kept_file.sync()
        _split_groups(plan, journal, data_key, secret_file, public_file, progress)
    _write_companions(plan, vault)
    if entry is not None:
        _write_file(vault / VAULT_FILE, entry.entry.sealed(data_key, VAULT_FILE), 0o600)
    _write_manifests(plan, journal, data_key, vault, worker)


def _sealed_kept(plan: Plan) -> list[TensorSpec]:
    return [sealed_spec(spec) for spec in plan.kept_specs()]


def _sealed_writer(path: Path, specs: list[TensorSpec], *, resume: bool) -> SafetensorsWriter:
    return SafetensorsWriter(path, specs, resume=resume, metadata={"format": "pt", "sealed": "sliplm/1"})


def _write_sealed(file: SafetensorsWriter, data_key: bytes, name: str, pieces: Iterable[bytes]) -> None:
    offset = 0
    for sealed in seal_blob(data_key, f"{file.path.name}/{name}", pieces):
        file.write_bytes(name, sealed, offset)
        offset += len(sealed)


def _split_groups(
    plan: Plan,
    journal: Journal,
    data_key: bytes,
    secret: SafetensorsWriter,
    public: SafetensorsWriter,
    progress: Progress,
) -> None:
    total = sum(group.rows * group.columns for group, _ in plan.split)
    done = 0
    found = {group.name: group for group in plan.groups({})}
    for group, choice in plan.split:
        progress(done, total, group.name)
        done += group.rows * group.columns
        if group.name in journal.errors:
            continue
        part, norms = _split_group(plan, group, choice)
        public.write(group.name, part.w)
        arrays = secret_tensors(part.secrets)
        if plan.base is not None:
            arrays |= plan.base.adapter_arrays(group, found[group.name])
        for name, array in arrays.items():
            _write_sealed(secret, data_key, name, [array.tobytes()])
        public.sync()
        secret.sync()
        journal.finish_group(group.name, (part.error, part.svd_error, *norms))
    progress(total, total, "")


def _split_group(plan: Plan, group: Group, choice: GroupChoice) -> tuple[GroupSplit, tuple[float, ...]]:
    if plan.base is not None:
        return plan.base.split_group(plan, group, choice)
    part = split_group(
        group.name,
        stack(plan.checkpoint, plan.layout, plan.sources, group),
        rank=choice.rank,
        precision=choice.precision,
        rotation=choice.rotation,
    )
    return part, ()


def _write_companions(plan: Plan, vault: Path) -> None:
    """config.json of the split model, generation settings and tokenizer files."""
    source = plan.checkpoint.path
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "slip"}
    if plan.untied:
        config["tie_word_embeddings"] = False
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = _dtype(plan.checkpoint)  # transformers would look for it in the sealed weights
    _write_file(vault / "config.json", json.dumps(config, indent=2).encode(), 0o600)
    for file in sorted(source.iterdir()):
        if _COMPANIONS.fullmatch(file.name) and file.is_file():
            _write_file(vault / file.name, file.read_bytes(), 0o600)


def _dtype(checkpoint: Checkpoint) -> str:
    """The type of the checkpoint's first floating tensor, as transformers would find it."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    types = (entry.dtype for entry in checkpoint.entries.values())
    return next((names[dtype] for dtype in types if dtype in names), "float32")


def _write_manifests(plan: Plan, journal: Journal, data_key: bytes, vault: Path, worker: Path) -> None:
    groups = plan.groups(journal.errors)
    seen = tuple(WorkerGroup(name=g.name, rows=g.rows, columns=g.columns, dtype=g.dtype) for g in groups)
    files = _records(worker)
    alone = plan.base is not None and plan.base.alone
    public = WorkerManifest(
        split_id=public_split_id(seen, files[SHARE]) if alone else journal.split_id, groups=seen, files=files
    )
    _write_file(worker / MANIFEST, public.model_dump_json(indent=1).encode(), 0o644)
    base = plan.base
    manifest = VaultManifest(
        split_id=public.split_id,
        sliplm=sliplm_version(),
        source=source_model(plan.checkpoint, plan.layout),
        base=None if base is None else base.source,
        adapters=() if base is None else tuple(adapter.name for adapter in base.adapters),
        recipe=plan.recipe,
        groups=groups,
        kept=tuple(
            KeptGroup(name=g.name, rows=g.rows, columns=g.columns, members=members(g)) for g in plan.whole
        ),
        kept_tensors=tuple(KeptTensor(name=s.name, dtype=s.dtype, shape=s.shape) for s in plan.kept_specs()),
        kept_bytes=sum(spec.nbytes for spec in _sealed_kept(plan)),
        attention=plan.layout.attention,
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
