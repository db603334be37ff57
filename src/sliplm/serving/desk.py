"""What all requests of a server share: who may ask, what room there is, what is counted and written down."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
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


@dataclass
class Desk:
    """What all requests share.

    Attributes:
        clients: who may ask; None: anybody.
        traces: where what is done is told, or None.
        under_way: answers that were begun and have not ended, of each client.
    """

    served: Served
    clients: Clients | None
    limits: Limits
    figures: Figures
    traces: Traces | None = None
    scorer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sliplm-scoring"))
    under_way: Counter[str] = field(default_factory=Counter)
    turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    refusals: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.lookout = Lookout(self.served)
        self.samples = Samples(self.lookout)
        if self.traces is not None:
            self.lookout.add(self.traces)

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
            return "no worker serves"
        return None

    def exchanges(self) -> Mapping[str, int]:
        """How many each worker has served."""
        return {status.address: status.served for status in self.served.model.slip.workers}


async def watch(desk: Desk) -> None:
    """Several times a second: who may ask, and whether the batch computes."""
    while True:
        await asyncio.sleep(LOOK)
        desk.record()
        if desk.clients is not None:
            desk.clients.refresh()
        desk.served.batch.revive()
        desk.samples.rest()
