"""A worker share in several folders, each for a worker of its own: shards (SPEC section 8).

    OUT/worker-1 ... OUT/worker-N     a manifest, whole groups that follow each other, a digest of both

Each shard is a worker's folder like any other, and can be served, copied, signed and verified alone.  What a
worker that serves one shows to the vault is `share_id`: a digest of the shard's manifest, which holds that of
its matrices.  So the vault's manifest, which holds these digests, says who may be asked for which groups, and
an altered shard is a stranger's.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sliplm.errors import ShareError
from sliplm.shares.manifest import ShardOf, VaultManifest, WorkerManifest
from sliplm.shares.share import (
    MANIFEST,
    VaultShare,
    WorkerShare,
    check_pair,
    open_worker,
    read_vault_manifest,
)

WHOLE = "worker"
"""The folder of a worker share that is in one piece."""


class Shard(NamedTuple):
    """Which groups one worker holds: `groups` of them from index `first` on; all where there are no shards.

    `share_id`: what a worker that serves it shows, 32 hexadecimal digits.  `folder`: its name in OUT.
    """

    folder: str
    share_id: str
    first: int
    groups: int

    def holds(self, group: int) -> bool:
        return self.first <= group < self.first + self.groups


def whole(split_id: str, groups: int) -> Shard:
    """A worker share in one piece."""
    return Shard(WHOLE, split_id, 0, groups)


def folder_of(number: int, shards: int) -> str:
    """The name of a shard's folder, numbers from 1 on."""
    return WHOLE if shards == 1 else f"{WHOLE}-{number}"


def shards_of(manifest: VaultManifest) -> tuple[Shard, ...]:
    """All shards of a split, in the order of their groups; a split without shards is one."""
    if not manifest.shards:
        return (whole(manifest.split_id, len(manifest.groups)),)
    found: list[Shard] = []
    first = 0
    for number, shard in enumerate(manifest.shards, 1):
        record = shard.files.get(MANIFEST)
        if record is None:
            raise ShareError(f"the vault's manifest has no digest of shard {number}: split again")
        folder = folder_of(number, len(manifest.shards))
        found.append(Shard(folder, share_id(record.sha256), first, shard.groups))
        first += shard.groups
    return tuple(found)


def share_id(sha256: str) -> str:
    """What a worker shows for a shard whose manifest has this digest."""
    return sha256[:32]


def own_shard(share: WorkerShare) -> Shard:
    """What an opened worker folder holds."""
    place, groups = share.manifest.shard, len(share.manifest.groups)
    if place is None:
        return whole(share.split_id, groups)
    folder = folder_of(place.number, place.shards)
    return Shard(folder, share_id(share.digests[MANIFEST].sha256), place.first, groups)


def shard_with(shards: Sequence[Shard], group: int) -> Shard:
    """The one that holds a group."""
    return shards[bisect.bisect_right(shards, group, key=lambda shard: shard.first) - 1]


def balanced(sizes: Sequence[int], shards: int) -> list[int]:
    """How many groups each shard gets: neighbours together, the largest shard as small as can be.

    Args:
        sizes: bytes of each group, in order.
        shards: 1 to the number of groups.
    """
    low, high = max(sizes), sum(sizes)
    while low < high:
        limit = (low + high) // 2
        if len(_filled(sizes, shards, limit)) <= shards:
            high = limit
        else:
            low = limit + 1
    return _filled(sizes, shards, low)


def _filled(sizes: Sequence[int], shards: int, limit: int) -> list[int]:
    """Shards filled in order up to a limit; a group is left for each of those that are to come."""
    counts, held = [0], 0
    for i, size in enumerate(sizes):
        left = len(sizes) - i
        if counts[-1] and (held + size > limit or left <= shards - len(counts)):
            counts.append(0)
            held = 0
        counts[-1] += 1
        held += size
    return counts


def place_of(number: int, counts: Sequence[int]) -> ShardOf | None:
    """What a shard's manifest says of itself; None where there is but one."""
    if len(counts) == 1:
        return None
    return ShardOf(number=number, shards=len(counts), first=sum(counts[: number - 1]))


def worker_folders(out: Path) -> list[Path]:
    """The worker's folders that a split wrote into `out`, by its vault's manifest, which is not verified yet.

    Raises:
        ShareError: there is no vault, or its manifest is not valid.
    """
    return [out / shard.folder for shard in shards_of(read_vault_manifest(out / "vault"))]


def open_beside(out: Path) -> WorkerShare:
    """Open the worker share, all of it, that a split wrote into a folder; not compared with the vault.

    Raises:
        ShareError: a folder is missing or damaged.
    """
    shards = shards_of(read_vault_manifest(out / "vault"))
    return open_worker(out / WHOLE) if len(shards) == 1 else joined(out, shards)


def open_all(vault: VaultShare, share: Path | None = None) -> WorkerShare:
    """Open and verify the worker share that belongs to a vault, all shards of it.

    Args:
        share: the worker's folder; of a split with shards the folder in which all of theirs lie.  By default
            beside the vault's.

    Raises:
        ShareError: a folder is missing, or no worker's.
        MismatchError: it is of another split, or was altered.
    """
    sharded = bool(vault.manifest.shards)
    share = share or (vault.path.parent if sharded else vault.path.parent / WHOLE)
    if not share.exists():
        raise ShareError(
            f"there is no {share} to make masks from: copy the split's worker folder there, or name its "
            "place (share), a dealer, or a pool of masks"
        )
    worker = joined(share, shards_of(vault.manifest)) if sharded else open_worker(share)
    check_pair(vault, worker)
    return worker


def joined(folder: Path, shards: Sequence[Shard]) -> WorkerShare:
    """All shards that lie in a folder, as one share; its digests are named by shard and file.

    Raises:
        ShareError: one is missing, damaged, or another one than its folder's name says.
    """
    if (folder / MANIFEST).exists():
        raise ShareError(
            f"{folder} is one shard of {len(shards)}: give the folder in which all lie, "
            f"{shards[0].folder} to {shards[-1].folder}"
        )
    parts = [open_worker(folder / shard.folder) for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        if own_shard(part)[1:] != shard[1:]:
            raise ShareError(
                f"{part.path} is not the shard {shard.folder} that was written with the vault; copy it again"
            )
    manifest = WorkerManifest(
        split_id=parts[0].split_id,
        groups=tuple(group for part in parts for group in part.manifest.groups),
        files={},
    )
    return WorkerShare(
        path=folder,
        manifest=manifest,
        matrices={name: matrix for part in parts for name, matrix in part.matrices.items()},
        digests={
            f"{shard.folder}/{name}": record
            for shard, part in zip(shards, parts, strict=True)
            for name, record in part.digests.items()
        },
    )
