"""Which adapter a product takes: chosen per context, so per thread, task or request.

    with model.slip.adapter("fr"):
        model.generate(...)

A new thread begins with the vault's default: enter the context inside the thread that generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from sliplm.errors import InputError

BASE = "base"

Chosen = Mapping["Adapters", str | None]

# replaced whole by every choice: as long as it is the same object, every choice is the same
_CHOSEN: ContextVar[Chosen] = ContextVar("sliplm_adapters", default=MappingProxyType({}))


class Adapters:
    """The adapters of one vault and the choice among them; calling it makes a choice for a `with` block.

    Args:
        names: those that the share holds.
        default: where no choice was made; None or "base" for none of them.

    Raises:
        InputError: the default is not among the names.
    """

    def __init__(self, names: Sequence[str], default: str | None = None) -> None:
        self.names = tuple(names)
        self._default = self._checked(default)

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self.names)})"

    def __call__(self, name: str | None) -> AbstractContextManager[None]:
        """In the block, in this thread or task, products take the adapter `name`; None or "base": none.

        Raises:
            InputError: the share holds no such adapter.
        """
        return self._chosen(self._checked(name))

    @property
    def current(self) -> str | None:
        """The adapter that a product takes here and now; None for none."""
        return _CHOSEN.get().get(self, self._default)

    @contextmanager
    def _chosen(self, name: str | None) -> Iterator[None]:
        token = _CHOSEN.set(MappingProxyType({**_CHOSEN.get(), self: name}))
        try:
            yield
        finally:
            _CHOSEN.reset(token)

    def _checked(self, name: str | None) -> str | None:
        if name is None or name == BASE:
            return None
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise InputError(
                f"this split has no adapter {name!r}: it has {known}, and {BASE!r} for none of them"
            )
        return name


def chosen() -> Chosen:
    """What is chosen in this context: one and the same object until another choice is made or ends."""
    return _CHOSEN.get()
