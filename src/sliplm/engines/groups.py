"""Linear layers that read one input, and so share one exchange: what every engine finds in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear layer: `weight` names the model's parameter.

    The parameter is [rows, columns], or [columns, rows] if transposed; a convolution's [rows, channels,
    height, width] is read as [rows, columns].
    """

    module: str
    rows: int
    columns: int
    weight: str
    transposed: bool


@dataclass(frozen=True)
class Group:
    """Linear layers that read one input, in the order of their calls.

    `positions`: how many rows it multiplies per input: 1 for each token of a language model, one for each
    place of a convolution.
    """

    name: str
    members: tuple[Linear, ...]
    positions: int = 1

    @property
    def rows(self) -> int:
        return sum(member.rows for member in self.members)

    @property
    def columns(self) -> int:
        return self.members[0].columns

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(member.module for member in self.members)


def group_name(modules: Sequence[str]) -> str:
    """`a.b.c` and `a.b.d` become `a.b.c+d`."""
    parts = [module.split(".") for module in modules]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join([*parts[0][:shared], "+".join(".".join(p[shared:]) for p in parts)])
