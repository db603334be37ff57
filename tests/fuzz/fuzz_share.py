"""Fuzz target: the worker's share.safetensors, vouched for by its manifest: header, offsets and contents."""

from __future__ import annotations

import contextlib

from folders import SHAPES, scratch, worker_folder, worker_manifest
from sliplm.errors import SlipError
from sliplm.shares.share import MANIFEST, SHARE, open_worker

MAX_LEN = 4096

_WORKER = worker_folder(scratch() / "worker")
_SEED = (_WORKER / SHARE).read_bytes()


def target(data: bytes) -> None:
    """Whatever opens has the shapes of the manifest, inside the file."""
    (_WORKER / SHARE).write_bytes(data)
    (_WORKER / MANIFEST).write_bytes(worker_manifest(_WORKER))
    with contextlib.suppress(SlipError):
        share = open_worker(_WORKER)
        assert {name: matrix.shape for name, matrix in share.matrices.items()} == SHAPES
        for matrix in share.matrices.values():
            assert matrix.dtype == "int16" and matrix.tobytes() in data


def seeds() -> list[bytes]:
    """The honest file, and headers that lie about lengths."""
    head = int.from_bytes(_SEED[:8], "little")
    lengths = [(2**64 - 1).to_bytes(8, "little"), (head + 1).to_bytes(8, "little"), bytes(8)]
    return [_SEED, _SEED[:-1], _SEED + b"\0", b"", *(length + _SEED[8:] for length in lengths)]
