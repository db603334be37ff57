"""Fuzz target: both manifests, through `open_worker` and `open_vault`."""

from __future__ import annotations

import contextlib

from folders import KEY, scratch, vault_folder, worker_folder
from sliplm.errors import SlipError
from sliplm.shares.share import MANIFEST, SHARE, open_vault, open_worker

MAX_LEN = 8192

_BASE = scratch()
_WORKER, _VAULT = worker_folder(_BASE / "worker"), vault_folder(_BASE / "vault")
_SEEDS = [b"w" + (_WORKER / MANIFEST).read_bytes(), b"v" + (_VAULT / MANIFEST).read_bytes()]


def target(data: bytes) -> None:
    """The first byte says whose manifest the rest is; what opens is what the files hold."""
    if data[:1] == b"w":
        (_WORKER / MANIFEST).write_bytes(data[1:])
        with contextlib.suppress(SlipError):
            share = open_worker(_WORKER)
            held = (_WORKER / SHARE).stat().st_size
            assert sum(matrix.nbytes for matrix in share.matrices.values()) <= held
    else:
        (_VAULT / MANIFEST).write_bytes(data[1:])
        with contextlib.suppress(SlipError):
            open_vault(_VAULT, KEY)
            assert data[1:] == _SEEDS[1][1:], "a manifest that is not the sealed one was believed"


def seeds() -> list[bytes]:
    """The honest manifests, and some that hurt other parsers."""
    deep = b"[" * 4000
    return [
        *_SEEDS,
        b"w" + deep,
        b"v" + deep,
        b'w{"version":1}',
        b'w{"version":' + b"9" * 5000 + b"}",
        b"w\xff",
        b"v",
    ]
