"""What clients reach where several replicas serve: it hands each request to the replica of its client.

A replica has all of `app`, and looks at the key and the body again.  Here is only what must be known before:
who asks, so that all that one client asks for is computed, limited and counted in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, Response

from sliplm.cluster.onserve import Lost, Replica, Replicas
from sliplm.parties.audit import AuditLog
from sliplm.serving import replies
from sliplm.serving.answering import LOOK
from sliplm.serving.clients import Client, Clients
from sliplm.serving.desk import NO_WORKER, Refused
from sliplm.serving.door import CLIENT, METRICS, REQUEST_ID, Door, Message, Receive, Scope, Send
from sliplm.serving.refusals import Refusal

_PASSED: Final = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
    "headers", "client", "server", REQUEST_ID,
)  # fmt: skip
_HEALTH: Final = {"/health": 0, "/ready": 1}
"""Of a replica's news: why it does not compute, and why it cannot answer now."""


class Front:
    """The ASGI application.

    Args:
        clients: None serves anybody, whoever has least to do.
        audit: where refusals are written down.
        name: of the model.
    """

    def __init__(self, group: Replicas, clients: Clients | None, audit: AuditLog, name: str) -> None:
        self._group, self._clients, self._audit, self._name = group, clients, audit, name
        self._refused, self._registry = Refused(), CollectorRegistry()
        self._counter = Counter(
            "sliplm:request_refused", "Requests without one, by status.", ["model_name", "status"],
            registry=self._registry,
        )  # fmt: skip
        self.app = Door(self._answer, clients, self._refuse)

    async def watch(self) -> None:
        """Who may ask, and which replicas are up."""
        following = asyncio.ensure_future(self._group.follow())
        try:
            while True:
                await asyncio.sleep(LOOK)
                self._refused.record(self._audit)
                if self._clients is not None:
                    self._clients.refresh()
        finally:
            following.cancel()

    def close(self) -> None:
        """Write down what is left."""
        self._refused.record(self._audit)

    def _refuse(self, client: Client | None, refusal: Refusal) -> None:
        self._counter.labels(self._name, str(refusal.status)).inc()
        self._refused.add(client, refusal)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = scope["method"] == "GET"  # how else to ask, a replica says
        if read and scope["path"] in _HEALTH:
            await self._health(_HEALTH[scope["path"]])(scope, receive, send)
        elif read and scope["path"] == METRICS:
            await (await self._metrics(_passed(scope)))(scope, receive, send)
        else:
            client: Client = scope[CLIENT]
            try:
                replica = self._group.of(None if self._clients is None else client.name, _able)
            except Lost as lost:
                raise _lost(lost) from lost
            await _unless_gone(receive, _hand_over(replica, _passed(scope), await _body(receive), send))

    def _health(self, place: int) -> Response:
        """200 while one replica can."""
        found = {each.name: each.news[place] or "ok" if each.up else "down" for each in self._group.all}
        good = "ok" in found.values()
        return JSONResponse({"status": "ok" if good else "none", "replicas": found}, 200 if good else 503)

    async def _metrics(self, scope: Message) -> Response:
        """The figures of all replicas, each with its name as a label; of one that is down only that it is."""
        up = GaugeMetricFamily("sliplm:replica_up", "Whether it is asked.", labels=["model_name", "replica"])
        texts: dict[str, str] = {}
        for each in self._group.all:
            if each.up:
                with contextlib.suppress(Lost):
                    texts[each.name] = await _text(each, scope)
            up.add_metric([self._name, each.name], float(each.name in texts))
        texts["front"] = generate_latest(self._registry).decode()
        return Response(generate_latest(_Read([up, *_labelled(texts)])), media_type=CONTENT_TYPE_LATEST)


class _Read:
    """Figures that were read, as a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self._families


def _labelled(texts: dict[str, str]) -> Iterable[Metric]:
    """The figures of several texts of Prometheus', in one family each, labelled with whose they are."""
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for found in text_string_to_metric_families(text):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                family.samples.append(sample._replace(labels={**sample.labels, "replica": name}))
    return families.values()


async def _text(replica: Replica, scope: Message) -> str:
    """What a replica answers, whole.  Raises: Lost."""
    found = b""
    async with contextlib.aclosing(replica.ask(scope, b"")) as messages:
        async for message in messages:
            found += message.get("body", b"")
            if message.get("status", 200) != 200:
                raise Lost(f"replica {replica.name} shows no figures: {message['status']}")
    return found.decode()


async def _hand_over(replica: Replica, scope: Message, body: bytes, send: Send) -> None:
    """Answer with what a replica does.  Raises: Refusal; Lost where an answer has begun that is no stream."""
    started, stream = False, False
    try:
        async with contextlib.aclosing(replica.ask(scope, body)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    headers = [(key, value) for key, value in message["headers"] if key != b"x-request-id"]
                    message["headers"] = headers  # the door names it again
                    stream = any(
                        key == b"content-type" and b"event-stream" in value for key, value in headers
                    )
                started = True
                await send(message)
    except Lost as lost:
        if not started:
            raise _lost(lost) from lost
        if not stream:
            raise
        await send({"type": "http.response.body", "body": replies.event(_lost(lost).body())})


async def _unless_gone(receive: Receive, work: Any) -> None:
    """Do some work, unless the client hangs up meanwhile.  Raises: what the work does."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
    finally:
        for each in (doing, gone):
            each.cancel()
        await asyncio.wait({doing, gone})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes:
    """The body, as far as it came.  Raises: Refusal for one that is too long."""
    found, more = [], True
    while more:
        message = await receive()
        found.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(found)


def _able(news: tuple[str | None, str | None]) -> bool:
    """Whether a replica computes, and has a worker to compute with; one that is busy keeps its clients."""
    return news[0] is None and news[1] != NO_WORKER


def _passed(scope: Scope) -> Message:
    """What a replica sees of a request, as plain data."""
    return {name: scope[name] for name in _PASSED if name in scope}


def _lost(lost: Lost) -> Refusal:
    return Refusal(503, "the replica that serves you was lost: ask again", kind="server_error",
                   code="replica_lost", retry=1)  # fmt: skip
