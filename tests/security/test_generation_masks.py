"""However text is generated, no mask serves two messages: checked in the worker's own log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import families
import sliplm
import sliplm.masks.masks
from ledger import Ledger
from reuse import bound, reused
from sliplm.errors import WorkerError
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker
from test_vault import Logging, serving


class Cancelled(Exception):
    """The client hung up."""


class HangsUp(BaseStreamer):
    """A stream that is cancelled after a few tokens."""

    def __init__(self) -> None:
        self.left = 4

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise Cancelled

    def end(self) -> None:
        """Not reached."""


def cancelled(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    for _ in range(3):
        with pytest.raises(Cancelled):
            model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=HangsUp())


def of(**options: Any) -> Callable[[PreTrainedModel, dict[str, torch.Tensor]], None]:
    def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=12, pad_token_id=0, **options)

    return run


WAYS = {
    "greedy text, twice": of(do_sample=False),
    "beams that are reordered": of(num_beams=4, num_return_sequences=2, do_sample=False),
    "speculative tokens, rejected": of(prompt_lookup_num_tokens=5, do_sample=False),
    "sampling": of(do_sample=True),
    "streams that are cancelled": cancelled,
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    sliplm.split(families.make("llama", folder / "model"), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def shares(split: Path) -> tuple[VaultShare, WorkerShare]:
    return open_vault(split / "vault"), open_worker(split / "worker")


def check(worker: Logging, shares: tuple[VaultShare, WorkerShare]) -> tuple[int, int]:
    """(rows, pairs under one mask) over all groups of a worker's log."""
    rows = pairs = 0
    for index, secrets in enumerate(shares[0].groups.values()):
        log = [message for group, message in worker.messages if group == index]
        if log:
            messages = np.concatenate(log)
            rows += len(messages)
            pairs += len(reused(messages, bound(secrets.norm, secrets.n)))
    return rows, pairs


@pytest.mark.parametrize("way", WAYS)
def test_no_mask_serves_two_messages(
    split: Path, shares: tuple[VaultShare, WorkerShare], tmp_path: Path, ledger: Ledger, way: str
) -> None:
    worker = Logging(shares[1])
    with serving(worker, tmp_path / "w") as address:
        model: Any = sliplm.load(split / "vault", workers=[address], ahead=8)
        ids = torch.arange(3, 27)[None] % 7 + 3  # repeats, so that look-ups find something
        WAYS[way](model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        model.slip.close()
    rows, pairs = check(worker, shares)
    assert rows > 100
    ledger.record(way, tries=rows, detected=rows - pairs, leaked=pairs, note="messages in the worker's log")
    assert pairs == 0


def test_the_check_finds_a_mask_that_serves_twice(
    split: Path, shares: tuple[VaultShare, WorkerShare], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: with the burning taken out, the same check finds the pairs."""
    worker = Logging(shares[1])

    def keep(batch: Any, rows: int, **how: Any) -> Any:
        burnt = burn(batch, rows, **how)
        batch.used = 0
        return burnt

    burn = sliplm.masks.masks.Batch.burn  # type: ignore[attr-defined]
    monkeypatch.setattr("sliplm.masks.masks.Batch.burn", keep)
    with serving(worker, tmp_path / "w") as address:
        model: Any = sliplm.load(split / "vault", workers=[address], ahead=8)
        ids = torch.arange(3, 7)[None]
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        model.slip.close()
    assert check(worker, shares)[1] > 0


def test_a_request_that_failed_is_asked_again_under_new_masks(
    split: Path, shares: tuple[VaultShare, WorkerShare], tmp_path: Path
) -> None:
    """The client's own retry, after an error: other masks, even for the same prompt."""
    worker = Logging(shares[1])
    ids = torch.arange(3, 9)[None]
    with serving(worker, tmp_path / "w") as address:
        model: Any = sliplm.load(split / "vault", workers=[address], ahead=8)
        model(ids)
        model.slip.drain(address)
        with pytest.raises(WorkerError):
            model(ids)
        model.slip.rejoin(address)
        model(ids)
        model.slip.close()
    assert check(worker, shares)[1] == 0
