"""How transformers loads a vault folder: `quant_method: slip`, by its own `from_pretrained`.

    config = SlipConfig(workers=["worker.example:7400?keys=keys"])
    model = AutoModelForCausalLM.from_pretrained("out/vault", quantization_config=config)

transformers builds the model without memory, this quantizer replaces the split layers and decrypts what the
vault keeps (`opened`), transformers loads that, and this quantizer connects the layers to the vault.

`sliplm.load` opens the vault first and hands it over (`hand_over`), so that transformers never sees the
vault's folder.  Where a user gives the folder to `from_pretrained`, transformers has read its `config.json`
before this quantizer is asked: the folder is verified then, and what was read is held to it (`provenance`).
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sliplm.engines.experts import ManyProducts, SlipExperts, replace_experts
from sliplm.engines.modules import GroupProduct, SlipLinear, refuse_in_children, replace
from sliplm.engines.transformers.hybrid import make_hybrid
from sliplm.engines.transformers.opened import OpenedModel, remade
from sliplm.engines.transformers.provenance import check_config, verified_generation
from sliplm.errors import InputError, ShareError
from sliplm.masks.anchor import CommandAnchor, file_anchor
from sliplm.masks.pool import DiskPool
from sliplm.network.attestation import Attester, Verifier
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.quarantine import Quarantine
from sliplm.parties.terms import Fallback, Terms
from sliplm.parties.vault import Vault
from sliplm.shares.keysource import KeySpec, checked
from sliplm.shares.shards import open_all
from sliplm.shares.share import MODEL, VaultShare, WorkerShare, open_vault

Folder = str | os.PathLike[str]

METHOD = "slip"
REFERENCE = "slip-reference"
WORKERS_VARIABLE = "SLIPLM_WORKERS"


@register_quantization_config(REFERENCE)
@register_quantization_config(METHOD)
class SlipConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a vault runs.  A vault folder stores only `quant_method`; the rest is said at each loading.

    Args:
        workers: addresses, as `LocalWorker.address` gives them; None takes the environment's
            SLIPLM_WORKERS (separated by commas).
        key: what the vault share is sealed with, see `keysource`; None takes the user's key file.
        share: the worker folder, from which masks are dealt, or the folder with all shards in it; None takes
            what lies beside the vault folder, or no folder where dealers or a pool are named.
        dealers: addresses of workers that deal masks, and do not collude with `workers`.
        pool: a folder with masks dealt by `slip deal`.
        anchor: the command with which that pool was dealt, if any, see `anchor.CommandAnchor`.
        ahead: tokens whose masks are kept ready in memory.
        timeout: seconds to wait for a worker's or dealer's answer.
        fallback: without a worker "fail" the request, or compute "here", from `share`: slow.
        pad_to: messages of more than one row are filled up to a multiple of so many.  That hides the number
            of rows in sizes, not a prompt's length: the gaps between messages still tell it.
        inputs: rows that each input travels as, 1, or 2: what rounding leaves of the first follows as a
            second, for twice the masks and traffic, where weights do not make up for activation outliers.
        hide_routing: each expert of a mixture gets a row for each token, so that workers do not see who is
            chosen, see `Terms`.
        audit: a file to which records of lies, losses and returns are appended.
        attester: makes this vault's evidence, for workers that ask for it.
        verifier: judges the workers' and dealers' evidence.
        adapter: the adapter that serves where a request chooses none, see `adapters`; None for none.
        deal_on: what masks are dealt on from `share`: "cpu", or NVIDIA cards, "cuda" or "cuda:0,cuda:1".
        quant_method: as stored.
    """

    def __init__(
        self,
        workers: Sequence[str] | None = None,
        share: Folder | None = None,
        ahead: int = 64,
        timeout: float = 30.0,
        quant_method: str = METHOD,
        key: KeySpec = None,
        dealers: Sequence[str] = (),
        pool: Folder | None = None,
        anchor: str | None = None,
        fallback: Fallback = "fail",
        pad_to: int = 1,
        inputs: int = 1,
        hide_routing: bool = False,
        audit: Folder | None = None,
        attester: Attester | None = None,
        verifier: Verifier | None = None,
        adapter: str | None = None,
        deal_on: str = "cpu",
    ) -> None:
        self.workers = None if workers is None else checked_workers(workers)
        self.dealers = checked_workers(dealers) if dealers else []
        self.share = None if share is None else os.fspath(share)
        self.pool = None if pool is None else os.fspath(pool)
        self.audit = None if audit is None else os.fspath(audit)
        self.anchor, self.fallback, self.pad_to = anchor, fallback, pad_to
        self.inputs, self.hide_routing = inputs, hide_routing
        self.ahead, self.timeout = ahead, timeout
        self.attester, self.verifier = attester, verifier
        self.adapter, self.deal_on = adapter, deal_on
        self.key = checked(key)
        self.quant_method = quant_method

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of `from_pretrained` sets over the stored configuration."""
        return {name: value for name, value in vars(self).items() if name in _SAID_AT_LOADING}

    def __deepcopy__(self, memo: dict[int, Any]) -> SlipConfig:
        """transformers copies its configurations; what they hold of ours is not copied with them."""
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        """What is stored and shown: addresses and paths are of this machine only, the key of nobody else."""
        return {"quant_method": self.quant_method}


_SAID_AT_LOADING = frozenset(inspect.signature(SlipConfig).parameters) - {"quant_method"}

# Without this, transformers drops the configuration that the user passed for the stored one.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, SlipConfig)


class Shares(NamedTuple):
    """An opened vault on its way through transformers."""

    vault: VaultShare
    worker: WorkerShare | None
    opened: OpenedModel
    config: SlipConfig


_HANDED: dict[str, Shares] = {}  # by the private folder that transformers is given


@contextmanager
def hand_over(shares: Shares) -> Iterator[Path]:
    """The folder to give to transformers, whose quantizer then finds these shares."""
    folder = shares.opened.folder
    _HANDED[str(folder)] = shares
    try:
        yield folder
    finally:
        _HANDED.pop(str(folder), None)
        shares.opened.close()


@register_quantizer(METHOD)
class SlipQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `SlipLinear` in the place of the split layers and opens the vault, as `model.slip`."""

    quantization_config: SlipConfig
    # Trainer asks both before it evaluates; who trains is refused by the model's own train()
    is_trainable: ClassVar[bool] = True
    is_qat_trainable: ClassVar[bool] = True
    _shares: tuple[VaultShare, WorkerShare | None]
    _opened: OpenedModel
    _groups: tuple[GroupProduct, ...]
    _experts: tuple[SlipExperts, ...]

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        """Refuse devices other than the CPU and NVIDIA's cards: the trusted side runs there."""
        devices = device_map.values() if isinstance(device_map, Mapping) else ()
        if any(torch.device(device).type not in ("cpu", "cuda") for device in devices):
            raise InputError(
                f"device_map {device_map}: the trusted side of a split model runs on the CPU or on NVIDIA's "
                "cards"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Turn "auto" and its kin into the first card if there is one: what a vault keeps is small."""
        if not isinstance(device_map, str):
            return device_map
        return {"": torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        files = [] if checkpoint_files is None else checkpoint_files
        folder = _vault_folder(files)
        handed = _HANDED.pop(str(folder), None)
        if handed is None:
            vault, worker = open_shares(folder, self.quantization_config)
            self._opened = OpenedModel(vault)
            check_config(model.config, self._opened.folder, vault)
            verified_generation(model, self._opened.folder)
        else:
            vault, worker, self._opened, self.quantization_config = handed
        self._shares = vault, worker
        groups = vault.manifest.groups
        self._groups = replace(model, {g.name: g.members for g in groups if g.expert is None}, None)
        self._experts = replace_experts(model, groups, None)
        for name in [name for name, module in model.named_modules() if isinstance(module, SlipLinear)]:
            model.all_tied_weights_keys.pop(f"{name}.weight", None)  # no longer there to be tied
        for module in _split_layers(model):
            vars(module)["weight"] = _initialised(module)  # GPT-2, BLT, others initialise layers by name
        files[:] = [self._opened.path]  # the very list that transformers reads next

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        tensors = model.state_dict(keep_vars=True)
        _fill(tensors, self._opened.path)
        self._opened.close()
        missing = [
            name for name, tensor in tensors.items() if not (_is_initialised(tensor) or remade(model, name))
        ]
        if missing:
            names = ", ".join(missing[:5])
            raise ShareError(f"{self._shares[0].path / MODEL} lacks {names}: split the model again")
        for module in _split_layers(model):
            del vars(module)["weight"]
        model.requires_grad_(False)
        source = self._open(*self._shares)
        del self._shares, self._opened  # the vault has taken what it needs of the secrets
        for group in self._groups:
            group.source = source
        for experts in self._experts:
            experts.source = source
        model.slip = source
        refuse_in_children(model)
        make_hybrid(model)

    def _open(self, vault: VaultShare, worker: WorkerShare | None) -> ManyProducts:
        return connect(self.quantization_config, vault, worker)

    def is_serializable(self) -> bool:
        """Called by `save_pretrained`, which would write a model without its split weights."""
        raise InputError("a split model cannot be saved: copy its vault folder, or split the original again")


@register_quantizer(REFERENCE)
class ReferenceQuantizer(SlipQuantizer):
    """The same with both shares in this process and no worker."""

    def _open(self, vault: VaultShare, worker: WorkerShare | None) -> ManyProducts:
        if worker is None:
            raise InputError("the reference needs the worker share: name no dealer and no pool")
        config = self.quantization_config
        return LocalProducts(vault, worker, config.adapter, config.inputs)


def open_shares(folder: Path, config: SlipConfig) -> tuple[VaultShare, WorkerShare | None]:
    """The vault share in `folder`, and the worker share that masks are dealt from; the key is forgotten.

    Raises:
        CredentialError, SealError, ShareError: as `sliplm.load`.
    """
    vault = open_vault(folder, config.key)
    config.key = None  # it has served
    worker = None
    if config.share is not None or not (config.dealers or config.pool):
        worker = open_all(vault, None if config.share is None else Path(config.share))
    return vault, worker


def connect(config: SlipConfig, vault: VaultShare, worker: WorkerShare | None) -> Vault:
    """The trusted side, connected to its workers.

    Raises:
        InputError, MaskError, WorkerError: as `sliplm.load`.
    """
    workers = config.workers or _workers_of_environment()
    pool = None
    if config.pool is not None:
        shapes = [(group.rows, group.columns) for group in vault.manifest.groups]
        anchor = file_anchor() if config.anchor is None else CommandAnchor(config.anchor)
        uses = [1.0 if config.hide_routing else group.use for group in vault.manifest.groups]
        pool = DiskPool(Path(config.pool), vault.pool_name, vault.pool_key, shapes, anchor, uses=uses)
    try:
        terms = Terms(
            workers,
            worker,
            dealers=config.dealers,
            pool=pool,
            ahead=config.ahead,
            timeout=config.timeout,
            fallback=config.fallback,
            pad_to=config.pad_to,
            inputs=config.inputs,
            hide_routing=config.hide_routing,
            audit=config.audit,
            attester=config.attester,
            verifier=config.verifier,
            adapter=config.adapter,
            deal_on=config.deal_on,
            quarantine=Quarantine.own(),
        )
        return Vault(vault, terms)
    except BaseException:
        if pool is not None:
            pool.close()
        raise


def checked_workers(workers: Sequence[str]) -> list[str]:
    """Return the addresses as a list.

    Raises:
        InputError: there are none, or `workers` is one text.
    """
    if isinstance(workers, str) or not workers or not all(isinstance(item, str) and item for item in workers):
        raise InputError(f'workers is a list of addresses, such as ["127.0.0.1:7400"], and not {workers!r}')
    return list(workers)


def _workers_of_environment() -> list[str]:
    workers = [item for item in os.environ.get(WORKERS_VARIABLE, "").split(",") if item]
    if not workers:
        raise InputError(
            "no worker is named for this split model: use sliplm.load(vault_dir, workers=[...]), or pass "
            "quantization_config=SlipConfig(workers=[...]), or set the environment's "
            f"{WORKERS_VARIABLE} to addresses separated by commas"
        )
    return workers


def _vault_folder(checkpoint_files: Sequence[str]) -> Path:
    """The folder of the one file that transformers is about to read."""
    paths = [Path(file) for file in checkpoint_files]
    if [path.name for path in paths] != [MODEL]:
        raise ShareError(
            f"a vault folder keeps its weights in {MODEL}, not in {[path.name for path in paths]}: "
            "give the folder `vault` as `split` wrote it"
        )
    return paths[0].parent


def _split_layers(model: PreTrainedModel) -> list[SlipLinear]:
    return [module for module in model.modules() if isinstance(module, SlipLinear)]


def _initialised(layer: SlipLinear) -> torch.Tensor:
    """A tensor of a layer's shape without memory, that transformers' initialisers pass over."""
    tensor = torch.empty(layer.out_features, layer.in_features, device="meta")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def _fill(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Read what transformers passed over because it takes a name of today's for one of an older form."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in set(file.keys()) & {
            name for name, tensor in tensors.items() if not _is_initialised(tensor)
        }:
            tensors[name].copy_(file.get_tensor(name))
            tensors[name]._is_hf_initialized = True  # type: ignore[attr-defined]


def _is_initialised(tensor: torch.Tensor) -> bool:
    """Whether transformers read the tensor from the checkpoint, or tied it to one that it read."""
    return bool(getattr(tensor, "_is_hf_initialized", False))
