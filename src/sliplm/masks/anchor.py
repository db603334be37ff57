"""A record outside of a pool's folder that tells the pool from its copies and restored backups.

For each pool an anchor keeps one token, and changes it by compare-and-swap alone: whoever names the present
token may put the next in its place, once.  A pool that does not know the present token is a copy, or was
restored from a backup (`pool` has the argument).  `FileAnchor` lies on this machine and goes back in time
with it when the whole machine is restored; what is behind a `CommandAnchor` need not.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Final, Protocol

from sliplm import durable, places
from sliplm.errors import PoolError
from sliplm.filesystem import because
from sliplm.reading import read_bounded

TOKEN: Final = re.compile("[0-9a-f]{32}")
"""How a token looks, and the id of a pool."""

REFUSED: Final = 3
"""Exit status of an anchor's command: the token is another one; nothing was changed."""

_SAID: Final = 300  # characters of the command's own words in an error


class Anchor(Protocol):
    """Where the tokens are."""

    def swap(self, pool_id: str, old: str | None, new: str) -> bool:
        """Put `new` in the place of `old` if `old` is there, durably; None stands for a pool that the anchor
        does not know.  swap(id, t, t) asks whether t is there.

        Returns: False when another token is there, or none, or one where none should be; nothing was changed.
            A swap that was made before is no success a second time: its `old` is not there any more.

        Raises: PoolError when it cannot be done or said; the swap may have been made.
        """


def file_anchor(folder: Path | None = None) -> FileAnchor:
    """The user's own anchors (`places.anchors`).  Raises: PlaceError."""
    return FileAnchor(places.anchors() if folder is None else folder)


class FileAnchor:
    """Tokens in files of a folder (mode 0700, 0600), for pools that stay on this machine.

    Args:
        folder: made at the first swap if missing; it must not lie in a pool or be part of its backups.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def __repr__(self) -> str:
        return f"FileAnchor({str(self._folder)!r})"

    def swap(self, pool_id: str, old: str | None, new: str) -> bool:
        """As `Anchor.swap`."""
        _check(pool_id, old, new)
        path = self._folder / pool_id
        try:
            durable.make_folder(self._folder)
            guard = durable.lock(self._folder / "lock", wait=True)
            try:
                if _token(path) != old:
                    return False
                durable.replace(path, new.encode())  # also where old is new: what was read must be durable
                return True
            finally:
                os.close(guard)
        except OSError as error:
            raise PoolError(
                f"the anchor {path} cannot be read or written {because(error, path, 'check its rights')}, or "
                f"name another folder in {places.STATE}"
            ) from error


class CommandAnchor:
    """Tokens behind a command: a database, etcd, a TPM, another machine.

    It is run as `COMMAND POOL_ID OLD NEW`, without a shell, OLD being - for a pool that is not known.  Exit
    status 0 says that OLD was there and NEW is there now, for good; 3 that something else is there, and
    nothing was changed; anything else that it failed.  It must not take a swap that was made before for a
    success (a client that tries again by itself does).

    Args:
        command: program and arguments, as in a shell; %-signs and $ mean nothing.
        limit: seconds that it may take.

    Raises: PoolError for an empty command, or quotes that do not close.
    """

    def __init__(self, command: str, limit: float = 30.0) -> None:
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise PoolError(f"the anchor's command cannot be read ({error}): check its quotes") from error
        if not self._command:
            raise PoolError("the anchor's command is empty: name a program")
        self._limit = limit

    def __repr__(self) -> str:
        return f"CommandAnchor({self._command[0]!r})"

    def swap(self, pool_id: str, old: str | None, new: str) -> bool:
        """As `Anchor.swap`."""
        _check(pool_id, old, new)
        arguments = [*self._command, pool_id, "-" if old is None else old, new]
        try:
            done = subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=self._limit,
                check=False,
            )
        except OSError as error:
            raise PoolError(
                f"the anchor's command does not start ({error.strerror}): {arguments[0]}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise PoolError(
                f"the anchor's command did not end within {self._limit:g} s: {arguments[0]}"
            ) from error
        if done.returncode not in (0, REFUSED):
            said = done.stderr[-_SAID:].decode("utf-8", "replace").strip() or "it said nothing"
            raise PoolError(f"the anchor's command failed with status {done.returncode}: {said}")
        return done.returncode == 0


def _check(pool_id: str, *tokens: str | None) -> None:
    if not all(TOKEN.fullmatch(value) for value in (pool_id, *tokens) if value is not None):
        raise PoolError(
            "an anchor takes a pool's id and tokens of 32 hexadecimal digits; nothing was changed"
        )


def _token(path: Path) -> str | None:
    """The token in a file; None without a file."""
    try:
        data = read_bounded(path, 64)
    except FileNotFoundError:
        return None
    text = data.decode("ascii", "replace")
    if not TOKEN.fullmatch(text):
        raise PoolError(f"the anchor {path} is damaged: delete its pool and deal again")
    return text
