"""Torch's threads while a split model runs: few, for its own thread alone, and as they were afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sliplm.engines import idle
from sliplm.engines.modules import Closeable, derive

OWN = 6
LIMIT = 30.0

pytestmark = pytest.mark.skipif(idle._openmp is None, reason="this torch has no OpenMP")


@pytest.fixture(autouse=True)
def own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_OWN_CHOICE", frozenset({OWN}))


def chosen(number: int, call: Callable[[], Any]) -> Any:
    """In a thread of its own, where torch has so many threads."""
    found: list[Any] = []

    def run() -> None:
        torch.get_num_threads()
        idle._openmp.omp_set_num_threads(number)
        found.append(call())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT)
    return found[0]


class Model(nn.Module):
    """Notes how many threads torch has."""

    def __init__(self, during: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.during = during

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.seen.append(torch.get_num_threads())
        self.during()
        if fail:
            raise ValueError("no")
        return x


def split(model: Model) -> Any:
    derive(model, Closeable, {})
    return model


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (idle.MANY - 1, 1), (idle.MANY, OWN // 2)])
def test_few_threads_in_a_forward_and_all_of_them_after(rows: int, threads: int) -> None:
    model = split(Model())

    def call() -> int:
        model(torch.zeros(rows, 5))
        return torch.get_num_threads()

    assert chosen(OWN, call) == OWN
    assert model.seen == [threads]


def test_an_error_leaves_no_model_slow() -> None:
    model = split(Model())

    def call() -> int:
        with pytest.raises(ValueError, match="no"):
            model(torch.zeros(1, 5), fail=True)
        return torch.get_num_threads()

    assert chosen(OWN, call) == OWN


def test_who_chose_a_number_keeps_it() -> None:
    model = split(Model())

    def call() -> int:
        model(torch.zeros(1, 5))
        return torch.get_num_threads()

    assert chosen(OWN - 1, call) == OWN - 1
    assert model.seen == [OWN - 1]


def test_who_chooses_in_a_forward_has_it_afterwards() -> None:
    model = split(Model(lambda: idle._openmp.omp_set_num_threads(4)))

    def call() -> int:
        model(torch.zeros(1, 5))
        return torch.get_num_threads()

    assert chosen(OWN, call) == 4


def test_other_threads_models_keep_theirs() -> None:
    """A plain model, and a second split one, while the first is in its forward."""
    second, after = split(Model()), []

    def meanwhile() -> None:
        def call() -> int:
            number = torch.get_num_threads()
            second(torch.zeros(1, 5))
            after.append(torch.get_num_threads())
            return number

        after.append(chosen(OWN, call))

    first = split(Model(meanwhile))

    def call() -> int:
        first(torch.zeros(1, 5))
        return torch.get_num_threads()

    assert chosen(OWN, call) == OWN
    assert after == [OWN, OWN]
    assert first.seen == second.seen == [1]


def test_one_in_the_other() -> None:
    """As an assistant that is split too."""
    inner = split(Model())
    outer = split(Model(lambda: inner(torch.zeros(1, 5))))

    def call() -> int:
        outer(torch.zeros(1, 5))
        return torch.get_num_threads()

    assert chosen(OWN, call) == OWN
    assert inner.seen == outer.seen == [1]


def test_the_rows_of_an_input() -> None:
    ids, floats = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, 5)
    assert idle._rows((ids,), {}) == idle._rows((), {"input_ids": ids}) == 14
    assert idle._rows((floats,), {}) == idle._rows((), {"input_ids": None, "inputs_embeds": floats}) == 14
    assert idle._rows((), {}) == idle._rows(("x",), {}) == idle._rows((torch.tensor(1.0),), {}) == idle.MANY
