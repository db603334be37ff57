"""ASGI applications in processes of a Ray cluster, by Ray Serve, which starts anew what dies.

Each replica is an application of Ray Serve's of its own, so that it keeps its name when it is started anew,
and who is asked is chosen here.  Serve's proxies are not used and nothing is exposed by them: who listens to
clients keeps his own rules.  What goes to and fro is pickle, in clusters that `onray` lets pass and that ask
for a token: a replica of Ray Serve's listens on all networks for calls of other processes of Ray's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    MutableMapping,
)
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, NamedTuple

from sliplm.cluster.onray import alive, first_line, joined, release
from sliplm.errors import ClusterError, SlipError

Message = MutableMapping[str, Any]
App = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_BEAT: Final = 0.5  # seconds between two signs of life
_QUIET: Final = 10.0  # seconds without one after which nothing more is asked of a replica
_BEATS: Final = 60  # signs until who listens has to ask again
_START: Final = 600.0  # seconds that all have to begin
_ALONE: Final = _START + 60.0  # seconds after which a replica that nobody listens to ends
_ENDING: Final = 10.0  # seconds that an answer has to end when nobody waits for it
_AT_ONCE: Final = 4096  # calls of a replica; what is inside has limits of its own

logger = logging.getLogger(__name__)


class Lost(ClusterError):
    """Who was asked has died, and what came of the request is not known; or nobody is there to be asked."""


class Inside(NamedTuple):
    """What runs in a replica.

    Attributes:
        app: answers requests.
        watch: runs beside it, from its start to its end.
        news: plain data that who asks should know, several times a second.
    """

    app: App
    watch: Callable[[], Coroutine[Any, Any, None]]
    news: Callable[[], Any]


Make = Callable[[str], AbstractContextManager[Inside]]
"""The name of a replica -> what it runs.  It is pickled, and shown nowhere."""


@contextmanager
def replicas(address: str | None, count: int, make: Make) -> Iterator[Replicas]:
    """Processes on a cluster, which share its processors evenly, until the block ends.

    Args:
        address: as `onray.joined` takes it; None is a cluster of this machine's own.
        count: how many, from 1.
        make: called once in each process, and again where one is started anew.

    Raises: ClusterError where Ray Serve is not installed, the cluster may not be used or has no room.
    """
    with joined(address) as ray:
        serve = _serve()
        cpus = _processors([machine.get("CPU", 0.0) for machine in alive(ray)], count)
        group = f"sliplm-{uuid.uuid4().hex[:8]}"
        made = serve.deployment(_Replica).options(
            name="replica", num_replicas=1, max_ongoing_requests=_AT_ONCE, health_check_period_s=1,
            graceful_shutdown_timeout_s=_ENDING, ray_actor_options={"num_cpus": cpus},
            logging_config={"enable_access_log": False},
        )  # fmt: skip
        targets = [
            serve.RunTarget(made.bind(release(), str(i), make), name=f"{group}-{i}", route_prefix=None)
            for i in range(count)
        ]
        found = _begun(serve, targets)
        try:
            yield Replicas(ray, found)
        finally:
            for target in targets:
                serve.delete(target.name, _blocking=False)


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ClusterError(
            f"Ray Serve is not installed ({error.name} is missing): pip install 'sliplm[replicas]'"
        ) from error
    log = logging.getLogger("ray.serve")
    log.handlers.clear()  # what goes and comes back is told here
    log.setLevel(logging.ERROR)
    return serve


def _begun(serve: Any, targets: list[Any]) -> list[Replica]:
    """Replicas on their way.  Raises: ClusterError."""
    try:
        serve.start(proxy_location="Disabled")
        handles = serve.run_many(targets, wait_for_applications_running=False)
    except Exception as error:  # any of Ray's
        raise ClusterError(f"Ray Serve cannot begin ({first_line(error)}): see `serve status`") from error
    return [Replica(str(i), handle) for i, handle in enumerate(handles)]


def _processors(machines: list[float], count: int) -> int:
    """How many a replica takes, so that there is room for all.  Raises: ClusterError."""
    for each in range(int(max(machines, default=0)), 0, -1):
        if sum(int(cpus // each) for cpus in machines) >= count:
            return each
    raise ClusterError(
        f"the cluster has no room for {count} replicas: it has {int(sum(machines))} processors, and each "
        "takes one at least: ask for fewer, or add machines with `ray start`"
    )


# --- in a process of the cluster --------------------------------------------------------------------------


class _Replica:
    """One process.  Where it cannot begin, it says why and ends."""

    def __init__(self, ours: str, name: str, make: Make) -> None:
        self._id, self._held = uuid.uuid4().hex, ExitStack()
        self._error: SlipError | None = None
        self._watch: list[asyncio.Task[None]] = []
        self._heard = time.monotonic()
        try:
            _check(ours)
            self._inside = self._held.enter_context(make(name))
        except SlipError as error:
            self._error = error
        except Exception as error:
            logger.exception("a replica cannot begin")
            self._error = ClusterError(f"a replica cannot begin: {type(error).__name__}: {first_line(error)}")

    def __repr__(self) -> str:
        return f"_Replica({self._id}, what it runs hidden)"  # Ray shows it

    def __del__(self) -> None:
        """Ray Serve calls it before the process ends."""
        self._held.close()

    async def beats(self) -> AsyncIterator[tuple[str, Any]]:
        """Which process this is, and its news, for a while."""
        if self._error is not None:
            yield self._id, self._error
            await asyncio.sleep(_BEAT)
            os._exit(1)  # to be started anew
        if not self._watch:
            self._watch = [asyncio.create_task(each()) for each in (self._inside.watch, self._alone)]
        for _ in range(_BEATS):
            self._heard = time.monotonic()
            yield self._id, self._inside.news()
            await asyncio.sleep(_BEAT)

    async def _alone(self) -> None:
        """End when who began this is gone, without a word."""
        from ray import serve

        while time.monotonic() - self._heard < _ALONE:
            await asyncio.sleep(_BEATS * _BEAT)
        logger.error("nobody has asked for signs of life for %.0f s: this replica ends", _ALONE)
        await asyncio.to_thread(serve.delete, serve.get_replica_context().app_name, _blocking=False)

    async def answer(self, of: str, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """The ASGI messages that answer a request; none where another process was asked."""
        if of != self._id:
            return
        requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone, messages = asyncio.Event(), asyncio.Queue[Message | None]()

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._inside.app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            task.result()
        finally:
            gone.set()
            _, late = await asyncio.wait({task}, timeout=_ENDING)
            for each in late:
                each.cancel()


def _check(ours: str) -> None:
    """Raise ClusterError where this process may not serve."""
    if release() != ours:
        raise ClusterError(f"a machine of the cluster has sliplm {release()} and not {ours}: install it")
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ClusterError(
            "a replica listens on all networks for Ray's calls, and whoever reaches it could run anything in "
            "it: start Ray with RAY_AUTH_MODE=token on all machines (docs/serving.md)"
        )


# --- seen from here ---------------------------------------------------------------------------------------


class Replica:
    """One of several, as seen from who asks.

    Attributes:
        name: stays when it is started anew.
        news: its last, if it is up.
        asked: requests under way.
    """

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self.asked = name, 0
        self.news: Any = None
        self._beats = handle.options(stream=True, method_name="beats")
        self._answers = handle.options(stream=True, method_name="answer")
        self._id: str | None = None
        self._gone = asyncio.Event()

    @property
    def up(self) -> bool:
        """Whether it may be asked."""
        return self._id is not None

    async def begin(self) -> None:
        """Wait until it is up.  Raises: what it raised; ClusterError where it takes too long."""
        stream = self._beats.remote()
        try:
            async with asyncio.timeout(_START):
                found, news = await anext(stream)
        except TimeoutError:
            raise ClusterError(
                f"replica {self.name} has not begun in {_START:.0f} s: see `ray status`, whether others use "
                "the cluster, and Ray's logs"
            ) from None
        finally:
            stream.cancel()
        _check_news(news)
        self._id, self.news = found, news

    async def follow(self, check: Callable[[], Any]) -> None:
        """See it, which has begun, go and come back, for ever.

        Args:
            check: raises ClusterError where nothing may be sent to it.
        """
        while True:
            stream = None
            try:
                while True:
                    stream = stream or self._beats.remote()
                    async with asyncio.timeout(_QUIET if self.up else None):
                        beat = await anext(stream, None)
                    if beat is None:
                        stream = None
                        continue
                    _check_news(beat[1])
                    if not self.up:
                        await asyncio.to_thread(check)
                        logger.info("replica %s is back", self.name)
                    self._id, self.news = beat
            except Exception as error:  # of ours, or any of Ray's
                logger.warning("replica %s is gone: %s", self.name, first_line(error))
            finally:
                if stream is not None:
                    stream.cancel()
                self._gone.set()
                self._id, self.news, self._gone = None, None, asyncio.Event()
            await asyncio.sleep(_BEAT)

    async def ask(self, scope: Message, body: bytes) -> AsyncGenerator[Message]:
        """The ASGI messages that answer a request.  It is asked once, of the process that is there now.

        Raises: Lost.
        """
        if self._id is None:
            raise Lost(f"replica {self.name} is gone")
        stream, fallen = self._answers.remote(self._id, scope, body), asyncio.ensure_future(self._gone.wait())
        self.asked, last = self.asked + 1, None
        try:
            while (message := await self._next(stream, fallen)) is not None:
                last = message if _ends(message) else None  # told when all that belongs to it is done
                if last is None:
                    yield message
            if last is None:
                raise Lost(f"replica {self.name} was asked as it went")
            yield last
        finally:
            self.asked -= 1
            _give_up(fallen)
            stream.cancel()

    async def _next(self, stream: Any, fallen: asyncio.Future[Any]) -> Message | None:
        """The next message; None after the last.  Raises: Lost."""
        coming = asyncio.ensure_future(anext(stream, None))
        try:
            await asyncio.wait({coming, fallen}, return_when=asyncio.FIRST_COMPLETED)
            found: Message | None = coming.result()
        except asyncio.InvalidStateError:
            raise Lost(f"replica {self.name} is gone") from None
        except Exception as error:  # any of Ray's
            raise Lost(f"replica {self.name} has failed: {first_line(error)}") from error
        finally:
            _give_up(coming)
        return found


def _ends(message: Message) -> bool:
    """Whether an answer ends with this message."""
    return message["type"] == "http.response.body" and not message.get("more_body")


def _give_up(task: asyncio.Future[Any]) -> None:
    """Cancel what may be under way, and do not complain of how it ends."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _check_news(news: Any) -> None:
    """Raise what a replica could not begin for."""
    if isinstance(news, SlipError):
        raise news


class Replicas:
    """All of them.

    Attributes:
        all: up or not.
    """

    def __init__(self, ray: Any, found: list[Replica]) -> None:
        self._ray, self.all = ray, found

    async def begin(self) -> None:
        """Wait until all are up.  Raises: what one of them raised."""
        await asyncio.gather(*(each.begin() for each in self.all))

    async def follow(self) -> None:
        """See them go and come back, for ever."""
        await asyncio.gather(*(each.follow(lambda: alive(self._ray)) for each in self.all))

    def of(self, who: str | None, able: Callable[[Any], bool]) -> Replica:
        """Whom to ask for somebody: always the same while that one is up and able (rendezvous hashing); for
        nobody in particular, who has least to do.

        Args:
            able: whether there is use in asking one with such news; where none is able, all are.

        Raises: Lost where none is up.
        """
        up = [each for each in self.all if each.up]
        up = [each for each in up if able(each.news)] or up
        if not up:
            raise Lost("no replica is up")
        if who is None:
            return min(up, key=lambda each: each.asked)
        return max(up, key=lambda each: hashlib.sha256(f"{each.name}/{who}".encode()).digest())
