"""Row "seats": who vanished keeps nobody out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ledger import Ledger
from sliplm.errors import WorkerUnavailable
from sliplm.network import authority
from sliplm.network.dialling import connect
from sliplm.parties.seats import MAX_EACH
from sliplm.parties.worker import Worker
from sliplm.shares.share import WorkerShare
from test_worker import LIMIT, check_products, greet, matrices, serving, share, share_dir, side_of

__all__ = ["matrices", "share", "share_dir"]


def test_one_certificate_takes_half_the_seats_at_most(
    share: WorkerShare, tmp_path: Path, ledger: Ledger
) -> None:
    """Vaults that vanished hold no seat from another owner, nor from their own next one."""
    keys = tmp_path / "keys"
    authority.init(keys)
    authority.issue(keys, "vault", "vault-2")
    with serving(Worker(share, threads=1), "127.0.0.1:0", keys) as address, ExitStack() as stack:
        host = address.partition("?")[0]
        other, theirs = stack.enter_context(connect(f"{host}?keys={keys / 'vault-2'}", LIMIT)), side_of(share)
        greet(other, theirs)
        held = []
        for _ in range(MAX_EACH + 4):
            connection, side = stack.enter_context(connect(address, LIMIT)), side_of(share)
            greet(connection, side)
            held.append((connection, side))
        left = 0
        for connection, side in held[:4]:
            try:
                check_products(connection, side, share, 3)
            except WorkerUnavailable:
                left += 1
        for connection, side in (held[4], held[-1], (other, theirs)):
            check_products(connection, side, share, 4)
    ledger.record("seats: idle vaults beyond those of one owner", 4, left, 4 - left, "the oldest gives way")
    assert left == 4
