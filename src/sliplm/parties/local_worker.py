"""A worker process on this machine, for trying things out and for tests."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Final, Self

from sliplm import forks, places
from sliplm.closing import Closing
from sliplm.errors import WorkerUnavailable
from sliplm.filesystem import because
from sliplm.network import authority as authorities
from sliplm.network.addresses import fits
from sliplm.shares.folders import check_folder

START_LIMIT: Final = 60.0  # seconds; the first start on a machine compiles its kernel
_PASSED: Final = frozenset(
    (
        "PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
        "PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONHASHSEED",
        "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONDEVMODE",
        "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR",
        "SLIPLM_HOME", "SLIPLM_CACHE", "SLIPLM_STATE",
        "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TRITON_HOME", "TRITON_CACHE_DIR",
    )
)  # fmt: skip
_PASSED_PREFIXES: Final = ("LC_", "OMP_", "NUMBA_", "MKL_", "OPENBLAS_", "COVERAGE_", "COV_CORE_")
_STOP_LIMIT: Final = 5.0
_LINE: Final = 4096  # bytes of the ready line, at most
_TAIL: Final = 2000  # bytes of the worker's last words in an error


class LocalWorker(Closing):
    """A worker in a process of its own, with which this one shares memory.

        with LocalWorker(out_dir / "worker") as worker:
            model = sliplm.load(out_dir / "vault", workers=[worker.address])

    Its door is a socket in a private temporary folder.  With an authority it is on loopback instead, over
    TLS, like workers elsewhere: several workers of one vault share an authority.  The process and the folder
    end with the block, with the object, or with this process, whichever comes first; if this process is
    killed, the worker notices and removes the folder.

    Args:
        share_dir: the worker share.
        threads: cores that one product may use; None for all.
        authority: the folder of an authority, as `slip keys init` makes it; None needs no keys.
        name: whose keys it uses there; the vault's are those of "vault".
    """

    def __init__(
        self,
        share_dir: Path | str,
        threads: int | None = None,
        *,
        authority: Path | None = None,
        name: str = "worker",
    ) -> None:
        self._share = Path(share_dir)
        self._threads = threads
        self._authority, self._name = authority, name
        self._address: str | None = None
        self._owner = forks.Process()
        self._held = _Held()
        self._dropped = weakref.finalize(self, _end, self._owner, self._held)
        forks.watch(self)

    def __repr__(self) -> str:
        return f"LocalWorker({str(self._share)!r}, {self._address or 'not started'})"

    def __enter__(self) -> Self:
        """Start.

        Raises:
            ShareError: the folder is not a worker's.
            WorkerUnavailable: with the process's last words, if it does not come up.
        """
        check_folder(self._share, "worker")
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    @property
    def address(self) -> str:
        """Where it listens, with the vault's keys, if any.  Raises WorkerUnavailable outside the block."""
        if self._address is None:
            raise WorkerUnavailable("the local worker is not running: use it in a with block")
        return self._address

    @property
    def pid(self) -> int:
        """The process's number.  Raises WorkerUnavailable outside the block."""
        if self._held.process is None:
            raise WorkerUnavailable("the local worker is not running: use it in a with block")
        return self._held.process.pid

    def close(self) -> None:
        """Stop the process and delete the keys made for it; harmless when done already.  Nothing in a forked
        child.
        """
        if not self._owner.here:
            return
        self._address = None
        _end(self._owner, self._held)

    def left_behind(self) -> None:
        """In a forked child: let the worker end with the parent."""
        self._held.hang_up()

    def _start(self) -> None:
        if self._held.process is not None:
            raise WorkerUnavailable("the local worker runs already: make a second one")
        self._held.folder = places.NewFolder()
        folder, keys = self._held.folder.path, self._authority
        where = f"shm:{folder / 's'}"
        if keys is None and not fits(folder / "s"):  # a long name of a folder: TLS does without
            keys = folder / "keys"
            authorities.init(keys)
        command = [sys.executable, "-P", "-m", "sliplm", "worker", str(self._share), "--json"]
        command += ["--until-stdin-closes", str(folder), "--listen"]
        command += [where] if keys is None else ["127.0.0.1:0", "--keys", str(keys / self._name)]
        if self._threads is not None:
            command += ["--threads", str(self._threads)]
        try:
            with (folder / "stderr").open("wb") as log:
                process = self._held.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    env=worker_environment(),
                )  # fmt: skip
        except OSError as error:
            raise WorkerUnavailable(
                f"the local worker for {self._share} cannot be started {because(error, folder, 'try again')}"
            ) from error
        line = _first_line(process, time.monotonic() + START_LIMIT)
        try:
            listening = json.loads(line)["listening"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._failure(line) from error
        self._address = listening if keys is None else f"{listening}?keys={keys / 'vault'}"

    def _failure(self, line: bytes) -> WorkerUnavailable:
        """Why the process did not come up, in its own words."""
        said = ""
        if self._held.folder is not None:
            with contextlib.suppress(OSError):
                log = (self._held.folder.path / "stderr").read_bytes()
                said = log[-_TAIL:].decode("utf-8", "replace").strip()
        said = said or line.decode("utf-8", "replace").strip() or "it said nothing"
        return WorkerUnavailable(f"the local worker for {self._share} did not start: {said}")


def worker_environment() -> dict[str, str]:
    """What of this process's environment a worker may see: what Python and its kernels need, no secret.

    A list of what passes, not of what does not: keys and passphrases may stand in variables of any name.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }


class _Held:
    """What a running worker takes."""

    folder: places.NewFolder | None = None
    process: subprocess.Popen[bytes] | None = None

    def hang_up(self) -> None:
        """Close our ends of its streams."""
        process = self.process
        for stream in () if process is None else (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _end(owner: forks.Process, held: _Held) -> None:
    if not owner.here:
        return
    process = held.process
    if process is not None:
        process.terminate()
        try:
            process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        held.hang_up()
        held.process = None
    if held.folder is not None:
        held.folder.close()
        held.folder = None


def _first_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What the process prints up to its first newline, its end, or the deadline."""
    line = b""
    if process.stdout is None:
        return line
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while b"\n" not in line and len(line) < _LINE:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            break
        chunk = os.read(process.stdout.fileno(), _LINE)
        if not chunk:
            process.wait(_STOP_LIMIT)
            break
        line += chunk
    return line
