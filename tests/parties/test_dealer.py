"""Masks dealt by others: a second worker, a lying one, a silent one, a dead one; and who is blamed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sliplm.errors import DealerError, InputError, VerificationError
from sliplm.network.transport import Connection
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.supply import Supply
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.protocol.worker_side import Deal, Multiply, WorkerSide
from sliplm.shares.share import WorkerShare
from test_vault import Logging, Rogue, Shares, add, folder, group, inputs, serving, shares  # noqa: F401


class Dealer(Logging):
    """An honest dealer that counts what it deals."""

    dealt = 0

    def __init__(self, share: WorkerShare) -> None:
        super().__init__(share)
        self._wanted = "dealer"

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        assert isinstance(asked, Deal), "a dealer sees no message"
        self.dealt += asked.rows
        super()._answer(connection, side, asked)


class Liar(Dealer):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        u = np.ones((asked.rows, self._shapes[asked.group][0]), np.uint32)
        connection.send(side.product(1), u.data, deadline=time.monotonic() + 5)


class Mute(Dealer):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        time.sleep(2)


class Dead(Dealer):
    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        connection.close()


def test_a_second_worker_deals_and_the_vault_needs_no_share(shares: Shares, tmp_path: Path) -> None:
    local = LocalProducts(*shares)
    worker, dealer = Logging(shares[1]), Dealer(shares[1])
    with serving(worker, tmp_path / "w") as address, serving(dealer, tmp_path / "d") as dealing:
        with Vault(shares[0], Terms([address], dealers=[dealing], ahead=4)) as vault:
            for name in shares[0].groups:
                for rows in (1, 3, 40):
                    x = inputs(shares, name, rows)
                    assert np.array_equal(vault.product(name, x), local.product(name, x))
            assert vault.wait_dealt(30), "while somebody deals, the two counts may differ"
            assert vault.counters.rows_dealt == dealer.dealt > 0
    rows = [row.tobytes() for _, message in worker.messages for row in message]
    assert len(set(rows)) == len(rows)


def test_nothing_is_dealt_before_the_vault_is_whole(
    shares: Shares, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Supply):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            time.sleep(0.5)  # a machine under load: a dealer that was asked by now has answered

    monkeypatch.setattr("sliplm.parties.vault.Supply", Late)
    x = inputs(shares, group, 2)
    with (
        serving(Logging(shares[1]), tmp_path / "w") as address,
        serving(Dealer(shares[1]), tmp_path / "d") as d,
    ):
        with Vault(shares[0], Terms([address], dealers=[d], ahead=4)) as vault:
            assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))


def test_large_batches_take_several_frames(
    shares: Shares, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliplm.protocol.side.FRAME_BYTES", 4096)
    dealer = Dealer(shares[1])
    x = inputs(shares, group, 50)
    with serving(Logging(shares[1]), tmp_path / "w") as address, serving(dealer, tmp_path / "d") as dealing:
        with Vault(shares[0], Terms([address], dealers=[dealing], ahead=0)) as vault:
            vault.deal(50, [group])
            assert np.array_equal(vault.product(group, x), LocalProducts(*shares).product(group, x))
            assert vault.counters.rows_dealt_late == 0
    assert dealer.dealt == 50


@pytest.mark.parametrize(
    ("kind", "state"), [(Liar, "quarantined"), (Mute, "suspended"), (Dead, "lost")], ids=lambda k: str(k)
)
def test_a_bad_dealer_is_told_apart_from_the_worker(
    shares: Shares, group: str, tmp_path: Path, kind: type[Dealer], state: str
) -> None:
    worker = Logging(shares[1])
    with serving(worker, tmp_path / "w") as address, serving(kind(shares[1]), tmp_path / "d") as dealing:
        with Vault(shares[0], Terms([address], dealers=[dealing], ahead=0, timeout=1)) as vault:
            with pytest.raises(DealerError) as caught:
                vault.product(group, inputs(shares, group))
            assert caught.value.address == dealing
            assert [status.state for status in vault.dealers] == [state]
            assert [status.state for status in vault.workers] == ["up"]
            assert [(r.role, r.address) for r in vault.audit.records] == [("dealer", dealing)]
    assert worker.messages == [], "nothing is sent under a mask that nobody vouches for"


@pytest.mark.parametrize("kind", [Liar, Mute, Dead])
def test_another_dealer_or_the_share_takes_over(
    shares: Shares, group: str, tmp_path: Path, kind: type[Dealer]
) -> None:
    x = inputs(shares, group)
    expected = LocalProducts(*shares).product(group, x)
    with (
        serving(Logging(shares[1]), tmp_path / "w") as address,
        serving(kind(shares[1]), tmp_path / "d") as bad,
        serving(Dealer(shares[1]), tmp_path / "e") as good,
    ):
        with Vault(shares[0], Terms([address], dealers=[bad, good], ahead=0, timeout=1)) as vault:
            assert np.array_equal(vault.product(group, x), expected)
            assert vault.workers[0].state == "up"
        with Vault(shares[0], Terms([address], shares[1], dealers=[bad], ahead=0, timeout=1)) as vault:
            assert np.array_equal(vault.product(group, x), expected)


def test_a_bad_worker_is_not_taken_for_a_bad_dealer(shares: Shares, group: str, tmp_path: Path) -> None:
    with (
        serving(Rogue(shares[1], add(1)), tmp_path / "w") as address,
        serving(Dealer(shares[1]), tmp_path / "d") as dealing,
    ):
        with Vault(shares[0], Terms([address], dealers=[dealing], ahead=0)) as vault:
            with pytest.raises(VerificationError):
                vault.product(group, inputs(shares, group))
            assert vault.dealers[0].state == "up"
            assert list(vault.quarantined) == [address]


def test_a_worker_may_not_deal_for_itself(shares: Shares, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its own dealer"):
        Terms(["unix:/x"], dealers=["unix:/x"])
    with pytest.raises(InputError, match="nobody deals"):
        Terms(["unix:/x"])
