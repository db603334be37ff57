"""What a client is told that gets no answer: OpenAI's statuses, its form of errors, and the reason in words.

No message names a worker, repeats a prompt, or shows a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sliplm.errors import BusyError, InputError, PrecisionError, SlipError


class Trouble(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Troubled(BaseModel):
    """The body of every answer that is none."""

    error: Trouble


class Refusal(Exception):
    """A request that is not answered, or no further.

    Attributes:
        status: of HTTP.
        kind, code, param: as OpenAI's errors have them.
        retry: seconds after which to ask again, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self._headers = dict(headers or {})
        self.status, self.kind, self.code, self.param, self.retry = status, kind, code, param, retry

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        found = self._headers | ({} if self.retry is None else {"retry-after": str(self.retry)})
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """As JSON."""
        error = Trouble(message=str(self), type=self.kind, param=self.param, code=self.code)
        return Troubled(error=error).model_dump()


def wrong(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request itself cannot be answered."""
    return Refusal(400, message, param=param, code=code)


def unsupported(param: str) -> Refusal:
    """OpenAI's API has it, this server has not."""
    return wrong(f"{param} is not supported by this server: leave it out", param, "unsupported_parameter")


def no_model(name: str) -> Refusal:
    """The model is not served here."""
    shown = name if len(name) <= 100 else name[:100] + "..."
    return Refusal(404, f"there is no model {shown!r}: see /v1/models", code="model_not_found", param="model")


def forbidden(what: str, *, most: int | None = None) -> Refusal:
    """The key's policy does not allow it, or no more than so many."""
    limit = "" if most is None else f" beyond {most}"
    return Refusal(
        403,
        f"your key may not ask for {what}{limit}",
        kind="permission_error",
        code="not_allowed",
        param=what,
    )


def busy() -> Refusal:
    """There is no room for one more now."""
    return Refusal(503, "the server is busy: ask again", kind="server_error", code="overloaded", retry=1)


def too_many(most: int) -> Refusal:
    """The client has too many answers under way."""
    return Refusal(
        429,
        f"your key has {most} answers under way at most: wait for some",
        kind="requests",
        code="rate_limit_exceeded",
        retry=1,
    )


def failed(error: Exception) -> Refusal:
    """What became of an error of ours.  The log has its words."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, BusyError):
        return busy()
    if isinstance(error, PrecisionError):
        return wrong("this input cannot be computed exactly enough", code="precision")
    if isinstance(error, InputError):
        return wrong("this input cannot be computed")
    if isinstance(error, SlipError):
        return Refusal(503, "no worker serves now: ask again", kind="server_error", code="no_worker", retry=5)
    return Refusal(500, "the server failed; its log says why", kind="server_error", code="internal")
