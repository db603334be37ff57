"""What the manifests of the two shares say, as strict models (SPEC section 8)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sliplm.shares.recipe import Recipe, RotationKind
from sliplm.shares.tensorfile import ITEM_BYTES, TensorSpec

FORMAT_VERSION = 3
MAX_GROUPS = 1 << 16  # of a split, as messages number them: DeepSeek-V3's experts are 29,696
ADAPTER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
PLAIN_MODULE = "plain PyTorch module"  # a `config_class`: no configuration of transformers


def _known_dtype(name: str) -> str:
    if name not in ITEM_BYTES:
        raise ValueError(f"{name} is no type of safetensors")
    return name


Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
SplitId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]
AdapterName = Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=255)]
FilePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$", max_length=255)
]  # in the folder, or in one of its folders
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(fail_fast=True)]  # a million wrong ones are one error
IntegerType = Literal["I8", "I16"]
DType = Annotated[str, AfterValidator(_known_dtype)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Member:
    """A linear layer of a group; the members' rows follow each other in the group's matrix."""

    module: Name
    rows: Size


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class ExpertOf:
    """Which expert a group is of: `number` of the fused parameter `weight` of `module`.

    `use`: what part of the rows it is expected to see.
    """

    module: Name
    weight: Name
    number: Annotated[int, Field(ge=0, lt=1 << 31)]
    use: Annotated[float, Field(gt=0, le=1)]


class FileRecord(_Model):
    """Length and sha256 of a file."""

    bytes: int = Field(ge=0)
    sha256: Hex


class WorkerGroup(_Model):
    """What the worker knows of a group: its name, shape and integer type."""

    name: Name
    rows: Size
    columns: Size
    dtype: IntegerType


class Difference(_Model):
    """Frobenius norms of a full fine-tune: `norm` of D = W - W_base, `base` of W_base, `tail` of D - A B."""

    norm: float = Field(ge=0)
    base: float = Field(ge=0)
    tail: float = Field(ge=0)


class GroupAdapter(_Model):
    """What an adapter does to a group: the rank of what it adds to each member, 0 for none."""

    name: AdapterName
    ranks: Several[Annotated[int, Field(ge=0, lt=1 << 31)]]


class VaultGroup(WorkerGroup):
    """A split group as the vault knows it.

    `error` is the relative Frobenius error of quantisation, `svd_error` that of the kept directions
    (`splitting.direction_error`), `localisation` the largest entry of a singular vector of what is hidden; 0
    where that was not measured.  `difference` is there where a full fine-tune was split, `adapters` has
    those that change the group.  `positions`: rows that it multiplies per input, see `KeptGroup`.
    `expert`: of a mixture; the group's own name then has a secret number, under which the worker knows it.
    """

    members: Several[Member]
    rank: int = Field(ge=0)
    precision: int = Field(ge=4, le=12)
    rotation: RotationKind
    error: float = Field(ge=0)
    svd_error: float = Field(ge=0)
    localisation: float = Field(default=0.0, ge=0, le=1.001)
    difference: Difference | None = None
    adapters: Several[GroupAdapter] = ()
    positions: Size = 1
    expert: ExpertOf | None = None

    @property
    def use(self) -> float:
        """What part of the rows it is expected to see: 1 but for an expert."""
        return 1.0 if self.expert is None else self.expert.use

    @model_validator(mode="after")
    def _members_fill_the_group(self) -> Self:
        if sum(member.rows for member in self.members) != self.rows:
            raise ValueError(f"the members of {self.name} do not have {self.rows} rows together")
        if any(len(adapter.ranks) != len(self.members) for adapter in self.adapters):
            raise ValueError(f"an adapter of {self.name} does not have a rank for each member")
        return self


class KeptGroup(_Model):
    """A group of linear layers that stays in the vault whole.

    `positions`: rows that it multiplies per input: 1 for a token of a language model, all places of a
    convolution for a plain module's example inputs; 0 where its work is not counted.  `reason`: why it cannot
    be split; empty where the recipe placed it here.
    """

    name: Name
    rows: Size
    columns: Size
    members: Several[Member]
    positions: int = Field(default=1, ge=0, lt=1 << 31)
    reason: str = Field(default="", max_length=1024)
    expert: ExpertOf | None = None


class KeptTensor(_Model):
    """A tensor of `model.safetensors`, as it is when opened."""

    name: Name
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(max_length=8)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


class Attention(_Model):
    """Attention of one layer, for counting; `window` limits the keys that a token sees."""

    heads: Size
    head_dim: Size
    window: Size | None = None


class SourceModel(_Model):
    """The model that was split: its folder's name, its configuration's class and its parameters."""

    name: str = Field(max_length=4096)
    config_class: str = Field(max_length=256)
    parameters: int = Field(ge=0)


class ShardOf(_Model):
    """Which shard a worker's folder holds: `number` of `shards`, from 1 on.

    `first`: the index in the split of its first group; the others follow.
    """

    number: Annotated[int, Field(ge=1, le=MAX_GROUPS)]
    shards: Annotated[int, Field(ge=2, le=MAX_GROUPS)]
    first: Annotated[int, Field(ge=0, lt=MAX_GROUPS)]

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.number > self.shards or self.first < self.number - 1:
            raise ValueError("a shard's number and first group do not agree with how many there are")
        return self


class ShardRecord(_Model):
    """A shard as the vault knows it: how many groups it holds, and the digests of its folder's two files."""

    groups: Size
    files: dict[FileName, FileRecord]


class WorkerManifest(_Model):
    """`worker/manifest.json`: names, shapes and types only.

    `split_id` is random, or `public_split_id` where the share is that of a public base alone.  `shard`: which
    part of the share lies here, where several workers hold it together; not written else.
    """

    format: Literal["sliplm-worker"] = "sliplm-worker"
    version: Literal[3] = 3
    split_id: SplitId
    groups: Several[WorkerGroup]
    files: dict[FileName, FileRecord]
    shard: ShardOf | None = None

    @model_serializer(mode="wrap")
    def _without_no_shard(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without("shard", handler(self))


class VaultManifest(_Model):
    """`vault/manifest.json`: the whole account of a split.

    `kept_bytes`: of `kept_tensors`, sealed.  `base`: the public model that it was split against, if any, and
    `adapters` to it.  `shards`: where several folders hold the worker's share, in the order of their groups;
    `worker_files` is empty then.
    """

    format: Literal["sliplm-vault"] = "sliplm-vault"
    version: Literal[2, 3] = 3  # of version 2 only the ledger's entry is still read
    split_id: SplitId
    sliplm: str = Field(max_length=64)
    source: SourceModel
    base: SourceModel | None = None
    adapters: Several[AdapterName] = ()
    recipe: Recipe
    groups: Several[VaultGroup]
    kept: Several[KeptGroup]
    kept_tensors: Several[KeptTensor]
    kept_bytes: int = Field(ge=0)
    attention: Several[Attention]
    files: dict[FilePath, FileRecord]
    worker_files: dict[FileName, FileRecord]
    shards: Several[ShardRecord] = ()

    @model_serializer(mode="wrap")
    def _without_no_shards(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without("shards", handler(self))

    @model_validator(mode="after")
    def _shards_hold_all_groups(self) -> Self:
        if self.shards and sum(shard.groups for shard in self.shards) != len(self.groups):
            raise ValueError("the shards do not hold the groups of the split, each once")
        if len(self.shards) == 1 or (self.shards and self.worker_files):
            raise ValueError("a split has one worker share, or two shards and more")
        return self

    @model_validator(mode="after")
    def _adapters_are_named(self) -> Self:
        named = {adapter.name for group in self.groups for adapter in group.adapters}
        if named - set(self.adapters) or len(set(self.adapters)) != len(self.adapters):
            raise ValueError("the adapters of the groups are not those of the split")
        return self


def _without(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A share that is no shard is written as releases without shards read it."""
    if not fields.get(name):
        fields.pop(name, None)
    return fields


def public_split_id(groups: Iterable[WorkerGroup], *shares: FileRecord) -> str:
    """The split id of a worker share that is a public base and nothing else (SPEC section 2, M41).

    A function of what lies there, so that every owner of a fine-tune of one base has one and the same worker
    share.

    Args:
        groups: of the split, in order.
        shares: length and digest of `share.safetensors`, of each shard where there are several.
    """
    text = json.dumps([[g.name, g.rows, g.columns, g.dtype] for g in groups], separators=(",", ":"))
    data = "\n".join(("sliplm/1/public base", text, *(share.sha256 for share in shares)))
    return hashlib.sha256(data.encode()).hexdigest()[:32]
