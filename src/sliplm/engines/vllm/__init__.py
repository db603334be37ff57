"""vLLM serves a split model: its engine is the vault's, by vLLM's own plugins.

    SLIPLM_WORKERS=worker.example:7400 python -m vllm.entrypoints.openai.api_server --model out/vault

`register` is the entry point `slip` of `vllm.general_plugins`, which vLLM calls in each of its processes.
May import `engines`, `engines.transformers` and what is below.  Begin with `loading`, then `products`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import wrapt

from sliplm.errors import InputError
from sliplm.shares.folders import side_of

METHOD: Final = "slip"
SCHEDULER: Final = "sliplm.engines.vllm.scheduling.Scheduler"


def register() -> None:
    """Make vLLM know `quant_method: slip`, and what a vault's folder is.  Harmless when done already."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    if METHOD in QUANTIZATION_METHODS:
        return
    from sliplm.engines.vllm.layers import SlipQuantization
    from sliplm.engines.vllm.loading import SlipLoader

    register_quantization_config(METHOD)(SlipQuantization)
    register_model_loader(METHOD)(SlipLoader)
    # it makes the configuration: in processes that are handed one, it is never imported
    wrapt.register_post_import_hook(_hook, "vllm.engine.arg_utils")


def _hook(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "EngineArgs.create_engine_config", _for_a_vault)


def _for_a_vault(create: Any, chosen: Any, args: Any, kwargs: Any) -> Any:
    """What a vault's folder needs, chosen for whoever names one; prefixes are not shared, for how fast an
    answer begins would tell one user what another has asked.

    Args:
        chosen: vLLM's `EngineArgs`.

    Raises: InputError for what a vault does not do.
    """
    if side_of(Path(chosen.model)) == "vault":
        engines = chosen.tensor_parallel_size, chosen.pipeline_parallel_size, chosen.data_parallel_size
        refused = {
            "prefix caching": chosen.enable_prefix_caching,
            "parallel engines": engines != (1, 1, 1),
            "speculative decoding": chosen.speculative_config,
            "LoRA of vLLM's (split an adapter, and name it as `adapter`)": chosen.enable_lora,
        }
        if names := [name for name, asked in refused.items() if asked]:
            raise InputError(f"a split model runs on vLLM without {', '.join(names)}")
        chosen.enable_prefix_caching = False
        chosen.load_format, chosen.scheduler_cls = METHOD, SCHEDULER
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # it wipes no blocks where it sees no need to
    return create(*args, **kwargs)
