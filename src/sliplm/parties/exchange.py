"""One exchange, of one group or several: steps 1 to 5 of SPEC section 4 in order, with retry and fail-over.

What must not change places:

    M7   the masks of all groups are burnt before the message made with them exists
    M8   who is asked next, after a failure, is sent the same message
    M13  nothing of an answer is used before step 4 has passed for every row of every group
    M15  after a wrong answer other challenges are in force before the next one is checked
    M16  when nobody is left, an error or a product computed here: never an unmasked or unverified one
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Final, NamedTuple

from sliplm.arithmetic.field import Elements
from sliplm.errors import ExhaustedError, SlipError, VerificationError
from sliplm.network.link import Link
from sliplm.parties.audit import AuditLog
from sliplm.parties.counters import Counters
from sliplm.parties.dealer import Dealing
from sliplm.parties.message import Codec, Codecs, Message, Part
from sliplm.parties.supply import Supply
from sliplm.parties.workforce import FAILURES, Workforce
from sliplm.secrecy import Secret

_FEW: Final = 64  # rows of an exchange for which the next one is prepared: of more it would take too long


class Timed(NamedTuple):
    """When an exchange did what, in seconds of `perf_counter`; or one try of it that failed.

    Attributes:
        group: its name, or the first one's of several.
        rows: of all groups in it.
        worker: the address of who was asked.
        failed: the kind of error, or None.
        begun, taken: taking masks.  asked: the message was made.  answered: it was there.  checked: step 4
            had passed.  ended: step 5 was done.  Of a failed try all are its beginning or its end.
        computed: seconds of it that the worker says it took.
    """

    group: str
    rows: int
    worker: str
    failed: str | None
    begun: float
    taken: float
    asked: float
    answered: float
    checked: float
    ended: float
    computed: float


Watcher = Callable[[Timed, Any, Callable[[], Elements]], None]
"""Told of each exchange, in the thread that made it: when it did what, the first group's inputs x [rows, n]
(an array, or on a card), and what gives the message, uint32, which begins with x~ of the first row; to fetch
it from a card takes time.  It must not wait, raise, or keep any of them.
"""


class _Last(threading.local):
    """The first group of this thread's last message."""

    group = -1


class Exchange(Secret):
    """The exchanges of one vault with its workers.  Several threads may run theirs at once.

    Args:
        codecs: of every group.
        supply: where masks come from.
        workers: who is asked.
        here: who computes for want of a worker, or None where the request is to fail.
        counters: where exchanges are counted.
        audit: where it is said that a product was computed here.
        inputs: rows that each input travels as, 1 or 2.

    Attributes:
        watchers: told of each exchange.
    """

    def __init__(
        self,
        codecs: Codecs,
        supply: Supply,
        workers: Workforce,
        here: Dealing | None,
        counters: Counters,
        audit: AuditLog,
        inputs: int,
    ) -> None:
        self.codecs, self._supply, self._workers, self._here = codecs, supply, workers, here
        self._counters, self._audit, self._inputs = counters, audit, inputs
        self._follows: dict[int, int] = {}  # the group that was asked after a group last
        self._thread = _Last()
        self.watchers: list[Watcher] = []
        self._masks_made = True  # by the processor; a card makes its own of their keys
        self._kind: type[Message] = Message

    @property
    def computes_here(self) -> bool:
        """Whether a request is served for want of a worker."""
        return self._here is not None

    def on(self, codecs: Codecs, kind: type[Message]) -> Exchange:
        """The same exchanges for activations on a card."""
        other = Exchange(codecs, self._supply, self._workers, self._here, self._counters, self._audit, 1)
        other._masks_made, other._kind, other.watchers = False, kind, self.watchers
        return other

    def run(self, parts: Sequence[Part], adapter: str | None) -> None:
        """The products of one message.

        Args:
            parts: by ascending group, each group once, all of one shard; what one frame carries.

        Raises: InputError for NaN or infinity; MaskError; ExhaustedError when no answer could be
            checked; the last worker's error when none is left.
        """
        group = parts[0].group
        self._follows[self._thread.group], self._thread.group = group, group
        codecs = [self.codecs[part.group] for part in parts]
        for codec in codecs:
            codec.check_left()  # M15: what cannot be checked is not asked for
        begun, late = perf_counter(), self._counters.seconds_dealing_late
        if len(parts[0].x) <= _FEW:
            self._workers.rouse()  # to wake takes as long as masks and message take to make
        inputs, made = self._inputs, self._masks_made
        masks = [
            self._supply.take(part.group, inputs * len(part.x), made=made) for part in parts
        ]  # burnt: M7
        start = perf_counter()
        late = self._counters.seconds_dealing_late - late  # other threads' may be in it
        message = self._kind(codecs, parts, masks, adapter)  # steps 1 and 2

        def meanwhile() -> None:
            message.ahead()
            if self._masks_made:
                self._prepare(group, message.questions[0][1])

        failure: SlipError | None = None
        tried: set[Link] = set()
        asked = since = perf_counter()
        while (link := self._workers.pick(tried, group)) is not None:
            tried.add(link)
            try:
                with link:  # its turn: until that ends, nobody else uses the buffer of the answer
                    claims, micros = message.exchanged(link, meanwhile)  # M8
                    answered, took = perf_counter(), link.took
                    if (wrong := message.wrong(claims)) is not None:  # step 4, before all use: M13
                        raise self._lie(link, wrong)
                    checked = perf_counter()
                    message.open(claims)  # step 5
            except ExhaustedError:
                raise  # whoever used them up is quarantined already
            except FAILURES as error:
                failure = error
                since = self._failed(link, error, message, parts[0].x, since)
                continue
            ended = perf_counter()
            vault = asked - start + ended - checked
            self._workers.served(link, took, message.work)
            self._counters.exchanged(
                message.rows, message.elements.nbytes, message.answer, len(tried), micros,
                burn=max(0.0, start - begun - late), vault=vault,
                wait=answered - asked, check=checked - answered,
            )  # fmt: skip
            times = begun, start, since, answered, checked, ended, micros * 1e-6
            self._tell(message, parts[0].x, link, times)
            break
        else:
            message.ahead()
            message.open_plain([self._computed_here(part, failure) for part in parts])
        if lossy := message.lossy():
            self._counters.lossy(lossy)

    def _failed(self, link: Link, error: SlipError, message: Message, x: Any, since: float) -> float:
        """Decide what becomes of a worker after a try that failed; when that was."""
        self._workers.failed(link, error, message.codecs[0].name)
        now = perf_counter()
        self._tell(message, x, link, (since, since, since, now, now, now, 0.0), type(error).__name__)
        return now

    def _tell(
        self, message: Message, x: Any, link: Link, times: Sequence[float], failed: str | None = None
    ) -> None:
        if self.watchers:
            timed = Timed(message.codecs[0].name, message.rows, link.address, failed, *times)
            for watcher in tuple(self.watchers):
                watcher(timed, x, message.seen)

    def _prepare(self, group: int, rows: int) -> None:
        """While a worker computes: what the exchange needs that followed this group's the last time, for as
        many rows.
        """
        following = self._follows.get(group)
        if following is not None and rows <= _FEW:
            self._supply.prepare(following, rows)
            self.codecs[following].bring_near()

    def _lie(self, link: Link, codec: Codec) -> VerificationError:
        """The error for a wrong product of a group, of which other challenges are in force already (M15); the
        worker is quarantined.

        Raises: ExhaustedError when the group has no challenges left.
        """
        error = VerificationError(
            f"worker {link.address}: its product for {codec.name} is wrong; nothing of it was used, and "
            "the worker is quarantined",
            link.address,
        )
        self._workers.wrong(link)
        self._workers.failed(link, error, codec.name)  # now, while nobody else has his turn with it: M14
        codec.check_left()
        return error

    def _computed_here(self, part: Part, failure: SlipError | None) -> Elements:
        """M16: the product from the worker share on this machine, checked, where the owner chose so.

        Raises: the last worker's error where he did not; KernelError for a damaged share.
        """
        if self._here is None:
            raise self._workers.refusal(failure, part.group)
        codec = self.codecs[part.group]
        hidden = codec.unmasked(part.x, part.out, self._inputs).hidden
        if self._counters.computed_here(len(hidden)):
            why = failure or self._workers.nobody(part.group)
            self._audit.write("computed here", f"slowly, for want of a worker: {why}", group=codec.name)
        return self._here.compute(part.group, hidden)
