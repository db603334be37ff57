"""What a console shows of exchanges: a worker's view of a row beside the true one, and a step's stages.

It holds what it shows in memory only, and only while a console is open: an activation is as good as a prompt.
"""

from __future__ import annotations

import base64
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sliplm.arithmetic.field import Elements
from sliplm.engines.transformers.loop import Step
from sliplm.parties.exchange import Timed
from sliplm.serving.lookout import Lookout

OPEN: Final = 3.0
"""Seconds after its last question for which a console counts as open."""

WIDE: Final = 256
"""Numbers of a row that are kept."""

KEPT: Final = 24
"""Rows that are kept."""

SHOWN: Final = 512
"""Exchanges of a step that are shown."""

BINS: Final = 32
_EVERY: Final = 0.05  # seconds between two samples, at least
_COUNTED: Final = 1 << 16  # elements of a message that are counted, at most

Bytes = NDArray[np.uint8]


class Sample(NamedTuple):
    """One row of a group.

    Attributes:
        masked: the highest byte of each element that the worker was sent: uint8 [up to WIDE].
        true: the same row of the layer's input, its largest as 127 and nought as 128, or None.
    """

    number: int
    masked: Bytes
    true: Bytes | None


@dataclass
class _Kept:
    """All that is kept while a console is open."""

    rows: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    group: str | None = None
    step: dict[str, Any] | None = None
    next: float = -math.inf  # time.monotonic() of the next sample

    def cover(self) -> None:
        """Forget the true rows."""
        for row in self.rows:
            if row.true is not None:
                row.true.fill(0)
        self.rows = deque((row._replace(true=None) for row in self.rows), KEPT)


class Samples:
    """The samples of one server, of the group that is asked first once a console is open."""

    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout
        self._lock = threading.Lock()
        self._until = self._bare_until = -math.inf  # time.monotonic()
        self._number = 0
        self._kept = _Kept()

    def __repr__(self) -> str:
        return f"Samples({'open' if self.open else 'closed'})"

    @property
    def open(self) -> bool:
        """Whether anything is kept."""
        return self._until > -math.inf

    def look(self, since: int, *, bare: bool) -> dict[str, Any]:
        """What a console shows now; it counts as open for a while from now on.

        Args:
            since: the number of the last sample that it has.
            bare: whether it may see true activations.
        """
        with self._lock:
            if not self.open:
                self._lookout.add(self)
            self._until = time.monotonic() + OPEN
            if bare:
                self._bare_until = self._until
            return {
                "group": self._kept.group,
                "rows": [
                    {"number": row.number, "masked": _text(row.masked),
                     "true": _text(row.true) if bare and row.true is not None else None}
                    for row in self._kept.rows if row.number > since
                ],
                "counts": self._kept.counts.tolist(),
                "step": self._kept.step,
            }  # fmt: skip

    def rest(self) -> None:
        """To be called several times a second: forget everything once no console is open."""
        now = time.monotonic()
        with self._lock:
            if self._bare_until < now:
                self._kept.cover()
            if self.open and self._until < now:
                self._until = -math.inf
                self._kept = _Kept()
                self._lookout.remove(self)

    def exchanged(self, timed: Timed, x: Any, message: Callable[[], Elements]) -> None:
        """Keep a row now and then.  Of activations on a card only what the worker sees is kept."""
        now, kept = time.monotonic(), self._kept
        if timed.failed is not None or now < kept.next or kept.group not in (None, timed.group):
            return
        sent = message()
        counts = np.bincount(sent[:_COUNTED] >> np.uint32(32 - BINS.bit_length() + 1), minlength=BINS)
        width = min(WIDE, x.shape[1] if isinstance(x, np.ndarray) else WIDE)
        masked = (sent[:width] >> np.uint32(24)).astype(np.uint8)
        true = _scaled(x[0, :width]) if now < self._bare_until and isinstance(x, np.ndarray) else None
        with self._lock:
            if kept is not self._kept or not self.open:
                return  # closed meanwhile
            self._number += 1
            kept.group, kept.next = timed.group, now + _EVERY
            kept.counts += counts
            kept.rows.append(Sample(self._number, masked, true))

    def stepped(self, step: Step, exchanges: Sequence[Timed]) -> None:
        """Keep the last step's stages, in milliseconds from its begin."""
        shown = [
            [timed.group, timed.worker.partition("?")[0], timed.failed,
             *(round(1e3 * (at - step.begun), 3) for at in timed[4:10]), round(1e3 * timed.computed, 3)]
            for timed in exchanges[:SHOWN]
        ]  # fmt: skip
        told = {
            "rows": step.rows, "prompt": step.prompt, "requests": len(step.requests), "failed": step.failed,
            "milliseconds": round(1e3 * (step.ended - step.begun), 3), "exchanges": shown,
        }  # fmt: skip
        with self._lock:
            if self.open:
                self._kept.step = told


def _scaled(row: Any) -> Bytes:
    most = float(np.abs(row).max(initial=0.0)) or 1.0
    scaled: Bytes = np.rint(row * (127 / most) + 128).astype(np.uint8)
    return scaled


def _text(row: Bytes) -> str:
    return base64.b64encode(row.tobytes()).decode()
