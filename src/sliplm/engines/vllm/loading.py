"""How vLLM loads a vault's folder: `--load-format slip`, in the process that computes.

As with transformers (`engines.transformers.quantizer`) the folder is opened and verified, what the vault
keeps is decrypted into memory, and the layers are connected to the vault.  vLLM has read the configuration
and the tokenizer by then: the configuration is held to the verified one.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from sliplm.engines.vllm import METHOD, SCHEDULER
from sliplm.engines.vllm.products import Products
from sliplm.errors import InputError, ShareError

_COUNTED: Final = "VLLM_COMPUTE_NANS_IN_LOGITS"


class SlipLoader(BaseModelLoader):  # type: ignore[misc]
    """Makes vLLM's model of a vault's folder.

    How the vault runs is said in `--model-loader-extra-config`, by the names of `SlipConfig`:
    `{"workers": ["worker.example:7400?keys=keys/vault"], "fallback": "here"}`.
    """

    _path: str | None = None

    def download_model(self, model_config: Any) -> None:
        """Nothing: a vault's folder is here."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model, connected to its workers, with the vault as `model.slip`.

        Raises:
            InputError: an option of vLLM's or of ours cannot be used.
            CredentialError, SealError, ShareError, MaskError, WorkerError: as `sliplm.load`.
        """
        _check(vllm_config)
        from sliplm.engines.transformers.opened import OpenedModel
        from sliplm.engines.transformers.provenance import check_config
        from sliplm.engines.transformers.quantizer import SlipConfig, connect, open_shares

        config = SlipConfig(**_settings(self.load_config.model_loader_extra_config, SlipConfig))
        vault, worker = open_shares(Path(model_config.model), config)
        manifest = vault.manifest
        if any(group.expert is not None for group in manifest.groups):
            raise InputError("mixtures of experts are not served on vLLM: slip serve does")
        products = Products()
        vllm_config.quant_config.bind({g.name: g.members for g in manifest.groups}, products.number)
        opened = OpenedModel(vault)
        try:
            check_config(model_config.hf_config, opened.folder, vault)
            self._path = opened.path
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        finally:
            self._path = None
            opened.close()
        vllm_config.quant_config.check_taken()
        with _on_all_cores():
            products.vault = connect(config, vault, worker)
        vars(model).update(slip=products.vault, slip_products=products)  # they live as long as it
        return model

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Read what the vault keeps.

        Raises:
            ShareError: something is missing.
            InputError: it is not the moment.
        """
        if self._path is None:
            raise InputError("a vault's weights are loaded once, with the model")
        with safe_open(self._path, framework="pt") as file:
            loaded = model.load_weights(_tensors(file))
        missing = {name for name, value in model.named_parameters() if value.numel()} - set(loaded or ())
        if missing:
            raise ShareError(
                f"vLLM did not load {', '.join(sorted(missing)[:3])}, or does not say so: this model is "
                "served by slip serve"
            )


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Have threads that start in the block run on all cores that vLLM's engine may use: OpenMP has bound this
    one to a core, which whoever deals masks should leave alone.
    """
    engine, own = multiprocessing.parent_process(), os.sched_getaffinity(0)
    if engine is None or engine.pid is None:
        yield
        return
    os.sched_setaffinity(0, os.sched_getaffinity(engine.pid))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _tensors(file: Any) -> Iterator[tuple[str, Tensor]]:
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        yield name, file.get_tensor(name)


def _check(vllm_config: Any) -> None:
    """Raises: InputError for another device than the CPU, or where it would not be known who has failed."""
    if not current_platform.is_cpu():
        raise InputError("a split model runs on vLLM on the CPU only: slip serve runs on NVIDIA's cards too")
    os.environ[_COUNTED] = "1"
    if vllm_config.scheduler_config.scheduler_cls != SCHEDULER or not envs.VLLM_COMPUTE_NANS_IN_LOGITS:
        raise InputError(
            f"--scheduler-cls {SCHEDULER} and {_COUNTED}=1 are chosen where --model names a vault's folder: "
            "this vLLM did not take them, give them yourself"
        )


def _settings(said: Any, kind: type) -> dict[str, Any]:
    """The arguments of `SlipConfig` that JSON can say."""
    known = set(inspect.signature(kind).parameters) - {"quant_method", "attester", "verifier", "deal_on"}
    if not isinstance(said, Mapping) or set(said) - known:
        raise InputError(
            f"--model-loader-extra-config is a JSON object of {', '.join(sorted(known))}, and not {said!r}"
        )
    return {**said, "quant_method": METHOD}
