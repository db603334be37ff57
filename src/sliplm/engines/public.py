"""The worker's folder of a split under way, or one for each of its shards (SPEC section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sliplm.closing import Closing
from sliplm.errors import RecipeError
from sliplm.shares.contents import worker_spec
from sliplm.shares.manifest import FileRecord, ShardRecord, WorkerGroup, WorkerManifest
from sliplm.shares.shards import WHOLE, balanced, folder_of, place_of
from sliplm.shares.share import SHARE
from sliplm.shares.tensorfile import SafetensorsWriter

Records = dict[str, FileRecord]


class Layout:
    """Which groups go into which folder: neighbours together, of about as many bytes.

    Args:
        groups: all of the split, in order.
        shards: how many folders.

    Raises:
        RecipeError: there are not so many groups.
    """

    def __init__(self, groups: Sequence[WorkerGroup], shards: int) -> None:
        if type(shards) is not int or not 1 <= shards <= max(1, len(groups)):
            raise RecipeError(
                f"shards is how many workers hold the share together: from 1 to {len(groups)}, the number of "
                f"split groups, not {shards!r}"
            )
        sizes = [worker_spec(group).nbytes for group in groups]
        self.counts = [len(groups)] if shards == 1 else balanced(sizes, shards)
        self.folders = tuple(folder_of(number, shards) for number in range(1, shards + 1))

    def parts(self, groups: Sequence[WorkerGroup]) -> list[Sequence[WorkerGroup]]:
        """The groups of each folder."""
        found, first = [], 0
        for count in self.counts:
            found.append(groups[first : first + count])
            first += count
        return found

    def manifests(
        self, groups: Sequence[WorkerGroup], split_id: str, files: Sequence[Records]
    ) -> list[WorkerManifest]:
        """What each folder's manifest says, of files with these digests."""
        return [
            WorkerManifest(split_id=split_id, groups=tuple(part), files=one, shard=place_of(i, self.counts))
            for i, (part, one) in enumerate(zip(self.parts(groups), files, strict=True), 1)
        ]

    def known(self, files: Sequence[Records]) -> dict[str, Any]:
        """What the vault's manifest says of the folders: `worker_files`, and `shards` where there are any.

        Args:
            files: digests of each folder, of its manifest too.
        """
        if len(self.folders) == 1:
            return {"worker_files": files[0]}
        shards = (ShardRecord(groups=count, files=one) for count, one in zip(self.counts, files, strict=True))
        return {"worker_files": {}, "shards": tuple(shards)}


class PublicFiles(Closing):
    """The matrices in their files, open for writing.

    Args:
        partial: where the folders are.
        groups: all of the split, in order.

    Attributes:
        resumed: all files of an earlier run are continued.

    Raises:
        ShareError: as `SafetensorsWriter`.
    """

    def __init__(self, partial: Path, layout: Layout, groups: Sequence[WorkerGroup], *, resume: bool) -> None:
        self._stack = ExitStack()
        self._files: dict[str, SafetensorsWriter] = {}
        self.resumed = True
        try:
            for folder, part in zip(layout.folders, layout.parts(groups), strict=True):
                specs = [worker_spec(group) for group in part]
                file = SafetensorsWriter(partial / folder / SHARE, specs, mode=0o644, resume=resume)
                self._stack.enter_context(file)
                self.resumed = self.resumed and file.resumed
                self._files.update(dict.fromkeys((group.name for group in part), file))
        except BaseException:
            self.close()
            raise

    def write(self, group: str, w: npt.NDArray[Any]) -> None:
        """The integers of a group; on the disk at the return.  Raises: ShareError."""
        file = self._files[group]
        file.write(group, w)
        file.sync()

    def close(self) -> None:
        self._stack.close()


def is_worker_folder(name: str) -> bool:
    """Whether a folder of this name is a worker's, whole or a shard."""
    stem, dash, number = name.partition("-")
    return stem == WHOLE and (not dash or number.isdecimal())
