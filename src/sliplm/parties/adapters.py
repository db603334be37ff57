"""Which adapter a product takes: chosen per context, so per thread, task or request.

    with model.slip.adapter("fr"):
        model.generate(...)

A new thread begins with the vault's default, whatever is chosen where it was started: name the adapter in
the call (`generate(..., adapter="fr")`), or enter the context inside the thread.  A product that is asked
for in a thread without a choice, while another thread's is in force, warns.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from sliplm.errors import InputError, SlipWarning

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
        self._lock = threading.Lock()
        self._blocks: dict[object, tuple[int, str | None]] = {}  # blocks in force: thread, choice

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
        made = _CHOSEN.get()
        if self in made:
            return made[self]
        if self._blocks:
            self._warn_of_a_thread_without_choice()
        return self._default

    @contextmanager
    def _chosen(self, name: str | None) -> Iterator[None]:
        token, block = _CHOSEN.set(MappingProxyType({**_CHOSEN.get(), self: name})), object()
        with self._lock:
            self._blocks[block] = threading.get_ident(), name
        try:
            yield
        finally:
            with self._lock:
                self._blocks.pop(block, None)
            _CHOSEN.reset(token)

    def _warn_of_a_thread_without_choice(self) -> None:
        """Warn where a choice of another thread may be meant for this one too, once for each choice."""
        here = threading.get_ident()
        with self._lock:
            found = {block: name for block, (thread, name) in self._blocks.items() if thread != here}
            for block in found:
                del self._blocks[block]
        for name in found.values():
            if name != self._default:
                warnings.warn(
                    f"this thread answers with {self._default or BASE}, while another thread has chosen "
                    f"{name or BASE}: a choice does not pass to another thread. Name it in the call, "
                    f"generate(..., adapter={name or BASE!r}), or enter the `with` block inside the thread",
                    SlipWarning,
                    stacklevel=3,
                )

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
