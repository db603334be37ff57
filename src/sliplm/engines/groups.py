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
class Expert:
    """Which expert's weight a group is.

    Attributes:
        module: the fused experts' module.  weight: its parameter.  number: the expert.
        use: what part of the rows it is expected to see.
    """

    module: str
    weight: str
    number: int
    use: float


@dataclass(frozen=True)
class Group:
    """Linear layers that read one input, in the order of their calls.

    `positions`: how many rows it multiplies per input: 1 for each token of a language model, one for each
    place of a convolution.  `expert`: of which expert it is, if of one; it sees some of these rows only.
    """

    name: str
    members: tuple[Linear, ...]
    positions: int = 1
    expert: Expert | None = None

    @property
    def rows(self) -> int:
        return sum(member.rows for member in self.members)

    @property
    def columns(self) -> int:
        return self.members[0].columns

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(member.module for member in self.members)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names beside its own that a recipe's patterns are matched on."""
        return self.modules if self.expert is None else (*self.modules, self.expert.module)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The model's parameters that its weight is read from."""
        if self.expert is not None:
            return (f"{self.expert.module}.{self.expert.weight}",)
        return tuple(member.weight for member in self.members)


def group_name(modules: Sequence[str]) -> str:
    """`a.b.c` and `a.b.d` become `a.b.c+d`."""
    parts = [module.split(".") for module in modules]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join([*parts[0][:shared], "+".join(".".join(p[shared:]) for p in parts)])
