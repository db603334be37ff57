"""Load a split model as a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sliplm.engines.transformers.layout import architecture
from sliplm.engines.transformers.opened import OpenedModel
from sliplm.engines.transformers.provenance import read_config
from sliplm.engines.transformers.quantizer import (
    METHOD,
    REFERENCE,
    Folder,
    Shares,
    SlipConfig,
    checked_workers,
    hand_over,
    open_shares,
)
from sliplm.errors import InputError, ShareError
from sliplm.network.attestation import Attester, Verifier
from sliplm.parties.local_worker import LocalWorker
from sliplm.parties.terms import Fallback
from sliplm.reading import read_bounded
from sliplm.shares.folders import check_folder
from sliplm.shares.keysource import KeySpec, checked
from sliplm.shares.manifest import PLAIN_MODULE
from sliplm.shares.shards import worker_folders
from sliplm.shares.share import CONFIG, MODEL, read_vault_manifest

MAX_CONFIG_BYTES = 16 << 20


class Running(TypedDict, total=False):
    """How a vault runs: the keyword arguments of `load` that `SlipConfig` explains."""

    share: Folder | None
    dealers: Sequence[str]
    pool: Folder | None
    anchor: str | None
    ahead: int
    timeout: float
    fallback: Fallback
    pad_to: int
    inputs: int
    hide_routing: bool
    audit: Folder | None
    attester: Attester | None
    verifier: Verifier | None
    adapter: str | None
    deal_on: str


def load(
    vault_dir: Folder,
    workers: Sequence[str],
    key: KeySpec = None,
    *,
    dtype: torch.dtype = torch.float32,
    model_class: Any = None,
    **options: Unpack[Running],
) -> PreTrainedModel:
    """Load a vault folder; the split layers ask the workers for their products.

    The result is a `PreTrainedModel` like any other, in evaluation mode, on the CPU, without gradients.
    Its vault is `model.slip` (`counters`, `deal`, `adapter`); `model.close()` or the end of a block
    `with load(...) as model` closes it, and so does the last reference to the model.

    Args:
        vault_dir: the folder `vault` that `split` wrote.
        workers: addresses of workers that hold its worker share.
        key: what the vault share is sealed with, see `keysource`; None takes the user's key file.
        dtype: of what the vault computes itself; products are computed in float32 whatever it is.
        model_class: the class that was split, or its Auto class; None takes the class that the checkpoint
            names, else AutoModelForCausalLM.
        options: share, dealers, pool, anchor, ahead, timeout, fallback, pad_to, inputs, hide_routing, audit,
            attester, verifier, adapter, deal_on, as `SlipConfig` takes them.

    Raises:
        InputError: an argument cannot be used.
        CredentialError: the key cannot be had.
        SealError: the key is another one, or sealed bytes were altered.
        ShareError: a folder is missing, incomplete, damaged or of another split.
        MaskError: nobody deals masks, or the pool cannot be used.
        WorkerError: no worker can serve.
    """
    unknown = set(options) - set(Running.__annotations__)
    if unknown:
        raise InputError(f"load has no option {', '.join(sorted(unknown))}; see SlipConfig")
    settings = {
        "quant_method": METHOD,
        "workers": checked_workers(workers),
        "key": checked(key),
        **options,
    }
    return _from_pretrained(Path(vault_dir), settings, dtype, model_class)


def open(out_dir: Folder, **options: Any) -> PreTrainedModel:
    """Run a split on this machine: `out_dir/worker` in a worker process, `out_dir/vault` here.

    Of a split in shards each has a process of its own.

    The worker process ends with `model.close()`, at the end of a block `with open(...) as model`,
    when nothing refers to the model any more, or with this process.

    Both share the cores, so what the vault computes itself runs on few of torch's threads (`idle`).

    Args:
        out_dir: the folder that `split` wrote.
        options: keyword arguments of `load`.

    Raises:
        what `load` and `LocalWorker` raise.
    """
    out_dir = Path(out_dir)
    check_folder(out_dir, None)
    with ExitStack() as stack:
        workers = [stack.enter_context(LocalWorker(folder)) for folder in worker_folders(out_dir)]
        model = load(out_dir / "vault", [worker.address for worker in workers], **options)
        for worker in workers:
            cast(Any, model).slip.close_with_it(worker)
        stack.pop_all()
    return model


def reference(
    out_dir: Folder,
    *,
    key: KeySpec = None,
    dtype: torch.dtype = torch.float32,
    model_class: Any = None,
    adapter: str | None = None,
    inputs: int = 1,
) -> PreTrainedModel:
    """Load the quantised model that a split stands for, from both shares in this process, without a worker.

    The hybrid model, with the same `inputs`, gives the same logits, bit for bit: this is the yardstick.  It
    protects nothing.

    Raises:
        CredentialError, ShareError: as `load`.
    """
    check_folder(Path(out_dir), None)
    settings = {"quant_method": REFERENCE, "key": checked(key), "adapter": adapter, "inputs": inputs}
    return _from_pretrained(Path(out_dir) / "vault", settings, dtype, model_class)


def _from_pretrained(
    vault_dir: Path, settings: dict[str, Any], dtype: torch.dtype, model_class: Any
) -> PreTrainedModel:
    """Open the vault, and let transformers make the model from verified bytes alone."""
    _check_kind(vault_dir)
    slip = SlipConfig(**settings)
    vault, worker = open_shares(vault_dir, slip)
    with hand_over(Shares(vault, worker, OpenedModel(vault), slip)) as folder:
        config = read_config(folder, vault_dir)
        _check_method(config, vault_dir)
        model_class = model_class or architecture(config) or AutoModelForCausalLM
        # it goes into the stored entry: as an argument it would make transformers warn
        config.quantization_config = {"quant_method": slip.quant_method}
        model = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    model.config._name_or_path = model.name_or_path = str(vault_dir)
    return cast(PreTrainedModel, model)


def is_module(vault_dir: Path) -> bool:
    """Whether a vault folder is that of a plain PyTorch module."""
    try:
        return read_vault_manifest(vault_dir).source.config_class == PLAIN_MODULE
    except ShareError:
        return False  # whoever opens it says what is wrong


def can_generate(vault_dir: Folder) -> bool:
    """Whether the model of a vault folder generates text: causal language models do, encoders do not.

    True where it cannot be told: whoever opens the folder says what is wrong.  A hint from a file that is not
    verified yet: only the names of the classes in it count, and no file is handed on.
    """
    vault_dir = Path(vault_dir)
    if is_module(vault_dir):
        return False
    try:
        stored = json.loads(read_bounded(vault_dir / CONFIG, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return True
    named = stored.get("architectures") if isinstance(stored, dict) else None
    found = architecture(PretrainedConfig(architectures=named)) if isinstance(named, list) else None
    return found is None or bool(found.can_generate())


def _check_kind(vault_dir: Path) -> None:
    """Say in plain words what a folder is not, before a key is asked for.  Raises: ShareError."""
    check_folder(vault_dir, "vault")
    for name in (CONFIG, MODEL):
        if not (vault_dir / name).is_file():
            raise ShareError(f"{vault_dir} has no {name}: give the folder `vault` that `split` wrote")
    if is_module(vault_dir):
        raise ShareError(
            f"{vault_dir} is the vault of a plain PyTorch module: load it with sliplm.load_module, which "
            "takes a module of the class that was split"
        )


def _check_method(config: PretrainedConfig, vault_dir: Path) -> None:
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != METHOD:
        raise ShareError(f"{vault_dir} is no vault folder: give the folder `vault` that `split` wrote")
