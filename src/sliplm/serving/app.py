"""The server's routes: OpenAI's chats, completions and models; health, readiness, figures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sliplm.parties.audit import AuditLog
from sliplm.serving import replies
from sliplm.serving.answering import LOOK, Answers, Piece
from sliplm.serving.asked import Body, Chat, Completion, refused
from sliplm.serving.clients import Client, Clients
from sliplm.serving.door import CLIENT, REQUEST_ID, Door
from sliplm.serving.figures import Figures
from sliplm.serving.limits import Limits, Taken
from sliplm.serving.refusals import Refusal, Troubled, busy, failed, forbidden, too_many, wrong
from sliplm.serving.served import Served
from sliplm.shares.share import sliplm_version

T = TypeVar("T")

WAITING: Final = 256
"""Answers that may be under way or wait; who comes then is told to ask again."""

OF_ONE: Final = WAITING // 2
"""The same of one client, so that no one keeps out the others."""

GONE: Final = 499
"""nginx's status for a client that hung up; nobody reads it."""

HERE: Final = ["localhost", "127.0.0.1", "[::1]"]

logger = logging.getLogger("sliplm.serving")


@dataclass
class Desk:
    """What all requests share.

    Attributes:
        clients: who may ask; None: anybody.
        under_way: answers that were begun and have not ended, of each client.
    """

    served: Served
    clients: Clients | None
    limits: Limits
    figures: Figures
    scorer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sliplm-scoring"))
    under_way: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def stands(self, client: Client) -> bool:
        """Whether a client may still have answers."""
        return self.clients is None or self.clients.stands(client)

    def refuse(self, client: Client | None, refusal: Refusal) -> None:
        """Count a request without an answer; `record` writes down how many there were."""
        self.figures.refused.labels(self.served.name, str(refusal.status)).inc()
        name = "" if client is None else client.name
        self.refusals[name, refusal.code or refusal.kind, refusal.status] += 1

    def record(self) -> None:
        """Write down what was refused since: a line for each kind, so that no stranger fills the disk."""
        refusals, self.refusals = self.refusals, Counter()
        for (name, why, status), count in refusals.items():
            detail = {"status": status, "requests": count}
            self.audit.write("refused", why, role="client", address=name, detail=detail)

    @property
    def audit(self) -> AuditLog:
        """The vault's audit record."""
        found: AuditLog = self.served.model.slip.audit
        return found

    def check_room(self, client: Client, answers: int) -> None:
        """Raise Refusal where there is no place for so many more."""
        if self.under_way.total() + answers > WAITING:
            raise busy()
        if self.clients is not None and self.under_way[client.name] + answers > OF_ONE:
            raise too_many(OF_ONE)

    def ready(self) -> str | None:
        """Why it cannot answer now; None if it can."""
        vault = self.served.model.slip
        if self.under_way.total() >= WAITING:
            return "busy"
        if not any(status.state == "up" for status in vault.workers) and not vault.computes_here:
            return "no worker serves"
        return None


class Job:
    """One request on its way: what it has taken, and what becomes of it."""

    def __init__(self, desk: Desk, request: Request, body: Body, answers: Answers, taken: Taken) -> None:
        self.desk, self.body, self.answers = desk, body, answers
        self.id, self.client = request.scope[REQUEST_ID], taken.client
        self.created, self._begun, self._last = int(time.time()), time.perf_counter(), 0.0
        self._taken, self._before = taken, _served(desk)
        self._pieces = answers.pieces(lambda: desk.stands(self.client), desk.scorer)
        self._seen: dict[int, int] = {}
        self._closed = False
        self.spell = desk.served.piece
        self.told = answers.top is not None
        desk.under_way[self.client.name] += len(answers.choices)

    async def pieces(self, first: Piece | None = None) -> AsyncIterator[Piece]:
        """The pieces of all answers, counted.  Raises: Refusal."""
        if first is not None:
            yield first
        async for piece in self._pieces:
            self._count(piece)
            yield piece

    async def first(self) -> Piece:
        """The first piece, to know whether there is an answer before its status is sent.  Raises: Refusal."""
        piece = await anext(self._pieces)
        self._count(piece)
        return piece

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return replies.usage(self.answers.prompt_tokens, self.answers.generated)

    def close(self, refusal: Refusal | None = None) -> None:
        """Once, however it ended: free its places, give back what it did not use, and record it."""
        if self._closed:
            return
        self._closed = True
        self.answers.give_up()
        desk, answers, name = self.desk, self.answers, self.body.model
        desk.under_way[self.client.name] -= len(answers.choices)
        begun = any(choice.generated or choice.ended for choice in answers.choices)
        used = answers.used if begun else 0
        desk.limits.settle(self._taken, used)
        seconds = time.perf_counter() - self._begun
        desk.figures.whole.labels(name).observe(seconds)
        desk.figures.prompts.labels(name).inc(answers.prompt_tokens if begun else 0)
        desk.figures.prompt_size.labels(name).observe(answers.prompt_tokens)
        ended = all(choice.ended for choice in answers.choices)
        workers = {who: n - self._before.get(who, 0) for who, n in _served(desk).items()}
        detail = {
            "request": self.id, "model": name, "prompt": answers.prompt_tokens,
            "generated": answers.generated, "charged": used, "answers": len(answers.choices),
            "logprobs": self.told, "seconds": round(seconds, 3),
            "workers": {who: n for who, n in workers.items() if n},
        }  # fmt: skip
        how = "answered" if ended else ("given up" if refusal is None else refusal.code or refusal.kind)
        desk.audit.write("asked", how, role="client", address=self.client.name, detail=detail)

    def _count(self, piece: Piece) -> None:
        figures, name, now = self.desk.figures, self.body.model, time.perf_counter()
        choice = self.answers.choices[piece.choice]
        if not self._seen:
            figures.first.labels(name).observe(now - self._begun)
        new = choice.taken - self._seen.get(piece.choice, 0)
        if self._last and new:
            figures.between.labels(name).observe((now - self._last) / new)
        self._last = now
        self._seen[piece.choice] = choice.taken
        figures.generated.labels(name).inc(new)
        if piece.end is not None:
            figures.answer_size.labels(name).observe(choice.generated)
            figures.answered.labels(name, piece.end).inc()


class Streamed(StreamingResponse):  # type: ignore[misc]
    """A stream whose job is closed however it ends, also if it never begins."""

    def __init__(self, job: Job, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


def build(desk: Desk) -> Any:
    """The ASGI application.  Routes take and give OpenAI's forms; errors too."""
    app = FastAPI(
        title="sliplm", version=sliplm_version(), docs_url=None, redoc_url=None,
        responses={"default": {"description": "No answer.", "model": Troubled}},
    )  # fmt: skip
    _add_answers(app, desk)
    _add_figures(app, desk)
    _add_errors(app, desk)
    described = app.openapi()
    for body in (Chat, Completion):
        described["components"]["schemas"][body.__name__]["properties"]["model"]["enum"] = [
            *desk.served.names
        ]
    if desk.clients is None:  # a page in a browser must not reach it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=HERE, www_redirect=False)
    return Door(app, desk.clients, desk.refuse)


def _add_answers(app: FastAPI, desk: Desk) -> None:
    async def chat(request: Request, body: Chat) -> Response:
        return await answer(desk, request, body)

    async def completions(request: Request, body: Completion) -> Response:
        return await answer(desk, request, body)

    async def models() -> Any:
        return {"object": "list", "data": [_model(desk, name) for name in desk.served.names]}

    async def model(name: str) -> Any:
        desk.served.adapter(name)
        return _model(desk, name)

    both: Any = {200: {"description": "Whole, or as a stream.", "content": {"text/event-stream": {}}}}
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], responses=both)
    app.add_api_route("/v1/completions", completions, methods=["POST"], responses=both)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name}", model)


def _add_figures(app: FastAPI, desk: Desk) -> None:
    async def health() -> Response:
        alive = desk.served.batch.alive
        return JSONResponse({"status": "ok" if alive else "the batch has ended"}, 200 if alive else 503)

    async def ready() -> Response:
        why = desk.ready()
        return JSONResponse({"status": why or "ready"}, 200 if why is None else 503)

    async def metrics() -> Response:
        text = await asyncio.to_thread(generate_latest, desk.figures.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    text: Any = {200: {"description": "For Prometheus.", "content": {"text/plain": {}}}}
    late: Any = {503: {"description": "Not now."}}
    app.add_api_route("/health", health, responses=late)
    app.add_api_route("/ready", ready, responses=late)
    app.add_api_route("/metrics", metrics, responses=text, response_class=PlainTextResponse)


def _add_errors(app: FastAPI, desk: Desk) -> None:
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _told(desk, request, refused(error.errors()))

    async def refusing(request: Request, error: Refusal) -> Response:
        return _told(desk, request, error)

    async def http(request: Request, error: HTTPException) -> Response:
        return _told(desk, request, _of_http(error))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Refusal, refusing)
    app.add_exception_handler(HTTPException, http)


async def answer(desk: Desk, request: Request, body: Body) -> Response:
    """The answer to one request, whole or as a stream.  Raises: Refusal."""
    client: Client = request.scope[CLIENT]
    body.check()
    desk.served.adapter(body.model)
    _check_policy(client, body)
    answers = Answers(desk.served, body, await desk.served.encode(body))
    desk.check_room(client, len(answers.choices))
    job = Job(desk, request, body, answers, desk.limits.take(client, answers.tokens))
    try:
        if body.stream:
            first = await _unless_gone(request, job.first())
            return Streamed(job, _events(job, first))
        whole = await _unless_gone(request, _whole(job))
        job.close()
        return JSONResponse(whole)
    except BaseException as error:
        job.close(error if isinstance(error, Refusal) else None)
        raise


async def _whole(job: Job) -> dict[str, Any]:
    found: list[list[Piece]] = [[] for _ in job.answers.choices]
    async for piece in job.pieces():
        found[piece.choice].append(piece)
    return _head(job) | {
        "choices": [_choice(job, index, pieces) for index, pieces in enumerate(found)],
        "usage": job.usage(),
    }


def _choice(job: Job, index: int, pieces: list[Piece]) -> dict[str, Any]:
    form = replies.chat_choice if isinstance(job.body, Chat) else replies.text_choice
    return form(index, pieces, job.spell, told=job.told)


async def _events(job: Job, first: Piece) -> AsyncIterator[bytes]:
    """A stream's events.  What fails in its midst is told as an event, and ends it."""
    head = _head(job, chunk=True)
    with_usage = job.body.stream_options is not None and job.body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if with_usage else {}
    at: dict[int, int] = {}
    try:
        async for piece in job.pieces(first):
            began = piece.choice in at
            place = at.setdefault(piece.choice, 0)
            if isinstance(job.body, Chat):
                delta = replies.chat_delta(piece, job.spell, told=job.told, first=not began)
            else:
                delta = replies.text_choice(piece.choice, [piece], job.spell, told=job.told, at=place)
            at[piece.choice] = place + len(piece.text)
            yield replies.event(head | {"choices": [delta]} | rest)
        if with_usage:
            yield replies.event(head | {"choices": [], "usage": job.usage()})
        yield replies.event("[DONE]")
    except Refusal as refusal:
        job.close(refusal)
        yield replies.event(refusal.body())


def _head(job: Job, *, chunk: bool = False) -> dict[str, Any]:
    talk = isinstance(job.body, Chat)
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if talk else "text_completion"
    prefix = "chatcmpl-" if talk else "cmpl-"
    return {"id": prefix + job.id, "object": kind, "created": job.created, "model": job.body.model}


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What comes of some work, unless the client hangs up meanwhile.  Raises: Refusal, which nobody reads."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refusal(GONE, "the client hung up", code="client_gone")
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_policy(client: Client, body: Body) -> None:
    """Raise Refusal for probabilities that the client may not see."""
    top = body.logprobs if isinstance(body, Completion) else body.top
    if top is None:
        return
    if client.logprobs is None:
        raise forbidden("logprobs")
    if top > client.logprobs:
        raise forbidden("top_logprobs" if isinstance(body, Chat) else "logprobs")
    if isinstance(body, Completion) and body.echo and not client.echo:
        raise forbidden("echo")


def _told(desk: Desk, request: Request, refusal: Refusal) -> Response:
    if refusal.status != GONE:
        desk.refuse(request.scope.get(CLIENT), refusal)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _of_http(error: HTTPException) -> Refusal:
    if isinstance(error.__cause__, Refusal):  # raised while the body was read
        return error.__cause__
    if error.status_code == 404:
        return Refusal(404, "there is nothing here: see /openapi.json", code="not_found")
    if error.status_code == 405:
        return Refusal(
            405,
            "this is asked otherwise: see /openapi.json",
            code="method_not_allowed",
            headers=error.headers,
        )
    if error.status_code == 400:
        return wrong("the body is no JSON")
    return failed(error)


def _model(desk: Desk, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": desk.served.begun, "owned_by": "sliplm",
        "parent": None if name == desk.served.name else desk.served.name,
        "max_model_len": desk.served.batch.longest,
    }  # fmt: skip


def _served(desk: Desk) -> Mapping[str, int]:
    """Exchanges that each worker has served."""
    return {status.address: status.served for status in desk.served.model.slip.workers}


async def watch(desk: Desk) -> None:
    """Several times a second: who may ask, and whether the batch computes."""
    while True:
        await asyncio.sleep(LOOK)
        desk.record()
        if desk.clients is not None:
            desk.clients.refresh()
        desk.served.batch.revive()
