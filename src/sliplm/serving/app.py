"""The server's routes: OpenAI's chats, completions and models; health, readiness, figures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sliplm.serving import console, replies
from sliplm.serving.answering import Answers, Piece
from sliplm.serving.asked import Body, Chat, Completion, refused
from sliplm.serving.clients import Client
from sliplm.serving.desk import Desk
from sliplm.serving.door import CLIENT, Door
from sliplm.serving.job import Job, Streamed
from sliplm.serving.refusals import Refusal, Troubled, failed, forbidden, wrong
from sliplm.shares.share import sliplm_version

T = TypeVar("T")

GONE: Final = 499
"""nginx's status for a client that hung up; nobody reads it."""

HERE: Final = ["localhost", "127.0.0.1", "[::1]"]


def build(desk: Desk) -> Any:
    """The ASGI application.  Routes take and give OpenAI's forms; errors too."""
    app = FastAPI(
        title="sliplm", version=sliplm_version(), docs_url=None, redoc_url=None, redirect_slashes=False,
        responses={"default": {"description": "No answer.", "model": Troubled}},
    )  # fmt: skip
    _add_answers(app, desk)
    _add_figures(app, desk)
    console.add_routes(app, desk)
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

    trouble = {"schema": {"$ref": f"#/components/schemas/{Troubled.__name__}"}}
    text: Any = {
        200: {"description": "For Prometheus.", "content": {"text/plain": {}}},
        "default": {"description": "No answer.", "content": {"application/json": trouble}},
    }
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
    async with desk.encoding(client, body.answers):
        prompts = await desk.served.encode(body)
    answers = Answers(desk.served, body, prompts)
    async with desk.turn():
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
    options = job.body.stream_options
    with_usage = options is not None and options.include_usage
    often = with_usage and options is not None and options.continuous_usage_stats
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
            yield replies.event(head | {"choices": [delta]} | ({"usage": job.usage()} if often else rest))
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
        raise forbidden("top_logprobs" if isinstance(body, Chat) else "logprobs", most=client.logprobs)
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
