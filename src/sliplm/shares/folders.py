"""Which folder of a split somebody gave, and which one is meant: for messages, nothing is verified."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Final, Literal

from sliplm.errors import ShareError
from sliplm.reading import open_regular

Side = Literal["vault", "worker"]

SIDES: Final[tuple[Side, ...]] = ("vault", "worker")
_MANIFEST: Final = "manifest.json"
_FIRST_SHARD: Final = "worker-1"
_HEAD: Final = 256  # bytes of a manifest, in which its format stands


def side_of(folder: Path) -> Side | None:
    """Whose share a folder holds, by the first bytes of its manifest; None if there is none to read."""
    try:
        with open_regular(folder / _MANIFEST) as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    return next((side for side in SIDES if f'"sliplm-{side}"'.encode() in head), None)


def wrong_folder(folder: Path, wanted: Side | None) -> str | None:
    """Why a folder is not the one that is wanted, and which is; None if it looks right.

    Args:
        wanted: whose share; None for what a split wrote, with both in it.
    """
    found = side_of(folder)
    if wanted is None:
        return _not_both(folder, found)
    if found == wanted:
        return None
    if found == "vault":
        return f"{folder} is the secret vault: it stays with you. Give the worker's folder, {_other(folder)}"
    if found == "worker":
        return f"{folder} is the worker's folder: give the vault's, {_other(folder)}"
    if side_of(_share(folder, wanted)) == wanted:
        some = "one of its shards, such as " if _share(folder, wanted).name == _FIRST_SHARD else ""
        there = _share(folder, wanted)
        return f"{folder} is what a split wrote, the vault and the worker: give {some}{there}"
    return f"{folder} {_instead(folder)}: give the folder `{wanted}` that a split wrote"


def check_folder(folder: Path, wanted: Side | None) -> None:
    """Raises: ShareError where `wrong_folder` has something to say."""
    if (wrong := wrong_folder(folder, wanted)) is not None:
        raise ShareError(wrong)


def _not_both(folder: Path, found: Side | None) -> str | None:
    there = [side for side in SIDES if side_of(_share(folder, side)) == side]
    if len(there) == len(SIDES):
        return None
    if there:
        lacks = "worker" if there == ["vault"] else "vault"
        return f"{folder} has no folder {lacks}: copy that of the same split there, or split again"
    if found is not None:
        return f"{folder} is one of the two folders that a split wrote: give {folder.absolute().parent}"
    return f"{folder} {_instead(folder)}: give the folder that a split wrote, with vault and worker in it"


def _other(folder: Path) -> str:
    """The other folder of the same split, where it lies beside this one."""
    wanted: Side = "worker" if side_of(folder) == "vault" else "vault"
    if folder.name in ("", ".."):
        folder = folder.resolve()
    beside = _share(folder.parent, wanted)
    return str(beside) if side_of(beside) == wanted else f"`{wanted}` of the same split"


def _share(out: Path, side: Side) -> Path:
    """Where a split wrote a side's share, or the first shard of it."""
    first = out / _FIRST_SHARD
    return first if side == "worker" and not (out / side).exists() and first.exists() else out / side


def _instead(folder: Path) -> str:
    """What lies there, after the folder's name."""
    if not folder.is_dir():
        return "is no folder" if folder.exists() else "does not exist"
    if (folder / "certificate.pem").is_file():
        return "holds keys, which go to --keys or ?keys="
    if os.path.lexists(folder / _MANIFEST):
        return f"has a {_MANIFEST} that is no split's, or cannot be read"
    if (folder / "config.json").is_file() and not (folder / "seal.json").exists():
        return f"is a model that was not split (slip split {shlex.quote(str(folder))} OUT does)"
    return f"has no {_MANIFEST}"
