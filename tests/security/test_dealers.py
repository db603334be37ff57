"""Rows "dealers": who deals a mask never sees its message, whatever the network and the dealers do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ledger import Ledger
from sliplm.errors import CredentialError, InputError, MismatchError
from sliplm.network import authority
from sliplm.network.transport import Connection
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.protocol.worker_side import Deal, Multiply, Several, WorkerSide
from test_vault import Logging, Shares, folder, group, inputs, shares
from test_workforce import serving_tls

__all__ = ["folder", "group", "shares"]


class Keeping(Logging):
    """Keeps every batch key that it is shown, and deals wrongly once it has turned."""

    turned = False

    def __init__(self, shares: Shares) -> None:
        super().__init__(shares[1])
        self.keys: list[bytes] = []

    def _check_asked(self, event: Multiply | Several | Deal) -> None:
        if isinstance(event, Deal):
            self.keys.append(event.key)
        super()._check_asked(event)

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        if self.turned and isinstance(asked, Deal):
            u = np.ones((asked.rows, self._shapes[asked.group][0]), np.uint32)
            connection.send(side.product(1), u.data, deadline=time.monotonic() + 5)
        else:
            super()._answer(connection, side, asked)


def test_a_redirected_dealer_gets_no_key(shares: Shares, tmp_path: Path, ledger: Ledger) -> None:
    """The dealer's address leads to a worker's certificate, and a worker's to a dealer's."""
    keys = tmp_path / "keys"
    authority.init(keys)
    authority.issue(keys, "worker", "second")
    worker, stranger, dealer = Logging(shares[1]), Keeping(shares), Keeping(shares)
    refused = 0
    with (
        serving_tls(worker, keys / "worker", tmp_path) as first,
        serving_tls(stranger, keys / "second", tmp_path) as at,
        serving_tls(dealer, keys / "dealer", tmp_path) as deals,
    ):
        for terms in (
            Terms([first], dealers=[at], ahead=0),
            Terms([deals], shares[1], ahead=0),
            Terms([deals], dealers=[first], ahead=0),
        ):
            try:
                Vault(shares[0], terms)
            except CredentialError:
                refused += 1
    leaked = len(stranger.keys) + len(dealer.keys) + len(dealer.messages)
    ledger.record("dealers: an address leads to another role", 3, refused, leaked, "no key, no message sent")
    assert (refused, leaked) == (3, 0)


def test_no_key_goes_to_two_dealers_and_a_liars_masks_are_dropped(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger
) -> None:
    keys, audit = tmp_path / "keys", tmp_path / "audit.jsonl"
    authority.init(keys)
    authority.issue(keys, "dealer", "dealer-2")
    worker, liar, honest = Logging(shares[1]), Keeping(shares), Keeping(shares)
    x, local = inputs(shares, group, 4), LocalProducts(*shares)
    with (
        serving_tls(worker, keys / "worker", tmp_path) as first,
        serving_tls(liar, keys / "dealer", tmp_path) as one,
        serving_tls(honest, keys / "dealer-2", tmp_path) as two,
        Vault(shares[0], Terms([first], dealers=[one, two], ahead=0, audit=audit)) as vault,
    ):
        vault.deal(8, [group])
        assert len(liar.keys) == 1 and not honest.keys
        liar.turned = True
        vault.deal(8, [group])  # the lie is seen; the other deals under a key of its own
        held = vault._supply.memory.available(vault._index[group])
        for _ in range(4):
            assert np.array_equal(vault.product(group, x), local.product(group, x))
    events = [json.loads(line) for line in audit.read_text().splitlines()]
    dropped = [event for event in events if event["event"] == "masks dropped"]
    shared = set(liar.keys) & set(honest.keys)
    ledger.record(
        "dealers: one lies, another deals", 2, len(dropped) + (held == 8), len(shared), "fresh keys"
    )
    assert (held, len(dropped), shared) == (8, 1, set())


def test_one_process_never_deals_and_multiplies(
    folder: Path, shares: Shares, tmp_path: Path, ledger: Ledger
) -> None:
    """A real process on a Unix socket, under every name of its file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    path = tmp_path / "a" / "d.sock"
    command = [sys.executable, "-m", "sliplm", "worker", folder / "worker", "--listen", f"unix:{path}"]
    with subprocess.Popen(
        [*map(str, command), "--role", "dealer", "--json"], stdout=subprocess.PIPE, env=os.environ
    ) as process:
        try:
            assert process.stdout is not None and b"listening" in process.stdout.readline()
            names = [f"unix:{path}", f"unix:{tmp_path}/a/../a/d.sock", f"unix:{tmp_path}/link/d.sock"]
            refused = 0
            for name in names:
                for terms in (Terms([name], shares[1], ahead=0), Terms([name], dealers=[names[0]], ahead=0)):
                    with pytest.raises((MismatchError, CredentialError, InputError)):
                        Vault(shares[0], terms)
                    refused += 1
        finally:
            process.terminate()
    tries = 2 * len(names)
    ledger.record("dealers: one process as both", tries, refused, tries - refused, "every name of its socket")
