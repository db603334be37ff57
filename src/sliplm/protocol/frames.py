"""Frames as bytes: one 28-byte little-endian header, then the payload.

    offset  bytes  field
         0      4  magic      b"SLIP"
         4      1  version    3
         5      1  kind       HELLO, WELCOME, MULTIPLY, SEVERAL, PRODUCT, FAULT, EVIDENCE, DEAL,
                            ACCEPT or LEND
         6      2  place      0: the payload follows; 1: it lies in the lent memory (MULTIPLY, PRODUCT)
         8      4  sequence   number of the exchange; the answer repeats it
        12      4  group      index of the group in the manifest; how many of SEVERAL; the code of a FAULT
        16      4  rows       rows of the payload
        20      4  micros     the worker's own compute time in microseconds: statistics, never trusted
        24      4  length     payload bytes, at most MAX_PAYLOAD, or MAX_LENT where they do not follow

    HELLO     vault -> worker   split id (16 bytes), nonce (32 bytes), whom the vault means to speak to
                                (u32): 1 a worker, 2 a dealer
    WELCOME   worker -> vault   split id (16 bytes), groups (u32), the longest payload it takes (u32),
                                1 if the vault must show evidence, else 0 (u32), nonce (32 bytes),
                                then the worker's evidence, at most MAX_EVIDENCE bytes
    EVIDENCE  vault -> worker   the vault's evidence, at most MAX_EVIDENCE bytes
    ACCEPT    worker -> vault   nothing: the evidence is good
    MULTIPLY  vault -> worker   rows * n field elements (u32)
    SEVERAL   vault -> worker   for each of `group` groups, by ascending index, its index and its rows (u32
                                each); then rows * n field elements of each; `rows` are of all of them
    DEAL      vault -> dealer   the key of a batch (32 bytes) and its first row (u32): rows * n elements are
                                made of them by the dealer
    PRODUCT   worker -> vault   rows * m field elements (u32), group after group as they were asked
    LEND      vault -> worker   the bytes that lent memory has for each way (u64), see SPEC
    LEND      worker -> vault   nothing; rows: 1 if it can use the memory, 0 if it cannot
    FAULT     worker -> vault   UTF-8 text, at most MAX_FAULT bytes

Everything here is pure: which frame may come when is decided in `protocol`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from sliplm.arithmetic.field import KEY_BYTES
from sliplm.errors import InputError, WireError

VERSION = 3
MAX_PAYLOAD = 64 * 2**20
MAX_LENT = 2**30
MAX_FAULT = 1024
MAX_EVIDENCE = 64 * 2**10
ELEMENT = 4  # bytes of a field element

_MAGIC = b"SLIP"
_HEADER = struct.Struct("<4sBBHIIIII")
_HELLO = struct.Struct("<16s32sI")
_DEAL = struct.Struct("<32sI")
_LEND = struct.Struct("<Q")
_WELCOME = struct.Struct("<16sIII32s")

HEADER_BYTES = _HEADER.size
SPLIT_ID_BYTES = 16
NONCE_BYTES = 32
DEAL_BYTES = _DEAL.size
LEND_BYTES = _LEND.size
PART_BYTES = 8  # a group of SEVERAL, before its elements
HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size  # before the evidence


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    MULTIPLY = 3
    PRODUCT = 4
    FAULT = 5
    EVIDENCE = 6
    DEAL = 7
    ACCEPT = 8
    SEVERAL = 9
    LEND = 10


class Party(IntEnum):
    """Whom a vault means to speak to."""

    WORKER = 1
    DEALER = 2


class FaultCode(IntEnum):
    """Why a worker refuses."""

    MISMATCH = 1  # the vault belongs to another split, or means to speak to another party
    PROTOCOL = 2  # the vault's frame breaks the protocol
    INTERNAL = 3  # the worker failed
    EVIDENCE = 4  # the vault's evidence is refused


_KINDS = {int(kind): kind for kind in Kind}
_LENT = frozenset((Kind.MULTIPLY, Kind.PRODUCT))  # whose payload may lie in lent memory


class Header(NamedTuple):
    """The fields of a frame's header that carry information."""

    kind: Kind
    sequence: int
    group: int
    rows: int
    micros: int
    length: int
    lent: bool = False


def pack_header(header: Header) -> bytes:
    """The 28 bytes of a header.  Raises InputError if a field does not fit."""
    kind, sequence, group, rows, micros, length, lent = header
    if length > (most := MAX_LENT if lent else MAX_PAYLOAD):
        raise InputError(f"a frame carries at most {most} bytes, not {length}: send fewer rows")
    try:
        return _HEADER.pack(_MAGIC, VERSION, kind, int(lent), sequence, group, rows, micros, length)
    except struct.error as error:
        raise InputError(f"a header's fields are unsigned 32-bit numbers: {error}") from error


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """The header in exactly HEADER_BYTES bytes.  Raises WireError on anything else."""
    try:
        magic, version, kind, place, sequence, group, rows, micros, length = _HEADER.unpack(data)
    except struct.error as error:
        raise WireError(f"a header has {HEADER_BYTES} bytes, not {len(data)}") from error
    if magic != _MAGIC:
        raise WireError("the peer does not speak this protocol: is the address a slip worker's?")
    if version != VERSION:
        raise WireError(
            f"the peer speaks version {version}, this side {VERSION}: install the same release on both"
        )
    if kind not in _KINDS or place > int(kind in _LENT):
        raise WireError(f"a frame of unknown kind {kind} (place {place})")
    if length > (most := MAX_LENT if place else MAX_PAYLOAD):
        raise WireError(f"a frame announces {length} bytes; the limit is {most}")
    return Header(_KINDS[kind], sequence, group, rows, micros, length, place == 1)


def pack_split_id(split_id: str) -> bytes:
    """The 16 bytes of a split id of 32 hexadecimal digits.  Raises InputError."""
    try:
        raw = bytes.fromhex(split_id)
    except ValueError as error:
        raise InputError("a split id is 32 hexadecimal digits") from error
    if len(raw) != SPLIT_ID_BYTES or raw.hex() != split_id:
        raise InputError("a split id is 32 lower-case hexadecimal digits")
    return raw


def pack_hello(split_id: str, nonce: bytes, party: Party = Party.WORKER) -> bytes:
    """The payload of a HELLO.  Raises InputError."""
    return _HELLO.pack(pack_split_id(split_id), _nonce(nonce), party)


def parse_hello(payload: bytes | bytearray | memoryview) -> tuple[str, bytes, Party]:
    """(split id, nonce, whom it is for) of a HELLO.  Raises WireError."""
    try:
        raw, nonce, party = _HELLO.unpack(payload)
    except struct.error as error:
        raise WireError(f"a hello has {HELLO_BYTES} bytes, not {len(payload)}") from error
    if party not in (Party.WORKER, Party.DEALER):
        raise WireError(f"a hello is for a worker or a dealer, not {party}")
    return raw.hex(), nonce, Party(party)


def pack_parts(parts: Sequence[tuple[int, int]]) -> bytes:
    """The (group, rows) of every group of a SEVERAL, which its elements follow.  Raises InputError."""
    try:
        return struct.pack(f"<{2 * len(parts)}I", *itertools.chain.from_iterable(parts))
    except struct.error as error:
        raise InputError(f"groups and rows are unsigned 32-bit numbers: {error}") from error


def parse_parts(payload: bytes | bytearray | memoryview, count: int) -> list[tuple[int, int]]:
    """The (group, rows) of the `count` groups that a SEVERAL begins with.  Raises WireError."""
    try:
        flat = struct.unpack_from(f"<{2 * count}I", payload)
    except struct.error as error:
        raise WireError(f"{len(payload)} bytes do not hold the rows of {count} groups") from error
    return list(zip(flat[::2], flat[1::2], strict=True))


def pack_deal(key: bytes, first_row: int) -> bytes:
    """The payload of a DEAL.  Raises InputError."""
    if len(key) != KEY_BYTES or not 0 <= first_row < 2**32:
        raise InputError(f"a batch has a key of {KEY_BYTES} bytes and rows from 0 below 2^32")
    return _DEAL.pack(key, first_row)


def parse_deal(payload: bytes | bytearray | memoryview) -> tuple[bytes, int]:
    """(key, first row) of a DEAL.  Raises WireError."""
    try:
        key, first_row = _DEAL.unpack(payload)
    except struct.error as error:
        raise WireError(f"a deal has {DEAL_BYTES} bytes, not {len(payload)}") from error
    return key, first_row


def pack_lend(size: int) -> bytes:
    """The payload of a vault's LEND.  Raises InputError."""
    if not 0 < size <= MAX_LENT:
        raise InputError(f"lent memory has 1 to {MAX_LENT} bytes each way, not {size}")
    return _LEND.pack(size)


def parse_lend(payload: bytes | bytearray | memoryview) -> int:
    """Bytes each way of a vault's LEND.  Raises WireError."""
    try:
        (size,) = _LEND.unpack(payload)
    except struct.error as error:
        raise WireError(f"a lend has {LEND_BYTES} bytes, not {len(payload)}") from error
    if not 0 < size <= MAX_LENT:
        raise WireError(f"lent memory has 1 to {MAX_LENT} bytes each way, not {size}")
    return int(size)


class WelcomeFields(NamedTuple):
    """The payload of a WELCOME."""

    split_id: str
    groups: int
    max_payload: int
    wants_evidence: bool
    nonce: bytes
    evidence: bytes


def pack_welcome(fields: WelcomeFields) -> bytes:
    """The payload of a WELCOME.  Raises InputError."""
    split_id, groups, max_payload, wants, nonce, evidence = fields
    if len(evidence) > MAX_EVIDENCE:
        raise InputError(f"evidence has at most {MAX_EVIDENCE} bytes, not {len(evidence)}")
    return _WELCOME.pack(pack_split_id(split_id), groups, max_payload, int(wants), _nonce(nonce)) + evidence


def parse_welcome(payload: bytes | bytearray | memoryview) -> WelcomeFields:
    """The fields of a WELCOME.  Raises WireError."""
    try:
        raw, groups, max_payload, wants, nonce = _WELCOME.unpack_from(payload)
    except struct.error as error:
        raise WireError(f"a welcome has {WELCOME_BYTES} bytes or more, not {len(payload)}") from error
    if wants > 1 or len(payload) > WELCOME_BYTES + MAX_EVIDENCE:
        raise WireError("the worker's welcome is malformed")
    return WelcomeFields(raw.hex(), groups, max_payload, wants == 1, nonce, bytes(payload[WELCOME_BYTES:]))


def _nonce(nonce: bytes) -> bytes:
    if len(nonce) != NONCE_BYTES:
        raise InputError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
    return nonce


def pack_fault(text: str) -> bytes:
    """The payload of a FAULT: the text cut to MAX_FAULT bytes of whole characters."""
    return text.encode("utf-8", "replace")[:MAX_FAULT].decode("utf-8", "ignore").encode()


def parse_fault(code: int, payload: bytes | bytearray | memoryview) -> tuple[FaultCode, str]:
    """(code, text) of a FAULT.  Raises WireError.

    The text is a stranger's and ends up on terminals: control characters become "?".
    """
    if len(payload) > MAX_FAULT:
        raise WireError(f"a fault's text has at most {MAX_FAULT} bytes, not {len(payload)}")
    try:
        known = FaultCode(code)
        text = bytes(payload).decode("utf-8")
    except ValueError as error:
        raise WireError(f"a fault of unknown code {code}, or whose text is not UTF-8") from error
    return known, "".join(letter if letter.isprintable() else "?" for letter in text)
