"""One request from its first token to its last line in the audit record."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import Request
from fastapi.responses import StreamingResponse

from sliplm.serving import replies
from sliplm.serving.answering import Answers, Piece
from sliplm.serving.asked import Body, Chat
from sliplm.serving.desk import Desk
from sliplm.serving.door import REQUEST_ID
from sliplm.serving.limits import ASKED, BEGUN, Taken
from sliplm.serving.refusals import Refusal

_FAILED: Final = (400, 500, 503)
"""Statuses of what could not be computed: without a token it costs nothing."""


class Job:
    """One request on its way: what it has taken, and what becomes of it."""

    def __init__(self, desk: Desk, request: Request, body: Body, answers: Answers, taken: Taken) -> None:
        self.desk, self.body, self.answers = desk, body, answers
        self.id, self.client = request.scope[REQUEST_ID], taken.client
        self.created, self._begun, self._last = int(time.time()), time.perf_counter(), 0.0
        self._taken, self._before = taken, desk.exchanges()
        self._pieces = answers.pieces(lambda: desk.stands(self.client), desk.scorer)
        self._seen: dict[int, int] = {}
        self._closed = False
        self.spell = desk.served.piece
        self.told = answers.top is not None
        desk.under_way[self.client.name] += len(answers.choices)
        detail = {"request": self.id, "charged": taken.tokens, **desk.place}
        desk.audit.write(BEGUN, "let in", role="client", address=self.client.name, detail=detail)
        self._traced = None
        if desk.traces is not None:
            operation = "chat" if isinstance(body, Chat) else "text_completion"
            asked = [choice.request for choice in answers.choices if choice.request is not None]
            self._traced = desk.traces.begin(self.id, operation, body.model, asked)

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
        if refusal is None or refusal.status not in _FAILED:  # who hangs up early had his prompt read
            begun = begun or any(choice.request and choice.request.computed for choice in answers.choices)
        used = answers.used if begun else 0
        desk.limits.settle(self._taken, used)
        seconds = time.perf_counter() - self._begun
        desk.figures.whole.labels(name).observe(seconds)
        desk.figures.prompts.labels(name).inc(answers.prompt_tokens if begun else 0)
        desk.figures.prompt_size.labels(name).observe(answers.prompt_tokens)
        ended = all(choice.ended for choice in answers.choices)
        workers = {who: n - self._before.get(who, 0) for who, n in desk.exchanges().items()}
        detail = {
            "request": self.id, "model": name, "prompt": answers.prompt_tokens,
            "generated": answers.generated, "charged": used, "answers": len(answers.choices),
            "logprobs": self.told, "seconds": round(seconds, 3),
            "workers": {who: n for who, n in workers.items() if n},
        }  # fmt: skip
        how = "answered" if ended else ("given up" if refusal is None else refusal.code or refusal.kind)
        if self._traced is not None:
            self._traced.end(how, answers.prompt_tokens, answers.generated)
        desk.audit.write(ASKED, how, role="client", address=self.client.name, detail=detail)

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
