"""sliplm: run a language model on hardware that you do not trust.

    import sliplm

    sliplm.split("model", "out")                      # out/vault stays with you, out/worker goes out
    with sliplm.open("out") as model:                 # a worker process on this machine, the vault here
        model.generate(...)

Importing the package is cheap: torch and transformers are loaded by what needs them, so that a worker runs
without.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from sliplm import errors, places
from sliplm.shares.recipe import Recipe, Rule

if TYPE_CHECKING:
    from sliplm.engines.torch.convert import split_module
    from sliplm.engines.torch.load import load_module, open_module
    from sliplm.engines.transformers.answer import load_tokenizer
    from sliplm.engines.transformers.convert import split
    from sliplm.engines.transformers.load import load, open
    from sliplm.engines.transformers.quantizer import SlipConfig
    from sliplm.engines.transformers.resealing import reseal
    from sliplm.parties.local_worker import LocalWorker

__all__ = [
    "LocalWorker",
    "Recipe",
    "Rule",
    "SlipConfig",
    "errors",
    "load",
    "load_module",
    "load_tokenizer",
    "open",
    "open_module",
    "reseal",
    "split",
    "split_module",
]

_LAZY = {
    "split": "sliplm.engines.transformers.convert",
    "load": "sliplm.engines.transformers.load",
    "open": "sliplm.engines.transformers.load",
    "split_module": "sliplm.engines.torch.convert",
    "load_module": "sliplm.engines.torch.load",
    "open_module": "sliplm.engines.torch.load",
    "SlipConfig": "sliplm.engines.transformers.quantizer",
    "load_tokenizer": "sliplm.engines.transformers.answer",
    "reseal": "sliplm.engines.transformers.resealing",
    "LocalWorker": "sliplm.parties.local_worker",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sliplm' has no attribute {name!r}")


places.settle()  # before a library looks for its cache


def _register(_: Any) -> None:
    if "vllm" not in sys.modules:  # it loads vaults itself, and does not start where numba is loaded
        import_module("sliplm.engines.transformers.quantizer")


# from_pretrained knows `quant_method: slip` from here on, at no cost to those who never load transformers
wrapt.register_post_import_hook(_register, "transformers.modeling_utils")
