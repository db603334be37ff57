"""Tasks alone: what may be carried out again, and what is refused before a cluster is joined."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import sliplm
from sliplm.cluster import onray
from sliplm.cluster.tasks import HERE, in_order
from sliplm.errors import ClusterError, InputError, MaskError
from sliplm.masks.anchor import FileAnchor
from sliplm.masks.masks import Dealt
from sliplm.masks.poolfolder import PoolWriter, stock
from sliplm.parties.dealer import DealTask
from sliplm.shares.grouptask import GroupResult, GroupTask, carry_out
from sliplm.shares.recipe import GroupChoice
from sliplm.shares.splitter import Splitter
from sliplm.shares.splitting import all_challenge_products

M, N = 24, 16
CHOICE = GroupChoice(rank=2, precision=12, rotation="fast", placement="split")


def test_no_more_tasks_are_drawn_than_are_carried_out_at_once() -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(4):
            drawn.append(number)
            yield number

    with HERE.pool(lambda: 10, lambda ten, number: (ten + number, len(drawn))) as pool:
        assert list(in_order(pool, tasks())) == [(10, 1), (11, 2), (12, 3), (13, 4)]


def test_what_a_task_raises_comes_in_its_turn() -> None:
    with HERE.pool(lambda: None, lambda _, number: 6 // number) as pool:
        values = in_order(pool, (2, 0, 3))
        assert next(values) == 3
        with pytest.raises(ZeroDivisionError):
            next(values)


# --- again ------------------------------------------------------------------------------------------------


def verifies(result: GroupResult, w: np.ndarray) -> bool:
    """Whether a result's secrets are those of these integers."""
    seed = result.secrets["g/seed"].tobytes()
    return bool((all_challenge_products(seed, w) == result.secrets["g/c"]).all())


def test_a_task_that_is_carried_out_again_has_a_seed_of_its_own() -> None:
    """Each try is whole: the secrets of one verify the integers of that one, and of no other."""
    weight = np.random.default_rng(1).standard_normal((M, N)).astype(np.float32)
    task = GroupTask("g", CHOICE, weight)
    first, again = (carry_out(Splitter("cpu"), pickle.loads(pickle.dumps(task))) for _ in range(2))
    assert (first.secrets["g/seed"] != again.secrets["g/seed"]).any()
    assert verifies(first, first.w) and verifies(again, again.w)
    assert not verifies(first, again.w) and not verifies(again, first.w)


def test_tasks_hide_what_they_carry() -> None:
    weight = np.full((M, N), 7.25, np.float32)
    assert "7.25" not in repr(GroupTask("g", CHOICE, weight))
    assert "7.25" not in repr(GroupResult(weight, {"g/seed": weight}, (0.0,)))
    assert b"k" * 32 not in repr(DealTask(0, 1, N, b"k" * 32)).encode()


def test_a_batch_is_put_once(tmp_path: Path) -> None:
    """Else its masks would be there twice under two numbers."""
    place = (tmp_path / "pool", "0" * 32, lambda label: bytes(32), [(M, N)])
    dealt = Dealt(np.zeros((3, M), np.uint32))
    with PoolWriter(*place, FileAnchor(tmp_path / "anchors")) as writer:
        drawn = writer.draw()
        writer.put(0, 3, drawn, dealt)
        with pytest.raises(MaskError, match="used twice"):
            writer.put(0, 3, drawn, dealt)
    assert [group.ready for group in stock(*place)] == [3]


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"pip install 'sliplm\[cluster\]'"):
        sliplm.split(tmp_path, tmp_path / "out", ray="auto")


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "ray://head:10001", "head:port"])
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(ClusterError, match="HOST:PORT"):
        onray._check_address(address)


def test_nothing_goes_to_another_host_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(ClusterError, match="set RAY_USE_TLS=1"):
        onray._check_address("198.51.100.7:6379")


def test_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ClusterError, match="no Ray cluster answers"):
            onray._check_address(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_card_is_not_chosen_by_number(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Ray chooses the card"):
        sliplm.split(tmp_path, tmp_path / "out", device="cuda:1", ray="auto")
    assert not any(tmp_path.iterdir())
