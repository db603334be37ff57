"""The trusted side: `product(group, x)` behind masks, verification, retry and fail-over."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from sliplm import forks
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.kernels.cuda.card import Card
from sliplm.arithmetic.kernels.cuda.vault_steps import CardRows
from sliplm.closing import Closing, expect_drops, when_dropped
from sliplm.errors import CardError, CredentialError, InputError, SlipError, WorkerUnavailable
from sliplm.network.keys import mark
from sliplm.network.link import Greet, Link
from sliplm.network.transport import Connection
from sliplm.parties.adapters import Adapters
from sliplm.parties.audit import AuditLog
from sliplm.parties.card_codec import CardMessage, settle
from sliplm.parties.card_trial import CardCodecs
from sliplm.parties.codec import GroupCodec
from sliplm.parties.counters import Counters
from sliplm.parties.dealer import Dealing, ShareDealer
from sliplm.parties.exchange import Exchange, Watcher
from sliplm.parties.framing import by_shard, cut
from sliplm.parties.lending import lend
from sliplm.parties.message import Part
from sliplm.parties.quarantine import Quarantine
from sliplm.parties.standing import Status
from sliplm.parties.supply import Supply
from sliplm.parties.terms import Terms
from sliplm.parties.workforce import Role, Workforce
from sliplm.protocol.vault_side import Welcome
from sliplm.secrecy import Secret
from sliplm.shares.shards import shards_of
from sliplm.shares.share import VaultShare, check_pair

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FLOAT = np.dtype(np.float32)


class Vault(Secret, Closing):
    """The trusted side of one split model.

    It closes by itself when nothing refers to it any more, or at the end of the process: its threads, its
    connections and whoever calls back know its parts, or it weakly.

    Args:
        share: the vault's share.
        terms: whom it asks, where its masks come from, and what else is chosen.

    Attributes:
        adapter: what it has, and how to choose for a block: `with vault.adapter("fr"): ...`
        files: verified bytes of the small files beside the shares: the configuration, the tokenizer.
        counters: what it has done.
        audit: who lied, stalled, vanished or came back.

    Raises: MismatchError for shares of different splits; InputError for an unknown adapter; what `Link.open`
        raises.
    """

    def __init__(self, share: VaultShare, terms: Terms) -> None:
        self._process = forks.Process()
        self.adapter = Adapters(share.manifest.adapters, terms.adapter)
        if terms.dealing_share is not None:
            check_pair(share, terms.dealing_share)
        self.files = share.files
        self.counters, self.audit = Counters(), AuditLog(terms.audit)
        self._index = {name: i for i, name in enumerate(share.groups)}
        self._codecs = [GroupCodec(secrets) for secrets in share.groups.values()]
        self._pad_to, self._inputs, self._hide_routing = terms.pad_to, terms.inputs, terms.hide_routing
        shapes = [(codec.m, codec.n) for codec in self._codecs]

        def workforce(addresses: Sequence[str], role: Role) -> Workforce:
            return Workforce.of(
                addresses, role, share.split_id, shapes, terms.timeout, self.audit,
                _greeting(weakref.ref(self), role), terms.attester, terms.verifier, terms.quarantine,
                shards_of(share.manifest),
            )  # fmt: skip

        self._seen: dict[Role, set[bytes]] = {"worker": set(), "dealer": set()}
        self._apart = threading.Lock()  # of two who greet at a time, the second sees the first
        self._workers = workforce(terms.workers, "worker")
        try:
            self._dealers = workforce(terms.dealers, "dealer") if terms.dealers else None
        except BaseException:
            self._workers.close()
            raise
        share_here = None if terms.dealing_share is None else ShareDealer(terms.dealing_share, terms.deal_on)
        dealing = Dealing(self._codecs, share_here, self._dealers)
        uses = [1.0 if terms.hide_routing else group.use for group in share.manifest.groups]
        self._supply = Supply(uses, dealing, terms.pool, terms.inputs * terms.ahead, self.counters)
        here = dealing if terms.fallback == "here" else None
        self._exchange = Exchange(
            self._codecs, self._supply, self._workers, here, self.counters, self.audit, terms.inputs
        )
        self._on_cards: dict[Card, Exchange] = {}
        for force in self._forces:
            force.taken_back = _telling(weakref.ref(self), Vault._drop_revoked)
        if self._dealers is not None:
            self._dealers.fallen = _telling(weakref.ref(self), Vault._drop_masks)
        self._others: list[Closing] = []
        held = (self._process, self._workers, self._dealers, self._supply, self._others)
        expect_drops()
        self._dropped = weakref.finalize(self, _end_aside, *held)
        try:
            self._drop_liars(terms.quarantine)
            self._drop_revoked(frozenset().union(*(force.revoked() for force in self._forces)))
            self._workers.open_one()
            if self._dealers is not None:
                self._dealers.open_one()
            self._supply.start()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Vault(groups={len(self._codecs)}, workers={self._workers!r}, secrets hidden)"

    @property
    def _forces(self) -> tuple[Workforce, ...]:
        return (self._workers,) if self._dealers is None else (self._workers, self._dealers)

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
    def watchers(self) -> list[Watcher]:
        """Who is told of each exchange; for others to add themselves to, and to take themselves out."""
        return self._exchange.watchers

    @property
    def serves(self) -> bool:
        """Whether for every group a worker is up."""
        return self._workers.serves()

    @property
    def computes_here(self) -> bool:
        """Whether it does what no worker is left for."""
        return self._exchange.computes_here

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

        Raises: InputError for a wrong shape, NaN or infinity; MaskError; ForkError in a forked child;
            WorkerError when no worker is left that serves.
        """
        self._process.check()
        part = self._part(group, x)
        if len(part.x) * self._inputs == 1:  # fits a frame, whoever is asked
            self._exchange.run((part,), self.adapter.current)
        else:
            self._ask((part,))
        answer: Floats = part.out[: len(x)]
        return answer

    def product_on_card(self, group: str, x: CardRows, out: CardRows) -> None:
        """The same for activations on a card: x [rows, n] into out [rows, m], in the type of `out`, on their
        stream.  What rounding has cost is judged with the next product of this thread, or by `settle`; until
        then a row of which nothing is left is NaN.

        Raises: as `product`, and CardError for a group that has no programs or where the card fails.
        """
        self._process.check()
        index = self._index.get(group)
        if index is None:
            raise InputError(f"this split has no group {group!r}")
        exchange = self._on_cards.get(x.card)
        if exchange is None:
            exchange = self._exchange_on(x.card)
        part = Part(index, x, out)
        if len(x) == 1:
            exchange.run((part,), self.adapter.current)
        else:
            self._ask((part,), exchange)

    def works_on_card(self, group: str, card: Card) -> bool:
        """Whether a card does a group's steps: not for bases of kind haar, nor for inputs of two rows, nor if
        its results are not the processor's, which the log says.
        """
        index = self._index.get(group)
        if self._inputs != 1 or index is None or self._codecs[index].secrets.rotation == "haar":
            return False
        try:
            (self._on_cards.get(card) or self._exchange_on(card)).codecs[index].check_left()
        except CardError as error:
            logger.warning("%s: the vault's steps are done on the processor: %s", group, error)
            return False
        return True

    def settle(self) -> None:
        """Wait for the last product of this thread on each card, and judge what rounding has cost it.

        Raises: PrecisionError.
        """
        for card in tuple(self._on_cards):  # another thread may begin with one
            if lossy := settle(card):
                self.counters.lossy(lossy)

    @property
    def pads_to(self) -> int:
        """The number of which the rows of a message are a multiple, where there is more than one."""
        return self._pad_to

    def _exchange_on(self, card: Card) -> Exchange:
        made = self._exchange.on(CardCodecs(self._codecs, card), CardMessage)
        with self._apart:
            found = self._on_cards.setdefault(card, made)
        if found is made:
            lend(self._workers.links, card)
        return found

    @property
    def hides_routing(self) -> bool:
        """Whether every expert of a layer is to get as many rows as there are tokens."""
        return self._hide_routing

    def products(self, asked: Sequence[tuple[str, Floats]]) -> list[Floats]:
        """The products of several groups, each named once, in one exchange, or as few as frames allow:
        what the experts of a layer are asked together.

        Raises: as `product`.
        """
        self._process.check()
        parts = [self._part(group, x) for group, x in asked]
        self._ask(parts)
        return [part.out[: len(x)] for part, (_, x) in zip(parts, asked, strict=True)]

    def _ask(self, parts: Sequence[Part], exchange: Exchange | None = None) -> None:
        exchange, adapter, lent = exchange or self._exchange, self.adapter.current, exchange is not None
        inputs = self._inputs if exchange is self._exchange else 1
        for some in by_shard(parts, self._workers.shard_of):
            first = some[0].group
            links = [link for link in self._workers.links if link.barred is None and link.may_hold(first)]
            for message in cut(some, links, inputs, lent=lent):  # those that are barred slow nobody down
                exchange.run(message, adapter)

    def deal(self, rows: int, groups: Sequence[str] | None = None) -> None:
        """Deal more masks now, in memory, for `rows` inputs of each of the groups named, or, where none is,
        for so many tokens; an expert of a mixture then gets what it is expected to need (`masks.expected`).
        """
        self._process.check()
        unknown = [name for name in groups or () if name not in self._index]
        if unknown or rows < 1:
            raise InputError(
                f"deal takes a number of rows from 1 and names of groups, not {rows} and {unknown}"
            )
        rows *= self._inputs
        if groups is None:
            self._supply.add(rows)
        else:
            self._supply.memory.add([self._index[name] for name in groups], rows)

    def wait_dealt(self, timeout: float) -> bool:
        """Wait until the background dealer has all masks ready that it keeps; False after `timeout`
        seconds.
        """
        return self._supply.memory.wait_full(timeout)

    def mask_bytes(self) -> int:
        """Memory that the masks now ready take."""
        return self._supply.memory.stored_bytes()

    def mask_rows(self) -> dict[str, int]:
        """Rows of masks that are ready, by group."""
        return dict(zip(self._index, self._supply.ready(), strict=True))

    def close(self) -> None:
        """Close the connections, stop dealing and forget all masks; nothing in a forked child."""
        if not self._process.here:
            return
        _end(self._process, self._workers, self._dealers, self._supply, self._others)
        self._dropped.detach()

    def close_with_it(self, other: Closing) -> None:
        """Have something closed after it, which lives as long: a worker of its own."""
        self._others.append(other)

    def _part(self, group: str, x: Floats) -> Part:
        """The rows of a group, checked, with more of zeros up to a multiple of `pad_to`, and room for the
        answer.
        """
        index = self._index.get(group)
        if index is None:
            raise InputError(f"this split has no group {group!r}")
        codec = self._codecs[index]
        if x.ndim != 2 or x.shape[1] != codec.n or x.dtype != _FLOAT:
            raise InputError(f"{group} takes float32 [rows, {codec.n}], not {x.dtype} {list(x.shape)}")
        rows = len(x)
        if rows > 1 and (missing := -rows % self._pad_to):
            x = np.concatenate([x, np.zeros((missing, codec.n), np.float32)])
        return Part(index, x, np.empty((len(x), codec.m), np.float32))

    def _greeted(self, role: Role, link: Link, connection: Connection, welcome: Welcome) -> None:
        """A connection was made: no worker may be a dealer, and a machine that was set back shows here."""
        force = self._workers if role == "worker" else self._dealers
        if force is not None:
            force.known_liar(link)
        self._supply.freshness = welcome.nonce
        with self._apart:
            self._check_apart(role, link, connection)
        if self.counters.exchanges:
            self._supply.renew()
            self.audit.write("masks renewed", "a connection was made anew", role=role, address=link.address)

    def _check_apart(self, role: Role, link: Link, connection: Connection) -> None:
        """Whoever deals a mask must never see its message: not now, not before, not after (M12)."""
        theirs: Role = "dealer" if role == "worker" else "worker"
        barred = self._seen[theirs] | (self._supply.dealers() if role == "worker" else frozenset())
        others = self._dealers if role == "worker" else self._workers
        places = {other.connection.place for other in (others.links if others else ()) if other.connection}
        if connection.mark in barred or (connection.place is not None and connection.place in places):
            raise CredentialError(
                f"{link.address} shows the same key, process or socket as a {theirs} of this vault or of its "
                "pool: who deals a mask must not see its message; give each dealer its own keys (`slip keys "
                "issue NAME --role dealer`), or deal the pool again"
            )
        if connection.mark:
            self._seen[role].update(connection.marks)
            if role == "worker":
                self._supply.shun({connection.mark})

    def _drop_liars(self, quarantine: Quarantine | None) -> None:
        """What was dealt on disk by one who was caught since, by whichever vault, is used no more."""
        for one in self._supply.dealers() if quarantine is not None else ():
            known = None if quarantine is None else quarantine.find(None, one)
            if known is not None and (rows := self._supply.drop({one})):
                why = f"{rows} rows on disk that it had dealt: {known.why()}"
                self.audit.write("masks dropped", why, role="dealer", address=known.address)

    def _drop_masks(self, link: Link) -> None:
        """A dealer fell: what it has dealt is used no more."""
        if rows := self._supply.drop(link.marks):
            why = f"{rows} rows that it had dealt"
            self.audit.write("masks dropped", why, role="dealer", address=link.address, peer=link.peer)

    def _drop_revoked(self, serials: Collection[int]) -> None:
        """Certificates were taken back: what their holders dealt is used no more, by whichever process."""
        marks = {mark(serial): serial for serial in serials}
        seen = self._supply.dealers() | self._seen["dealer"]
        if rows := self._supply.drop(marks):
            which = ", ".join(f"{marks[each]:x}" for each in seen & marks.keys())
            why = f"{rows} rows dealt under a certificate that is revoked, serial {which}"
            self.audit.write("masks dropped", why, role="dealer")


def _telling(vault: weakref.ref[Vault], tell: Callable[[Vault, T], None]) -> Callable[[T], None]:
    """A method of the vault for threads of its parts, which must not keep it, nor end by an error of it."""

    def told(what: T) -> None:
        found = vault()
        if found is not None:
            try:
                tell(found, what)
            except SlipError as error:  # a pool that cannot be read now is shunned all the same
                logger.error("%s", error)  # noqa: TRY400

    return told


def _greeting(vault: weakref.ref[Vault], role: Role) -> Greet:
    """`_greeted` for a link, which must not keep the vault."""

    def greet(link: Link, connection: Connection, welcome: Welcome) -> None:
        found = vault()
        if found is None:
            raise WorkerUnavailable("the vault is closed; load the model again")
        found._greeted(role, link, connection, welcome)

    return greet


def _end(
    process: forks.Process,
    workers: Workforce,
    dealers: Workforce | None,
    supply: Supply,
    others: Sequence[Closing],
) -> None:
    if not process.here:
        return
    workers.close()
    if dealers is not None:
        dealers.close()
    supply.close()
    for other in others:
        other.close()


def _end_aside(process: forks.Process, *held: Any) -> None:
    """`_end` for a vault that was dropped."""
    if process.here:
        when_dropped(partial(_end, process, *held))
