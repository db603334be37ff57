"""One message on its way: of each group its rows, its masks, and the codec that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from sliplm.arithmetic.field import Elements
from sliplm.masks.masks import Masks
from sliplm.network.link import Link
from sliplm.parties.workforce import work
from sliplm.protocol.frames import ELEMENT
from sliplm.secrecy import Secret


class Part(NamedTuple):
    """The inputs of one group in an exchange: W x of x float32 [rows, n] goes into out, float32 [rows, m]; or
    both on a card, in a type of their own.
    """

    group: int
    x: Any
    out: Any


class Codec(Protocol):
    """A group's arithmetic: `codec.GroupCodec`, or `card_codec.CardCodec`, where everything is explained."""

    name: str
    m: int
    n: int

    def check_left(self) -> None: ...

    def ask(self, x: Any, masks: Masks, hidden: Elements, out: Any) -> Any: ...

    def unmasked(self, x: Any, out: Any, inputs: int) -> Any: ...

    def ahead(self, asked: Any, adapter: str | None) -> None: ...

    def holds(self, asked: Any, y: Any) -> bool: ...

    def opened(self, asked: Any, y: Any, u: Any) -> None: ...

    def judge(self, asked: Any) -> int: ...

    def bring_near(self) -> None: ...


class Codecs(Protocol):
    """That of each group."""

    def __getitem__(self, group: int, /) -> Codec: ...


class Message(Secret):
    """One message on its way, made with masks that are burnt: of each group its rows and what is known of
    them.

    Attributes:
        elements: x~ of all groups behind each other, uint32.
        questions: each group with its rows, as they are asked.  asked: what each codec knows of it.
        rows, answer: of all groups: rows, bytes of the answer.
    """

    __slots__ = ("_adapter", "_masks", "answer", "asked", "codecs", "elements", "questions", "rows")

    def __init__(
        self, codecs: Sequence[Codec], parts: Sequence[Part], masks: Sequence[Masks], adapter: str | None
    ) -> None:
        self.codecs, self._masks, self._adapter = codecs, masks, adapter
        self.questions = [(part.group, mask.rows) for part, mask in zip(parts, masks, strict=True)]
        sizes = [rows * codec.n for codec, (_, rows) in zip(codecs, self.questions, strict=True)]
        self.elements = np.empty(sum(sizes), np.uint32)
        self.asked: list[Any] = []
        self.rows = self.answer = first = 0
        for k, (_, x, out) in enumerate(parts):
            rows, last = self.questions[k][1], first + sizes[k]
            hidden = self.elements[first:last].reshape(rows, codecs[k].n)
            self.asked.append(codecs[k].ask(x, masks[k], hidden, out))  # steps 1 and 2
            self.rows, self.answer, first = self.rows + rows, self.answer + ELEMENT * rows * codecs[k].m, last

    @property
    def work(self) -> int:
        """What `workforce.work` says."""
        codecs = enumerate(self.codecs)
        return work([(codec.m, codec.n, self.questions[k][1]) for k, codec in codecs])

    def ahead(self) -> None:
        """What does not depend on the answer, once: a worker that fails is followed by another."""
        for k, asked in enumerate(self.asked):
            if asked.challenges is None:
                self.codecs[k].ahead(asked, self._adapter)

    def exchanged(self, link: Link, meanwhile: Callable[[], None]) -> tuple[Sequence[Any], int]:
        """Steps 2 and 3 with one worker, as `Link.exchange`: its claims, and its compute time."""
        return link.exchange(self.questions, self.elements, meanwhile)

    def seen(self) -> Elements:
        """x~ as the worker has it, for who watches."""
        return self.elements

    def wrong(self, claims: Sequence[Any]) -> Codec | None:
        """Step 4, of every group: the first whose product is wrong.  Other challenges are in force for it
        then (M15).
        """
        for k, asked in enumerate(self.asked):
            if not self.codecs[k].holds(asked, claims[k]):
                return self.codecs[k]
        return None

    def open(self, claims: Sequence[Any]) -> None:
        """Step 5, of every group."""
        for k, asked in enumerate(self.asked):
            self.codecs[k].opened(asked, claims[k], self._masks[k].u)

    def open_plain(self, products: Sequence[Elements]) -> None:
        """The same for products of what no mask hides."""
        for k, asked in enumerate(self.asked):
            self.codecs[k].opened(asked, products[k], np.zeros_like(products[k]))

    def lossy(self) -> int:
        """How many rows rounding has cost much.  Raises: PrecisionError."""
        return sum([codec.judge(asked) for codec, asked in zip(self.codecs, self.asked, strict=True)])
