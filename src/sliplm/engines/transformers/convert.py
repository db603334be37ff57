"""A checkpoint folder -> the vault's folder and the worker's folder (SPEC, the split)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sliplm.cluster.onray import executor
from sliplm.engines.groups import Group
from sliplm.engines.progress import Update
from sliplm.engines.source import stack
from sliplm.engines.transformers.finetune import plan_against, refuse_without_base
from sliplm.engines.transformers.origin import compare, warn_of_named_base, warn_of_relatives
from sliplm.engines.transformers.plan import Plan, make_plan, warn_of_whole
from sliplm.engines.writing import refuse_existing, write_split
from sliplm.errors import InputError
from sliplm.filesystem import readable
from sliplm.planning.counts import SplitReport
from sliplm.shares.keysource import KeySpec, checked
from sliplm.shares.recipe import Recipe
from sliplm.shares.sketch import Likeness
from sliplm.shares.splitter import Splitter


def split(
    model_dir: Path | str,
    out_dir: Path | str,
    recipe: Recipe | None = None,
    *,
    key: KeySpec = None,
    public: Path | str | Iterable[Path | str] = (),
    i_know: bool = False,
    ledger: Path | str | None = None,
    progress: Update | None = None,
    base: Path | str | None = None,
    adapters: Mapping[str, Path | str] | None = None,
    device: str = "auto",
    shards: int = 1,
    ray: str | None = None,
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
        progress: called before each group and at the end; None shows a bar where stderr is a terminal.
        base: the folder of the public model that this one was trained from, or this one itself.  The worker's
            share is then the base alone, whatever was trained, and the vault holds the difference.
        adapters: by name the folders of LoRA adapters to the model, as peft saves them; only with a base.
        device: where matrices are decomposed: "auto" (the first NVIDIA card, if PyTorch sees one; the
            processor for what it cannot), "cpu", or a card that must do it, "cuda" or "cuda:1".  The card
            holds secrets, and is trusted like the processor.
        shards: how many workers hold the share together, each whole groups of about as many bytes: folders
            `worker-1`, `worker-2` and so on instead of `worker`.
        ray: "HOST:PORT" of a Ray cluster's head, or "auto": its machines split the groups, which they see
            in clear with all their secrets.  Only the owner's own machines may belong to it.  `device` "cuda"
            takes a card for each group, anything else processors.

    Raises:
        CardError: the named card is missing, fails, or has too little memory.
        ClusterError: the cluster is missing, may not be used as it is, or loses a group again and again.
        InputError: there is no such device.
        AdapterError: an adapter is incomplete, of another model or of no kind that can be kept exactly.
        CheckpointError: the checkpoint is incomplete, damaged or of no kind that can be split.
        UnsplittableError: modules hold matrices that cannot be split, and the recipe does not place them in
            the vault.
        RecipeError: a rank above a group's, a rule that matches nothing, what has no meaning with a base, or
            without one, or more shards than groups.
        CredentialError: the key cannot be had.
        LedgerError: the same weights or a close relative were split before under this key; or the ledger
            cannot be read or written.
        SealError: an earlier run that is to be continued was sealed with another key.
        ShareError: the folders exist, or the disk is full or cannot be written.
    """
    out, key = Path(out_dir), checked(key)
    refuse_existing(out)
    there = device if ray is None else _device_there(device)
    with executor(ray, cards=int(there == "cuda")) as carried_out:
        splitter = Splitter(device if ray is None else "cpu")
        plan = _planned(Path(model_dir), recipe or Recipe(), base, adapters or {}, splitter)
        warn_of_whole(plan, level=2)
        relatives = _relatives(plan, public)
        report = write_split(
            plan, out, key, progress, i_know=i_know, ledger=ledger, shards=shards, executor=carried_out,
            splitter=(lambda: splitter) if ray is None else partial(Splitter, there),
        )  # fmt: skip
    return report.model_copy(update={"public": relatives})


def _device_there(device: str) -> str:
    """On a machine of a cluster: Ray shows a task the cards that it asked for."""
    if ":" in device:
        raise InputError(f"device {device!r}: Ray chooses the card; say cuda or cpu")
    return "cuda" if device == "cuda" else "cpu"


def _planned(
    model: Path,
    recipe: Recipe,
    base: Path | str | None,
    adapters: Mapping[str, Path | str],
    splitter: Splitter,
) -> Plan:
    if base is not None:
        return plan_against(model, recipe, Path(base), adapters, splitter)
    refuse_without_base(recipe, adapters)
    return make_plan(model, recipe)


def _relatives(plan: Plan, public: Path | str | Iterable[Path | str]) -> dict[str, Likeness]:
    """How close the model is to public ones, with the warnings that this calls for."""
    proven = all(choice.rotation == "haar" for _, choice in plan.split)
    folders = [public] if isinstance(public, str | Path) else list(public)
    plans = {readable(folder): make_plan(Path(folder), Recipe(placement="vault")) for folder in folders}
    if not plans:
        if not proven and plan.base is None:
            warn_of_named_base(plan.stored.checkpoint.path, level=3)
        return {}
    ours = _weights(plan, (group for group, _ in plan.split))
    found = compare(ours, {name: _weights(other, _whole(other)) for name, other in plans.items()})
    warn_of_relatives(found, proven=proven, level=3)
    return found


def _whole(plan: Plan) -> Iterator[Group]:
    """The groups of a public model, but for those that the checkpoint stores in another form."""
    for group in plan.whole:
        if plan.stored.holds(group):
            yield group


def _weights(plan: Plan, groups: Iterable[Group]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for group in groups:
        yield group.name, stack(plan.read, group)
