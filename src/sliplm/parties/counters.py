"""What a vault counts: rows, bytes, and where the seconds went."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """What a vault has done: counts, bytes, and seconds by where they went."""

    exchanges: int = 0
    rows: int = 0
    rows_here: int = 0  # computed by the vault for want of a worker
    retries: int = 0  # exchanges that another worker had to answer
    bytes_sent: int = 0
    bytes_received: int = 0
    rows_dealt: int = 0
    rows_dealt_late: int = 0  # dealt while a request waited
    renewals: int = 0  # times that all masks were thrown away
    seconds_vault: float = 0.0  # steps 1, 2 and 5
    seconds_burn: float = 0.0  # taking masks, dealing late apart
    seconds_check: float = 0.0  # step 4
    seconds_worker: float = 0.0  # step 3, as the worker says
    seconds_link: float = 0.0  # the rest of the wait
    seconds_dealing: float = 0.0  # O1 to O3, in the background or while a request waited
    seconds_dealing_late: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """All counters by name."""
        return asdict(self)
