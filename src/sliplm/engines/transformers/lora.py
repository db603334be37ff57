"""A LoRA adapter's folder, as peft writes it -> what it adds to each linear layer, exactly.

Read here and not by peft: two small files, no model in memory, no pickle.  What an adapter may hold beside
plain LoRA is refused by name, never passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sliplm.arithmetic.fixedpoint import Floats
from sliplm.engines.groups import Group, Linear
from sliplm.engines.transformers.checkpoint import Checkpoint
from sliplm.engines.transformers.experts import Fused, fused_experts
from sliplm.engines.transformers.stored import StoredModel
from sliplm.errors import AdapterError, CheckpointError
from sliplm.reading import open_regular
from sliplm.shares.manifest import GroupAdapter
from sliplm.shares.recipe import problems
from sliplm.shares.splitting import LowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 16 << 20
MERGE = "merge it with peft (merge_and_unload, save_pretrained) and split the result with --base"

# fields of peft's LoraConfig that change nothing at inference, or only say which tensors there are
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type",
    "lora_dropout", "layers_pattern", "eva_config", "lora_ga_config", "loftq_config", "corda_config",
    "megatron_core", "qalora_group_size",
    "fan_in_fan_out",  # A and B lie the same way round whatever the layer's own weight does
}  # fmt: skip
# what wraps a module while it is trained, and names that differ between classes of one model
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ON_THE_WAY = {"base_model", "model", "language_model", "transformer", "text_model"}
# ways to begin that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change it
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class _Config(BaseModel):
    """What of adapter_config.json counts here."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = True

    def rank(self, *names: str) -> int:
        """Of a module, by the name that it had in training, then by the model's."""
        return int(_of(self.rank_pattern or {}, names, self.r))

    def scaling(self, *names: str) -> float:
        """What peft multiplies B A by."""
        rank = self.rank(*names)
        return float(_of(self.alpha_pattern or {}, names, self.lora_alpha)) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def targets_parameter(self, name: str) -> bool:
        """Whether the adapter must have tensors for these fused weights."""
        if self.layers_to_transform is not None or self.exclude_modules:
            return False
        return any(_ends(name, one) for one in self.target_parameters or ())

    def targets(self, module: str) -> bool:
        """Whether the adapter must have tensors for this layer; False where that is not easily said."""
        if self.layers_to_transform is not None or self.exclude_modules or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(_ends(module, name) for name in self.target_modules)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one model; its tensors stay on the disk until a group asks for them.

    Attributes:
        ranks: module -> rank of what is added to it; of fused experts `PARAMETER.NUMBER` -> rank.
    """

    name: str
    path: Path
    ranks: Mapping[str, int]
    _config: _Config
    _file: Checkpoint
    _keys: Mapping[str, tuple[str, str]]  # module -> tensors of A and B
    _own: Mapping[str, str]  # module -> its name in the model that was trained
    _experts: Mapping[str, Fused]  # fused parameter -> its experts

    def in_group(self, group: Group) -> GroupAdapter | None:
        """What it does to a group; None for nothing."""
        ranks = tuple(self.ranks.get(member.module, 0) for member in group.members)
        return GroupAdapter(name=self.name, ranks=ranks) if any(ranks) else None

    def parts(self, group: Group) -> tuple[LowRank, ...]:
        """What it adds to the members of a group: scaling B times A, float32, nothing of it approximated.

        Raises:
            AdapterError: a tensor holds NaN or infinity, is not of a floating type, or cannot be read.
        """
        found, first = [], 0
        for member in group.members:
            if member.module in self.ranks:
                a, b = self.factors(member.module)
                found.append(LowRank(first, a, b))
            first += member.rows
        return tuple(found)

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """scaling B [rows, r] and A [r, columns] of a module, float32.

        Raises:
            AdapterError: as `parts`.
        """
        fused, _, number = module.rpartition(".")
        held = module if module in self._keys else fused
        try:
            inner, outer = (self._file.read(key) for key in self._keys[held])
        except CheckpointError as error:
            raise AdapterError(f"adapter {self.name}: {error}") from error
        if held != module:  # as peft lays them out: [experts * r, columns] and [rows, r * experts]
            experts = len(self._experts[fused].groups)
            inner = inner.reshape(experts, -1, inner.shape[1])[int(number)]
            outer = outer.reshape(len(outer), -1, experts)[:, :, int(number)]
        scaled = outer.astype(np.float64) * self._config.scaling(self._own[held], held)
        if not (np.abs(scaled) <= np.finfo(np.float32).max).all():
            raise AdapterError(f"adapter {self.name}: what it adds to {module} is beyond float32")
        return scaled.astype(np.float32), np.ascontiguousarray(inner)


def read_adapter(name: str, path: Path, model: StoredModel) -> Adapter:
    """Read an adapter and check it against the model.

    Raises:
        AdapterError: it is incomplete, of another kind than LoRA, of another model, or trains what LoRA on
            linear layers cannot express; the message says what to do.
    """
    config = _read_config(name, path)
    file = _AdapterFile(name, path)
    layers = (group for group in model.layout.groups if group.expert is None)  # experts are no modules
    linears = {member.module: member for group in layers for member in group.members}
    names, own, experts = _Names(model), dict[str, str](), fused_experts(model.layout.groups)
    keys: dict[str, dict[str, str]] = {}
    _check_gathered(name, file)
    others = [
        one for one in config.target_parameters or () if not any(_ends(weight, one) for weight in experts)
    ]
    if others:
        raise AdapterError(
            f"adapter {name} uses target_parameters on {', '.join(others)}, which is no plain LoRA and no "
            f"weight of experts: {MERGE}"
        )
    for key in file.entries:
        trained, what = _parts(key)
        module = names.of(trained)
        if what in ("lora_A.weight", "lora_B.weight"):
            if what in keys.setdefault(module, {}):
                raise AdapterError(
                    f"adapter {name} has two tensors for {what} of {module}, {keys[module][what]} and {key}: "
                    "save one adapter alone with peft (save_pretrained, selected_adapters=[...])"
                )
            keys[module][what], own[module] = key, trained
        elif not (what == "base_layer.weight" and _same(file, key, model, module)):
            raise AdapterError(f"adapter {name} has the tensor {key}, which is no plain LoRA: {MERGE}")
    keys, own = _with_parameters(name, keys, own, file, experts)
    for module, found in keys.items():
        layer = linears.get(module) or (experts[module].layer if module in experts else None)
        count = len(experts[module].groups) if module in experts else 1
        _check_factors(name, module, found, file, config.rank(own[module], module), layer, count)
    absent = [module for module in linears if config.targets(module) and module not in keys]
    absent += [weight for weight in experts if config.targets_parameter(weight) and weight not in keys]
    if absent or not keys:
        raise AdapterError(
            f"adapter {name} has no tensors for {', '.join(absent[:5]) or 'any layer'}, which its {CONFIG} "
            "names: copy it again"
        )
    pairs = {module: (found["lora_A.weight"], found["lora_B.weight"]) for module, found in keys.items()}
    ranks = {
        place: config.rank(own[module], module)
        for module in pairs
        for place in (experts[module].groups if module in experts else (module,))
    }
    adapter = Adapter(name, path, ranks, config, file, pairs, own, experts)
    for module in ranks:
        adapter.factors(module)  # so that a damaged one is found before anything is written
    return adapter


def fingerprint(adapter: Adapter) -> list[Any]:
    """Name, and files with their bytes and times of change: what a split depends on."""
    stats = [(file, (adapter.path / file).stat()) for file in (CONFIG, WEIGHTS)]
    return [adapter.name, [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]]


# --- checks ----------------------------------------------------------------------------------------------


class _AdapterFile(Checkpoint):
    """The one file of an adapter, read like a checkpoint's."""

    def __init__(self, name: str, path: Path) -> None:
        self.path, self.files, self.entries, self._file_of = path, (), {}, {}
        self._last: dict[str, Floats] = {}
        if not (path / WEIGHTS).is_file():
            why = f"has no {WEIGHTS}; give the folder that peft's save_pretrained wrote"
            if (path / "adapter_model.bin").exists():
                why = (
                    "has its weights in a pickle file only, which sliplm does not open: it can run code. "
                    "Load it with peft where you trust it and save it again, which writes safetensors"
                )
            raise AdapterError(f"adapter {name}: {path} {why}")
        try:
            self._add(path / WEIGHTS, None)
        except CheckpointError as error:
            raise AdapterError(f"adapter {name}: {error}") from error

    def read(self, key: str, number: int | None = None) -> Floats:
        """As `Checkpoint.read`; the last two stay in memory, for experts come one after the other."""
        if key not in self._last:
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[key] = super().read(key)
        return self._last[key]


def _read_config(name: str, path: Path) -> _Config:
    try:
        with open_regular(path / CONFIG) as file:
            fields = json.loads(file.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise AdapterError(
            f"adapter {name}: {path / CONFIG} cannot be read ({error.strerror}); give the folder that peft's "
            "save_pretrained wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"adapter {name}: {path / CONFIG} is no valid JSON ({error}); copy it again"
        ) from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LORA":
        raise AdapterError(f"adapter {name} is of the kind {kind}, and only LORA can be kept exact: {MERGE}")
    try:
        config = _Config(**fields)
    except ValidationError as error:
        raise AdapterError(f"adapter {name}: {path / CONFIG} cannot be used:\n{problems(error)}") from error
    _check_config(name, config)
    return config


def _check_config(name: str, config: _Config) -> None:
    """Refuse what plain LoRA on linear layers does not express, known to this release or not."""
    if config.bias != "none":
        raise AdapterError(f"adapter {name} was trained with bias={config.bias!r}: {MERGE}")
    if config.modules_to_save:
        saved = ", ".join(config.modules_to_save)
        raise AdapterError(f"adapter {name} holds whole modules ({saved}), and not only LoRA: {MERGE}")
    if config.init_lora_weights not in _BEGINNINGS:
        raise AdapterError(
            f"adapter {name} began with init_lora_weights={config.init_lora_weights!r}, which changes the "
            "base: save it as plain LoRA (peft's path_initial_model_for_weight_conversion), or else "
            f"{MERGE}"
        )
    odd = [field for field, value in (config.model_extra or {}).items() if value and field not in _HARMLESS]
    if odd:
        raise AdapterError(f"adapter {name} uses {', '.join(odd)}, which is no plain LoRA: {MERGE}")
    try:
        for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
            re.compile(pattern)
        config.targets("")
    except re.error as error:
        raise AdapterError(f"adapter {name}: {CONFIG} has a pattern that is none ({error})") from error


def _check_factors(
    name: str,
    module: str,
    found: Mapping[str, str],
    file: Checkpoint,
    rank: int,
    linear: Linear | None,
    count: int,
) -> None:
    """`count`: of the matrices that lie in one; 1 but for experts."""
    if linear is None:
        raise AdapterError(
            f"adapter {name} changes {module}, which is no linear layer of this model: it is of another "
            f"model; or else {MERGE}"
        )
    wanted = {"lora_A.weight": (count * rank, linear.columns), "lora_B.weight": (linear.rows, count * rank)}
    for what, shape in wanted.items():
        if what not in found:
            raise AdapterError(f"adapter {name} lacks {what} of {module}: it is incomplete, copy it again")
        if file.entries[found[what]].shape != shape:
            raise AdapterError(
                f"adapter {name}: {found[what]} has the shape {file.entries[found[what]].shape}, and "
                f"{module} with rank {rank} calls for {shape}: it is the adapter of another model"
            )


def _with_parameters(
    name: str,
    keys: dict[str, dict[str, str]],
    own: dict[str, str],
    file: Checkpoint,
    experts: Mapping[str, Fused],
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The same with the tensors of fused experts under their parameters' names.

    peft calls them by their module, one wrapper within the other, whatever parameter they are of: that is
    told by their shapes.
    """
    named, trained = dict[str, dict[str, str]](), dict[str, str]()
    for module, found in keys.items():
        bare = module.removesuffix(".base_layer")
        beside = [weight for weight in experts if weight.rpartition(".")[0] == bare]
        if not beside:
            named[module], trained[module] = found, own[module]
            continue
        sizes = {weight: (experts[weight].layer.columns, experts[weight].layer.rows) for weight in beside}
        shapes = [file.entries[key].shape for key in found.values()]
        mine = tuple(
            file.entries[found[what]].shape[at]
            if what in found and len(file.entries[found[what]].shape) == 2
            else 0
            for what, at in (("lora_A.weight", 1), ("lora_B.weight", 0))
        )
        fitting = [weight for weight, size in sizes.items() if size == mine]
        if len(fitting) != 1 or fitting[0] in named:
            why = "fit none" if not fitting else "fit more than one"
            raise AdapterError(
                f"adapter {name}: its tensors for {module}, {shapes}, {why} of the experts' weights "
                f"({', '.join(beside)}): it is of another model, or else {MERGE}"
            )
        named[fitting[0]] = found
        trained[fitting[0]] = f"{own[module].removesuffix('.base_layer')}.{fitting[0].rpartition('.')[2]}"
    return named, trained


def _check_gathered(name: str, file: Checkpoint) -> None:
    """Refuse what DeepSpeed's ZeRO stage 3 leaves where nothing gathered the weights: empty tensors."""
    empty = [key for key, entry in file.entries.items() if 0 in entry.shape]
    if empty:
        raise AdapterError(
            f"adapter {name}: {empty[0]} is empty, as are {len(empty)} of its {len(file.entries)} tensors: "
            "it was saved under DeepSpeed's ZeRO stage 3 without being gathered. Convert the training "
            "checkpoint with zero_to_fp32.py, or save again with stage3_gather_16bit_weights_on_model_save"
        )


def _parts(key: str) -> tuple[str, str]:
    """Module as it was called in training, and what of it: `[base_model.model.]MODULE.lora_A.weight`.

    `torch.compile`, FSDP and the like add names of their own, and a raw state dict the adapter's
    (`lora_A.default.weight`).
    """
    names = [name for name in key.split(".") if name not in _WRAPPERS]
    plain = re.sub(r"^(base_model\.model\.|base_model\.)+", "", ".".join(names))
    match = re.fullmatch(r"(.+?)\.(lora_[AB])\.(?:[^.]+\.)?weight", plain)
    if match:
        return match[1], f"{match[2]}.weight"
    match = re.fullmatch(r"(.+?)\.((?:lora_\w+|base_layer)\..+|\w+)", plain)
    return (match[1], match[2]) if match else ("", key)


class _Names:
    """The model's modules by the names that an adapter may have them under.

    `AutoModel` and the model with a head, a language model alone and inside a vision model, differ in names
    on the way such as `model` and `language_model` only.
    """

    def __init__(self, model: StoredModel) -> None:
        self._prefix = model.layout.model.base_model_prefix
        parameters = model.layout.parameters
        self._modules = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
        for weight in fused_experts(model.layout.groups):
            module = weight.rpartition(".")[0]
            self._modules |= {module, f"{module}.base_layer"}  # peft's wrappers of two parameters
        self._bare: dict[str, list[str]] = {}
        for module in self._modules:
            self._bare.setdefault(_bare(module), []).append(module)

    def of(self, trained: str) -> str:
        """The model's name; the one given where there is none, or several."""
        for name in (f"{self._prefix}.{trained}", trained):
            if name in self._modules:
                return name
        found = self._bare.get(_bare(trained), [])
        return found[0] if len(found) == 1 else trained


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _bare(module: str) -> str:
    return ".".join(name for name in module.split(".") if name not in _ON_THE_WAY)


def _same(file: Checkpoint, key: str, model: StoredModel, module: str) -> bool:
    """Whether a copy of a weight, as peft saves it along with adapters of the head, is the model's own."""
    stored = model.stored_as(f"{module}.weight")
    return stored is not None and np.array_equal(file.read(key), model.checkpoint.read(stored))


def _of(pattern: Mapping[str, float], names: Sequence[str], default: float) -> float:
    """The value for a module, by peft's rule: the first key that matches its name or the end of it."""
    for name in names:
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return default
