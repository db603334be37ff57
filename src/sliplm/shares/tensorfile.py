"""Reading and writing `.safetensors` files without holding more than one tensor.

The layout: 8 bytes little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the
tensors back to back.  Reading validates with the safetensors library before any offset is trusted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sliplm import durable
from sliplm.closing import Closing
from sliplm.errors import ShareError
from sliplm.filesystem import because, is_missing
from sliplm.reading import open_regular

MAX_HEADER_BYTES = 16 << 20  # of a file of which nothing is known
MAX_WRITTEN_BYTES = 100_000_000  # of a header: more the library does not read

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

NUMPY: Mapping[str, str] = {
    "BOOL": "?", "U8": "|u1", "I8": "|i1", "I16": "<i2", "U16": "<u2", "F16": "<f2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype code (such as "F32") and shape of a tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class HeaderLimit:
    """How long the header of a file may be whose tensors are known: in bytes, and in entries (commas)."""

    nbytes: int
    items: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> HeaderLimit:
        """For exactly these tensors, written by whomever."""
        nbytes, items = 4096, 64
        for spec in specs:
            nbytes += len(json.dumps(spec.name)) + 96 + 24 * len(spec.shape)
            items += 4 + len(spec.shape)
        return cls(min(nbytes, MAX_WRITTEN_BYTES), items)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a file: dtype code, shape, first byte from the file's start, bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(
    path: Path,
    opened: BufferedReader | None = None,
    *,
    any_type: bool = False,
    limit: HeaderLimit | None = None,
) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in file order.

    Args:
        opened: the file that is read, where `path` is only what it is called.
        any_type: list tensors of types that are not in ITEM_BYTES too; whoever uses one checks its type.
        limit: judged before memory is taken; None for MAX_HEADER_BYTES.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no complete safetensors file: truncated, damaged, or with a header beyond the
            limit or of unknown dtypes.
    """
    if opened is None:
        with open_regular(path) as file:
            return read_header(path, file, any_type=any_type, limit=limit)
    opened.seek(0)
    length = int.from_bytes(opened.read(8), "little")
    size = os.fstat(opened.fileno()).st_size
    most = MAX_HEADER_BYTES if limit is None else limit.nbytes
    if size < 8 or length > min(most, size - 8):
        raise ValueError("its header is cut off or too long")
    header = opened.read(length)
    if limit is not None and header.count(b",") > limit.items:
        raise ValueError("its header lists more than its tensors")
    try:
        # checks names, shapes, offsets and the file's length, of the very file that is open
        with safe_open(f"/proc/self/fd/{opened.fileno()}", framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"not a complete safetensors file ({error})") from error
    return _entries(json.loads(header), 8 + length, size, any_type)


def map_file(file: BufferedReader, entries: Mapping[str, TensorEntry]) -> dict[str, npt.NDArray[Any]]:
    """Read-only views of the tensors of a file through one memory map; nothing is read yet."""
    file.seek(0)
    try:
        whole: npt.NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        if not is_missing(error):
            raise
        whole = np.memmap(file, dtype=np.uint8, mode="c")  # some file systems map privately alone
        whole.flags.writeable = False
    return {
        name: whole[e.start : e.start + e.nbytes].view(NUMPY[e.dtype]).reshape(e.shape)
        for name, e in entries.items()
    }


def lay_out(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Where tensors go: by falling item size, so that each is aligned to its items.

    Returns: the file's first bytes, where each tensor starts, and the file's length.

    Raises:
        ValueError: the header would be longer than anybody reads.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype]):
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
        starts[spec.name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_WRITTEN_BYTES:
        raise ValueError("more tensors than a file can hold")
    head = len(text).to_bytes(8, "little") + text
    return head, {name: start + len(head) for name, start in starts.items()}, len(head) + end


class SafetensorsWriter(Closing):
    """Writes tensors of known shapes into a preallocated file, each at its own offset, in any order.

    The tensors lie as `lay_out` says.  With `resume`, a file of the same header and length is continued
    (`resumed` is then True); else it is made anew.

    Raises:
        ShareError: the disk is full (the message says how many bytes are needed and how many are free), or
            the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        *,
        mode: int = 0o600,
        resume: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._specs = {spec.name: spec for spec in specs}
        try:
            header, self._starts, self.size = lay_out(self._specs.values(), metadata)
        except ValueError as error:
            raise ShareError(f"{path}: {error}; split fewer groups") from error
        self.resumed = resume and self._same(header)
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if self.resumed else os.O_CREAT | os.O_TRUNC)
        try:
            self._fd = os.open(path, flags, mode)
        except OSError as error:
            raise write_error(path, self.size, error) from error
        if not self.resumed:
            self._start(header, mode)

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write one tensor (C-contiguous or not; its dtype must already be the file's).

        Raises:
            ShareError: the disk is full or broken.
            ValueError: the array is not what was announced for this name.
        """
        spec = self._specs[name]
        if array.shape != spec.shape or array.dtype != np.dtype(NUMPY[spec.dtype]):
            raise ValueError(f"{name}: announced {spec.dtype} {spec.shape}, got {array.dtype} {array.shape}")
        self.write_bytes(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def write_bytes(self, name: str, data: memoryview | bytes, offset: int = 0) -> None:
        """Write raw bytes of one tensor, from `offset` inside it.

        Raises:
            ShareError: the disk is full or broken.
            ValueError: the bytes do not fit into the tensor.
        """
        view = memoryview(data)
        if offset < 0 or offset + len(view) > self._specs[name].nbytes:
            raise ValueError(f"{name}: {len(view)} bytes at {offset} do not fit")
        place = self._starts[name] + offset
        try:
            while view:
                done = os.pwrite(self._fd, view, place)
                view, place = view[done:], place + done
        except OSError as error:
            raise write_error(self.path, self.size, error) from error

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        try:
            durable.sync(self._fd)
        except OSError as error:
            raise write_error(self.path, self.size, error) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _same(self, header: bytes) -> bool:
        try:
            with open_regular(self.path) as file:
                return os.fstat(file.fileno()).st_size == self.size and file.read(len(header)) == header
        except OSError:
            return False

    def _reserve(self) -> None:
        """Find out now that the disk is full, and not after an hour, where the file system can tell."""
        try:
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            if not is_missing(error):
                raise
            os.ftruncate(self._fd, self.size)

    def _start(self, header: bytes, mode: int) -> None:
        try:
            durable.set_mode(self._fd, mode)
            self._reserve()
            os.pwrite(self._fd, header, 0)
        except OSError as error:
            self.close()
            self.path.unlink(missing_ok=True)
            raise write_error(self.path, self.size, error) from error


def write_error(path: Path, needed: int, error: OSError) -> ShareError:
    """The ShareError for a failed write of a file of `needed` bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = free_bytes(path)
        return ShareError(
            f"{path}: no room for this file: {needed} bytes needed, {free} free "
            f"{because(error, path, 'make room')}; then run the same command again: finished work is kept"
        )
    return ShareError(f"{path}: cannot be written {because(error, path, 'check the folder')}")


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that would hold `path`."""
    while not path.exists() and path != path.parent:
        path = path.parent
    found = shutil.disk_usage(path)
    return found.free if found.total else sys.maxsize  # some network file systems do not say


def _entries(header: dict[str, Any], base: int, size: int, any_type: bool) -> dict[str, TensorEntry]:
    header.pop("__metadata__", None)
    entries = {}
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"][0]):
        start, end = item["data_offsets"]
        known = item["dtype"] in ITEM_BYTES
        if not (known or any_type):
            raise ValueError(f"tensor {name} has the unknown dtype {item['dtype']}")
        fits = not known or end - start == math.prod(item["shape"]) * ITEM_BYTES[item["dtype"]]
        if not fits or base + end > size:
            raise ValueError(f"tensor {name} does not fill its place")
        entries[name] = TensorEntry(item["dtype"], tuple(item["shape"]), base + start, end - start)
    return entries
