"""Does a card do what the vault's processor does?  Tried with a random input before a group is used there.

Step 4 is on the worker, not on this card: a program that turned wrongly here would give wrong answers that
nobody notices.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np

from sliplm.arithmetic import field
from sliplm.arithmetic.field import Elements, P
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Card
from sliplm.arithmetic.kernels.cuda.vault_steps import CardRows
from sliplm.errors import CardError
from sliplm.masks.masks import Masks, Origin
from sliplm.parties.card_codec import CardAsked, CardCodec
from sliplm.parties.codec import Asked, GroupCodec

ROWS: Final = (1, 18)  # one, and so many that blocks share what they load
_ROUNDED: Final = 0.1  # part of x~ that may differ by one
_FAR: Final = 1e-4  # of the largest output
_SIZE: Final = 1 << 20  # of products without their mask


class CardCodecs:
    """Of every group its `CardCodec` on one card, made and tried when first used.

    Raises CardError for a group that the card does not compute as the processor does.
    """

    def __init__(self, codecs: Sequence[GroupCodec], card: Card) -> None:
        self._codecs, self._card, self._made = codecs, card, dict[int, CardCodec]()
        self._making = threading.Lock()
        self._tried = dict[tuple[object, ...], str | None]()  # by what programs are compiled for

    def __getitem__(self, group: int) -> CardCodec:
        found = self._made.get(group)
        if found is None:
            with self._making:
                found = self._made.get(group)  # made meanwhile
                if found is None:
                    found = self._made[group] = self._good(self._codecs[group])
        return found

    def _good(self, codec: GroupCodec) -> CardCodec:
        made, secrets = CardCodec(codec, self._card), codec.secrets
        kind = codec.m, codec.n, secrets.rotation, len(secrets.b)
        if kind not in self._tried:
            self._tried[kind] = difference(codec, made, self._card)
        if (wrong := self._tried[kind]) is not None:
            raise CardError(
                f"{wrong} on {self._card!r} is not what the processor makes of it: update driver and Triton"
            )
        return made


def difference(codec: GroupCodec, on_card: CardCodec, card: Card) -> str | None:
    """The first step whose result differs, or None.  Raises CardError where a program does not run."""
    for rows in ROWS:
        x = np.random.default_rng().standard_normal((rows, codec.n)).astype(np.float32)
        with card.entered():
            there, room = driver.Memory(x.nbytes), driver.Memory(4 * rows * codec.m)
            there.write(0, x)
        placed = CardRows(card, 0, there.address, rows, codec.n, "float32")
        out = CardRows(card, 0, room.address, rows, codec.m, "float32")
        y = field.uniform_words(field.new_key(), 0, 0, rows, codec.m)[:, : codec.m].copy()

        asked, here, same = _asked(codec, on_card, x, placed, out)
        if not same:
            return f"`ask` of {rows} rows"
        u = _checked(codec, on_card, asked, y)
        if u is None:
            return f"`check` of {rows} rows"
        codec.opened(here, y, u)
        found = _opened(on_card, asked, out)
        if not np.abs(found - here.out).max() <= _FAR * np.abs(here.out).max():  # nor is NaN
            return f"`opened` of {rows} rows"
    return None


def _asked(
    codec: GroupCodec, on_card: CardCodec, x: Floats, placed: CardRows, out: CardRows
) -> tuple[CardAsked, Asked, bool]:
    """Steps 1 and 2 under one mask, on both: whether x~ is the same, but for a few numbers that are rounded
    otherwise.
    """
    key, rows, u = field.new_key(), len(x), np.zeros(out.shape, np.uint32)
    there, here = np.empty(x.shape, np.uint32), np.empty(x.shape, np.uint32)
    asked = on_card.ask(placed, Masks(None, u, codec.n, Origin(key, 0, 0)), there, out)
    on_card.fetch(asked)
    on_card.ahead(asked)
    words = field.uniform_words(key, 0, 0, rows, codec.n)
    other = codec.ask(x, Masks(words, u, codec.n), here, np.zeros(out.shape, np.float32))
    codec.ahead(other)
    differ = field.centre(((there.astype(np.int64) - here) % P).astype(np.uint32))
    same = np.abs(differ).max() <= 1 and (differ != 0).sum() <= max(1.0, _ROUNDED * differ.size)
    return asked, other, bool(same)


def _checked(codec: GroupCodec, on_card: CardCodec, asked: CardAsked, y: Elements) -> Elements | None:
    """Step 4, for claims y that are changed until they are right: they are accepted, and refused with one
    entry changed.  Their mask u; None where the card says otherwise.
    """
    right = _make_right(codec, asked, y)
    u = ((y.astype(np.int64) - np.random.default_rng().integers(-_SIZE, _SIZE, y.shape)) % P).astype(
        np.uint32
    )
    wrong = y.copy()
    wrong[-1, -1] = (int(wrong[-1, -1]) + 1) % P
    refused = not on_card.sums_hold(asked, wrong, u)[0]
    accepted, largest = on_card.sums_hold(asked, y, u)
    plain = field.centre(((y.astype(np.int64) - u) % P).astype(np.uint32))
    good = refused and accepted == right and largest == np.abs(plain).max()
    return u if good else None


def _make_right(codec: GroupCodec, asked: CardAsked, y: Elements) -> bool:
    """Change the first two entries of each row of y so that both challenges hold, if they can."""
    challenges = codec.left()
    wanted, sums = codec.expected(challenges, asked.hidden), np.empty((len(y), 2), np.uint64)
    field.expect(challenges.e, y, sums, 0, len(y))
    (a, b), (c, d) = [[int(v) for v in row[:2]] if codec.m > 1 else (0, 0) for row in challenges.e]
    if (a * d - b * c) % P == 0:
        return False
    inverse = pow(a * d - b * c, -1, P)
    for i, (first, second) in enumerate((wanted.astype(object) - sums.astype(object)) % P):
        y[i, 0] = (int(y[i, 0]) + (first * d - second * b) * inverse) % P
        y[i, 1] = (int(y[i, 1]) + (second * a - first * c) * inverse) % P
    return True


def _opened(on_card: CardCodec, asked: CardAsked, out: CardRows) -> Floats:
    """Step 5 of what was checked last."""
    asked.checked = asked.believed = True
    on_card.opened(asked, np.empty((0, 0), np.uint32), None)
    at = asked.desk
    got = driver.Pinned(out.nbytes)
    at.wait()
    at.open = None
    driver.call("cuMemcpyDtoHAsync_v2", got.address, out.address, out.nbytes, None)
    driver.call("cuStreamSynchronize", None)
    found: Floats = got.elements(*out.shape).view(np.float32).copy()
    return found
