"""Files that are there whole or not at all, however the writing ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sliplm import durable


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close"])
def test_an_interrupt_leaves_no_unfinished_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come as soon as the file is there, before anybody has its descriptor."""
    path, real = tmp_path / "state", getattr(os, call)
    path.write_bytes(b"old")

    def interrupted(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            durable.replace(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    assert path.read_bytes() == b"old"


def test_what_lies_in_the_way_is_left_there(tmp_path: Path) -> None:
    """A link where the unfinished file would be is refused, and not deleted."""
    path = tmp_path / "state"
    durable.unfinished_name(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        durable.replace(path, b"new")
    assert durable.unfinished_name(path).is_symlink()
    assert not path.exists()
