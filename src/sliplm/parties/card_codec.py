"""The vault's arithmetic for one group where activations lie on a card: `GroupCodec`'s methods by
`kernels.cuda.vault_steps`.

The host waits for x~ before its message, and has step 4's result before anything of step 5 is asked for
(M13).  It does not wait for step 5: what rounding has cost an answer is read with the next wait, and a row of
which nothing is left (M51) has become NaN on the card meanwhile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from sliplm.arithmetic.field import Elements
from sliplm.arithmetic.kernels.cuda.card import Card
from sliplm.arithmetic.kernels.cuda.lent import Lent
from sliplm.arithmetic.kernels.cuda.vault_layout import Laid
from sliplm.arithmetic.kernels.cuda.vault_steps import Asked, CardRows, Desk, Words, desk
from sliplm.errors import CardError, InputError
from sliplm.masks.masks import Masks
from sliplm.network.link import Link
from sliplm.parties.codec import Challenges, GroupCodec, Judged
from sliplm.parties.message import Message
from sliplm.secrecy import Secret

FEW: Final = 4
"""Rows up to which x~ goes by the host, and the processor checks the answer: the card's way takes longer."""


class _Open(NamedTuple):
    """A product that was asked for on a card, and not yet judged."""

    codec: GroupCodec
    rows: int


class CardAsked(Secret):
    """As `codec.Asked`, of rows on a card.

    Attributes:
        x, out: the input, and where the answer will be.  hidden: room for x~ in the message, uint32
            [rows, n]; fetched: whether it is there, and not on the card alone.
        expected: <c, x~> for `challenges`, empty where the card has it.  pads: where u lies on the card.
        checked: `holds` has passed it.  believed: no product is too large (M64).
    """

    __slots__ = (
        "believed", "challenges", "checked", "desk", "expected", "fetched", "hidden", "masks", "out", "pads",
        "x",
    )  # fmt: skip

    def __init__(self, at: Desk, x: CardRows, hidden: Elements, out: CardRows, masks: Masks) -> None:
        self.desk, self.x, self.hidden, self.out, self.masks = at, x, hidden, out, masks
        self.fetched, self.pads = len(x) <= FEW, 0
        self.expected = np.empty((0, 0), np.uint64)
        self.challenges: Challenges | None = None
        self.checked = self.believed = False


class CardCodec(Secret):
    """One group on one card; its challenges and what it says of its losses are those of `codec`.

    Raises CardError for a group whose rotations have no program, and where the card is full.
    """

    def __init__(self, codec: GroupCodec, card: Card) -> None:
        secrets = codec.secrets
        self.name, self.m, self.n, self._codec, self._card = codec.name, codec.m, codec.n, codec, card
        self._laid = Laid(
            card, secrets.rotation_in(), secrets.rotation_out(), secrets.d_in, secrets.scale, secrets.a,
            secrets.b, codec.limit, secrets.noise,
        )  # fmt: skip
        put = self._laid.put
        with card.entered():
            self._adapters = {
                name: [(put(part.a.T), put(part.b), len(part.b), part.first, len(part.a)) for part in parts]
                for name, parts in secrets.adapters.items()
            }
        self._challenges: dict[int, tuple[int, int]] = {}  # addresses of e and c by the set's number
        self._renewing = threading.Lock()

    def __repr__(self) -> str:
        return f"CardCodec({self.name!r}, {self._card!r}, secrets hidden)"

    def check_left(self) -> None:
        """As `GroupCodec.check_left`."""
        self._codec.check_left()

    def ask(self, x: CardRows, masks: Masks, hidden: Elements, out: CardRows) -> CardAsked:
        """Steps 1 and 2, as `GroupCodec.ask`; waits for them, and so for all before them.

        Raises: as there, and PrecisionError for the product before this one in this thread.
        """
        at, laid = desk(x.card), self._laid
        at.begin(x.stream)
        asked = CardAsked(at, x, hidden, out, masks)
        if not asked.fetched:
            asked.pads = at.pads([part.u for part in masks.parts])
        at.ask(laid, x, self._words(at, masks), send=asked.fetched)
        found = at.asked(len(x))
        if found is Asked.REJECTED:  # once in 10^5 rows; the host makes these masks
            at.ask(laid, x, at.given(masks.words), send=asked.fetched)
            found = at.asked(len(x))
        _settle(at)  # first: what a lost row made of the layers after it is its fault
        if found is not Asked.READY:
            raise InputError(
                f"{self.name}: the input holds NaN or infinity; look for the cause in the layers before it"
            )
        if asked.fetched:
            at.sent(hidden)
        return asked

    def _words(self, at: Desk, masks: Masks) -> Words:
        batches = [(*part.origin, part.rows) for part in masks.parts if part.origin is not None]
        return at.made(batches, self.n) if len(batches) == len(masks.parts) else at.given(masks.words)

    def fetch(self, asked: CardAsked) -> None:
        """Have x~ in the message."""
        if not asked.fetched:
            asked.desk.fetch(asked.hidden)
            asked.fetched = True

    def lay(self, asked: CardAsked, lent: Lent) -> None:
        """x~ to memory of the same card that a worker has borrowed."""
        asked.desk.lay(lent.questions, asked.x.nbytes)

    def unmasked(self, x: CardRows, out: CardRows, inputs: int) -> CardAsked:
        """As `GroupCodec.unmasked`; inputs of two rows never come here."""
        del inputs
        nothing = Masks(np.zeros(x.shape, np.uint32), np.zeros(out.shape, np.uint32), self.n)
        asked = self.ask(x, nothing, np.empty(x.shape, np.uint32), out)
        self.fetch(asked)
        return asked

    def bring_near(self) -> None:
        """A card has nothing nearer."""

    def ahead(self, asked: CardAsked, adapter: str | None = None) -> None:
        """As `GroupCodec.ahead`; asked for and not waited for."""
        at, laid, x, challenges = asked.desk, self._laid, asked.x, self._codec.left()
        at.expect(laid, x, self._addresses(challenges)[1])
        at.low_rank(laid, x, laid.a, laid.b, laid.rank, 0, self.m, add=False)
        asked.challenges = challenges
        if adapter is not None:
            for a, b, rank, place, wide in self._adapters.get(adapter, ()):
                at.low_rank(laid, x, a, b, rank, place, wide, add=True)
        if len(x) <= FEW:
            self._expect(asked, challenges)

    def holds(self, asked: CardAsked, y: Elements | Lent) -> bool:
        """Step 4, as `GroupCodec.holds`: of few rows on the processor, of many on the card, where claims in
        lent memory are copied to our own first (M68).
        """
        challenges, rows, at = self._codec.left(), len(asked.x), asked.desk
        if isinstance(y, Lent) or rows > FEW:
            if asked.challenges is not challenges:  # renewed meanwhile
                at.expect(self._laid, asked.x, self._addresses(challenges)[1])
                asked.challenges = challenges
            right, largest = self._sums(asked, y.answers if isinstance(y, Lent) else y, asked.pads)
        else:
            if asked.challenges is not challenges:
                self._expect(asked, challenges)
            right = self._codec.holds_for(challenges, asked.expected, y)
            largest = at.unmasked(y, asked.masks.u) if right else 0
        if not right:
            self._codec.renew_challenges(challenges)
            return False
        asked.believed = largest <= self._codec.edge
        asked.checked = True
        return True

    def sums_hold(self, asked: CardAsked, y: Elements, u: Elements) -> tuple[bool, int]:
        """Step 4 on the card whatever the rows, using no challenges up; and the largest size in y - u."""
        return self._sums(asked, y, asked.desk.pads([u]))

    def _sums(self, asked: CardAsked, y: Elements | int, pads: int) -> tuple[bool, int]:
        at, challenges, rows = asked.desk, asked.challenges, len(asked.x)
        if challenges is None:
            raise CardError("an answer is checked after `ahead`")
        at.brought()
        at.check(self._laid, rows, at.claims(y, asked.out.nbytes), pads, self._addresses(challenges)[0])
        return at.verdict(rows, self.m)

    def opened(self, asked: CardAsked, y: Elements | Lent, u: Elements | None) -> None:
        """Step 5, asked for and not waited for, of what `holds` has passed, or what was computed here."""
        at = asked.desk
        if not asked.checked and u is not None and not isinstance(y, Lent):  # computed here, checked there
            asked.believed = at.unmasked(y, u) <= self._codec.edge
        if asked.believed:
            at.opened(self._laid, asked.out)
            at.open = _Open(self._codec, len(asked.x))

    def judge(self, asked: CardAsked) -> int:
        """As `GroupCodec.judge`: of this product M64, of the rest what was settled since the last time."""
        if not asked.believed:
            return self._codec.judge(Judged(asked.desk.losses(0), math.nan, np.ones(0)))
        lossy, asked.desk.lossy = asked.desk.lossy, 0
        return lossy

    def _expect(self, asked: CardAsked, challenges: Challenges) -> None:
        """<c, x~> by the processor, for its own check."""
        asked.expected, asked.challenges = self._codec.expected(challenges, asked.hidden), challenges

    def _addresses(self, challenges: Challenges) -> tuple[int, int]:
        found = self._challenges.get(challenges.number)
        if found is None:
            with self._renewing, self._card.entered():
                found = self._challenges.get(challenges.number)  # made meanwhile
                if found is None:
                    found = self._laid.put(challenges.e), self._laid.put(challenges.c)
                    self._challenges[challenges.number] = found
        return found


class CardMessage(Message):
    """A message whose x~ lies on a card: where the worker has borrowed memory there, it goes that way."""

    __slots__ = ()

    def exchanged(self, link: Link, meanwhile: Callable[[], None]) -> tuple[Sequence[Any], int]:
        asked: CardAsked = self.asked[0]
        codec: Any = self.codecs[0]
        group, rows = self.questions[0]
        lent = link.borrowed() if rows > FEW else None
        if lent is not None and lent.card is asked.x.card and rows <= link.max_lent(group):
            codec.lay(asked, lent)
            return [lent], link.exchange_lent(group, rows, meanwhile)
        codec.fetch(asked)
        return super().exchanged(link, meanwhile)

    def seen(self) -> Elements:
        codec: Any = self.codecs[0]
        codec.fetch(self.asked[0])
        return self.elements

    def open(self, claims: Sequence[Any]) -> None:
        self.codecs[0].opened(self.asked[0], claims[0], None)


def settle(card: Card) -> int:
    """Wait for what this thread has asked a card for; how many rows rounding has cost much.

    Raises: PrecisionError as `GroupCodec.judge`.
    """
    at = desk(card)
    if at.open is not None:
        at.wait()
        _settle(at)
    lossy, at.lossy = at.lossy, 0
    return lossy


def _settle(at: Desk) -> None:
    """Judge the product before, which is complete."""
    found, at.open = at.open, None
    if found is not None:
        losses = at.losses(found.rows)
        at.lossy += found.codec.judge(Judged(losses, float(losses.max(initial=0.0)), np.ones(found.rows)))
