"""What one frame carries: the rows of a request, cut and packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from sliplm.errors import InputError
from sliplm.network.link import Link
from sliplm.parties.message import Part
from sliplm.protocol.frames import ELEMENT, PART_BYTES
from sliplm.shares.shards import Shard


def by_shard(parts: Sequence[Part], shard_of: Callable[[int], Shard | None]) -> list[Sequence[Part]]:
    """Those together that one worker can be asked together.

    Args:
        shard_of: what holds a group; None where every worker holds all.
    """
    if len(parts) == 1 or shard_of(parts[0].group) is None:
        return [parts]
    return [list(some) for _, some in groupby(sorted(parts, key=_group), lambda part: shard_of(part.group))]


def _group(part: Part) -> int:
    return part.group


def cut(
    parts: Sequence[Part], links: Sequence[Link], inputs: int = 1, *, lent: bool = False
) -> Iterator[list[Part]]:
    """The parts of a request by ascending group, in as few messages as frames and answers allow.

    How they are cut depends on groups and rows alone, never on what the rows hold.

    Args:
        links: who may be asked; the one with the smallest frames decides.
        inputs: rows of the message for each row of a part.
        lent: whether they may go by way of lent memory; only one part then.

    Raises: InputError for a group whose frames are too small for one input.
    """
    if len(parts) == 1:
        group, count = parts[0].group, inputs * len(parts[0].x)
        if count and all(count <= _most(link, group, lent=lent) for link in links):
            yield list(parts)  # on the way of every token of several sequences
            return
    limit = min((link.max_payload for link in links if not lent), default=1 << 62)
    message: list[Part] = []
    asked = answered = 0
    for part in sorted(parts, key=lambda part: part.group):
        rows = min(
            (_most(link, part.group, lent=lent) for link in links), default=inputs * max(1, len(part.x))
        )
        step = rows // inputs
        if not step:
            raise InputError(
                f"an input of {part.x.shape[1]} numbers fits no frame as {inputs} rows; load with inputs=1"
            )
        for first in range(0, len(part.x), step):
            some = slice(first, first + step)
            piece = Part(part.group, part.x[some], part.out[some])
            there = PART_BYTES + ELEMENT * inputs * piece.x.size
            back = ELEMENT * inputs * piece.out.size
            full = asked + there > limit or answered + back > limit
            if message and (full or message[-1].group == part.group):
                yield message
                message, asked, answered = [], 0, 0
            message.append(piece)
            asked, answered = asked + there, answered + back
    if message:
        yield message


def _most(link: Link, group: int, *, lent: bool) -> int:
    """Rows of a group that one message to this worker carries."""
    return max(link.max_rows(group), link.max_lent(group)) if lent else link.max_rows(group)
