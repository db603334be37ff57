"""The trusted side: `product(group, x)` behind masks, verification, retry and fail-over."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.errors import CredentialError, InputError, MaskError, SlipError, VerificationError
from sliplm.masks import masks
from sliplm.masks.masks import Masks
from sliplm.network.link import Link
from sliplm.network.transport import Connection
from sliplm.parties.adapters import Adapters
from sliplm.parties.audit import AuditLog
from sliplm.parties.codec import GroupCodec, Scales
from sliplm.parties.counters import Counters
from sliplm.parties.dealer import Dealing, ShareDealer
from sliplm.parties.terms import Terms
from sliplm.parties.workforce import FAILURES, Role, Status, Workforce
from sliplm.protocol.vault_side import Welcome
from sliplm.shares.share import VaultShare, check_pair


class Vault:
    """The trusted side of one split model.

    Args:
        share: the vault's share.
        terms: whom it asks, where its masks come from, and what else is chosen.

    Attributes:
        adapter: what it has, and how to choose for a block: `with vault.adapter("fr"): ...`
        counters: what it has done.
        audit: who lied, stalled, vanished or came back.

    Raises: MismatchError for shares of different splits; InputError for an unknown adapter; what `Link.open`
        raises.
    """

    def __init__(self, share: VaultShare, terms: Terms) -> None:
        self.adapter = Adapters(share.manifest.adapters, terms.adapter)
        if terms.dealing_share is not None:
            check_pair(share, terms.dealing_share)
        self.counters, self.audit = Counters(), AuditLog(terms.audit)
        self._lock = threading.Lock()
        self._index = {name: i for i, name in enumerate(share.groups)}
        self._codecs = [GroupCodec(secrets) for secrets in share.groups.values()]
        self._fallback, self._pad_to, self._disk = terms.fallback, terms.pad_to, terms.pool
        self._freshness = b""  # the nonces that peers sent: see masks.deal
        shapes = [(codec.m, codec.n) for codec in self._codecs]

        def workforce(addresses: Sequence[str], role: Role) -> Workforce:
            return Workforce.of(
                addresses, role, share.split_id, shapes, terms.timeout, self.audit,
                partial(self._greeted, role), terms.attester, terms.verifier,
            )  # fmt: skip

        self._workers = workforce(terms.workers, "worker")
        self._dealers = workforce(terms.dealers, "dealer") if terms.dealers else None
        here = None if terms.dealing_share is None else ShareDealer(terms.dealing_share)
        self._dealing = Dealing(self._codecs, here, self._dealers)
        self._pool = masks.MaskPool(
            len(self._codecs), self._deal, terms.ahead if self._dealing.possible and terms.pool is None else 0
        )
        try:
            self._workers.open_one()
            if self._dealers is not None:
                self._dealers.open_one()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Vault(groups={len(self._codecs)}, workers={self._workers!r}, secrets hidden)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the split groups."""
        return tuple(self._index)

    @property
    def workers(self) -> tuple[Status, ...]:
        """How each worker stands."""
        return self._workers.states()

    @property
    def dealers(self) -> tuple[Status, ...]:
        """How each dealer stands."""
        return () if self._dealers is None else self._dealers.states()

    @property
    def quarantined(self) -> dict[str, str]:
        """Workers and dealers that are never asked again, by address, and why."""
        everybody = (*self.workers, *self.dealers)
        return {status.address: status.reason for status in everybody if status.state == "quarantined"}

    def drain(self, address: str) -> None:
        """Ask a worker nothing more, and let go of it.  Raises InputError for a stranger's address."""
        self._workers.drain(address)

    def rejoin(self, address: str) -> None:
        """Ask a drained or quarantined worker again.  Raises InputError, and what `Link.open` raises."""
        self._workers.rejoin(address)

    def product(self, group: str, x: Floats) -> Floats:
        """W x for each row x of a group: float32 [rows, n] -> float32 [rows, m], members' rows in order,
        without biases.

        Raises: InputError for a wrong shape, NaN or infinity; MaskError; WorkerError when no worker is
            left that serves.
        """
        codec, adapter = self._codec(group, x), self.adapter.current
        rows = len(x)
        if rows > 1 and rows % self._pad_to:
            x = np.concatenate([x, np.zeros((-rows % self._pad_to, codec.n), np.float32)])
        out = np.empty((len(x), codec.m), np.float32)
        asked = [link for link in self._workers.links if link.barred is None]  # the others slow nobody down
        step = min((link.max_rows(self._index[group]) for link in asked), default=max(1, len(x)))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            self._exchange(self._index[group], codec, x[part], out[part], adapter)
        return out[:rows]

    def deal(self, rows: int, groups: Sequence[str] | None = None) -> None:
        """Deal `rows` more masks now, in memory, for each of the groups named, or for all."""
        names = self._index if groups is None else groups
        unknown = [name for name in names if name not in self._index]
        if unknown or rows < 1:
            raise InputError(
                f"deal takes a number of rows from 1 and names of groups, not {rows} and {unknown}"
            )
        self._pool.add([self._index[name] for name in names], rows)

    def wait_dealt(self, timeout: float) -> bool:
        """Wait until the background dealer has all masks ready that it keeps; False after `timeout`
        seconds.
        """
        return self._pool.wait_full(timeout)

    def mask_bytes(self) -> int:
        """Memory that the masks now ready take."""
        return self._pool.stored_bytes()

    def close(self) -> None:
        """Close the connections, stop dealing and forget all masks."""
        self._workers.close()
        if self._dealers is not None:
            self._dealers.close()
        self._pool.close()
        if self._disk is not None:
            self._disk.close()

    def _codec(self, group: str, x: Floats) -> GroupCodec:
        if group not in self._index:
            raise InputError(f"this split has no group {group!r}")
        codec = self._codecs[self._index[group]]
        if x.ndim != 2 or x.shape[1] != codec.n or x.dtype != np.float32:
            raise InputError(f"{group} takes float32 [rows, {codec.n}], not {x.dtype} {list(x.shape)}")
        return codec

    def _exchange(self, index: int, codec: GroupCodec, x: Floats, out: Floats, adapter: str | None) -> None:
        start = time.perf_counter()
        z, alpha = codec.scaled(x)  # (1)
        taken = time.perf_counter()
        late = self.counters.seconds_dealing_late
        mask = self._take(index, len(x))  # burnt before the message is made
        late = self.counters.seconds_dealing_late - late
        have = time.perf_counter()
        hidden = codec.masked(z, alpha, mask.r)  # (2)
        failure: SlipError | None = None
        tried: set[Link] = set()
        while (link := self._workers.pick(tried)) is not None:
            tried.add(link)
            sent = time.perf_counter()
            try:
                with link.exchange(index, hidden) as (claim, micros):  # (3)
                    came = time.perf_counter()
                    self._verify(codec, link, hidden, claim)  # (4): nothing of it is used before
                    checked = time.perf_counter()
                    codec.opened(x, alpha, claim, mask.u, out, adapter)  # (5)
            except FAILURES as error:
                failure = error
                self._workers.failed(link, error, codec.name)
                continue
            self._workers.served(link)
            times = _Times(
                vault=(taken - start) + (sent - have) + (time.perf_counter() - checked),
                burn=max(0.0, have - taken - late),
                wait=came - sent,
                worker=micros * 1e-6,
                check=checked - came,
            )
            self._count(hidden, out, times, len(tried))
            return
        if self._fallback == "fail":
            raise self._workers.refusal(failure)
        y = self._compute(index, z, alpha, failure or self._workers.nobody())
        codec.opened(x, alpha, y, np.zeros_like(y), out, adapter)

    def _verify(self, codec: GroupCodec, link: Link, x: Elements, y: Elements) -> None:
        challenges = codec.challenge_set
        if not codec.accepts(x, y):
            # that it failed tells the worker something about them: they are not used again
            codec.renew_challenges(challenges)
            error = VerificationError(
                f"worker {link.address}: its product for {codec.name} is wrong; nothing of it was used, and "
                "the worker is quarantined",
                link.address,
            )
            self._workers.failed(link, error, codec.name)  # now, while nobody else has his turn with it
            raise error

    def _compute(self, index: int, z: Floats, alpha: Scales, why: SlipError) -> Elements:
        """The owner's choice for want of a worker: the product from the worker share, on this machine."""
        codec = self._codecs[index]
        with self._lock:
            first = self.counters.rows_here == 0
            self.counters.rows_here += len(z)
        if first:
            self.audit.write("computed here", f"slowly, for want of a worker: {why}", group=codec.name)
        return self._dealing.compute(index, codec.in_field(z, alpha))

    # --- masks -------------------------------------------------------------------------------------------

    def _take(self, index: int, rows: int) -> Masks:
        if self._disk is not None and (not self._dealing.possible or self._disk.available(index) >= rows):
            return self._disk.take(index, rows)
        return self._pool.take(index, rows)

    def _deal(self, index: int, rows: int, background: bool, late: bool) -> masks.Batch:
        start = time.perf_counter()
        if not self._dealing.possible:
            raise MaskError("the pool on disk is used up: run `slip deal` again, or name a dealer")
        batch = self._dealing.batch(index, rows, background=background, freshness=self._freshness)
        with self._lock:
            spent = time.perf_counter() - start
            self.counters.rows_dealt += rows
            self.counters.seconds_dealing += spent
            if late:
                self.counters.rows_dealt_late += rows
                self.counters.seconds_dealing_late += spent
        return batch

    def _greeted(self, role: Role, link: Link, connection: Connection, welcome: Welcome) -> None:
        """A connection was made: no worker may be a dealer, and a machine that was set back shows here."""
        self._freshness = welcome.nonce
        others = self._dealers if role == "worker" else self._workers
        for other in () if others is None else others.links:
            if other.connection is not None and _same_key(connection, other.connection):
                raise CredentialError(
                    f"{link.address} and {other.address} show the same key: who deals a mask must not see "
                    "its message; give dealers a worker's keys of their own"
                )
        if self.counters.exchanges:
            self.counters.renewals += 1
            self._pool.renew()
            if self._disk is not None:
                self._disk.renew()
            self.audit.write("masks renewed", "a connection was made anew", role=role, address=link.address)

    def _count(self, sent: Elements, out: Floats, times: _Times, tries: int) -> None:
        with self._lock:
            counters = self.counters
            counters.exchanges += 1
            counters.rows += len(sent)
            counters.retries += tries - 1
            counters.bytes_sent += sent.nbytes
            counters.bytes_received += out.size * 4
            counters.seconds_vault += times.vault
            counters.seconds_burn += times.burn
            counters.seconds_check += times.check
            counters.seconds_worker += min(times.worker, times.wait)  # its word: never more than the wait
            counters.seconds_link += max(0.0, times.wait - times.worker)


class _Times(NamedTuple):
    """Seconds of one exchange."""

    vault: float
    burn: float
    wait: float
    worker: float
    check: float


def _same_key(one: Connection, other: Connection) -> bool:
    return (
        one.identity is not None and other.identity is not None and one.identity.spki == other.identity.spki
    )
