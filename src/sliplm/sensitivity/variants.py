"""Which parts are taken away together, and how much of them: the rows of the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sliplm.errors import InputError
from sliplm.sensitivity.subject import Part, Subject

ALL = "all"
MAX_RANK = 1024

Table = Literal["whole", "kind", "layer", "first", "last"]


@dataclass(frozen=True)
class Variant:
    """One measurement: the model without the top `rank` triplets of some groups.

    Attributes:
        table: "whole" (nothing is taken away), "kind" (one kind of matrix in all layers, or all kinds),
            "layer" (all matrices of one layer), "first" and "last" (of so many layers at either end).
        of: the kind, the layer's number, or how many layers.
    """

    table: Table
    of: str
    rank: int
    groups: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the measurement in a journal."""
        return f"{self.table}|{self.of}|{self.rank}"

    def __str__(self) -> str:
        if self.table == "whole":
            return "nothing taken away"
        what = {"kind": self.of, "layer": f"layer {self.of}"}
        return f"{what.get(self.table, f'{self.table} {self.of} layers')}, k = {self.rank}"


@dataclass(frozen=True)
class Grid:
    """How fine the tables are.

    Attributes:
        ranks: of the table by kind.
        layer_ranks: of the table by layer; the cumulative tables take the middle one.
        steps: points of each cumulative table, at most.
    """

    ranks: tuple[int, ...]
    layer_ranks: tuple[int, ...]
    steps: int

    def __post_init__(self) -> None:
        for ranks in (self.ranks, self.layer_ranks):
            if not ranks or min(ranks) < 1 or max(ranks) > MAX_RANK:
                raise InputError(f"ranks are numbers from 1 to {MAX_RANK}, and not {list(ranks)}")

    @property
    def top(self) -> int:
        """The largest rank."""
        return max(*self.ranks, *self.layer_ranks)

    @property
    def middle(self) -> int:
        """The rank of the cumulative tables."""
        ranks = sorted(self.layer_ranks)
        return ranks[len(ranks) // 2]


FINE = Grid(ranks=(1, 2, 4, 8, 16, 32, 64), layer_ranks=(1, 4, 16, 64), steps=32)
COARSE = Grid(ranks=(1, 4, 16, 64), layer_ranks=(16,), steps=6)


def variants(subject: Subject, grid: Grid) -> tuple[Variant, ...]:
    """Everything to measure, each once, the most telling first."""
    return tuple({v.key: v for v in _all(subject, grid)}.values())


def _all(subject: Subject, grid: Grid) -> Iterator[Variant]:
    parts = subject.parts
    yield Variant("whole", "", 0, ())
    for kind in (ALL, *subject.kinds):
        chosen = names(part for part in parts if kind in (ALL, part.kind))
        for rank in sorted(set(grid.ranks)):
            yield Variant("kind", kind, rank, chosen)
    layers = subject.layers
    for layer in layers:
        chosen = names(part for part in parts if part.layer == layer)
        for rank in sorted(set(grid.layer_ranks)):
            yield Variant("layer", str(layer), rank, chosen)
    for count in steps(len(layers), grid.steps):
        first, last = layers[:count], layers[-count:]
        yield Variant("first", str(count), grid.middle, names(p for p in parts if p.layer in first))
        yield Variant("last", str(count), grid.middle, names(p for p in parts if p.layer in last))


def names(parts: Iterator[Part]) -> tuple[str, ...]:
    """Of groups."""
    return tuple(part.name for part in parts)


def steps(count: int, most: int) -> Sequence[int]:
    """1 to `count`: all if they are at most `most`, else so many in equal ratios, both ends among them."""
    if count <= most:
        return range(1, count + 1)
    return sorted({round(count ** (i / (most - 1))) for i in range(most)})
