"""What all requests of a server share: who may ask, what room there is, what is counted and written down."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from sliplm.parties.audit import AuditLog
from sliplm.serving.answering import LOOK
from sliplm.serving.clients import Client, Clients
from sliplm.serving.figures import Figures
from sliplm.serving.limits import Limits
from sliplm.serving.lookout import Lookout
from sliplm.serving.refusals import Refusal, busy, too_many
from sliplm.serving.samples import Samples
from sliplm.serving.served import Served

if TYPE_CHECKING:  # what it needs may not be installed
    from sliplm.serving.tracing import Traces

WAITING: Final = 256
"""Answers that may be under way or wait; who comes then is told to ask again."""

OF_ONE: Final = WAITING // 2
"""The same of one client, so that no one keeps out the others."""


NO_WORKER: Final = "no worker serves"
"""Why a vault cannot answer, until one of its workers comes back."""


class Refused:
    """How many requests were refused, of whom and why."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, int]] = Counter()

    def add(self, client: Client | None, refusal: Refusal) -> None:
        """One more; `record` writes down how many there were."""
        name = "" if client is None else client.name
        self._counts[name, refusal.code or refusal.kind, refusal.status] += 1

    def record(self, audit: AuditLog) -> None:
        """Write down what came since: a line for each kind, so that no stranger fills the disk."""
        counts, self._counts = self._counts, Counter()
        for (name, why, status), count in counts.items():
            detail = {"status": status, "requests": count}
            audit.write("refused", why, role="client", address=name, detail=detail)


@dataclass
class Desk:
    """What all requests share.

    Attributes:
        clients: who may ask; None: anybody.
        traces: where what is done is told, or None.
        turn: what a request is let in within, so that nobody else counts meanwhile.
        place: which of several replicas this is, as the audit record has it.
        under_way: answers that were begun and have not ended, of each client.
    """

    served: Served
    clients: Clients | None
    limits: Limits
    figures: Figures
    traces: Traces | None = None
    turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    place: Mapping[str, str] = field(default_factory=dict)
    scorer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sliplm-scoring"))
    under_way: Counter[str] = field(default_factory=Counter)
    turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    refused: Refused = field(default_factory=Refused)

    def __post_init__(self) -> None:
        self.lookout = Lookout(self.served)
        self.samples = Samples(self.lookout)
        if self.traces is not None:
            self.lookout.add(self.traces)

    def stands(self, client: Client) -> bool:
        """Whether a client may still have answers."""
        return self.clients is None or self.clients.stands(client)

    def refuse(self, client: Client | None, refusal: Refusal) -> None:
        """Count a request without an answer."""
        self.figures.refused.labels(self.served.name, str(refusal.status)).inc()
        self.refused.add(client, refusal)

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

    @asynccontextmanager
    async def encoding(self, client: Client, answers: int) -> AsyncIterator[None]:
        """A client's turn to have a prompt made into tokens: one of each client at a time, since a long one
        takes seconds.  Meanwhile its answers count as under way.  Raises: Refusal.
        """
        self.check_room(client, answers)
        self.under_way[client.name] += answers
        try:
            async with self.turns[client.name]:
                yield
        finally:
            self.under_way[client.name] -= answers

    def ready(self) -> str | None:
        """Why it cannot answer now; None if it can."""
        vault = self.served.model.slip
        if self.under_way.total() >= WAITING:
            return "busy"
        if not vault.serves and not vault.computes_here:
            return NO_WORKER
        return None

    def exchanges(self) -> Mapping[str, int]:
        """How many each worker has served."""
        return {status.address: status.served for status in self.served.model.slip.workers}

    async def watch(self) -> None:
        """Several times a second: who may ask, and whether the batch computes."""
        while True:
            await asyncio.sleep(LOOK)
            self.refused.record(self.audit)
            if self.clients is not None:
                self.clients.refresh()
            self.served.batch.revive()
            self.samples.rest()

    def close(self) -> None:
        """Write down what is left."""
        self.refused.record(self.audit)
        self.scorer.shutdown(wait=False, cancel_futures=True)
        if self.traces is not None:
            self.traces.close()
