"""Lines of JSON of which none can be changed, left out or put in between unnoticed: each carries a hash.

    {...,"hash":"HEX"}

HEX is SHA-256 over the hash before it (64 zeros at first), all bytes since that line, and the line up to
its hash.  So it covers lines without a hash too: those of older versions, and what a crash has left of one.

Whoever can write the file can write another one, hashes and all, or cut off its end: what shows that is a
hash that was noted elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from sliplm.reading import open_regular

FIRST: Final = "0" * 64
LONGEST: Final = 1 << 20  # bytes of a line

_END: Final = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n\Z')

Told = Callable[[Mapping[str, Any]], None]
Running = Any
"""A hash object of hashlib's."""


class Head(NamedTuple):
    """Where a chain ends.

    Attributes:
        hash: of its last line with one.
        at: bytes up to the end of that line.
        lines: with a hash.
        bare: lines without one.
        broken: number of the first line whose hash is wrong, from 1, or None.
    """

    hash: str = FIRST
    at: int = 0
    lines: int = 0
    bare: int = 0
    broken: int | None = None


def sealed(line: Mapping[str, Any], before: Running) -> tuple[bytes, str]:
    """A line as it is written, and its hash.

    Args:
        before: the running hash of what stands before it.
    """
    body = json.dumps(line, separators=(",", ":")).encode()[:-1]
    before.update(body)
    found = before.hexdigest()
    return body + b',"hash":"' + found.encode() + b'"}\n', found


def read_on(file: BinaryIO, head: Head, told: Told = lambda line: None) -> tuple[Head, Running]:
    """The head after what follows in a file, which stands at `head.at`, and the running hash of a next line.

    Args:
        told: each line with a hash, as it is read.

    Raises: OSError.
    """
    between = running(head.hash)
    now, at, number = head, head.at, head.lines + head.bare
    while line := file.readline(LONGEST):
        at += len(line)
        number += line.endswith(b"\n")
        end = _END.search(line)
        if end is None:
            between.update(line)
            now = now._replace(bare=now.bare + line.endswith(b"\n"))
            continue
        between.update(line[: end.start()])
        right = between.hexdigest() == end[1].decode()
        broken = now.broken or (None if right else number)
        now = Head(end[1].decode(), at, now.lines + 1, now.bare, broken)
        between = running(now.hash)
        try:
            told(json.loads(line))
        except ValueError:
            now = now._replace(broken=now.broken or number)
    return now, between


def running(head: str) -> Running:
    """The running hash after a line whose hash this is."""
    return hashlib.sha256(head.encode())


def verify(path: Path, noted: str | None = None) -> tuple[Head, bool]:
    """The head of a file's chain, and whether it holds the line whose hash was noted.

    Raises: OSError.
    """
    seen = noted in (None, FIRST)

    def look(line: Mapping[str, Any]) -> None:
        nonlocal seen
        seen = seen or line.get("hash") == noted

    with open_regular(path) as file:
        head, _ = read_on(file, Head(), look)
    return head, seen
