"""Vault processes that are killed: one after the other, each a fork that opens everything itself.

    python crash_vault.py VAULT ADDRESS (POOL ANCHORS | WORKER)

With POOL its masks are on disk, with WORKER they are dealt in memory.  Each line on stdin, [POINT, TIMES,
SECONDS], starts a vault that asks for products without end.  It is killed at the point, when it comes there
for the TIMES-th time, or SECONDS after its first product.  A line on stdout says how it went: {"products":
how many, "error": what ended it, or null, "point": was it killed at the point}.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sliplm import durable
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import uniform_words
from sliplm.arithmetic.kernels import threads
from sliplm.errors import SlipError
from sliplm.masks.anchor import FileAnchor
from sliplm.masks.maskpool import MaskPool
from sliplm.masks.masks import Masks
from sliplm.masks.pool import DiskPool
from sliplm.network.transport import Connection
from sliplm.parties.codec import GroupCodec
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.shares.share import open_vault, open_worker

START_LIMIT = 60.0
POINTS: dict[str, tuple[object, str, bool]] = {
    "before the state is written": (durable, "replace", False),
    "before the state is renamed": (Path, "replace", False),
    "after the state is renamed": (Path, "replace", True),
    "before the anchor's swap": (FileAnchor, "swap", False),
    "after the anchor's swap": (FileAnchor, "swap", True),
    "before a used batch is deleted": (Path, "unlink", False),
    "before masks are taken": (DiskPool, "take", False),
    "after masks were taken": (DiskPool, "take", True),
    "before masks are taken from memory": (MaskPool, "take", False),
    "after masks were taken from memory": (MaskPool, "take", True),
    "before a message is sent": (Connection, "send", False),
    "after a message was sent": (Connection, "send", True),
    "any time": (durable, "nothing", False),
}


def kill_at(point: str, times: int, note: Callable[[], None]) -> None:
    """This process ends when it comes to the point for the so-many-th time."""
    owner, name, after = POINTS[point]
    if not hasattr(owner, name):
        return
    real: Any = getattr(owner, name)
    left = times

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        result = real(*args, **kwargs) if after else None
        if left <= 0:
            note()
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else real(*args, **kwargs)

    setattr(owner, name, wrapped)


def run(vault: Path, address: str, masks: list[Path], count: mmap.mmap) -> None:
    """Products of every group in turn, without end."""
    share = open_vault(vault)
    rng = np.random.default_rng(int.from_bytes(os.urandom(16), "big"))
    shapes = [(secrets.m, secrets.n) for secrets in share.groups.values()]
    disk = None
    if len(masks) == 2:
        anchor = FileAnchor(masks[1])
        disk = DiskPool(masks[0], share.split_id, share.pool_key, shapes, anchor, reserve=8)
    worker = None if disk else open_worker(masks[0])
    products = 0
    with Vault(share, Terms([address], worker, pool=disk, ahead=16)) as served:
        while True:
            for name, (_, n) in zip(share.groups, shapes, strict=True):
                served.product(name, rng.standard_normal((rng.integers(1, 5), n)).astype(np.float32))
                products += 1
                count[:4] = struct.pack("<i", products)


def warm_up(vault: Path) -> None:
    """Load what is compiled, once for all children; nothing secret of it is used again."""
    kernels.choose()
    for secrets in open_vault(vault).groups.values():
        codec, x = GroupCodec(secrets), np.ones((1, secrets.n), np.float32)
        r, y = uniform_words(bytes(32), 0, 0, 1, secrets.n), np.zeros((1, codec.m), np.uint32)
        hidden, out = np.empty((1, codec.n), np.uint32), np.empty((1, codec.m), np.float32)
        asked = codec.ask(x, Masks(r, y, codec.n), hidden, out)
        codec.ahead(asked)
        codec.holds(asked, y)
        codec.accepts(asked.hidden, y)
        codec.opened(asked, y, y)


def main() -> None:
    vault, address, *masks = Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:])
    warm_up(vault)
    count = mmap.mmap(-1, 8)  # shared with the child: products, and whether it came to the point
    for line in sys.stdin:
        point, times, seconds = json.loads(line)
        count[:8] = bytes(8)
        near, far = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(near)
            threads._pool.cache_clear()  # the parent's threads are not here
            try:
                kill_at(point, times, lambda: count.__setitem__(slice(4, 8), b"\1\0\0\0"))
                run(vault, address, masks, count)
            except SlipError as error:
                os.write(far, f"{type(error).__name__}: {error}".encode()[:2000])
            except BaseException as error:
                os.write(far, f"unexpected {error!r}".encode()[:2000])
            os._exit(1)
        os.close(far)
        begun = time.monotonic() + START_LIMIT
        while not select.select([near], [], [], 0.005)[0] and time.monotonic() < begun:
            if struct.unpack("<i", count[:4])[0]:
                select.select([near], [], [], seconds)  # readable when the child has ended, too
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        error = os.read(near, 4000).decode() or None
        os.close(near)
        products, at_point = struct.unpack("<ii", count[:8])
        print(json.dumps({"products": products, "error": error, "point": bool(at_point)}), flush=True)


if __name__ == "__main__":
    main()
