"""What is chosen once for a vault: whom it asks, where its masks come from, what it does in need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from sliplm.errors import InputError
from sliplm.masks.pool import DiskPool
from sliplm.network.attestation import Attester, Verifier
from sliplm.parties.quarantine import Quarantine
from sliplm.shares.share import WorkerShare

Fallback = Literal["fail", "here"]


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms on which one vault serves.

    Masks come from the pool on disk while it has some, then from the dealers, then from the worker share.

    Args:
        workers: addresses; requests are spread over those that serve.
        dealing_share: the worker's share, from which the vault deals its own masks; may be None where
            dealers or a pool are named.
        dealers: addresses of workers that deal masks and do not collude with `workers`.
        pool: masks dealt ahead on disk; the vault closes it.
        ahead: masks kept ready in memory for each group, in rows.
        timeout: limit in seconds of every wait for a worker or dealer.
        fallback: when no worker is left, "fail" the request, or compute the product "here", from
            `dealing_share`: slow.
        pad_to: products of more than one row are padded to a multiple of so many rows, each of which travels
            as `inputs` rows; this hides the number in sizes; the time between messages still tells it.
        inputs: rows that each input travels as, 1 or 2.  The second is what rounding leaves of the first: it
            costs as many masks and bytes again, and keeps inputs that are much larger in one entry
            than in the rest.
        hide_routing: of a mixture of experts, every expert of a layer gets one row for each token, chosen or
            not, so that workers see nothing of who is chosen: experts / chosen times the traffic and masks.
        audit: the file to which events are appended; None keeps the last in memory only.
        attester: gives the vault's evidence to workers that ask for it.
        verifier: judges the workers' and dealers' evidence.
        adapter: the one that products take where no other is chosen; None for none.
        quarantine: where it is kept who lied; None forgets it with the vault.
        deal_on: what the vault deals on, "cpu" or cards, as `placing.lay_out`.

    Raises: InputError without a worker, without masks, for a worker that would deal, or for a value that
        makes no sense.
    """

    workers: Sequence[str]
    dealing_share: WorkerShare | None = None
    _: KW_ONLY
    dealers: Sequence[str] = ()
    pool: DiskPool | None = None
    ahead: int = 64
    timeout: float = 30.0
    fallback: Fallback = "fail"
    pad_to: int = 1
    inputs: int = 1
    hide_routing: bool = False
    audit: Path | str | None = None
    attester: Attester | None = None
    verifier: Verifier | None = None
    adapter: str | None = None
    quarantine: Quarantine | None = None
    deal_on: str = "cpu"

    def __post_init__(self) -> None:
        if not self.workers:
            raise InputError(
                "no worker is named: start one with `slip worker SHARE --listen ADDRESS` and pass its address"
            )
        if self.ahead < 0 or self.timeout <= 0 or self.pad_to < 1:
            raise InputError(
                "ahead is a number of rows from 0, timeout a number of seconds above 0, pad_to a number of "
                "rows from 1"
            )
        checked_inputs(self.inputs)
        self._check_masks()
        if self.fallback not in ("fail", "here"):
            raise InputError(f"fallback is 'fail' or 'here', not {self.fallback!r}")
        if self.fallback == "here" and self.dealing_share is None:
            raise InputError("fallback 'here' computes from the worker share: name its folder")

    def _check_masks(self) -> None:
        """Somebody deals, and nobody who is asked online (M12; TLS keys are compared once they are shown)."""
        if self.dealing_share is None and not self.dealers and self.pool is None:
            raise InputError(
                "nobody deals masks: give the worker share, a dealer's address or a pool of masks"
            )
        if set(self.workers) & set(self.dealers):
            raise InputError("a worker cannot be its own dealer: it would know the masks of what it is sent")


def checked_inputs(inputs: int) -> int:
    """The number of rows that each input travels as.  Raises: InputError if it is not 1 or 2."""
    if type(inputs) is not int or inputs not in (1, 2):
        raise InputError(f"inputs, the rows that each input travels as, is 1 or 2, not {inputs!r}")
    return inputs
