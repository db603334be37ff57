"""Where files go whose place nobody named: also without a home, a passwd entry or a writable root.

    what                its own variable    else under SLIPLM_HOME    else
    cache               SLIPLM_CACHE        cache                     $XDG_CACHE_HOME/sliplm, ~/.cache/sliplm
    key file            SLIPLM_KEY_FILE     config/key                $XDG_CONFIG_HOME/sliplm/key, ~/.config
    ledger              SLIPLM_LEDGER       config/ledger             the same with ledger
    anchors of pools    SLIPLM_STATE        state/anchors             $XDG_STATE_HOME/sliplm/anchors, ~/.local
    temporary files     TMPDIR              tmp                       /tmp, /var/tmp, ..., /dev/shm

What must last (key, ledger, anchors) is never put where it is swept away: without a home it has no place
until one is named.  A cache may go: without a writable home it lies in the temporary folder, in a folder of
this user's own, for numba runs what it finds there.

(platformdirs raises without a home, and knows nothing of the middle columns.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import stat
import tempfile
import time
import weakref
from pathlib import Path
from typing import Final

from sliplm import forks
from sliplm.closing import Closing
from sliplm.errors import PlaceError
from sliplm.filesystem import because

HOME: Final = "SLIPLM_HOME"
"""The variable that names one folder for everything."""

CACHE: Final = "SLIPLM_CACHE"
KEY_FILE: Final = "SLIPLM_KEY_FILE"
LEDGER: Final = "SLIPLM_LEDGER"
STATE: Final = "SLIPLM_STATE"

VARIABLES: Final = (
    *(HOME, CACHE, KEY_FILE, LEDGER, STATE, "HOME", "TMPDIR"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"),
)
"""What is asked here: a process of ours that finds the same places needs these."""

_LIBRARIES: Final = {
    "NUMBA_CACHE_DIR": "numba",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_HOME": "triton",
    "MPLCONFIGDIR": "matplotlib",
}
_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # containers with a read-only root have it
_NAME: Final = "sliplm"
_ALIVE: Final = ".alive"
_YOUNG: Final = 60.0  # seconds


def home() -> Path | None:
    """The user's home folder, from $HOME or the passwd entry; None if neither names one."""
    named = os.environ.get("HOME", "")
    if not named:
        try:
            named = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return None
    return Path(named) if named.startswith("/") else None


def expanded(text: str | os.PathLike[str]) -> Path:
    """A path that a person named, absolute, ~ being the home folder.

    Raises: PlaceError for a ~ that stands for no folder.
    """
    path = Path(text)
    if str(path).startswith("~"):
        own = home()
        first, *rest = path.parts
        if first == "~" and own is not None:
            return own.joinpath(*rest)
        try:
            path = path.expanduser()
        except RuntimeError:
            raise PlaceError(f"{path}: there is no home folder {first} here: write the whole path") from None
    return path.absolute()


def cache() -> Path:
    """The folder of what can be fetched or made again; it may not exist yet.  Raises: PlaceError."""
    named = _named(CACHE, "cache")
    if named is not None:
        return named
    usual = _xdg("XDG_CACHE_HOME", ".cache")
    if usual is not None and writable(usual):
        return usual
    with contextlib.suppress(OSError, PlaceError):
        passing = temporary() / f"{_NAME}-{os.getuid()}"
        passing.mkdir(mode=0o700, exist_ok=True)
        if _ours(passing):  # in /tmp anybody may have made it before us
            return passing
    if usual is not None:
        return usual  # whoever writes there says why it does not go
    raise _homeless("the cache", CACHE)


def key_file() -> Path:
    """The user's own key file; it may not exist yet.  Raises: PlaceError."""
    return _lasting(KEY_FILE, "config/key", "XDG_CONFIG_HOME", ".config", "the sealing key")


def ledger() -> Path:
    """The folder of the owner's ledger; it may not exist yet.  Raises: PlaceError."""
    return _lasting(LEDGER, "config/ledger", "XDG_CONFIG_HOME", ".config", "the ledger of splits")


def anchors() -> Path:
    """The folder of the pools' anchors; it may not exist yet.  Raises: PlaceError."""
    return _lasting(STATE, "state/anchors", "XDG_STATE_HOME", ".local/state", "anchors of pools")


def temporary() -> Path:
    """A folder for temporary files; it exists.  Raises: PlaceError if there is none that can be written."""
    own = _named("", "tmp")
    if own is not None and not os.environ.get("TMPDIR"):
        try:
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PlaceError(
                f"{own} cannot be made {because(error, own, f'name another folder in {HOME}')}"
            ) from error
        return own
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        for other in (Path(os.environ.get("XDG_RUNTIME_DIR") or _MEMORY), _MEMORY):
            if other.is_dir() and writable(other):
                return other
    raise PlaceError(f"no folder for temporary files can be written: name one in TMPDIR or {HOME}")


class NewFolder(Closing):
    """A fresh private folder for temporary files, gone with `close`, with the object or with the process.

    What killed processes left there, of this user's, is removed first: each folder has a file that its
    process keeps locked.

    Raises: PlaceError.
    """

    def __init__(self) -> None:
        where = temporary()
        _sweep(where)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_NAME}-", dir=where))
            lock = _alive(self.path)
        except OSError as error:
            raise PlaceError(
                f"no temporary folder can be made in {where} {because(error, where, 'check its rights')}, or "
                f"name another folder in TMPDIR or {HOME}"
            ) from error
        self._end = weakref.finalize(self, _remove, forks.Process(), self.path, lock)

    def close(self) -> None:
        """Remove it; nothing in a forked child."""
        self._end()


def _alive(folder: Path) -> int | None:
    """Show that this process lives, for `_sweep`: a descriptor, or None where files cannot be locked."""
    lock = os.open(folder / _ALIVE, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        (folder / _ALIVE).unlink()
        return None
    return lock


def _sweep(where: Path) -> None:
    """Remove the folders of processes that were killed."""
    for left in where.glob(f"{_NAME}-*/{_ALIVE}"):
        with contextlib.suppress(OSError):
            status = left.lstat()
            folder = left.parent
            if not (_ours(folder) and folder.lstat().st_uid == os.geteuid() and stat.S_ISREG(status.st_mode)):
                continue
            if time.time() - status.st_mtime < _YOUNG:
                continue  # its process may not have locked it yet
            lock = os.open(left, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _remove(process: forks.Process, folder: Path, lock: int | None) -> None:
    if not process.here:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def writable(path: Path) -> bool:
    """Whether a folder, or the nearest one above it that exists, lets us make files."""
    try:
        while not path.exists():
            path = path.parent
        return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    except OSError:
        return False


def code_cache() -> Path | None:
    """A folder for compiled code, made and nobody's but ours to write; None if there is none to be had."""
    try:
        above = cache()
        folder = above / "numba"
        above.parent.mkdir(parents=True, exist_ok=True)
        for each in (above, folder):
            each.mkdir(mode=0o700, exist_ok=True)
        if _ours(above) and _ours(folder):
            return folder
    except (OSError, PlaceError):
        pass
    return None


def settle() -> None:
    """Give the libraries' caches a place where the home folder is none; what the user set stays."""
    try:
        tempfile.gettempdir()
    except OSError:
        with contextlib.suppress(PlaceError):
            os.environ["TMPDIR"] = tempfile.tempdir = str(temporary())
    usual = _xdg("XDG_CACHE_HOME", ".cache")
    if usual is not None and writable(usual):
        return
    folder = code_cache()
    if folder is not None:
        for variable, name in _LIBRARIES.items():
            os.environ.setdefault(variable, str(folder.parent / name))


def _named(variable: str, under: str) -> Path | None:
    """What its own variable names, or SLIPLM_HOME."""
    chosen = os.environ.get(variable) if variable else None
    if chosen:
        return expanded(chosen)
    everything = os.environ.get(HOME)
    return expanded(everything) / under if everything else None


def _xdg(variable: str, usual: str) -> Path | None:
    """sliplm's folder in one of the XDG base directories; a relative one counts as unset, as XDG has it."""
    named = os.environ.get(variable, "")
    if named.startswith("/"):
        return Path(named) / _NAME
    own = home()
    return None if own is None else own / usual / _NAME


def _lasting(variable: str, under: str, xdg: str, usual: str, what: str) -> Path:
    named = _named(variable, under)
    if named is not None:
        return named
    folder = _xdg(xdg, usual)
    if folder is None:
        raise _homeless(what, variable)
    return folder / Path(under).name


def _homeless(what: str, variable: str) -> PlaceError:
    return PlaceError(
        f"there is no home folder for {what}: name a folder for everything in {HOME}, or its own place in "
        f"{variable}"
    )


def _ours(folder: Path) -> bool:
    """Whether only we (or root) can put files there."""
    status = folder.lstat()
    mine = status.st_uid in (os.geteuid(), 0)
    return stat.S_ISDIR(status.st_mode) and mine and not status.st_mode & 0o022
