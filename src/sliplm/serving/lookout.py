"""Who watches what a server computes: steps of its batch with their exchanges, for a console or traces.

While nobody watches, neither the batch nor the vault is asked to tell anything.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from sliplm.arithmetic.field import Elements
from sliplm.engines.transformers.loop import Step
from sliplm.parties.exchange import Timed
from sliplm.serving.served import Served

MOST: Final = 4096
"""Exchanges of a step that are kept; of a mixture's long prompts there may be more."""

logger = logging.getLogger(__name__)


class Onlooker(Protocol):
    """Who watches.  Called in the batch's thread; an error of its own is logged, and costs no request."""

    def exchanged(self, timed: Timed, x: Any, message: Callable[[], Elements]) -> None:
        """As `parties.exchange.Watcher` is told; also of exchanges outside any step."""

    def stepped(self, step: Step, exchanges: Sequence[Timed]) -> None:
        """A step is over."""


class Lookout:
    """Puts exchanges to the steps that they were made in."""

    def __init__(self, served: Served) -> None:
        self._vault, self._batch = served.model.slip, served.batch
        self._onlookers: tuple[Onlooker, ...] = ()
        self._seen: dict[int, list[Timed]] = {}  # by thread
        self._lock = threading.Lock()

    def add(self, onlooker: Onlooker) -> None:
        """Tell somebody from now on."""
        with self._lock:
            if not self._onlookers:
                self._vault.watchers.append(self._exchanged)
                self._batch.watchers.append(self._stepped)
            self._onlookers = (*self._onlookers, onlooker)

    def remove(self, onlooker: Onlooker) -> None:
        """Tell it nothing more, but for what is being told now; harmless for a stranger."""
        with self._lock:
            if onlooker not in self._onlookers:
                return
            self._onlookers = tuple(each for each in self._onlookers if each is not onlooker)
            if not self._onlookers:
                self._vault.watchers.remove(self._exchanged)
                self._batch.watchers.remove(self._stepped)
                self._seen.clear()

    def _exchanged(self, timed: Timed, x: Any, message: Callable[[], Elements]) -> None:
        seen = self._seen.setdefault(threading.get_ident(), [])
        if len(seen) < MOST:
            seen.append(timed)
        for onlooker in self._onlookers:
            try:
                onlooker.exchanged(timed, x, message)
            except Exception:
                logger.exception("an onlooker failed")

    def _stepped(self, step: Step) -> None:
        seen = self._seen.pop(threading.get_ident(), [])
        exchanges = tuple(timed for timed in seen if timed.begun >= step.begun)
        for onlooker in self._onlookers:
            try:
                onlooker.stepped(step, exchanges)
            except Exception:
                logger.exception("an onlooker failed")
