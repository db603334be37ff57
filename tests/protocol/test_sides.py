"""Both sides of the protocol in memory: honest conversations, wrong orders, and bytes from a stranger."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliplm.errors import AttestationError, InputError, MismatchError, SlipError, WireError, WorkerFault
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import HEADER_BYTES, FaultCode, Header, Kind
from sliplm.protocol.side import FRAME_BYTES, State, Way
from sliplm.protocol.vault_side import VAULT_TABLE, Accept, Borrowed, Product, VaultSide, Welcome
from sliplm.protocol.worker_side import (
    WORKER_TABLE,
    Deal,
    Evidence,
    Hello,
    Lend,
    Multiply,
    Several,
    WorkerSide,
)
from sliplm.shares.manifest import MAX_GROUPS
from sliplm.shares.shards import whole

SPLIT_ID = "ab" * 16
OTHER_ID = "cd" * 16
NONCE = bytes(range(32))
KEY = bytes([7]) * 32
SHAPES = [(6, 4), (3, 5), (70000, 2)]

Side = VaultSide | WorkerSide


def give(side: Side, frame: bytes) -> object:
    """Hand a whole frame to a side, as the reader's loop does."""
    length = side.header(frame[:HEADER_BYTES])
    assert length == len(frame) - HEADER_BYTES
    return side.payload(frame[HEADER_BYTES:])


def greeted(*, wants: bool = False) -> tuple[VaultSide, WorkerSide]:
    """Both sides after HELLO and WELCOME, which may ask for evidence."""
    vault, worker = VaultSide(SPLIT_ID, SHAPES), WorkerSide(SPLIT_ID, SHAPES)
    assert give(worker, vault.hello(NONCE)) == Hello(SPLIT_ID, NONCE)
    assert give(vault, worker.welcome(NONCE, b"tdx", wants_evidence=wants)) == Welcome(
        whole(SPLIT_ID, len(SHAPES)), FRAME_BYTES, NONCE, wants, b"tdx"
    )
    return vault, worker


def vault_in(state: State) -> VaultSide:
    """A vault's side in the given state."""
    if state in (State.NEW, State.GREETED):
        vault = VaultSide(SPLIT_ID, SHAPES)
        if state is State.GREETED:
            vault.hello(NONCE)
    else:
        vault, _ = greeted(wants=state in (State.PROVING, State.PROVED))
        if state is State.PROVED:
            vault.evidence(b"tdx")
        if state is State.ASKED:
            vault.multiply(1, 2)
        if state is State.LENDING:
            vault.lend(64)
    if state is State.CLOSED:
        vault.close()
    assert vault.state is state
    return vault


def worker_in(state: State) -> WorkerSide:
    """A worker's side in the given state."""
    vault = VaultSide(SPLIT_ID, SHAPES)
    worker = WorkerSide(SPLIT_ID, SHAPES)
    if state is not State.NEW:
        give(worker, vault.hello(NONCE))
    if state in (State.READY, State.ASKED, State.PROVING, State.PROVED, State.LENDING):
        give(vault, worker.welcome(NONCE, wants_evidence=state in (State.PROVING, State.PROVED)))
    if state is State.PROVED:
        give(worker, vault.evidence(b"tdx"))
    if state is State.ASKED:
        give(worker, vault.multiply(1, 2) + bytes(4 * 2 * 5))
    if state is State.LENDING:
        give(worker, vault.lend(64))
    if state is State.CLOSED:
        worker.close()
    assert worker.state is state
    return worker


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 2**33)), max_size=8))
def test_honest_conversation(exchanges: list[tuple[int, int, int]]) -> None:
    vault, worker = greeted()
    for group, rows, micros in exchanges:
        m, n = SHAPES[group]
        x, y = bytes([1]) * (4 * rows * n), bytes([2]) * (4 * rows * m)
        assert give(worker, vault.multiply(group, rows) + x) == Multiply(group, rows, x)
        answer = give(vault, worker.product(micros) + y)
        assert answer == Product(group, rows, min(micros, 2**32 - 1), y)
        assert vault.state is worker.state is State.READY


def test_dealing() -> None:
    vault, worker = greeted()
    assert give(worker, vault.deal(1, 2, KEY, 5)) == Deal(1, 2, KEY, 5)
    assert give(vault, worker.product(3) + bytes(24)) == Product(1, 2, 3, bytes(24))
    assert repr(Deal(1, 2, KEY, 5)) == "Deal(group=1, rows=2, key hidden)"
    with pytest.raises(InputError, match="32 bytes"):
        vault.deal(1, 2, KEY[1:], 0)
    with pytest.raises(WireError, match="has not 31 bytes"):
        worker.header(wire.pack_header(Header(Kind.DEAL, 2, 1, 2, 0, 31)))


def lending(size: int = 48) -> tuple[VaultSide, WorkerSide]:
    vault, worker = greeted()
    assert give(worker, vault.lend(size)) == Lend(size)
    assert give(vault, worker.lend(borrowed=True)) == Borrowed(True)
    assert vault.state is worker.state is State.READY
    return vault, worker


def test_what_lies_in_lent_memory_does_not_follow() -> None:
    vault, worker = lending()
    assert (vault.max_lent(0), vault.max_lent(1), vault.max_lent(2), vault.max_lent(3)) == (2, 2, 0, 0)
    for _ in range(2):
        header = vault.multiply(1, 2, lent=True)
        assert worker.header(header) == 0
        assert worker.payload(b"") == Multiply(1, 2, b"", lent=True)
        assert give(vault, worker.product(7)) == Product(1, 2, 7, b"")
    assert give(worker, vault.multiply(1, 1) + bytes(20)) == Multiply(1, 1, bytes(20))
    assert give(vault, worker.product(7) + bytes(12)) == Product(1, 1, 7, bytes(12))


def test_lent_memory_that_cannot_be_used() -> None:
    vault, worker = greeted()
    give(worker, vault.lend(64))
    assert give(vault, worker.lend(borrowed=False)) == Borrowed(False)
    with pytest.raises(InputError, match="1 to 0 rows"):
        vault.multiply(1, 1, lent=True)
    assert give(worker, vault.lend(64)) == Lend(64)  # another try


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Header(Kind.MULTIPLY, 1, 1, 3, 0, 60, True), "1 to 2 rows"),
        (Header(Kind.MULTIPLY, 1, 1, 2, 0, 44, True), "has not 44 bytes"),
        (Header(Kind.MULTIPLY, 1, 2, 1, 0, 8, True), "1 to 0 rows"),
        (Header(Kind.LEND, 0, 0, 0, 0, 8), "twice"),
    ],
)
def test_what_a_worker_refuses_of_lent_memory(frame: Header, words: str) -> None:
    _, worker = lending()
    with pytest.raises(WireError, match=words):
        worker.header(wire.pack_header(frame))


def test_what_a_vault_refuses_of_lent_memory() -> None:
    for lent in (True, False):  # an answer that lies elsewhere than its question
        vault, _ = lending()
        vault.multiply(1, 2, lent=lent)
        with pytest.raises(WireError, match="does not answer"):
            vault.header(wire.pack_header(Header(Kind.PRODUCT, 1, 1, 2, 0, 24, not lent)))
    with pytest.raises(WireError, match="LEND is malformed"):
        vault_in(State.LENDING).header(wire.pack_header(Header(Kind.LEND, 0, 0, 2, 0, 0)))
    for size in (0, wire.MAX_LENT + 1):
        with pytest.raises(InputError, match="each way"):
            vault_in(State.READY).lend(size)
        with pytest.raises(WireError, match="each way"):
            wire.parse_lend(struct.pack("<Q", size))


def test_lent_memory_before_any_was_lent() -> None:
    _, worker = greeted()
    with pytest.raises(WireError, match="1 to 0 rows"):
        worker.header(wire.pack_header(Header(Kind.MULTIPLY, 1, 1, 2, 0, 40, True)))


def test_evidence_both_ways() -> None:
    vault, worker = greeted(wants=True)
    assert vault.state is worker.state is State.PROVING
    assert give(worker, vault.evidence(b"snp")) == Evidence(b"snp")
    assert vault.state is worker.state is State.PROVED
    assert give(vault, worker.accept()) == Accept()
    assert vault.state is worker.state is State.READY
    with pytest.raises(AttestationError, match="not what I trust"):
        give(vault_in(State.PROVED), worker.fault(FaultCode.EVIDENCE, "not what I trust"))
    with pytest.raises(WireError, match="ACCEPT is malformed"):
        vault_in(State.PROVED).header(wire.pack_header(Header(Kind.ACCEPT, 0, 0, 0, 0, 1)))
    with pytest.raises(InputError, match="at most 65536"):
        vault_in(State.PROVING).evidence(bytes(65537))
    with pytest.raises(WireError, match="malformed"):
        worker_in(State.PROVING).header(wire.pack_header(Header(Kind.EVIDENCE, 0, 0, 0, 0, 65537)))
    with pytest.raises(WireError, match="malformed"):
        vault_in(State.GREETED).header(
            wire.pack_header(Header(Kind.WELCOME, 0, 0, 0, 0, wire.WELCOME_BYTES + 65537))
        )


def test_several_groups_in_one_frame() -> None:
    vault, worker = greeted()
    x, y = bytes([1]) * 4 * (2 * 4 + 1 * 5), bytes([2]) * 4 * (2 * 6 + 1 * 3)
    assert give(worker, vault.several([(0, 2), (1, 1)]) + x) == Several([(0, 2), (1, 1)], x)
    assert give(vault, worker.product(9) + y) == Product(2, 3, 9, y)
    give(worker, vault.multiply(0, 1) + bytes(16))
    assert give(vault, worker.product(0) + bytes(24)) == Product(0, 1, 0, bytes(24))


@pytest.mark.parametrize(
    "parts",
    [[(0, 1)], [(1, 1), (0, 1)], [(0, 1), (0, 1)], [(0, 1), (3, 1)], [(0, 0), (1, 1)], [(0, 1), (2, 99)]],
)
def test_groups_that_no_frame_carries_together(parts: list[tuple[int, int]]) -> None:
    """One, not ascending, twice, unknown, without rows, with an answer above the limit: nothing is sent, and
    a worker that is sent it refuses before it computes or takes memory for the answer.
    """
    vault, worker = greeted()
    with pytest.raises(InputError, match="together"):
        vault.several(parts)
    assert vault.state is State.READY
    rows = sum(rows for _, rows in parts)
    payload = wire.pack_parts(parts) + bytes(
        4 * sum(r * dict(enumerate(SHAPES)).get(g, (1, 1))[1] for g, r in parts)
    )
    frame = wire.pack_header(Header(Kind.SEVERAL, 1, len(parts), rows, 0, len(payload))) + payload
    with pytest.raises(WireError):
        give(worker, frame)
    assert worker.state is State.CLOSED


@pytest.mark.parametrize(
    ("rows", "length"), [(3, 16 + 4 * 13 + 4), (4, 16 + 4 * 13), (3, FRAME_BYTES + 4), (3, 12)]
)
def test_a_frame_of_several_must_fit_what_it_says(rows: int, length: int) -> None:
    _, worker = greeted()
    payload = (wire.pack_parts([(0, 2), (1, 1)]) + bytes(length))[:length]
    with pytest.raises(WireError):
        give(worker, wire.pack_header(Header(Kind.SEVERAL, 1, 2, rows, 0, length)) + payload)
    assert worker.state is State.CLOSED


def test_sequence_numbers_wrap() -> None:
    vault, worker = greeted()
    vault._sequence = worker._sequence = 2**32 - 1
    give(worker, vault.multiply(0, 1) + bytes(16))
    assert isinstance(give(vault, worker.product(0) + bytes(24)), Product)
    assert vault._sequence == 0


def test_tables_mirror_each_other() -> None:
    other = {Way.SEND: Way.RECEIVE, Way.RECEIVE: Way.SEND}
    mirrored = {(state, other[way], kind): after for (state, way, kind), after in WORKER_TABLE.items()}
    assert mirrored == {key: after for key, after in VAULT_TABLE.items() if key[2] is not Kind.FAULT}


VAULT_SENDS: dict[Kind, Callable[[VaultSide], object]] = {
    Kind.HELLO: lambda side: side.hello(NONCE),
    Kind.MULTIPLY: lambda side: side.multiply(0, 1),
    Kind.SEVERAL: lambda side: side.several([(0, 1), (1, 2)]),
    Kind.DEAL: lambda side: side.deal(0, 1, KEY, 0),
    Kind.EVIDENCE: lambda side: side.evidence(b"tdx"),
    Kind.LEND: lambda side: side.lend(64),
}
WORKER_SENDS: dict[Kind, Callable[[WorkerSide], object]] = {
    Kind.WELCOME: lambda side: side.welcome(NONCE),
    Kind.PRODUCT: lambda side: side.product(0),
    Kind.ACCEPT: lambda side: side.accept(),
    Kind.LEND: lambda side: side.lend(borrowed=True),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", VAULT_SENDS)
def test_vault_sends_in_order_only(state: State, kind: Kind) -> None:
    side = vault_in(state)
    after = VAULT_TABLE.get((state, Way.SEND, kind))
    if after is None:
        with pytest.raises(WireError, match="not allowed"):
            VAULT_SENDS[kind](side)
    else:
        VAULT_SENDS[kind](side)
    assert side.state is (after or State.CLOSED)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", WORKER_SENDS)
def test_worker_sends_in_order_only(state: State, kind: Kind) -> None:
    side = worker_in(state)
    after = WORKER_TABLE.get((state, Way.SEND, kind))
    if after is None:
        with pytest.raises(WireError, match="not allowed"):
            WORKER_SENDS[kind](side)
    else:
        WORKER_SENDS[kind](side)
    assert side.state is (after or State.CLOSED)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("make", [vault_in, worker_in])
def test_frames_come_in_order_only(make: Callable[[State], Side], state: State, kind: Kind) -> None:
    side = make(state)
    table = VAULT_TABLE if isinstance(side, VaultSide) else WORKER_TABLE
    if (state, Way.RECEIVE, kind) in table:
        return
    with pytest.raises(WireError, match="not allowed"):
        side.header(wire.pack_header(Header(kind, 0, 0, 0, 0, 0)))
    assert side.state is State.CLOSED


@pytest.mark.parametrize("state", State)
def test_header_and_payload_alternate(state: State) -> None:
    side = vault_in(state)
    with pytest.raises(WireError, match="without a header"):
        side.payload(b"")
    assert side.state is State.CLOSED

    worker = WorkerSide(SPLIT_ID, SHAPES)
    frame = VaultSide(SPLIT_ID, SHAPES).hello(NONCE)
    worker.header(frame[:HEADER_BYTES])
    with pytest.raises(WireError, match="before the payload"):
        worker.header(frame[:HEADER_BYTES])


def test_payload_of_another_length() -> None:
    worker = WorkerSide(SPLIT_ID, SHAPES)
    worker.header(VaultSide(SPLIT_ID, SHAPES).hello(NONCE)[:HEADER_BYTES])
    with pytest.raises(WireError, match="15 bytes where 52"):
        worker.payload(bytes(15))


def test_vault_of_another_split() -> None:
    worker = WorkerSide(SPLIT_ID, SHAPES)
    vault = VaultSide(OTHER_ID, SHAPES)
    with pytest.raises(MismatchError, match="share made together"):
        give(worker, vault.hello(NONCE))
    with pytest.raises(MismatchError, match="other"):
        give(vault, worker.fault(FaultCode.MISMATCH, "other split"))
    assert vault.state is worker.state is State.CLOSED


def welcome_of(split_id: str, groups: int, longest: int) -> bytes:
    return wire.pack_welcome(wire.WelcomeFields(split_id, groups, longest, False, NONCE, b""))


@pytest.mark.parametrize("welcome", [(OTHER_ID, 3, FRAME_BYTES), (SPLIT_ID, 4, FRAME_BYTES)])
def test_worker_of_another_split(welcome: tuple[str, int, int]) -> None:
    vault = vault_in(State.GREETED)
    payload = welcome_of(*welcome)
    with pytest.raises(MismatchError, match="share made together"):
        give(vault, wire.pack_header(Header(Kind.WELCOME, 0, 0, 0, 0, len(payload))) + payload)
    assert vault.state is State.CLOSED


def test_worker_that_takes_short_frames() -> None:
    longest = 4 * 70000
    vault = vault_in(State.GREETED)
    payload = welcome_of(SPLIT_ID, 3, longest)
    give(vault, wire.pack_header(Header(Kind.WELCOME, 0, 0, 0, 0, len(payload))) + payload)
    assert [vault.max_rows(group) for group in range(3)] == [longest // 24, longest // 20, 1]

    vault = vault_in(State.GREETED)
    payload = welcome_of(SPLIT_ID, 3, longest - 1)
    with pytest.raises(WireError, match="one row needs"):
        give(vault, wire.pack_header(Header(Kind.WELCOME, 0, 0, 0, 0, len(payload))) + payload)


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 2},
        {"group": 0},
        {"rows": 1},
        {"rows": 3},
        {"length": 0},
        {"length": 28},
        {"length": 2**26},
    ],
)
def test_product_must_answer_the_question(change: dict[str, Any]) -> None:
    vault = vault_in(State.ASKED)  # group 1, two rows
    header = Header(Kind.PRODUCT, 1, 1, 2, 0, 4 * 2 * 3)
    with pytest.raises(WireError, match="does not answer"):
        vault.header(wire.pack_header(header._replace(**change)))
    assert vault.state is State.CLOSED
    assert vault_in(State.ASKED).header(wire.pack_header(header)) == 24


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 0}, {"sequence": 2}, {"group": 3}, {"group": 2**32 - 1}, {"rows": 0}, {"rows": 2**31},
        {"micros": 1}, {"length": 0}, {"length": 44}, {"length": 2**26},
    ],
)  # fmt: skip
def test_multiply_must_fit_the_share(change: dict[str, Any]) -> None:
    worker = worker_in(State.READY)
    header = Header(Kind.MULTIPLY, 1, 1, 2, 0, 4 * 2 * 5)
    with pytest.raises(WireError):
        worker.header(wire.pack_header(header._replace(**change)))
    assert worker.state is State.CLOSED
    assert worker_in(State.READY).header(wire.pack_header(header)) == 40


@pytest.mark.parametrize("field", ["sequence", "group", "rows", "micros", "length"])
@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.WELCOME])
def test_greetings_carry_nothing_else(kind: Kind, field: str) -> None:
    side: Side = worker_in(State.NEW) if kind is Kind.HELLO else vault_in(State.GREETED)
    header = Header(kind, 0, 0, 0, 0, wire.HELLO_BYTES if kind is Kind.HELLO else wire.WELCOME_BYTES)
    with pytest.raises(WireError, match="malformed"):
        side.header(wire.pack_header(header._replace(**dict[str, Any]({field: 1}))))


@pytest.mark.parametrize("state", [State.GREETED, State.ASKED])
def test_fault(state: State) -> None:
    vault = vault_in(state)
    with pytest.raises(WorkerFault, match=r"refuses \(internal\): out of memory"):
        give(vault, worker_in(State.READY).fault(FaultCode.INTERNAL, "out of memory"))
    assert vault.state is State.CLOSED
    vault = vault_in(state)
    with pytest.raises(WireError, match="at most 1024"):
        vault.header(wire.pack_header(Header(Kind.FAULT, 0, 2, 0, 0, 1025)))
    vault = vault_in(state)
    with pytest.raises(WireError, match="unknown code"):
        give(vault, wire.pack_header(Header(Kind.FAULT, 0, 9, 0, 0, 0)))


def test_rows_of_the_caller() -> None:
    vault, _ = greeted()
    assert vault.max_rows(0) == FRAME_BYTES // 24
    assert vault.max_rows(2) == FRAME_BYTES // 280000
    for group, rows in ((0, 0), (0, vault.max_rows(0) + 1), (3, 1), (-1, 1)):
        with pytest.raises(InputError):
            vault.multiply(group, rows)
    assert vault.state is State.READY  # the caller's mistake costs no connection
    vault.multiply(0, vault.max_rows(0))


def test_row_longer_than_a_frame() -> None:
    wide = [(FRAME_BYTES // 2, 3)]
    assert VaultSide(SPLIT_ID, wide).max_rows(0) == WorkerSide(SPLIT_ID, wide).max_rows(0) == 1


@pytest.mark.parametrize("shapes", [[], [(0, 1)], [(1, -1)], [(2**25, 1)], [(1, 1)] * (MAX_GROUPS + 1)])
def test_shapes_that_cannot_be(shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(InputError):
        VaultSide(SPLIT_ID, shapes)


def test_repr_shows_no_split() -> None:
    assert repr(greeted()[0]) == "VaultSide(ready, 3 groups)"


ANY_HEADER = st.builds(
    lambda kind, *numbers: struct.pack("<4sBBHIIIII", b"SLIP", wire.VERSION, kind, 0, *numbers),
    st.integers(0, 10),
    *[st.integers(0, 4) | st.integers(0, 2**32 - 1)] * 4,
    st.sampled_from([0, 48, 62, 24, 20, 40, 36, 2**24, 2**26, 2**26 + 1]) | st.integers(0, 2**32 - 1),
)


@settings(max_examples=400)
@given(
    st.sampled_from([vault_in, worker_in]),
    st.sampled_from(State),
    st.lists(ANY_HEADER | st.binary(max_size=40), max_size=3),
    st.data(),
)
def test_any_bytes(
    make: Callable[[State], Side], state: State, headers: list[bytes], data: st.DataObject
) -> None:
    """Whatever comes: an event, or an error of ours and a closed side; never a length above the limit."""
    side = make(state)
    try:
        for header in headers:
            length = side.header(header)
            assert length <= FRAME_BYTES
            if length > 4096:
                return
            size = data.draw(st.just(length) | st.integers(0, 64))
            payload = data.draw(st.binary(min_size=size, max_size=size))
            assert isinstance(
                side.payload(payload),
                Hello | Welcome | Accept | Evidence | Lend | Borrowed | Multiply | Several | Deal | Product,
            )
    except SlipError:
        assert side.state is State.CLOSED
        with pytest.raises(WireError):
            side.header(headers[0])
