"""What clients may send: the fields of OpenAI's API that are answered, and what each may hold.

A body is refused at its first mistake: a list of all of them would take a thousand times its memory.  A
field that is not here is refused by name.  Fields of OpenAI's that would change an answer, and are not
supported, may hold what changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sliplm.serving.refusals import Refusal, unsupported, wrong

CHOICES: Final = 16
"""Answers that one request may have."""

TOP: Final = 20
"""Likeliest tokens that may be asked for with each."""

STOP: Final = 1024
"""Characters of a text that ends an answer: each token is compared with all its beginnings."""


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("utf8", "half a character is no text") from None
    return text


def _whole(number: object) -> object:
    """JSON has one kind of number: 2.0 is 2."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _ids(prompt: object) -> object:
    """The same for token ids: a million of them are read at once."""
    return [_whole(number) for number in prompt] if isinstance(prompt, list) else prompt


def _few(prompt: object) -> object:
    """No more prompts than answers, before each of them is looked at."""
    if isinstance(prompt, list) and len(prompt) > CHOICES and isinstance(prompt[0], str | list):
        raise PydanticCustomError("too_many", "more than {most} prompts", {"most": CHOICES})
    return prompt


_OWN: Final = ("utf8", "too_many")
"""Mistakes that say themselves what is wrong."""

_FORMS: Final = {
    "prompt": f"a text, a list of token ids, or a list of up to {CHOICES} of either, none of them empty",
    "stop": f"a text of up to {STOP} characters, or a list of up to 4",
    "content": 'a text, or a list of parts {"type": "text", "text": ...}: there is nothing but text here',
}
"""What fields take that have alternatives."""

Text = Annotated[str, AfterValidator(_utf8)]
Whole = Annotated[int, BeforeValidator(_whole)]
Ending = Annotated[Text, Field(max_length=STOP)]
Stop = Ending | Annotated[list[Ending], Field(fail_fast=True, max_length=4)] | None
Number = Annotated[Whole, Field(ge=0, lt=2**31)]
Ids = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1), BeforeValidator(_ids)
]


class Strict(BaseModel):
    """JSON as it is: no number from a text, no field that is not known."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        """The first field that is not known, alone."""
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError("extra_forbidden", "unknown", {"name": str(name)})
        return data


class StreamOptions(Strict):
    """What comes with a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # with every piece: vLLM's own, which public load tools ask for


class Common(Strict):
    """What both ways to ask have."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # neither used nor kept
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text)

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return self.n or 1

    def check(self) -> None:
        """Raise Refusal for what is not supported, or does not go together."""
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options is for streams: set stream to true", "stream_options")
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise unsupported(name)


class Part(Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True, min_length=1)]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text"]


class Chat(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=TOP)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def most(self) -> int | None:
        """Tokens of an answer, or None for as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens to tell with each; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """As `Common.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs needs logprobs: set it to true", "top_logprobs")


class Completion(Common):
    """The body of /v1/completions."""

    prompt: Annotated[
        Text
        | Ids
        | Annotated[list[Text], Field(fail_fast=True, min_length=1)]
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1)],
        BeforeValidator(_few),
    ]
    max_tokens: Number | None = 16
    logprobs: Annotated[Whole, Field(ge=0, le=TOP)] | None = None
    echo: bool | None = None
    best_of: Whole | None = None
    suffix: Text | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as tokens."""
        found: Any = self.prompt
        return [found] if isinstance(found, str) or isinstance(found[0], int) else found

    @property
    def answers(self) -> int:
        """As `Common.answers`, to each prompt."""
        return len(self.prompts) * (self.n or 1)

    def check(self) -> None:
        """As `Common.check`."""
        super().check()
        if self.best_of not in (None, 1, self.n):
            raise unsupported("best_of")
        if self.suffix:
            raise unsupported("suffix")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens is at least 1, or 0 with echo", "max_tokens")
        if self.answers > CHOICES:
            raise wrong(f"prompts times n is at most {CHOICES}", "n")


Body = Chat | Completion


def refused(errors: Sequence[Any]) -> Refusal:
    """The refusal for a body that does not fit, from pydantic's errors; nothing of the body is repeated."""
    found = errors[0]
    where = [str(each) for each in found["loc"] if each != "body"]
    if found["type"] == "json_invalid":
        return wrong("the body is no JSON")
    if found["type"] == "extra_forbidden":
        name = found["ctx"]["name"][:100]
        return wrong(f"unknown field {name!r}: leave it out", name, "unknown_parameter")
    if where[:1] == ["logit_bias"]:
        return unsupported("logit_bias")
    if found["type"] == "missing":
        name = where[-1] if where else "the body"
        return wrong(f"{name} is missing", name, "missing_required_parameter")
    if not where:
        return wrong(
            "the body is a JSON object: send it with Content-Type: application/json",
            "the body",
            "invalid_value",
        )
    part = where[:3] if where[0] == "messages" else where[:1]  # what follows names alternatives of ours
    name = "".join(f"[{each}]" if each.isdigit() else f".{each}" for each in part).removeprefix(".")
    return wrong(f"{name}: {_words(found, part[-1])}", name, "invalid_value")


def _words(found: Any, name: str) -> str:
    """What is wrong with a field, of which pydantic may know only what the first alternative takes."""
    if name in _FORMS and found["type"] not in _OWN:
        return f"give {_FORMS[name]}"
    if found["type"] == "less_than":  # pydantic writes it as a float
        return f"Input should be less than {found['ctx']['lt']}"
    words: str = found["msg"]
    return words
