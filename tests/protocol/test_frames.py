"""Frames as bytes: exact layout, and nothing but WireError on bytes from a stranger."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import InputError, WireError
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import FaultCode, Header, Kind

U32 = st.integers(0, 2**32 - 1)
LENGTHS = st.integers(0, wire.MAX_PAYLOAD)
HEADERS = st.builds(Header, st.sampled_from(Kind), U32, U32, U32, U32, LENGTHS, st.just(False)) | st.builds(
    Header, st.sampled_from([Kind.MULTIPLY, Kind.PRODUCT]), U32, U32, U32, U32, LENGTHS, st.just(True)
)
SPLIT_ID = "0123456789abcdef" * 2


def test_layout() -> None:
    data = wire.pack_header(Header(Kind.MULTIPLY, 1, 2, 3, 4, 5))
    assert data.hex() == "534c4950" + "03" + "03" + "0000" + "01000000020000000300000004000000" + "05000000"
    assert len(data) == wire.HEADER_BYTES == 28


@given(HEADERS)
def test_header_round_trip(header: Header) -> None:
    assert wire.parse_header(wire.pack_header(header)) == header


@given(st.binary(max_size=40) | st.binary(min_size=24, max_size=24).map(lambda tail: b"SLIP" + tail))
def test_any_header_bytes(data: bytes) -> None:
    try:
        header = wire.parse_header(data)
    except WireError:
        return
    assert header.length <= (wire.MAX_LENT if header.lent else wire.MAX_PAYLOAD)
    assert wire.pack_header(header) == data


@given(HEADERS, st.integers(0, 27), st.integers(0, 255))
def test_one_changed_byte(header: Header, place: int, value: int) -> None:
    data = bytearray(wire.pack_header(header))
    data[place] = value
    try:
        found = wire.parse_header(data)
    except WireError:
        return
    assert wire.pack_header(found) == bytes(data)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, b"HTTP", "does not speak"),
        (4, b"\x01", "version 1"),
        (5, b"\x0b", "kind 11"),
        (6, b"\x01", "place 1"),
        (7, b"\x01", "place 256"),
    ],
)
def test_header_refusals(place: int, value: bytes, said: str) -> None:
    data = bytearray(wire.pack_header(Header(Kind.HELLO, 0, 0, 0, 0, 16)))
    data[place : place + len(value)] = value
    with pytest.raises(WireError, match=said):
        wire.parse_header(data)


@pytest.mark.parametrize(("lent", "most"), [(False, wire.MAX_PAYLOAD), (True, wire.MAX_LENT)])
def test_too_long_is_refused_by_both_sides(lent: bool, most: int) -> None:
    header = Header(Kind.PRODUCT, 1, 0, 1, 0, most, lent)
    data = bytearray(wire.pack_header(header))
    struct.pack_into("<I", data, 24, most + 1)
    with pytest.raises(WireError, match="the limit is"):
        wire.parse_header(data)
    with pytest.raises(InputError, match="fewer rows"):
        wire.pack_header(header._replace(length=most + 1))
    with pytest.raises(InputError):
        wire.pack_header(header._replace(rows=2**32))


@given(st.binary(min_size=16, max_size=16), U32, U32)
def test_welcome_round_trip(raw: bytes, groups: int, longest: int) -> None:
    nonce = raw * 2
    assert wire.parse_hello(wire.pack_hello(raw.hex(), nonce)) == (raw.hex(), nonce, wire.Party.WORKER)
    fields = wire.WelcomeFields(raw.hex(), groups, longest, groups % 2 == 0, nonce, raw[: groups % 17])
    assert wire.parse_welcome(wire.pack_welcome(fields)) == fields


@given(st.binary(max_size=80))
def test_any_payload_bytes(data: bytes) -> None:
    if len(data) == wire.HELLO_BYTES:
        wire.parse_hello(data)
    else:
        with pytest.raises(WireError):
            wire.parse_hello(data)
    if len(data) < wire.WELCOME_BYTES or data[24:28] not in (bytes(4), b"\1\0\0\0"):
        with pytest.raises(WireError):
            wire.parse_welcome(data)
    else:
        assert wire.parse_welcome(data).evidence == data[wire.WELCOME_BYTES :]


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="32 bytes"):
        wire.pack_hello("ab" * 16, bytes(31))
    fields = wire.WelcomeFields("ab" * 16, 1, 1, False, bytes(32), bytes(wire.MAX_EVIDENCE + 1))
    with pytest.raises(InputError, match="at most 65536"):
        wire.pack_welcome(fields)
    with pytest.raises(WireError, match="malformed"):
        wire.parse_welcome(bytes(wire.WELCOME_BYTES + wire.MAX_EVIDENCE + 1))


@pytest.mark.parametrize("text", ["", "ab", SPLIT_ID.upper(), SPLIT_ID + "00", "zz" * 16, " " + SPLIT_ID])
def test_split_ids_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        wire.pack_split_id(text)


@given(st.sampled_from(FaultCode), st.text(max_size=3000))
def test_fault_round_trip(code: FaultCode, text: str) -> None:
    payload = wire.pack_fault(text)
    assert len(payload) <= wire.MAX_FAULT
    found, said = wire.parse_fault(code, payload)
    assert found is code
    assert all(letter.isprintable() for letter in said)
    assert len(said) <= len(text)


@given(U32, st.binary(max_size=2000))
def test_any_fault(code: int, payload: bytes) -> None:
    try:
        _, text = wire.parse_fault(code, payload)
    except WireError:
        return
    assert len(payload) <= wire.MAX_FAULT
    assert text.isprintable()


def test_a_fault_cannot_write_on_the_terminal() -> None:
    assert wire.parse_fault(FaultCode.INTERNAL, b"a\x1b[2Jb\nc") == (FaultCode.INTERNAL, "a?[2Jb?c")
