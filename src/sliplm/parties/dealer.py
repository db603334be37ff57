"""Who makes the products u = w r of the masks (SPEC step O2), and their check (O3).

A dealer is the vault's own machine, from the worker share, or a worker that does *not* collude with those
that are asked online: it learns r, they learn x + r.  Only keys go to it and only products come back; a
product that fails the check is used for nothing, and its dealer, not a worker, is named.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from sliplm.arithmetic.field import Elements, uniform_rows
from sliplm.arithmetic.kernels.cuda.matrix import CudaMatrix
from sliplm.arithmetic.kernels.placing import lay_out
from sliplm.arithmetic.kernels.threads import default_threads, in_parallel
from sliplm.errors import (
    DealerError,
    ExhaustedError,
    KernelError,
    SlipError,
    VerificationError,
    WorkerUnavailable,
)
from sliplm.masks import masks
from sliplm.network.link import AnotherParty, Link, Marks
from sliplm.parties.codec import GroupCodec
from sliplm.parties.workforce import FAILURES, Workforce, work
from sliplm.secrecy import Secret
from sliplm.shares.shards import Shard, joined
from sliplm.shares.share import WorkerShare, open_worker

_ROWS_A_THREAD: Final = 8


class ShareDealer:
    """Deals from the worker share on this machine.

    Args:
        device: on its processor or its cards, as `placing.lay_out`.
    """

    def __init__(self, share: WorkerShare, device: str = "cpu") -> None:
        self._matrices = lay_out([share.matrices[name] for name in share.names], device, threads=1)

    def product(self, group: int, x: Elements, *, threads: int | None = None) -> Elements:
        """w x for rows x: uint32 [rows, n] -> uint32 [rows, m]; None: all cores where it pays."""
        matrix = self._matrices[group]
        if isinstance(matrix, CudaMatrix):
            return matrix.product(x, matrix.room(len(x)))
        if threads is None:
            threads = default_threads() if len(x) >= _ROWS_A_THREAD else 1
        y = np.empty((len(x), matrix.shape[0]), np.uint32)

        def part(first: int, last: int) -> None:
            y[first:last] = matrix.product(x[first:last])

        in_parallel(part, len(x), threads)
        return y


@dataclass(frozen=True, repr=False)
class DealTask:
    """A batch to deal as a task (`cluster.tasks`): made to be pickled, unlike other keys.

    Attributes:
        key: of r, uint32 [rows, n].  Whoever has it and sees a message under these masks opens it.
    """

    group: int
    rows: int
    n: int
    key: bytes

    def __repr__(self) -> str:
        return f"DealTask(group={self.group}, rows={self.rows}, key hidden)"


def carry_out(dealer: ShareDealer, task: DealTask) -> Elements:
    """u = w r, uint32 [rows, m], not yet checked: the same however often the task is carried out."""
    return dealer.product(task.group, uniform_rows(task.key, task.group, 0, task.rows, task.n))


def open_dealer(share: Path, shards: Sequence[Shard], device: str) -> ShareDealer:
    """In a process of a cluster: from a worker's folder, or the one in which all shards lie.

    Raises: ShareError as `shards.joined`.
    """
    return ShareDealer(open_worker(share) if len(shards) == 1 else joined(share, shards), device)


class Dealing(Secret):
    """Steps O1 to O3: batches of masks, checked.

    Args:
        codecs: of every group.
        here: the worker share on this machine, or None.
        dealers: asked first, before `here`.

    Attributes:
        tally: rows by the address and the certificate of who dealt them; None and None for this machine.
    """

    def __init__(
        self, codecs: Sequence[GroupCodec], here: ShareDealer | None, dealers: Workforce | None
    ) -> None:
        self._codecs, self._here, self._dealers = codecs, here, dealers
        self.tally: Counter[tuple[str | None, str | None]] = Counter()

    @property
    def possible(self) -> bool:
        """Whether anybody is there to deal."""
        return self._here is not None or self._dealers is not None

    def batch(self, group: int, rows: int, *, background: bool, freshness: bytes) -> masks.Batch:
        """A fresh batch, checked.

        Args:
            background: spend one core on it, not all.
            freshness: goes into the batch's key beside the system's randomness.

        Raises: DealerError when no dealer serves or the share here is damaged.
        """

        def products(fresh: masks.Fresh) -> masks.Dealt:
            return self.products(group, fresh, background=background)

        return masks.deal(group, self._codecs[group].n, rows, products, freshness)

    def products(self, group: int, fresh: masks.Fresh, *, background: bool = False) -> masks.Dealt:
        """u = w r for the r of the last key that is drawn, checked; each who is asked gets a key of his own.

        Raises: DealerError; ExhaustedError when none could be checked.
        """
        codec = self._codecs[group]
        codec.check_left()
        failure: SlipError | None = None
        if self._dealers is not None:
            tried: set[Link] = set()
            changed: set[Link] = set()
            while (link := self._dealers.pick(tried, group)) is not None:
                tried.add(link)
                start = time.monotonic()
                try:
                    dealt = self._dealt_by(link, group, fresh)
                except ExhaustedError:
                    raise  # nobody's fault but theirs who used them up
                except FAILURES as error:
                    failure = error
                    if isinstance(error, AnotherParty) and link not in changed:
                        changed.add(link)  # the new one is asked once, under a key of its own
                        tried.discard(link)
                        continue
                    self._dealers.failed(link, error, self._codecs[group].name)
                    continue
                self._dealers.served(link, time.monotonic() - start, work([(codec.m, codec.n, len(dealt.u))]))
                self.tally[link.address, link.peer] += len(dealt.u)
                return dealt
            failure = failure or self._dealers.nobody(group)
        if self._here is None:
            address = getattr(failure, "address", None)
            raise DealerError(
                f"no masks for {self._codecs[group].name}: {failure or 'nobody deals'}; start a dealer, or "
                "give the vault the worker share or a pool of masks",
                address,
            ) from failure
        _, r = fresh()
        return self.accepted(group, r, self._here.product(group, r, threads=1 if background else None))

    def accepted(self, group: int, r: Elements, u: Elements, place: str = "this machine") -> masks.Dealt:
        """u = w r, uint32 [rows, m], from the worker share on a machine of the owner's, checked.

        Raises: DealerError when it is wrong; ExhaustedError when it could not be checked.
        """
        self._codecs[group].check_left()
        try:
            self._check(group, r, u, None)
        except ExhaustedError:
            raise
        except VerificationError as error:
            raise DealerError(
                f"{self._codecs[group].name}: a dealt product is wrong; the worker share on {place} or "
                "its kernel is damaged: copy the share again"
            ) from error
        self.tally[None, None] += len(u)
        return masks.Dealt(u)

    def _dealt_by(self, link: Link, group: int, fresh: masks.Fresh) -> masks.Dealt:
        """What one dealer deals under a key of its own, checked.  Raises one of FAILURES; ExhaustedError."""
        key, r = fresh()
        marks: Marks | None = None
        u = np.empty((len(r), self._codecs[group].m), np.uint32)
        step = link.max_rows(group)
        for first in range(0, len(r), step):
            part = u[first : first + step]
            marks = link.deal(group, key, first, len(part), part, marks)
        self._check(group, r, u, link)
        if link.barred is not None:
            raise WorkerUnavailable(f"{link.address} fell while it dealt", link.address)
        return masks.Dealt(u, marks or ())

    def compute(self, group: int, x: Elements) -> Elements:
        """The product of an online exchange, on this machine, for want of a worker: uint32 [rows, m],
        checked.

        Raises: KernelError if it is wrong; DealerError without the worker share.
        """
        if self._here is None:
            raise DealerError("products are computed here only from the worker share: name its folder")
        y = self._here.product(group, x)
        if not self._codecs[group].accepts(x, y):
            raise KernelError(
                f"{self._codecs[group].name}: the product computed here is wrong; the worker share on this "
                "machine is damaged: copy it again"
            )
        return y

    def _check(self, group: int, r: Elements, u: Elements, link: Link | None) -> None:
        codec = self._codecs[group]
        if codec.accepts(r, u):
            return
        if link is not None and self._dealers is not None:
            self._dealers.wrong(link)
        raise VerificationError(
            f"its product for {codec.name} is wrong", None if link is None else link.address
        )
