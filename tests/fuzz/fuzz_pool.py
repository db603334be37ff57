"""Fuzz target: a pool of masks on disk: its state, a batch, and a file that somebody put there."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np

from folders import SPLIT_ID, scratch
from sliplm.arithmetic.field import derive_key
from sliplm.errors import SlipError
from sliplm.masks.masks import Dealt, Fresh
from sliplm.masks.pool import DiskPool
from sliplm.masks.poolfolder import STATE, PoolWriter, stock

MAX_LEN = 2048

SHAPES = [(2, 3), (3, 2)]
ROWS = 4
_BASE = scratch()
_POOL, _COPY = _BASE / "pool", _BASE / "copy"


class Willing:
    """An anchor that agrees to all: what is refused here, the files alone give away."""

    def swap(self, _pool_id: str, _old: str | None, _new: str) -> bool:
        return True


def _secret(label: str) -> bytes:
    return derive_key(bytes(32), label)


def _sums(group: int, fresh: Fresh) -> Dealt:
    """The products of a matrix that has 1 everywhere in its first column."""
    _, r = fresh()
    return Dealt(np.repeat(r[:, :1], SHAPES[group][0], axis=1), (bytes([1]) * 32,))


def _made() -> dict[str, bytes]:
    with PoolWriter(_POOL, SPLIT_ID, _secret, SHAPES, Willing()) as writer:
        for group in range(len(SHAPES)):
            writer.add(group, ROWS, _sums)
            writer.add(group, ROWS, _sums)
    return {path.name: path.read_bytes() for path in (_POOL / SPLIT_ID).iterdir() if path.stat().st_size}


_FILES = _made()
_NAMES = sorted(_FILES)


def target(data: bytes) -> None:
    """The first byte says which file the rest replaces; masks that come out are true, and come out once."""
    choice, content = data[0] % (len(_NAMES) + 1) if data else 0, data[1:]
    shutil.rmtree(_COPY, ignore_errors=True)
    folder = _COPY / SPLIT_ID
    folder.mkdir(parents=True)
    for name, original in _FILES.items():
        (folder / name).write_bytes(original)
    if choice < len(_NAMES):
        (folder / _NAMES[choice]).write_bytes(content)
    else:
        batch, name = _NAMES[data[1] % 4 if len(data) > 1 else 0], content[1:].decode("utf-8", "replace")
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            (folder / name.replace("/", "_")).write_bytes(_FILES[batch])
    with contextlib.suppress(SlipError):
        stock(_COPY, SPLIT_ID, _secret, SHAPES)
    handed: list[bytes] = []
    with (
        contextlib.suppress(SlipError),
        DiskPool(_COPY, SPLIT_ID, _secret, SHAPES, Willing(), reserve=3) as pool,
    ):
        for turn in range(2 * ROWS):
            masks = pool.take(turn % 2, 1)
            assert (masks.u == masks.r[:, :1]).all()
            handed += [row.tobytes() for row in masks.r]
    assert len(set(handed)) == len(handed), "a mask was handed out twice"


def seeds() -> list[bytes]:
    """The honest files, and a batch under names that are nearly its own."""
    batch = _NAMES[0]
    aliases = [batch.lstrip("0") or batch, "0" + batch, batch.replace("0", "\u0660"), f"{batch}.part", STATE]
    extra = bytes([len(_NAMES), 0])
    return [bytes([i]) + _FILES[name] for i, name in enumerate(_NAMES)] + [
        extra + alias.encode() for alias in aliases
    ]
