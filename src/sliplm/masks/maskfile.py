"""One batch of masks on disk: its products u sealed row by row; of r nothing, for it is made from a key.

    header   magic, version, split id, pool id, batch id, group, m, n, rows, number, the two
             marks of its dealer (32 bytes each, 0 for none); then its tag
    row i    u_i (m elements) and its tag: AES-256-GCM, nonce = i, the header authenticated with it

Both keys of a batch are HKDF of the pool's secret with the batch id as label: `r/ID` makes r (SPEC O1),
`u/ID` seals.  A batch id is 16 random bytes (`masks.fresh_key`), so no key serves two batches; a row is
sealed once, so no nonce serves twice.  All rows have one size, so one `pread` fetches any of them.  A file is
whole or absent, and never changed.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sliplm import durable
from sliplm.arithmetic.field import Elements, derive_key, uniform_rows, uniform_words
from sliplm.errors import PoolError
from sliplm.masks.masks import Dealt, Fresh, Masks, fresh_key
from sliplm.reading import open_regular
from sliplm.secrecy import Secret

NAME: Final = re.compile(r"(\d{1,9})-(\d{1,18})-([0-9a-f]{32})\.masks")
TAG_BYTES: Final = 16

_HEADER = struct.Struct("<8sI16s16s16sIIIIQ32s32s")
_MAGIC, _VERSION = b"SLIPMASK", 2
_ROWS_AT_ONCE = 16  # of a write
_HEADER_NONCE = b"\xff" * 12  # no row has this number
_BATCH_BYTES, _BATCH_ROWS = 32 << 20, 1024  # at most: a batch is dealt in memory

Product = Callable[[int, Fresh], Dealt]
"""(group, draws keys and their r) -> u = w r of the last r, uint32 [rows, m], checked (SPEC O2, O3)."""


@dataclass(frozen=True)
class Owner(Secret):
    """What a batch belongs to; ids are 32 hexadecimal digits, the secret 32 bytes."""

    split_id: str
    pool_id: str
    secret: bytes

    def __repr__(self) -> str:
        return f"Owner(split {self.split_id[:8]}, pool {self.pool_id[:8]}, secret hidden)"


@dataclass(frozen=True, repr=False)
class MaskFile(Secret):
    """A batch of `rows` masks for one group; `number` orders the batches of a group."""

    path: Path
    group: int
    number: int
    rows: int
    m: int
    n: int
    marks: tuple[bytes, ...]
    _header: bytes
    _r_key: bytes
    _u_key: bytes

    def __repr__(self) -> str:
        return f"MaskFile({self.path.name}, rows={self.rows}, secrets hidden)"

    @classmethod
    def open(cls, path: Path, owner: Owner, m: int, n: int) -> Self:
        """Read and verify the header.

        Args:
            path: its name says group, number and id.
            m, n: shape of the group.

        Raises: PoolError when it is not a whole batch of this pool and shape.
        """
        name = NAME.fullmatch(path.name)
        try:
            with open_regular(path) as file:
                data = file.read(_HEADER.size + TAG_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise _unusable(path, f"cannot be read ({error.strerror})") from error
        if name is None or len(data) != _HEADER.size + TAG_BYTES:
            raise _unusable(path, "is no whole batch")
        header, u_key = data[: _HEADER.size], derive_key(owner.secret, f"u/{name[3]}")
        try:
            AESGCM(u_key).decrypt(_HEADER_NONCE, data[_HEADER.size :], header)
        except InvalidTag:
            raise _unusable(path, "is of another pool, or was altered") from None
        fields = _HEADER.unpack(header)
        rows: int = fields[8]
        marks: tuple[bytes, ...] = tuple(mark for mark in fields[10:] if any(mark))
        if header != _pack(owner, name[3], int(name[1]), m, n, rows, int(name[2]), marks):
            raise _unusable(path, f"holds no masks for a matrix of {m} x {n} under this name")
        if size != file_bytes(m, rows):
            raise _unusable(path, f"has {size} bytes instead of {file_bytes(m, rows)}")
        r_key = derive_key(owner.secret, f"r/{name[3]}")
        return cls(path, int(name[1]), int(name[2]), rows, m, n, marks, header, r_key, u_key)

    def read(self, first: int, rows: int) -> Masks:
        """Rows `first` on, which the caller has burnt.  Raises: PoolError; then nothing of them is used."""
        sealed = row_bytes(self.m)
        try:
            with open_regular(self.path) as file:
                data = memoryview(os.pread(file.fileno(), rows * sealed, file_bytes(self.m, first)))
        except OSError as error:
            raise _unusable(self.path, f"cannot be read ({error.strerror})") from error
        if len(data) != rows * sealed:
            raise _unusable(self.path, "was cut off")
        cipher, u = AESGCM(self._u_key), np.empty((rows, self.m), np.uint32)
        for i in range(rows):
            try:
                plain = cipher.decrypt(_nonce(first + i), data[i * sealed : (i + 1) * sealed], self._header)
            except InvalidTag:
                raise _unusable(self.path, f"was altered in row {first + i}") from None
            u[i] = np.frombuffer(plain, "<u4")
        return Masks(uniform_words(self._r_key, self.group, first, rows, self.n), u, self.n)


def batch_rows(m: int, n: int) -> int:
    """How many rows one batch may have."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // (4 * max(m, n))))


def row_bytes(m: int) -> int:
    """Bytes of a row on disk."""
    return 4 * m + TAG_BYTES


def file_bytes(m: int, rows: int) -> int:
    """Bytes of a batch of `rows` rows on disk."""
    return _HEADER.size + TAG_BYTES + rows * row_bytes(m)


@dataclass(frozen=True, repr=False)
class Drawn(Secret):
    """What a batch has before it is dealt: its id, and the key of r."""

    batch_id: str
    r_key: bytes

    def __repr__(self) -> str:
        return f"Drawn({self.batch_id}, key hidden)"

    def r(self, group: int, rows: int, n: int) -> Elements:
        """uint32 [rows, n]."""
        return uniform_rows(self.r_key, group, 0, rows, n)


def draw(owner: Owner) -> Drawn:
    """The id and the key of one batch, never drawn before."""
    batch_id = fresh_key()[:16].hex()
    return Drawn(batch_id, derive_key(owner.secret, f"r/{batch_id}"))


def write(
    folder: Path, owner: Owner, group: int, number: int, shape: tuple[int, int], rows: int, drawn: Drawn,
    dealt: Dealt,
) -> Path:  # fmt: skip
    """Put a dealt batch into the folder: it is there, whole, at the return, or not at all.

    Args:
        shape: (m, n) of the group.

    Raises: OSError when the disk is full; PoolError for products of another shape.
    """
    (m, _), batch_id, u = shape, drawn.batch_id, np.ascontiguousarray(dealt.u, "<u4")
    cipher = AESGCM(derive_key(owner.secret, f"u/{batch_id}"))
    header = _pack(owner, batch_id, group, *shape, rows, number, dealt.marks)
    path = folder / f"{group:04d}-{number:010d}-{batch_id}.masks"
    if u.shape != (rows, m):
        raise PoolError(f"products {list(u.shape)} were dealt where {[rows, m]} were asked for")
    with durable.replacing(path) as file:
        file.write(header + cipher.encrypt(_HEADER_NONCE, b"", header))
        for first in range(0, rows, _ROWS_AT_ONCE):
            part = enumerate(u[first : first + _ROWS_AT_ONCE], first)
            file.write(b"".join(cipher.encrypt(_nonce(i), row.tobytes(), header) for i, row in part))
    return path


def _pack(
    owner: Owner, batch_id: str, group: int, m: int, n: int, rows: int, number: int, marks: tuple[bytes, ...]
) -> bytes:
    ids = [bytes.fromhex(text) for text in (owner.split_id, owner.pool_id, batch_id)]
    first, second = (*marks, bytes(32), bytes(32))[:2]
    return _HEADER.pack(_MAGIC, _VERSION, *ids, group, m, n, rows, number, first, second)


def _nonce(row: int) -> bytes:
    return row.to_bytes(12, "big")


def _unusable(path: Path, why: str) -> PoolError:
    return PoolError(f"the masks in {path} cannot be used: it {why}; delete this file and deal more")
