"""Memory of a card that two processes of one host share: a vault lends it, its worker borrows it.

Its first half is for questions, its second for answers.  The other process may write anything into it at
any time, and keep it after it was given back: the driver frees it when nobody has it any more.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import byref, c_int, c_uint64
from typing import Final

from sliplm import forks
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Card

_PAGE: Final = 2 << 20  # bytes: a multiple of what any card hands out
_ON_A_CARD, _PINNED, _DESCRIPTOR, _READ_AND_WRITE = 1, 1, 1, 3  # as the driver numbers them


class _Place(ctypes.Structure):
    _fields_ = (("kind", c_int), ("number", c_int))


class _Wanted(ctypes.Structure):
    _fields_ = (
        ("kind", c_int), ("shared_as", c_int), ("place", _Place), ("others", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class _Access(ctypes.Structure):
    _fields_ = (("place", _Place), ("rights", c_int))


class Lent:
    """Memory that this process makes and lends, zeros at first.

    An allocation of its own, in whole pages: nothing else of this process can be in it.

    Args:
        size: bytes of a question, and of an answer; rounded up to whole pages.

    Attributes:
        questions, answers: where they begin.

    Raises CardError: no room, or a driver that shares nothing.
    """

    def __init__(self, card: Card, size: int) -> None:
        self.card, self.size = card, -(-size // _PAGE) * _PAGE
        self._handle = c_uint64()
        place = _Place(_ON_A_CARD, card.device.ordinal)
        with card.entered():
            wanted = _Wanted(kind=_PINNED, shared_as=_DESCRIPTOR, place=place)
            driver.call("cuMemCreate", byref(self._handle), 2 * self.size, byref(wanted), 0)
            self.questions = _mapped(self, self._handle, 2 * self.size, [card])
            driver.call("cuMemsetD8Async", self.questions, 0, 2 * self.size, None)
            driver.call("cuStreamSynchronize", None)
        self.answers = self.questions + self.size

    def __repr__(self) -> str:
        return f"Lent({self.size >> 20} MiB each way of {self.card!r})"

    def descriptor(self) -> int:
        """A descriptor of it, to be passed on and closed.  Raises CardError."""
        found = c_int()
        with self.card.entered():
            driver.call("cuMemExportToShareableHandle", byref(found), self._handle, _DESCRIPTOR, 0)
        return found.value


class Borrowed:
    """Memory that another process lends, as this one's cards reach it.

    Args:
        descriptor: of it; it may be closed afterwards.
        size: bytes of a question, and of an answer.

    Raises CardError: no such memory, less of it, or a card that cannot reach it.
    """

    def __init__(self, descriptor: int, size: int, cards: Sequence[Card]) -> None:
        handle = c_uint64()
        with cards[0].entered():
            driver.call("cuMemImportFromShareableHandle", byref(handle), descriptor, _DESCRIPTOR)
            self.questions = _mapped(self, handle, 2 * size, cards)
        self.size, self.answers = size, self.questions + size

    def __repr__(self) -> str:
        return f"Borrowed({self.size >> 20} MiB each way)"


def _mapped(owner: object, handle: c_uint64, size: int, cards: Sequence[Card]) -> int:
    """The address at which these cards reach an allocation, as long as its owner lives."""
    address = c_uint64()
    weakref.finalize(owner, _give_back, forks.Process(), handle, address, size).atexit = False
    driver.call("cuMemAddressReserve", byref(address), size, 0, 0, 0)
    driver.call("cuMemMap", address, size, 0, handle, 0)
    places = [_Access(_Place(_ON_A_CARD, card.device.ordinal), _READ_AND_WRITE) for card in cards]
    driver.call("cuMemSetAccess", address, size, (_Access * len(places))(*places), len(places))
    return address.value


def _give_back(process: forks.Process, handle: c_uint64, address: c_uint64, size: int) -> None:
    driver.release(process, "cuMemUnmap", address, size)
    driver.release(process, "cuMemAddressFree", address, size)
    driver.release(process, "cuMemRelease", handle)
