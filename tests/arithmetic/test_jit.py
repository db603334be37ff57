"""Compiled code that is kept on disk is that of the sources that are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sliplm

INNER = """
from sliplm.arithmetic.jit import jit


@jit
def inner():
    return {}
"""
OUTER = """
from sliplm.arithmetic.inner import inner
from sliplm.arithmetic.jit import jit


@jit
def outer():
    return inner()
"""


def test_a_kept_function_notices_that_one_in_another_file_has_changed(tmp_path: Path) -> None:
    """After an upgrade, too, whose file of the first is as before."""
    package = Path(sliplm.__file__).parent
    shutil.copytree(package, tmp_path / "sliplm", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "sliplm" / "arithmetic"
    (folder / "outer.py").write_text(OUTER)
    code = "from sliplm.arithmetic.outer import outer; print(outer(), sum(outer.stats.cache_hits.values()))"

    def result(value: int) -> str:
        (folder / "inner.py").write_text(INNER.format(value))
        return subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout.strip()  # fmt: skip

    assert result(1) == "1 0"
    assert result(1) == "1 1"  # it was kept
    assert result(2) == "2 0"
