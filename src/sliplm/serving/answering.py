"""The answers to one request as they come: from the batch's tokens to pieces of text."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sliplm.engines.transformers.drawing import Drawing, Token
from sliplm.engines.transformers.loop import Request
from sliplm.engines.transformers.scoring import score
from sliplm.errors import SlipError
from sliplm.serving.asked import Body, Completion
from sliplm.serving.refusals import Refusal, failed
from sliplm.serving.served import Served, room
from sliplm.serving.text import TextSoFar

logger = logging.getLogger(__name__)

LOOK: Final = 0.25  # seconds after which is looked whether the client may still have answers
LONGEST_WAIT: Final = 600.0  # seconds without any token


class Piece(NamedTuple):
    """What is new of one answer.

    Attributes:
        choice: which answer.
        text: may be empty.
        tokens: that the text is of; with probabilities where they were asked for.
        end: why it ends here, as OpenAI says it: "stop" or "length"; None if it goes on.
    """

    choice: int
    text: str
    tokens: Sequence[Token]
    end: str | None = None


@dataclass(eq=False)
class Choice:
    """One answer on its way.

    Attributes:
        index: its number.
        prompt: tokens.
        echo: the text of the prompt where it is to be repeated, else None.
        request: what the batch does for it; None where nothing is generated.
    """

    index: int
    prompt: list[int]
    echo: str | None
    request: Request | None
    text: TextSoFar
    taken: int = 0
    ended: bool = False
    held: list[Token] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """Tokens so far."""
        return 0 if self.request is None else len(self.request.tokens)


class Answers:
    """All answers to one request.

    Args:
        body: what was asked; it may be.
        prompts: the tokens of each prompt.

    Attributes:
        choices: n answers to each prompt.
        tokens: that they may take at most, prompts included.
        top: how many of the likeliest tokens are told with each; None tells no probability.

    Raises: Refusal for a prompt that is too long.
    """

    def __init__(self, served: Served, body: Body, prompts: Sequence[list[int]]) -> None:
        self._served, self._body = served, body
        self._adapter = served.adapter(body.model)
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Choice] = asyncio.Queue()
        self._gone = False
        n = body.n or 1
        echo = isinstance(body, Completion) and bool(body.echo)
        self.top = body.logprobs if isinstance(body, Completion) else body.top
        self.choices: list[Choice] = []
        self.tokens = 0
        for i, prompt in enumerate(prompts):
            most = room(served, body, prompt)
            self.tokens += (len(prompt) + most) * n
            shown = self._echoed(i, prompt) if echo else None
            self.choices += [self._choice(i * n + j, prompt, most, shown, j) for j in range(n)]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(choice.prompt) for choice in self.choices[:: self._body.n or 1])

    @property
    def generated(self) -> int:
        """Tokens of all answers so far."""
        return sum(choice.generated for choice in self.choices)

    @property
    def used(self) -> int:
        """Tokens that were computed so far, a prompt for each of its answers."""
        return sum(len(choice.prompt) for choice in self.choices) + self.generated

    async def pieces(self, allowed: Callable[[], bool], scorer: ThreadPoolExecutor) -> AsyncIterator[Piece]:
        """Whatever is new, until all answers have ended.  What is not waited for to its end is given up.

        Args:
            allowed: whether the client may still have answers.
            scorer: whose thread computes the probabilities of prompts.

        Raises: Refusal.
        """
        try:
            for choice in self.choices:
                if choice.request is not None:
                    self._served.batch.submit(choice.request)
            for choice in self.choices:
                if choice.echo is not None:
                    yield await self._echo(choice, scorer)
            while not all(choice.ended for choice in self.choices):
                for piece in self._new(await self._next(allowed)):
                    yield piece
        except Refusal:
            raise
        except Exception as error:
            logger.log(
                logging.WARNING if isinstance(error, SlipError) else logging.ERROR,
                "an answer failed: %s", error, exc_info=not isinstance(error, SlipError),
            )  # fmt: skip
            raise failed(error) from error
        finally:
            self.give_up()

    async def _next(self, allowed: Callable[[], bool]) -> Choice:
        """The answer that has something new.  Raises: Refusal."""
        for _ in range(int(LONGEST_WAIT / LOOK)):
            if not allowed():
                raise Refusal(401, "your key was taken back", code="invalid_api_key")
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._news.get(), LOOK)
        raise Refusal(503, "no token came in time", kind="server_error", code="late")

    def give_up(self) -> None:
        """Free the places of all answers that have not ended."""
        self._gone = True
        for choice in self.choices:
            if choice.request is not None and not choice.request.done:
                self._served.batch.cancel(choice.request)

    def _choice(self, index: int, prompt: list[int], most: int, echo: str | None, copy: int) -> Choice:
        body = self._body
        how = Drawing(
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            None if body.seed is None else body.seed + copy,
            self.top,
        )
        text = TextSoFar(self._served.fast, prompt, body.stops)
        choice = Choice(index, prompt, echo, None, text, ended=most == 0)
        if most:
            choice.request = Request(prompt, most, how, self._adapter, lambda _: self._tell(choice))
        return choice

    def _tell(self, choice: Choice) -> None:
        """In the batch's thread."""
        if not self._gone:
            self._loop.call_soon_threadsafe(self._news.put_nowait, choice)

    def _echoed(self, prompt: int, ids: list[int]) -> str:
        given = self._body.prompts[prompt] if isinstance(self._body, Completion) else ""
        return given if isinstance(given, str) else self._served.decode(ids)

    async def _echo(self, choice: Choice, scorer: ThreadPoolExecutor) -> Piece:
        first = Token(choice.prompt[0], float("nan"), ())
        tokens: list[Token] = []
        if self.top is not None:
            found = await self._loop.run_in_executor(
                scorer,
                score,
                self._served.model,
                choice.prompt,
                self.top,
                self._adapter,
                lambda: self._gone,
                self._served.batch.turn,
            )
            tokens = [first, *found]
        return Piece(choice.index, choice.echo or "", tokens, "length" if choice.ended else None)

    def _new(self, choice: Choice) -> list[Piece]:
        """What came since this was asked before."""
        request = choice.request
        if choice.ended or request is None:
            return []
        if request.error is not None:
            raise request.error
        done, fresh = request.done, request.tokens[choice.taken :]
        choice.taken += len(fresh)
        shown = ""
        for token in fresh:
            choice.held.append(token)
            shown += choice.text.add(token.id)
            if choice.text.stopped:
                break
        if done:
            shown += choice.text.end()
        end = None
        if choice.text.stopped:
            end = "stop"
            self._served.batch.cancel(request)
        elif done:
            end = "stop" if self._ended_itself(request) else "length"
        if not shown and end is None:
            return []
        tokens, choice.held = choice.held, []
        choice.ended = end is not None
        if end == "stop" and tokens and self._ended_itself(request) and not choice.text.stopped:
            tokens = tokens[:-1]
        return [Piece(choice.index, shown, tokens, end)]

    def _ended_itself(self, request: Request) -> bool:
        return bool(request.tokens) and request.tokens[-1].id in self._served.batch.ends
