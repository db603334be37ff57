"""A checkpoint folder on disk: one tensor at a time, never the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
)

from sliplm.engines.transformers.layout import Layout
from sliplm.engines.transformers.opened import remade
from sliplm.errors import CheckpointError
from sliplm.reading import open_regular
from sliplm.shares.tensorfile import ITEM_BYTES, NUMPY, TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20  # which a processor's cache holds

FLOATS = ("F32", "F16", "BF16", "F64")


class Checkpoint:
    """The tensors of a Hugging Face checkpoint folder, by their names in its files.

    Raises:
        CheckpointError: not a folder, no config.json, no safetensors weights, or a file of them is missing,
            truncated or damaged; the message names it.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.path = Path(model_dir)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a folder; give a Hugging Face checkpoint's folder")
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{self.path} has no config.json; give a Hugging Face checkpoint's folder")
        self.files: tuple[Path, ...] = ()
        self.entries: dict[str, TensorEntry] = {}
        self._file_of: dict[str, Path] = {}
        if (self.path / SINGLE).exists():
            self._add(self.path / SINGLE, None)
        elif (self.path / INDEX).exists():
            self._add_shards(_read_index(self.path / INDEX))
        else:
            raise CheckpointError(_no_weights(self.path))

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change (ns) of the files that a split depends on."""
        names = [*self.files, self.path / "config.json"]
        stats = [(file.name, file.stat()) for file in names]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def read(self, key: str, number: int | None = None) -> npt.NDArray[np.float32]:
        """One tensor as float32, in its shape; or the `number`-th of those that it stacks.

        Raises:
            CheckpointError: it holds NaN or infinity, is not of a floating type, or cannot be read.
        """
        entry = self.entries[key]
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{key} has the type {entry.dtype}; split the model as it was before quantisation"
            )
        shape = entry.shape if number is None else entry.shape[1:]
        out = np.empty(math.prod(shape), dtype=np.float32)
        done = 0
        for chunk in self.chunks(key, number):
            count = len(chunk) // ITEM_BYTES[entry.dtype]
            _convert(entry.dtype, chunk, out[done : done + count])
            done += count
        if entry.dtype == "F64" and not np.isfinite(out).all():  # one that float32 cannot hold
            raise CheckpointError(f"{key} holds values beyond float32; the checkpoint cannot be split")
        return out.reshape(shape)

    def chunks(self, key: str, number: int | None = None) -> Iterator[bytes]:
        """The bytes of one tensor as stored (or of the `number`-th that it stacks), in pieces of 1 MiB.

        Floating types are checked on the way.

        Raises:
            CheckpointError: it holds NaN or infinity, or cannot be read.
        """
        entry, file_path = self.entries[key], self._file_of[key]
        left = entry.nbytes if number is None else entry.nbytes // entry.shape[0]
        try:
            with open_regular(file_path) as file:
                file.seek(entry.start + (0 if number is None else number * left))
                while left:
                    chunk = file.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise CheckpointError(f"{file_path} was cut off while it was read; copy it again")
                    if entry.dtype in FLOATS and not _finite(entry.dtype, chunk):
                        raise CheckpointError(f"{key} in {file_path} holds NaN or infinity; it is damaged")
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(f"{file_path} cannot be read ({error.strerror})") from error

    def _add(self, path: Path, keys: set[str] | None) -> None:
        try:
            entries = read_header(path, any_type=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing, but {INDEX} names it; copy it again") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}; copy it again") from error
        absent = sorted((keys or set()) - set(entries))
        if absent:
            raise CheckpointError(f"{path} lacks {_some(absent)}, which {INDEX} places there")
        self.files += (path,)
        for key, entry in entries.items():
            if keys is None or key in keys:
                self.entries[key], self._file_of[key] = entry, path

    def _add_shards(self, weight_map: Mapping[str, str]) -> None:
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{self.path / INDEX} names the file {name!r} outside the folder")
            self._add(self.path / name, {key for key, file in weight_map.items() if file == name})
        self.files += (self.path / INDEX,)


@dataclass(frozen=True)
class Sources:
    """Where a model's parameters lie in a checkpoint.

    Attributes:
        keys: parameter or persistent buffer -> the checkpoint's tensor.  A tied parameter that the
            checkpoint stores twice is there under both names.
        converted: tensors that transformers joins or cuts while it loads.
        stacks: fused parameter that is stored in one tensor for each expert, or two that follow each other
            in its rows -> the tensors of each expert, all of them in `converted`.
    """

    keys: dict[str, str]
    converted: tuple[str, ...]
    stacks: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


def locate(checkpoint: Checkpoint, layout: Layout) -> Sources:
    """Find every parameter of the model in the checkpoint, by the names that transformers itself accepts.

    Raises:
        CheckpointError: parameters are missing, or their shapes contradict the configuration.
    """
    shapes = layout.parameters | layout.buffers | {a: layout.parameters[b] for a, b in layout.tied.items()}
    keys, converted, covered, stacks = _renamed(checkpoint, layout, shapes)
    for alias, name in layout.tied.items():
        if alias in keys:
            keys.setdefault(name, keys[alias])  # stored under the other name only
    missing = sorted(
        name for name in set(layout.parameters) - set(keys) - covered if not remade(layout.model, name)
    )
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {_some(missing)}, which its config.json calls for; "
            "the checkpoint is incomplete, or the configuration is another model's"
        )
    for key in (*keys.values(), *converted):
        if checkpoint.entries[key].dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{key} has the type {checkpoint.entries[key].dtype}, which is neither split nor kept; "
                "convert it to float32, or split the model as it was before quantisation"
            )
    for name, key in keys.items():
        if checkpoint.entries[key].shape != shapes[name]:
            raise CheckpointError(
                f"{key} has the shape {checkpoint.entries[key].shape}, config.json calls for {shapes[name]}"
            )
    return Sources(keys, tuple(converted), _whole_stacks(stacks, checkpoint, shapes))


def _renamed(
    checkpoint: Checkpoint, layout: Layout, shapes: Mapping[str, Any]
) -> tuple[dict[str, str], list[str], set[str], _Stacks]:
    """Parameter -> key; converted keys; the parameters that these become; those that stack them."""
    transforms = get_model_conversion_mapping(layout.model)
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    keys: dict[str, str] = {}
    converted: list[str] = []
    covered: set[str] = set()
    stacks: _Stacks = {}
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                first = converter.target_patterns[0]
                targets = [target.replace(first, other) for other in converter.target_patterns]
                covered |= {_prefixed(other, layout, shapes) for other in targets}
                converted.append(key)
                if _stacks_experts(converter):
                    parts = stacks.setdefault(
                        _prefixed(targets[0], layout, shapes), [[] for _ in converter.source_patterns]
                    )
                    parts[converter.source_patterns.index(pattern)].append(key)
                break
        else:
            name = _prefixed(name, layout, shapes)
            if name not in shapes:  # a renaming of an older form that hits a name of today's
                name = _prefixed(key, layout, shapes)
            if name in shapes:
                keys.setdefault(name, key)
    return keys, converted, covered & set(shapes), stacks


_Stacks = dict[str, list[list[str]]]
"""Fused parameter -> for each tensor of an expert (gate, up), the keys of all experts in their order."""


def _stacks_experts(converter: WeightConverter) -> bool:
    """Whether it puts experts one behind the other, and an expert's tensors under each other, no more."""
    merge, *rest = converter.operations
    if not isinstance(merge, MergeModulelist) or merge.dim != 0:
        return False
    if len(converter.source_patterns) == 1:
        return not rest
    return len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1


def _whole_stacks(
    stacks: _Stacks, checkpoint: Checkpoint, shapes: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Those of which every expert is there, in the shape of the parameter."""
    found = {}
    for name, parts in stacks.items():
        shape = shapes.get(name, ())
        if len(shape) != 3 or {len(keys) for keys in parts} != {shape[0]}:
            continue
        experts = tuple(zip(*parts, strict=True))
        sizes = [[checkpoint.entries[key].shape for key in keys] for keys in experts]
        if all(len(size) == 2 and size[1] == shape[2] for one in sizes for size in one) and all(
            sum(size[0] for size in one) == shape[1] for one in sizes
        ):
            found[name] = experts
    return found


def _prefixed(name: str, layout: Layout, shapes: Mapping[str, Any]) -> str:
    """With or without the base model's prefix (older GPT-2 checkpoints have none), whichever exists."""
    prefix = layout.model.base_model_prefix + "."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in shapes:
            return candidate
    return name


def _finite(dtype: str, data: bytes) -> bool:
    """Whether none of these floating numbers is NaN or infinite."""
    if dtype == "BF16":  # not all of the exponent's bits are set
        return int((np.frombuffer(data, dtype="<u2") & 0x7F80).max(initial=0)) != 0x7F80
    return bool(np.isfinite(np.frombuffer(data, dtype=NUMPY[dtype])).all())


def _convert(dtype: str, data: bytes, out: npt.NDArray[np.float32]) -> None:
    """Floating numbers as they are stored, as float32."""
    if dtype == "BF16":  # the upper half of a float32
        bits = out.view(np.uint32)
        bits[:] = np.frombuffer(data, dtype="<u2")
        bits <<= 16
    else:
        with np.errstate(over="ignore"):
            out[:] = np.frombuffer(data, dtype=NUMPY[dtype])


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name, from an index of shards."""
    try:
        with open_regular(path) as file:
            index = json.loads(file.read(MAX_INDEX_BYTES))  # what is longer is cut off, and then no JSON
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid index of shards ({error}); copy it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} is no valid index of shards: no weight_map of names; copy it again")
    return weight_map


def _no_weights(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return (
            f"{path} has weights in pickle files only, which sliplm does not open: they can run code. Load "
            "model and tokenizer with transformers where you trust them, and call save_pretrained of both"
        )
    return f"{path} has neither {SINGLE} nor {INDEX}; give the folder of a complete checkpoint"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
