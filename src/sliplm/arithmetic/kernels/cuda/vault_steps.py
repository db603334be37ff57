"""The vault's steps for one group, asked of a card: `arithmetic.steps` for activations that lie there.

    Desk     what one thread needs for one message at a time: memory of both kinds, and programs
    CardRows activations where they lie

The steps are asked for in the order of SPEC section 4 on the stream of the activations.  The host waits
before a message leaves (`asked`), and where the card checks an answer, before anything of it is used
(`verdict`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from sliplm.arithmetic import field
from sliplm.arithmetic.field import Elements, P, sub_centred
from sliplm.arithmetic.jit import jit
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Card
from sliplm.arithmetic.kernels.cuda.tiles import Program
from sliplm.arithmetic.kernels.cuda.vault_layout import OUTPUTS, PIECE, Laid

KINDS: Final = {"float32": (0, 4), "bfloat16": (1, 2), "float16": (2, 2)}
"""Of activations: their number in the programs, and bytes."""

_LOW: Final = 0xFFFFFFFF
_LANES: Final = 128  # of a block that makes masks, two blocks of AES each
_KEYS: Final = 4096  # batches whose round keys are kept
_SEVERAL: Final = 16  # rows that share what a block has loaded
_RECORD: Final = 6
_Records = npt.NDArray[np.int64]

Call = Callable[[tuple[int, int], tuple[int, ...], int], None]
"""A program ready to be asked for: grid, arguments, stream."""


class CardRows:
    """Rows of activations, or room for them, in a card's memory: contiguous [rows, columns].

    Args:
        stream: what they are made and used on.  address: of the first.  kind: a name in KINDS.

    Attributes:
        nbytes: of as many elements, as they are in a message.
    """

    __slots__ = ("address", "card", "columns", "kind", "nbytes", "rows", "shape", "size", "stream")

    def __init__(self, card: Card, stream: int, address: int, rows: int, columns: int, kind: str) -> None:
        self.card, self.stream, self.address, self.kind = card, stream, address, kind
        self.rows, self.columns, self.shape = rows, columns, (rows, columns)
        self.size = rows * columns
        self.nbytes = 4 * self.size

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice) -> CardRows:
        """Some of them."""
        first, last, _ = rows.indices(self.rows)
        address = self.address + first * self.columns * KINDS[self.kind][1]
        return CardRows(self.card, self.stream, address, max(0, last - first), self.columns, self.kind)


class Words(NamedTuple):
    """Masks where a card reaches them: the first n words of each row are its r.  stride: words of a row."""

    address: int
    stride: int

    def __repr__(self) -> str:
        return "Words(hidden)"


class Asked(Enum):
    """What became of a message: it is ready; a row is not finite; a mask has a word that is no element."""

    READY = 0
    NOT_FINITE = 1
    REJECTED = 2


class Desk:
    """Memory and programs of one thread on one card, for one message at a time."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._calls = WeakKeyDictionary[Laid, dict[tuple[object, ...], Call]]()
        self._for_masks: dict[Program, Call] = {}
        self._pinned: dict[str, driver.Pinned] = {}
        self._memory: dict[str, driver.Memory] = {}
        self._keys: dict[bytes, driver.Memory] = {}
        self._stream = 0
        self._copies: driver.Stream | None = None
        self.open: Any = None  # the product of which nobody knows yet what rounding has cost
        self.lossy = 0  # rows found since somebody asked

    def pinned(self, name: str, size: int) -> driver.Pinned:
        """At least so many bytes of host memory that the card reaches; what was there before is gone."""
        found = self._pinned.get(name)
        if found is None or found.size < size:
            self.wait()
            self._pinned.pop(name, None)
            found = self._pinned[name] = driver.Pinned(_rounded(size))
        return found

    def memory(self, name: str, size: int) -> int:
        """The address of at least so many bytes on the card; what was there before is gone."""
        found = self._memory.get(name)
        if found is None or found.size < size:
            self.wait()
            self._memory.pop(name, None)
            found = self._memory[name] = driver.Memory(_rounded(size))
        return found.address

    def begin(self, stream: int) -> None:
        """The next message's activations are on this stream."""
        self.card.device.enter()
        if stream != self._stream:
            self.wait()
            self._stream = stream

    def wait(self) -> None:
        """Until all is done that was asked for."""
        driver.call("cuStreamSynchronize", self._stream or None)

    def given(self, words: Elements) -> Words:
        """Masks for `ask` made by the host: uint32 [rows, n or more], the first n of a row are its r."""
        r = self.pinned("r", words.nbytes)
        r.elements(*words.shape)[:] = words
        return Words(r.address, words.shape[1])

    def made(self, batches: Sequence[tuple[bytes, int, int, int]], n: int) -> Words:
        """Masks for `ask` that the card makes of batches' keys, as `field.uniform_words`, but without
        dropping any word: where one is to be, `asked` says so.

        Args:
            batches: key, stream, first row, rows.
        """
        blocks = field.row_blocks(n)
        words = self.memory("made", 16 * blocks * sum(rows for *_, rows in batches))
        keys = [self._round_keys(key) for key, *_ in batches]
        masked, to = self._program(Program("masked", (("BLOCK", _LANES),), 4)), words
        for round_keys, (_, stream, first, rows) in zip(keys, batches, strict=True):
            begin, count = first * blocks, rows * blocks
            masked((-(-count // (2 * _LANES)), 1), (
                round_keys, to, count, stream >> 32, stream & _LOW, begin >> 32, begin & _LOW,
            ), self._stream)  # fmt: skip
            to += 16 * count
        return Words(words, 4 * blocks)

    def _round_keys(self, key: bytes) -> int:
        found = self._keys.get(key)
        if found is None:
            if len(self._keys) >= _KEYS:
                self.wait()
                del self._keys[next(iter(self._keys))]
            found = self._keys[key] = driver.Memory(1024)
            found.write(0, np.frombuffer(key, np.uint32))
            places = found.address, found.address + 256, found.address + 512
            self._program(Program("stretch", (), 1))((1, 1), places, self._stream)
        return found.address + 512

    def _program(self, program: Program) -> Call:
        found = self._for_masks.get(program)
        if found is None:
            found = self._for_masks[program] = self.card.prepared(program, aligned=True)
        return found

    def ask(self, laid: Laid, x: CardRows, r: Words, *, send: bool) -> None:
        """Steps 1 and 2, for `asked`.  send: x~ to the host too, while it is made."""
        rows, n, kind = x.rows, laid.n, KINDS[x.kind][0]
        aligned = laid.aligned and not x.address % 16
        hidden, alpha = self.memory("hidden", 4 * rows * n), self.memory("alpha", 8 * rows)
        self._call(laid, "ask", kind, aligned)((rows, 1), (
            x.address, r.address, hidden,
            self.pinned("sent", 4 * rows * n).address if send else hidden, alpha,
            self.pinned("flags", 4 * rows).address, self.memory("work", 8 * rows * max(n, laid.m)),
            laid.orders_in, laid.factors_in, laid.numbers, r.stride,
        ), self._stream)  # fmt: skip

    def expect(self, laid: Laid, x: CardRows, c: int) -> None:
        """<c, x~> of what was asked, for c [2, n] at this address; and what rounding has cost the input."""
        aligned = laid.aligned and not x.address % 16
        self._call(laid, "expect", KINDS[x.kind][0], aligned)((x.rows, 1), (
            x.address, self.memory("hidden", 0), c, laid.d_in, self.memory("alpha", 0),
            self.pinned("expected", 32 * x.rows).address, self.memory("losses", 16 * x.rows),
        ), self._stream)  # fmt: skip

    def asked(self, rows: int) -> Asked:
        """Wait for `ask`: whether there is a message."""
        self.wait()
        flags = self.pinned("flags", 4 * rows).elements(1, rows)
        if (flags == 1).all():
            return Asked.READY
        return Asked.REJECTED if (flags == 3).any() else Asked.NOT_FINITE

    def sent(self, hidden: Elements) -> None:
        """x~ of an `ask` that sent it, into hidden [rows, n]."""
        hidden[:] = self.pinned("sent", hidden.nbytes).elements(*hidden.shape)

    def fetch(self, hidden: Elements) -> None:
        """x~ of an `ask` that did not, into hidden [rows, n]."""
        to = self.pinned("sent", hidden.nbytes).address
        driver.call("cuMemcpyDtoHAsync_v2", to, self.memory("hidden", 0), hidden.nbytes, self._stream or None)
        self.wait()
        self.sent(hidden)

    def lay(self, questions: int, size: int) -> None:
        """The same to memory that a worker reads."""
        hidden = self.memory("hidden", 0)
        driver.call("cuMemcpyDtoDAsync_v2", questions, hidden, size, self._stream or None)
        self.wait()

    def pads(self, parts: Sequence[Elements]) -> int:
        """u of a message on its way to the card, beside all else: uint32 [rows, m] in parts; its address
        there.  They must live until `brought`.
        """
        if self._copies is None:
            self._copies = driver.Stream()
        size, copies = sum(part.nbytes for part in parts), self._copies.handle
        there, done = self.memory("u", size), 0
        for part in parts:
            source = driver.pinned_address(part)
            if source is None:
                stage = self.pinned("u", size)
                source = stage.address + done
                stage.elements(1, size // 4)[0, done // 4 : (done + part.nbytes) // 4] = part.reshape(-1)
            driver.call("cuMemcpyHtoDAsync_v2", there + done, source, part.nbytes, copies)
            done += part.nbytes
        return there

    def brought(self) -> None:
        """Wait for `pads`."""
        if self._copies is not None:
            self._copies.wait()

    def claims(self, y: Elements | int, size: int) -> int:
        """The claims y~, from the host or an address on the card, in memory that is this process's alone: the
        address there.
        """
        if isinstance(y, int):
            there = self.memory("claims", size)
            driver.call("cuMemcpyDtoDAsync_v2", there, y, size, self._stream or None)
            return there
        claims = self.pinned("y", size)
        claims.elements(*y.shape)[:] = y
        return claims.address

    def low_rank(
        self, laid: Laid, x: CardRows, a: int, b: int, rank: int, place: int, wide: int, *, add: bool
    ) -> None:  # fmt: skip
        """A (B x) for A^T [rank, wide] and B [rank, n] at these addresses, to the outputs from `place` on."""
        rows, many = x.rows, _SEVERAL if x.rows >= _SEVERAL else 1
        low = self.memory("low", 4 * rows * laid.m)
        if not rank and not add:
            driver.call("cuMemsetD8Async", low, 0, 4 * rows * laid.m, self._stream or None)
        if not rank:
            return
        aligned = laid.aligned and not x.address % 16 and not place % 16 and not wide % 16
        sums, tall, stream = self.memory("sums", 4 * rows * rank), -(-rows // many), self._stream
        project = self._call(laid, "project", KINDS[x.kind][0], aligned, many)
        project((tall, rank), (x.address, b, sums, rows, rank), stream)
        times = self._call(laid, "low_rank", int(add), aligned, many, rank)
        grid = (tall, -(-wide // OUTPUTS))
        times(grid, (sums, a, low, rows, laid.m, place, wide), stream)

    def check(self, laid: Laid, rows: int, y: int, u: int, e: int) -> None:
        """Step 4's sums over y [rows, m] with e [2, m], for `verdict`; y without u.  All are addresses."""
        m = laid.m
        pieces = -(-m // PIECE)
        self._call(laid, "check", 0, laid.aligned)((rows, pieces), (
            y, u, e, self.memory("plain", 4 * rows * m),
            self.pinned("records", 8 * _RECORD * rows * pieces).address, m, pieces,
        ), self._stream)  # fmt: skip

    def verdict(self, rows: int, m: int) -> tuple[bool, int]:
        """Wait for `check`: is y the product of x~ for all rows, and the largest size of an entry without its
        mask.
        """
        self.wait()
        pieces = -(-m // PIECE)
        records = self._integers("records", rows * pieces * _RECORD).reshape(rows, pieces, _RECORD)
        right, largest = _verdict(records, self._integers("expected", rows * 4).reshape(rows, 4))
        return bool(right), int(largest)

    def unmasked(self, y: Elements, u: Elements) -> int:
        """Bring y without its mask to the card, for `opened`, of rows that the processor has checked; the
        largest size of an entry.
        """
        there, plain = self.memory("plain", y.nbytes), self.pinned("few", y.nbytes)
        largest = _unmasked(y, u, plain.elements(*y.shape).view(np.int32))
        driver.call("cuMemcpyHtoDAsync_v2", there, plain.address, y.nbytes, self._stream or None)
        return int(largest)

    def opened(self, laid: Laid, out: CardRows) -> None:
        """Step 5 of what was checked, into out; `losses` says what rounding has cost."""
        rows, aligned = out.rows, laid.aligned and not out.address % 16
        self._call(laid, "opened", KINDS[out.kind][0], aligned)((rows, 1), (
            self.memory("plain", 0), self.memory("low", 0), out.address, self.memory("alpha", 0),
            self.memory("losses", 0), self.pinned("said", 16 * rows).address, self.memory("work", 0),
            laid.orders_out, laid.factors_out, laid.scale, laid.numbers,
        ), self._stream)  # fmt: skip

    def losses(self, rows: int) -> npt.NDArray[np.float64]:
        """After a wait: what rounding has cost the answer and the input, float64 [rows, 2]."""
        found: npt.NDArray[np.float64] = self._integers("said", 2 * rows).view(np.float64).reshape(rows, 2)
        return found.copy()

    def _integers(self, name: str, count: int) -> npt.NDArray[np.int64]:
        return self.pinned(name, 8 * count).elements(1, 2 * count).reshape(-1).view(np.int64)

    def _call(self, laid: Laid, step: str, kind: int, aligned: bool, many: int = 1, rank: int = 0) -> Call:
        calls = self._calls.get(laid)
        if calls is None:
            calls = self._calls[laid] = {}
        key = step, kind, aligned, many, rank
        found = calls.get(key)
        if found is None:
            program = laid.program(step, kind, many, rank)
            found = calls[key] = self.card.prepared(program, aligned=aligned)
        return found


class _Desks(threading.local):
    def __init__(self) -> None:
        self.of: dict[Card, Desk] = {}


_desks = _Desks()


def desk(card: Card) -> Desk:
    """The calling thread's."""
    found = _desks.of.get(card)
    if found is None:
        found = _desks.of[card] = Desk(card)
    return found


# --- their parts -----------------------------------------------------------------------------------------


@jit
def _verdict(records: _Records, expected: _Records) -> tuple[bool, np.int64]:
    """<e, y> = <c, x~> for both challenges, and all y elements?  The largest size without masks."""
    right, largest = True, np.int64(0)
    for i in range(records.shape[0]):
        for t in range(2):
            low, high = np.int64(0), np.int64(0)
            for j in range(records.shape[1]):
                low += records[i, j, 2 * t]
                high += records[i, j, 2 * t + 1]
            if _residue(low, high) != _residue(expected[i, 2 * t], expected[i, 2 * t + 1]):
                right = False
        for j in range(records.shape[1]):
            if records[i, j, 4] >= P:
                right = False
            largest = max(largest, records[i, j, 5])
    return right, largest


@jit
def _unmasked(y: Elements, u: Elements, plain: npt.NDArray[np.int32]) -> np.int64:
    """plain = centre(y - u), and the largest size in it."""
    largest = np.int64(0)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            product = sub_centred(y[i, j], u[i, j])
            largest = max(largest, abs(product))
            plain[i, j] = np.int32(product)
    return largest


@jit
def _residue(low: np.int64, high: np.int64) -> np.int64:
    """low + 2^32 high mod p, of sums of fewer than 2^31 numbers below 2^32."""
    return (low % P + high % P * (2**32 % P)) % P


def _rounded(size: int) -> int:
    return 1 << max(12, (size - 1).bit_length())
