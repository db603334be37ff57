"""The yardstick: both shares in one process, without masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sliplm.arithmetic import kernels
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.closing import Closing
from sliplm.errors import InputError
from sliplm.parties.adapters import Adapters
from sliplm.parties.codec import GroupCodec
from sliplm.parties.terms import checked_inputs
from sliplm.secrecy import Secret
from sliplm.shares.share import VaultShare, WorkerShare, check_pair


class LocalProducts(Closing, Secret):
    """The quantised model in one process: the same products without masks and without a worker.

    What every hybrid run is compared with, bit for bit; it needs both shares, so it protects nothing.

    Args:
        share, worker: both shares of one split.
        adapter: the one that products take where no other is chosen; None for none.
        inputs: rows that each input would travel as, see `Terms`.

    Raises: MismatchError for shares of different splits; InputError for an unknown adapter, or for other
        `inputs` than 1 or 2.
    """

    def __init__(
        self, share: VaultShare, worker: WorkerShare, adapter: str | None = None, inputs: int = 1
    ) -> None:
        check_pair(share, worker)
        self.files = share.files
        self._inputs = checked_inputs(inputs)
        self.adapter = Adapters(share.manifest.adapters, adapter)
        self._codecs = {name: GroupCodec(secrets) for name, secrets in share.groups.items()}
        self._matrices = {name: kernels.prepare(worker.matrices[name]) for name in share.groups}

    def close(self) -> None:
        """Nothing is held."""

    def settle(self) -> None:
        """Nothing is left to be judged."""

    @property
    def hides_routing(self) -> bool:
        """Nothing leaves this process."""
        return False

    def products(self, asked: Sequence[tuple[str, Floats]]) -> list[Floats]:
        """As `Vault.products`."""
        return [self.product(group, x) for group, x in asked]

    def product(self, group: str, x: Floats) -> Floats:
        """As `Vault.product`."""
        if group not in self._codecs:
            raise InputError(f"this split has no group {group!r}")
        codec = self._codecs[group]
        out = np.empty((len(x), codec.m), np.float32)
        multiply, adapter = self._matrices[group].product, self.adapter.current
        codec.judge(codec.here(x, out, multiply, adapter, self._inputs))
        return out
