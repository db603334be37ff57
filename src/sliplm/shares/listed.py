"""The files of a share's folder, as its manifest lists them: opened once, checked, and then only that counts.

Whatever is done with a file after the check is done with the bytes that were checked, or with the open file
itself: what a path leads to a moment later does not matter.  What the manifest does not list is refused,
since other programs would pick it up by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import Final

from sliplm import durable
from sliplm.closing import Closing
from sliplm.errors import ShareError
from sliplm.reading import open_regular
from sliplm.shares.manifest import FileRecord

AGAIN: Final = "copy the share again, or split again"
MAX_SMALL_BYTES: Final = 256 << 20

# what desktops and network file systems leave behind, and what a crash leaves of ours: never opened
_LITTER: Final = re.compile(
    r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|\.nfs[0-9a-f]+|\.[\w.-]+\.part", re.IGNORECASE
)


def beside(path: Path, folder: Path) -> Path:
    """Where a listed file may lie instead while `revision` changes the list; its digest says which it is."""
    return durable.unfinished_name(folder / path.relative_to(folder).as_posix().replace("/", "-"))


class ListedFiles(Closing):
    """The files of a folder that a list names.

    Args:
        folder: where they lie.
        files: length and digest of each, already authenticated where that counts.
        required: names that must be listed.
        large: names whose files stay open instead of being kept in memory.
        besides: names that may lie there without being listed; None where the list is not of all files.

    Attributes:
        small: name -> bytes of those that were read into memory.

    Raises:
        ShareError: a file is missing, altered or no regular file; or one lies there that is not listed.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, FileRecord],
        *,
        required: Iterable[str],
        large: Iterable[str],
        besides: Iterable[str] | None,
    ) -> None:
        self.folder = folder
        self.small: dict[str, bytes] = {}
        self._open: dict[str, BufferedReader] = {}
        self._stack = ExitStack()
        for name in required:
            if name not in files:
                raise ShareError(f"{folder / 'manifest.json'} has no digest of {name}; {AGAIN}")
        if besides is not None:
            refuse_unlisted(folder, {*files, *besides})
        kept_open = frozenset(large)
        try:
            for name, expected in files.items():
                self._take(name, expected, keep_open=name in kept_open)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"ListedFiles({str(self.folder)!r}, {len(self.small) + len(self._open)} files)"

    def file(self, name: str) -> BufferedReader:
        """The open file of one of the large ones; whoever reads it says from where."""
        return self._open[name]

    def close(self) -> None:
        self._stack.close()

    def _take(self, name: str, expected: FileRecord, *, keep_open: bool) -> None:
        path = self.folder / name
        try:
            self._take_from(path, name, expected, keep_open)
        except ShareError:
            other = beside(path, self.folder)
            if not os.path.lexists(other):
                raise
            with contextlib.suppress(ShareError):
                self._take_from(other, name, expected, keep_open)
                return
            raise

    def _take_from(self, path: Path, name: str, expected: FileRecord, keep_open: bool) -> None:
        try:
            file = open_regular(path)
            self._stack.callback(file.close)
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:  # before any memory is taken for it
                raise ShareError(f"{path} has {size} bytes instead of {expected.bytes}; {AGAIN}")
            if keep_open:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                self._open[name] = file
            else:
                if size > MAX_SMALL_BYTES:
                    raise ShareError(f"{path} has {size} bytes, more than {MAX_SMALL_BYTES}; {AGAIN}")
                data = file.read(size + 1)
                file.close()
                found = hashlib.sha256(data).hexdigest()
                self.small[name] = data
        except OSError as error:
            raise ShareError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
        if found != expected.sha256:
            raise ShareError(f"{path} was altered or damaged; {AGAIN}")


def refuse_unlisted(folder: Path, listed: Iterable[str]) -> None:
    """Refuse a folder in which lies what the list does not name.

    Raises:
        ShareError: there is such a file, or the folder cannot be read.
    """
    allowed = frozenset(listed)
    try:
        found = sorted(name for name in _names(folder, "", allowed) if name not in allowed)
    except OSError as error:
        raise ShareError(f"{folder} cannot be read ({error.strerror}); {AGAIN}") from error
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ShareError(
            f"{folder / found[0]}{more}: not one of the files that the split wrote there, and other programs "
            "may load it by its name; move it away if it is yours, else copy the folder again"
        )


def _names(folder: Path, inside: str, allowed: frozenset[str]) -> Iterator[str]:
    """What lies in a folder, and in those folders of it in which something listed lies."""
    with os.scandir(folder) as items:
        for item in items:
            name = inside + item.name
            below = f"{name}/"
            if any(one.startswith(below) for one in allowed) and item.is_dir(follow_symlinks=False):
                yield from _names(folder / item.name, below, allowed)
            elif not (_LITTER.fullmatch(item.name) and item.is_file(follow_symlinks=False)):
                yield name
