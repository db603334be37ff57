"""Where a vault's masks come from: the pool on disk while it has some, else dealt, ahead or on demand."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from time import perf_counter

from sliplm.errors import MaskError, PoolError, SlipError
from sliplm.masks.expected import planned, rows_for
from sliplm.masks.maskpool import MaskPool
from sliplm.masks.masks import Batch, Masks
from sliplm.masks.pool import DiskPool
from sliplm.parties.counters import Counters
from sliplm.parties.dealer import Dealing
from sliplm.secrecy import Secret

logger = logging.getLogger(__name__)


class Supply(Secret):
    """The masks of one vault.

    Args:
        uses: of each group, what part of the rows it is expected to see: 1 but for experts.
        dealing: who deals.
        disk: masks dealt ahead on disk, or None.
        ahead: rows kept ready in memory for each group; none where there is a pool on disk.
        counters: where dealing is counted.

    Attributes:
        memory: the masks dealt by this vault, which no disk ever sees.
        freshness: the nonce that a peer sent last; it goes into the keys of batches, see `masks.fresh_key`.
    """

    def __init__(
        self, uses: Sequence[float], dealing: Dealing, disk: DiskPool | None, ahead: int, counters: Counters
    ) -> None:
        self._dealing, self._disk, self._counters, self._uses = dealing, disk, counters, uses
        self.freshness = b""
        self.memory = MaskPool(len(uses), self._deal, ahead if dealing.possible and disk is None else 0, uses)

    def __repr__(self) -> str:
        return f"Supply({self._disk or self.memory!r})"

    def start(self) -> None:
        """Begin to deal ahead: a dealer's greeting comes back to the vault, which must be whole by then."""
        self.memory.start()

    def take(self, group: int, rows: int, *, made: bool = True) -> Masks:
        """Masks for one message of so many rows, burnt: nobody is handed them again (M7).

        Args:
            made: with their r, see `MaskPool.take`.

        Raises: MaskError when the vault is closed, or there are no masks and nobody deals.
        """
        disk = self._disk
        if disk is not None and (not self._dealing.possible or disk.available(group) >= rows):
            return disk.take(group, rows)
        return self.memory.take(group, rows, made=made)

    def prepare(self, group: int, rows: int) -> None:
        """Make the next `take` of so many rows quick, if that is possible without dealing."""
        if self._disk is None:
            self.memory.prepare(group, rows)
            return
        try:
            self._disk.prepare(group, rows)
        except PoolError as error:  # those rows are skipped: the request that runs does not need them
            logger.warning("%s", error)

    def add(self, tokens: int) -> None:
        """Deal, in memory, what so many tokens are expected to take of each group.  Raises: MaskError."""
        uses = planned(self._uses, [0] * len(self._uses))
        for group, use in enumerate(uses):
            self.memory.add([group], rows_for(tokens, use))

    def ready(self) -> list[int]:
        """Rows that are ready for each group, in memory and on disk; what cannot be read now is none."""
        found = [self.memory.available(group) for group in range(len(self._uses))]
        if self._disk is not None:
            with contextlib.suppress(SlipError):
                found = [rows + self._disk.available(group) for group, rows in enumerate(found)]
        return found

    def renew(self) -> None:
        """Throw away all masks that are ready: this machine may have been set back to an earlier state."""
        self._counters.renewals += 1
        self.memory.renew()
        if self._disk is not None:
            self._disk.renew()

    def dealers(self) -> frozenset[bytes]:
        """The marks of those who dealt what lies on disk."""
        return frozenset() if self._disk is None else self._disk.dealers()

    def shun(self, marks: Collection[bytes]) -> None:
        """Use nothing on disk that these have dealt: they are asked online."""
        if self._disk is not None:
            self._disk.shun(marks)

    def drop(self, marks: Collection[bytes]) -> int:
        """Throw away what these have dealt, in memory and on disk; how many rows that were."""
        return self.memory.drop(marks) + (0 if self._disk is None else self._disk.drop(marks))

    def close(self) -> None:
        """Stop dealing and forget all masks."""
        self.memory.close()
        if self._disk is not None:
            self._disk.close()

    def _deal(self, group: int, rows: int, background: bool, late: bool) -> Batch:
        """Steps O1 to O3.  late: a request waits for it."""
        start = perf_counter()
        if not self._dealing.possible:
            raise MaskError("the pool on disk is used up: run `slip deal` again, or name a dealer")
        batch = self._dealing.batch(group, rows, background=background, freshness=self.freshness)
        self._counters.dealt(rows, perf_counter() - start, late=late)
        return batch
