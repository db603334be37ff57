"""How long a connection may do nothing: one that sends no request, or half of one, or reads nothing.

uvicorn waits for ever for a first request, for the rest of one, and for a reader.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

ASKING: Final = 30.0
"""Seconds in which a request has to be there whole."""

READING: Final = 60.0
"""Seconds after which a reader has to have taken what waits for it."""


class Patient(H11Protocol):  # type: ignore[misc]
    """uvicorn's connection, with limits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since = time.monotonic()
        self._asking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """It begins."""
        super().connection_made(transport)
        self._since = time.monotonic()
        self._asking = self.loop.call_later(ASKING, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It ends."""
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Another request may come."""
        self._since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The peer reads more slowly than it is written to."""
        super().pause_writing()
        self._reading = self.loop.call_later(READING, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        super().resume_writing()

    def _look(self) -> None:
        """End it if the request that is due is not there whole."""
        cycle: Any = self.cycle
        due = cycle is None or cycle.response_complete or cycle.more_body
        left = self._since + ASKING - time.monotonic()
        if due and left <= 0:
            self.transport.abort()
            return
        self._asking = self.loop.call_later(left if due else ASKING, self._look)
