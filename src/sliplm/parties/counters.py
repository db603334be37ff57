"""What a vault counts: rows, bytes, and where the seconds went."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """What a vault has done: counts, bytes, and seconds by where they went.  Any thread may count."""

    exchanges: int = 0
    rows: int = 0
    rows_here: int = 0  # computed by the vault for want of a worker
    rows_lossy: int = 0  # of which rounding the input has cost more than 1/32
    retries: int = 0  # exchanges that another worker had to answer
    bytes_sent: int = 0
    bytes_received: int = 0
    rows_dealt: int = 0
    rows_dealt_late: int = 0  # dealt while a request waited
    renewals: int = 0  # times that all masks were thrown away
    seconds_vault: float = 0.0  # steps 1, 2 and 5, but for what is done during the wait
    seconds_burn: float = 0.0  # taking masks, dealing late apart
    seconds_check: float = 0.0  # step 4
    seconds_worker: float = 0.0  # step 3, as the worker says
    seconds_link: float = 0.0  # the rest of the wait, that for workers who failed included
    seconds_dealing: float = 0.0  # O1 to O3, in the background or while a request waited
    seconds_dealing_late: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def as_dict(self) -> dict[str, float]:
        """All counters by name."""
        return asdict(self)

    def exchanged(
        self,
        rows: int,
        sent: int,
        received: int,
        tries: int,
        micros: int,
        *,
        burn: float,
        vault: float,
        wait: float,
        check: float,
    ) -> None:
        """Count an exchange that a worker served.

        Args:
            sent, received: bytes.
            tries: how many workers were asked.
            micros: what the one who served says that it took.
            burn, vault, wait, check: seconds of taking masks, of our own steps 1, 2 and 5, of the wait for
                workers, of step 4.
        """
        worker = min(micros * 1e-6, wait)  # its word is never more than the wait
        with self._lock:
            self.exchanges += 1
            self.rows += rows
            self.retries += tries - 1
            self.bytes_sent += sent
            self.bytes_received += received
            self.seconds_burn += burn
            self.seconds_vault += vault
            self.seconds_check += check
            self.seconds_worker += worker
            self.seconds_link += wait - worker

    def computed_here(self, rows: int) -> bool:
        """Count rows that no worker served; whether they are the first."""
        with self._lock:
            first = self.rows_here == 0
            self.rows_here += rows
        return first

    def lossy(self, rows: int) -> None:
        """Count rows whose input lost precision."""
        with self._lock:
            self.rows_lossy += rows

    def dealt(self, rows: int, seconds: float, *, late: bool) -> None:
        """Count a batch of masks.  late: a request waited for it."""
        with self._lock:
            self.rows_dealt += rows
            self.seconds_dealing += seconds
            if late:
                self.rows_dealt_late += rows
                self.seconds_dealing_late += seconds
