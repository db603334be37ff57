"""The splitting of one group as a task (`cluster.tasks`): what it takes, and all that comes of it.

Objects that hold secrets are not pickled (`secrecy`).  These two are made for it: what crosses to another
process is in them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.shares.contents import secret_tensors
from sliplm.shares.publicbase import split_base, split_difference
from sliplm.shares.recipe import GroupChoice
from sliplm.shares.splitter import Splitter


@dataclass(frozen=True, repr=False)
class GroupTask:
    """Weights in clear.

    Attributes:
        weight: float32 [m, n].
        base: the public matrix, float32 [m, n]; None without one.
        trained: `weight` is another than the base's.
        tail_to_worker: as `split_difference` takes it.
    """

    name: str
    choice: GroupChoice
    weight: Floats
    base: Floats | None = None
    trained: bool = True
    tail_to_worker: bool = False

    def __repr__(self) -> str:
        return f"GroupTask({self.name!r}, weights hidden)"


@dataclass(frozen=True, repr=False)
class GroupResult:
    """Both parts of a group, of one try and one seed.

    Attributes:
        w: int8 or int16 [m, n], the worker's.
        secrets: the vault's, under the names of `contents.secret_specs`; not yet sealed.
        errors: of quantisation, of the decomposition; the localisation; the norms of a difference, if any.
    """

    w: npt.NDArray[Any]
    secrets: Mapping[str, npt.NDArray[Any]]
    errors: tuple[float, ...]

    def __repr__(self) -> str:
        return f"GroupResult({list(self.w.shape)}, secrets hidden)"


def carry_out(splitter: Splitter, task: GroupTask) -> GroupResult:
    """Split a group.  Raises: as `Splitter.split_group`."""
    choice, norms = task.choice, tuple[float, ...]()
    if task.base is None:
        part = splitter.split_group(
            task.name, task.weight, rank=choice.rank, precision=choice.precision, rotation=choice.rotation
        )
    elif task.trained:
        part, norms = split_difference(
            task.name, task.weight, task.base, rank=choice.rank, precision=choice.precision,
            tail_to_worker=task.tail_to_worker, splitter=splitter,
        )  # fmt: skip
    else:
        part = split_base(task.name, task.base, choice.precision)
    found = (part.error, part.svd_error, part.localisation, *norms)
    return GroupResult(part.w, secret_tensors(part.secrets), found)
