"""The working folder of a campaign: results of one model on one text, and the splits that are attacked."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sliplm.attacks.children import end_with_parent
from sliplm.attacks.text import Text
from sliplm.engines.transformers.checkpoint import Checkpoint
from sliplm.engines.transformers.convert import split
from sliplm.errors import MismatchError
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import read_vault_manifest, record

AGAIN = "-again"  # the second split of the same weights, of another rank
_CORES = 4  # for each split of several side by side
_SUBJECT = "subject.json"


def claim(out: Path, model_dir: Path, text: Text) -> None:
    """Take a folder for a campaign on this model and text, or check that it is one.

    Raises:
        MismatchError: its results are of another model, or of a text that is another or cut otherwise.
        CheckpointError: as `Checkpoint`.
    """
    files = {path.name: record(path).sha256 for path in Checkpoint(model_dir).files}
    digest = hashlib.sha256()
    for part in (text.train, text.valid, text.test):
        digest.update(repr(tuple(part.shape)).encode() + part.numpy().tobytes())
    subject = {"weights": files, "text": digest.hexdigest()}
    file = out / _SUBJECT
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(subject) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MismatchError(f"{file} is damaged: choose another folder") from error
    other = [name for name in subject if found.get(name) != subject[name]]
    if other:
        raise MismatchError(
            f"{out} has results with other {' and '.join(other)}, which cannot be mixed with these: choose "
            "another folder"
        )


def prepare(
    model_dir: Path, work: Path, recipes: Mapping[str, Recipe], progress: Callable[[int, int], None]
) -> None:
    """Split the model by each recipe that has no split in `work` yet.

    Args:
        progress: called with the number of splits done and their number in all.

    Raises:
        MismatchError: a split there is by another recipe of that name.
        what `sliplm.split` raises.
    """
    work.mkdir(parents=True, exist_ok=True)
    key = work / "key"
    if not key.exists():
        with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    for name, recipe in recipes.items():
        if (work / name / "vault").exists():
            _check_recipe(work / name, recipe)
    missing = {name: recipe for name, recipe in recipes.items() if not (work / name / "vault").exists()}
    side_by_side = max(1, min(len(missing), (os.cpu_count() or 1) // _CORES))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(side_by_side, context, end_with_parent) as pool:
        waiting = [
            pool.submit(
                split, model_dir, work / name, recipe, key=key_of(work), i_know=True, ledger=work / "ledger"
            )
            for name, recipe in missing.items()
        ]
        for count, future in enumerate(waiting):
            progress(count, len(waiting))
            future.result()


def key_of(work: Path) -> str:
    """What seals the splits that were made for a campaign."""
    return f"file:{work / 'key'}"


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    if read_vault_manifest(folder / "vault").recipe != recipe:
        raise MismatchError(
            f"{folder} was split by another recipe: give this one another name, or choose another folder"
        )
