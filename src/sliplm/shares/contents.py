"""What the tensors of the two shares are, and how a group's secrets become them; no files.

The worker's `share.safetensors` has one integer tensor per group, named by its group.  The vault's has, per
group G of m rows, n columns and rank k: `G/a` F32 [m,k], `G/b` F32 [k,n], `G/d_out` F32 [m], `G/d_in` F32
[n], `G/scale` F32 [m], `G/c` U32 [4t,n] (4 sets of challenges), `G/norm` F64 [1], `G/noise` F64 [1] and
`G/seed` U8 [32]; and for each adapter N and member i that it changes, `G/adapter/N/i/a` F32 [rows of i, its
rank] and `G/adapter/N/i/b` F32 [its rank, n].  In both files of the vault a tensor lies sealed, as U8 [sealed
bytes] under its name; its true type and shape are in the manifest (`sealing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sliplm.shares.manifest import GroupAdapter, IntegerType, VaultGroup, WorkerGroup
from sliplm.shares.sealing import sealed_bytes
from sliplm.shares.splitting import CHALLENGE_SETS, CHALLENGES, GroupSecrets, LowRank
from sliplm.shares.tensorfile import TensorSpec


def worker_spec(group: WorkerGroup) -> TensorSpec:
    """The tensor of a group in the worker's share."""
    return TensorSpec(group.name, group.dtype, (group.rows, group.columns))


def secret_specs(group: VaultGroup) -> tuple[TensorSpec, ...]:
    """The tensors of a group in the vault's share."""
    m, n, k = group.rows, group.columns, group.rank
    fields: Iterable[tuple[str, str, tuple[int, ...]]] = (
        ("a", "F32", (m, k)), ("b", "F32", (k, n)),
        ("d_out", "F32", (m,)), ("d_in", "F32", (n,)), ("scale", "F32", (m,)),
        ("c", "U32", (CHALLENGE_SETS * CHALLENGES, n)),
        ("norm", "F64", (1,)), ("noise", "F64", (1,)), ("seed", "U8", (32,)),
    )  # fmt: skip
    own = tuple(TensorSpec(f"{group.name}/{field}", dtype, shape) for field, dtype, shape in fields)
    return own + tuple(
        TensorSpec(f"{place}/{field}", "F32", shape)
        for adapter in group.adapters
        for place, _, rows, rank in _places(group, adapter)
        for field, shape in (("a", (rows, rank)), ("b", (rank, n)))
    )


def _places(group: VaultGroup, adapter: GroupAdapter) -> Iterator[tuple[str, int, int, int]]:
    """Of each member that an adapter changes: where it lies, its first row, its rows, and the rank."""
    first = 0
    for i, (member, rank) in enumerate(zip(group.members, adapter.ranks, strict=True)):
        if rank:
            yield f"{group.name}/adapter/{adapter.name}/{i}", first, member.rows, rank
        first += member.rows


def sealed_spec(spec: TensorSpec) -> TensorSpec:
    """The tensor as a file of the vault holds it."""
    return TensorSpec(spec.name, "U8", (sealed_bytes(spec.nbytes),))


def secret_tensors(secrets: GroupSecrets) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a group under the names of `secret_specs`, those of adapters apart."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "a": secrets.a,
        "b": secrets.b,
        "d_out": secrets.d_out,
        "d_in": secrets.d_in,
        "scale": secrets.scale,
        "c": secrets.c,
        "norm": np.array([secrets.norm], dtype=np.float64),
        "noise": np.array([secrets.noise], dtype=np.float64),
        "seed": np.frombuffer(secrets.seed, dtype=np.uint8),
    }
    return {f"{secrets.name}/{field}": array for field, array in arrays.items()}


def adapter_tensors(
    group: VaultGroup, adapters: Mapping[str, tuple[LowRank, ...]]
) -> dict[str, npt.NDArray[np.float32]]:
    """The arrays of a group's adapters under the names of `secret_specs`."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for adapter in group.adapters:
        for (place, *_), part in zip(_places(group, adapter), adapters[adapter.name], strict=True):
            found |= {f"{place}/a": part.a, f"{place}/b": part.b}
    return found


def integer_type(precision: int) -> IntegerType:
    """The type of the worker's integers: int8 up to 8 bits, else int16."""
    return "I8" if precision <= 8 else "I16"


def group_secrets(group: VaultGroup, tensors: Mapping[str, npt.NDArray[Any]]) -> GroupSecrets:
    """A group of the vault from the arrays under the names of `secret_specs`."""

    def get(field: str) -> npt.NDArray[Any]:
        return tensors[f"{group.name}/{field}"]

    return GroupSecrets(
        name=group.name, m=group.rows, n=group.columns, precision=group.precision, rotation=group.rotation,
        a=get("a"), b=get("b"), d_out=get("d_out"), d_in=get("d_in"), scale=get("scale"),
        norm=float(get("norm")[0]), noise=float(get("noise")[0]), c=get("c"),
        seed=get("seed").tobytes(),
        adapters={
            adapter.name: tuple(
                LowRank(first, tensors[f"{place}/a"], tensors[f"{place}/b"])
                for place, first, _, _ in _places(group, adapter)
            )
            for adapter in group.adapters
        },
    )  # fmt: skip
