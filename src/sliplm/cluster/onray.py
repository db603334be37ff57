"""Tasks on the machines of a Ray cluster, which are the owner's own: they see what the tasks take.

Ray asks nobody for a password unless RAY_AUTH_MODE=token, and encrypts nothing unless RAY_USE_TLS=1.  Without
TLS only a cluster on this one host is used; that is looked at again before each task.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple, TypeVar

from sliplm import places
from sliplm.cluster.tasks import HERE, Executor, Pool
from sliplm.errors import ClusterError, SlipError, SlipWarning

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_CONNECT_SECONDS: Final = 5.0
_STATUS_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 20.0  # between two looks whether a machine is left that could carry out a task
_STORE: Final = 256 << 20  # bytes for objects of a cluster of our own
_TRIES: Final = 3  # again, after the machine died: what kills each machine that takes it must end

_PREPARED: dict[str, Any] = {}  # in a process of the cluster: by the pool's name


class _Outcome(NamedTuple):
    """All that comes back of a task, as one value: errors and warnings too."""

    value: Any
    error: SlipError | None
    said: tuple[str, ...]


def executor(
    address: str | None, *, cards: float = 0, width: int | None = None
) -> AbstractContextManager[Executor]:
    """This process for None; else the cluster at an address.

    Args:
        address: "HOST:PORT" of its head, or "auto" for the one that this machine belongs to.
        cards: GPUs that a task takes, maybe a part of one.  With 0, tasks see none.
        width: how many tasks at once; None: one on each machine, with all its processors, or on each card.

    Raises:
        ClusterError: Ray is not installed, or nothing answers there; several hosts without TLS; no machine
            with processors, or no card where one is asked for.
    """
    return nullcontext(HERE) if address is None else _connected(address, cards, width)


@contextmanager
def _connected(address: str, cards: float, width: int | None) -> Iterator[Executor]:
    with joined(address) as ray:
        yield _Cluster(ray, cards, width)


@contextmanager
def joined(address: str | None) -> Iterator[Any]:
    """Ray itself, connected to the cluster at an address, as for `executor`.

    Args:
        address: None starts a cluster on this machine, which knows this process alone and ends with it.

    Raises: ClusterError.
    """
    if address is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # before the import
    ray = _ray()
    if address is not None:
        _check_address(address)
    with nullcontext({"address": address}) if address is not None else _own_cluster() as options:
        try:
            ray.init(**options, log_to_driver=False, configure_logging=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            what = "cannot be started here" if address is None else f"at {address} cannot be joined"
            advice = ": name a folder with a shorter path in TMPDIR" if "AF_UNIX path" in str(error) else ""
            raise ClusterError(f"the Ray cluster {what} ({first_line(error)}){advice}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _own_cluster() -> Iterator[dict[str, Any]]:
    """How a cluster is started whose files nobody else reads: Ray opens its own folder to everybody."""
    with places.NewFolder() as folder:
        yield {
            "address": "local", "include_dashboard": False, "object_store_memory": _STORE,
            "_system_config": {"automatic_object_spilling_enabled": False}, "_temp_dir": f"{folder.path}/ray",
        }  # fmt: skip


def alive(ray: Any) -> list[dict[str, Any]]:
    """The resources of each machine that is there.

    Raises: ClusterError where a host has come that nothing may go to in clear.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    hosts = {node["NodeManagerAddress"] for node in nodes}
    if not _encrypted() and (len(hosts) > 1 or not all(map(_own, hosts))):
        raise _in_clear(f"the cluster has machines at {', '.join(sorted(hosts))}")
    return [node["Resources"] for node in nodes]


def _ray() -> Any:
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ClusterError(
            "Ray is not installed: pip install 'sliplm[cluster]', or for --replicas 'sliplm[replicas]', or "
            "leave --ray and --replicas out"
        ) from error
    if ray.is_initialized():
        raise ClusterError("this process uses a Ray cluster already: call ray.shutdown() first")
    return ray


# --- may it be used? -------------------------------------------------------------------------------------


def _check_address(address: str) -> None:
    """Raises: ClusterError where nothing answers within the limits, or what goes there would go in clear."""
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or "/" in host:
            raise ClusterError(
                f"--ray {address}: give HOST:PORT of the cluster's head, or auto on a machine of it"
            )
        if not _encrypted() and not _own(host):
            raise _in_clear(f"{host} is another machine")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address} ({first_line(error)}): start one with `ray start "
                "--head`"
            ) from error
    # a process of its own: where something else listens, Ray's client ends the process that it is in
    asked = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    asked += [] if address == "auto" else ["--address", address]
    try:
        done = subprocess.run(asked, capture_output=True, timeout=_STATUS_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise ClusterError(
            f"what listens at {address} is no Ray cluster that lets this machine in: see `ray status`, and "
            "that RAY_USE_TLS, RAY_AUTH_MODE and the version of Ray are the same on all machines"
        )


def _encrypted() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _in_clear(why: str) -> ClusterError:
    return ClusterError(
        f"{why}, and what tasks take and give, weights and secrets, would go there in clear: set "
        "RAY_USE_TLS=1 with certificates on all machines, and RAY_AUTH_MODE=token (docs/operations.md)"
    )


def _own(host: str) -> bool:
    """Whether an address is one of this machine's: nobody else can listen there."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
    except OSError:
        return False
    return True


# --- tasks -----------------------------------------------------------------------------------------------


class _Cluster:
    """Who is connected."""

    def __init__(self, ray: Any, cards: float, width: int | None) -> None:
        self._ray, self._cards, self._width = ray, cards, width
        self._cpus, self.width = self._room()

    @contextmanager
    def pool(self, prepare: Callable[[], S], function: Callable[[S, T], R]) -> Iterator[Pool[T, R]]:
        needs = {"num_cpus": self._cpus, "num_gpus": self._cards, "max_retries": _TRIES}
        remote = self._ray.remote(**needs, retry_exceptions=False, scheduling_strategy="SPREAD")(_carry_out)
        bound = self._ray.put((prepare, function))
        name = uuid.uuid4().hex
        pool: _OnRay[T, R] = _OnRay(self, lambda task: remote.remote(name, release(), bound, task))
        try:
            yield pool
        finally:
            pool.close()

    def begun(self, begin: Callable[[], Any]) -> Any:
        """What stands for a task's value.  Raises: ClusterError where its weights have no room."""
        try:
            return begin()
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"a task cannot be handed to the cluster ({first_line(error)}): give its machines more "
                "memory for objects, `ray start --object-store-memory`; the same command goes on"
            ) from error

    def value(self, reference: Any) -> Any:
        """What came of a task, taken once.  Raises: ClusterError."""
        ray = self._ray
        while True:
            try:
                return ray.get(reference, timeout=_LOOK_SECONDS)
            except ray.exceptions.GetTimeoutError:
                self._room()  # it may wait for a machine that will not come again
            except ray.exceptions.RayTaskError as error:  # no error of ours
                raise ClusterError(f"a task failed on the cluster: {first_line(error.cause)}") from error
            except ray.exceptions.RayError as error:
                raise ClusterError(
                    f"a task was lost on the cluster, {_TRIES} times again ({first_line(error)}); what is "
                    "finished stays, and the same command goes on"
                ) from error

    def cancel(self, reference: Any) -> None:
        self._ray.cancel(reference, force=True)

    def check(self) -> None:
        """Raises: ClusterError where a host has come that nothing may go to in clear."""
        alive(self._ray)

    def _room(self) -> tuple[float, int]:
        """Processors for a task, and how many tasks at once.  Raises: ClusterError."""
        resources = alive(self._ray)
        cpus, gpus = ([r.get(kind, 0.0) for r in resources] for kind in ("CPU", "GPU"))
        if not any(cpus) or (self._cards and not any(gpus)):
            raise ClusterError(
                f"the cluster has no machine left with {'a card' if self._cards else 'processors'} for "
                "tasks: start one with `ray start`; what is finished stays, and the same command goes on"
            )
        if self._width is not None:
            return 1, self._width
        if self._cards:
            return 1, int(sum(gpus) // self._cards) or 1
        each = min(count for count in cpus if count)
        return each, int(sum(count // each for count in cpus))


class _OnRay(Pool[T, R]):
    """A thread waits for each task."""

    def __init__(self, cluster: _Cluster, begin: Callable[[T], Any]) -> None:
        self.width = cluster.width
        self._cluster, self._begin = cluster, begin
        self._threads = ThreadPoolExecutor(self.width, "sliplm-ray")
        self._lock, self._begun, self._closed = threading.Lock(), set[Any](), False

    def submit(self, task: T, /) -> Future[R]:
        return self._threads.submit(self._one, task)

    def _one(self, task: T) -> R:
        self._cluster.check()
        with self._lock:
            if self._closed:
                raise ClusterError("the work was given up")
            reference = self._cluster.begun(lambda: self._begin(task))
            self._begun.add(reference)
        try:
            outcome: _Outcome = self._cluster.value(reference)
        finally:
            with self._lock:
                self._begun.discard(reference)
        for words in outcome.said:
            warnings.warn(words, SlipWarning, stacklevel=2)
        if outcome.error is not None:
            raise outcome.error
        value: R = outcome.value
        return value

    def close(self) -> None:
        """Nothing is begun from here on; what was begun is given up."""
        with self._lock:
            self._closed = True
            begun = list(self._begun)
        for reference in begun:
            self._cluster.cancel(reference)
        self._threads.shutdown(cancel_futures=True)


def _carry_out(name: str, ours: str, bound: tuple[Callable[[], S], Callable[[S, T], R]], task: T) -> _Outcome:
    """In a process of the cluster: a task, with what its pool has prepared there."""
    prepare, function = bound
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SlipWarning)
        try:
            if release() != ours:
                raise ClusterError(
                    f"a machine of the cluster has sliplm {release()} and not {ours}: install it"
                )
            if name not in _PREPARED:
                _PREPARED.clear()  # of an earlier pool
                _PREPARED[name] = prepare()
            value, error = function(_PREPARED[name], task), None
        except SlipError as raised:
            value, error = None, raised
    return _Outcome(value, error, tuple(str(w.message) for w in said if issubclass(w.category, SlipWarning)))


def release() -> str:
    """This machine's version of sliplm."""
    try:
        return version("sliplm")
    except PackageNotFoundError:
        return "0+unknown"


def first_line(error: BaseException) -> str:
    """The first line of what was said."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
