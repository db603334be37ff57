"""One exchange, of one group or several: steps 1 to 5 of SPEC section 4 in order, with retry and fail-over.

What must not change places:

    M7   the masks of all groups are burnt before the message made with them exists
    M8   who is asked next, after a failure, is sent the same message
    M13  nothing of an answer is used before step 4 has passed for every row of every group
    M15  after a wrong answer other challenges are in force before the next one is checked
    M16  when nobody is left, an error or a product computed here: never an unmasked or unverified one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.errors import ExhaustedError, SlipError, VerificationError
from sliplm.network.link import Link
from sliplm.parties.audit import AuditLog
from sliplm.parties.codec import GroupCodec, Scales
from sliplm.parties.counters import Counters, Stopwatch
from sliplm.parties.dealer import Dealing
from sliplm.parties.supply import Supply
from sliplm.parties.workforce import FAILURES, Workforce, work
from sliplm.secrecy import Secret


class Part(NamedTuple):
    """The rows of one group in an exchange: W x of x float32 [rows, n] goes into out, float32 [rows, m]."""

    group: int
    x: Floats
    out: Floats


class Exchange(Secret):
    """The exchanges of one vault with its workers.  Several threads may run theirs at once.

    Args:
        codecs: of every group.
        supply: where masks come from.
        workers: who is asked.
        here: who computes for want of a worker, or None where the request is to fail.
        counters: where exchanges are counted.
        audit: where it is said that a product was computed here.
    """

    def __init__(
        self,
        codecs: Sequence[GroupCodec],
        supply: Supply,
        workers: Workforce,
        here: Dealing | None,
        counters: Counters,
        audit: AuditLog,
    ) -> None:
        self._codecs, self._supply, self._workers, self._here = codecs, supply, workers, here
        self._counters, self._audit = counters, audit

    def run(self, parts: Sequence[Part], adapter: str | None) -> None:
        """The products of one message.

        Args:
            parts: by ascending group, each group once; what one frame carries.

        Raises: InputError for NaN or infinity; MaskError; ExhaustedError when no answer could be
            checked; the last worker's error when none is left.
        """
        groups, codecs, clock = (
            [part.group for part in parts],
            [self._codecs[p.group] for p in parts],
            Stopwatch(),
        )
        for codec in codecs:
            codec.check_left()  # M15: what cannot be checked is not asked for
        scaled = [codec.scaled(part.x) for codec, part in zip(codecs, parts, strict=True)]  # step 1
        clock.lap("vault")
        masks = [self._supply.take(part.group, len(part.x)) for part in parts]  # burnt: M7
        clock.skip()  # the supply has counted it
        messages = [
            codec.masked(z, alpha, mask.r)  # step 2
            for codec, (z, alpha), mask in zip(codecs, scaled, masks, strict=True)
        ]
        clock.lap("vault")

        failure: SlipError | None = None
        tried: set[Link] = set()
        while (link := self._workers.pick(tried)) is not None:
            tried.add(link)
            try:
                with link.exchange(groups, messages) as (claims, micros):  # step 3, of the same message: M8
                    clock.lap("wait")
                    took = link.took
                    self._verify(codecs, link, messages, claims)  # step 4, before all use: M13
                    clock.lap("check")
                    losses = [
                        codec.opened(part.x, alpha, claim, mask.u, part.out, adapter)  # step 5
                        for codec, part, (_, alpha), claim, mask in zip(
                            codecs, parts, scaled, claims, masks, strict=True
                        )
                    ]
                    clock.lap("vault")
            except ExhaustedError:
                raise  # whoever used them up is quarantined already
            except FAILURES as error:
                failure = error
                self._workers.failed(link, error, codecs[0].name)
                clock.lap("wait")
                continue
            effort = work((c.m, c.n, len(p.x)) for c, p in zip(codecs, parts, strict=True))
            self._workers.served(link, took, effort)
            rows, sent = sum(len(part.x) for part in parts), sum(x.nbytes for x in messages)
            self._counters.exchanged(rows, sent, sum(p.out.nbytes for p in parts), len(tried), clock, micros)
            break
        else:
            losses = []
            for codec, part, (z, alpha) in zip(codecs, parts, scaled, strict=True):
                y = self._computed_here(part.group, z, alpha, failure)
                losses.append(codec.opened(part.x, alpha, y, np.zeros_like(y), part.out, adapter))
        for codec, lost in zip(codecs, losses, strict=True):
            if lossy := codec.judge(lost):
                self._counters.lossy(lossy)

    def _verify(
        self,
        codecs: Sequence[GroupCodec],
        link: Link,
        messages: Sequence[Elements],
        claims: Sequence[Elements],
    ) -> None:
        """Step 4, of every group.  Raises VerificationError; the worker is then quarantined, other
        challenges in force for the group whose product is wrong.
        """
        for codec, message, claim in zip(codecs, messages, claims, strict=True):
            self._verify_one(codec, link, message, claim)

    def _verify_one(self, codec: GroupCodec, link: Link, message: Elements, claim: Elements) -> None:
        if codec.accepts(message, claim):  # M15: after a False other challenges are in force
            return
        error = VerificationError(
            f"worker {link.address}: its product for {codec.name} is wrong; nothing of it was used, and "
            "the worker is quarantined",
            link.address,
        )
        self._workers.failed(link, error, codec.name)  # now, while nobody else has his turn with it: M14
        codec.check_left()
        raise error

    def _computed_here(self, group: int, z: Floats, alpha: Scales, failure: SlipError | None) -> Elements:
        """M16: the product from the worker share on this machine, checked, where the owner chose so.

        Raises: the last worker's error where he did not; KernelError for a damaged share.
        """
        if self._here is None:
            raise self._workers.refusal(failure)
        if self._counters.computed_here(len(z)):
            why = failure or self._workers.nobody()
            self._audit.write(
                "computed here", f"slowly, for want of a worker: {why}", group=self._codecs[group].name
            )
        return self._here.compute(group, self._codecs[group].in_field(z, alpha))
