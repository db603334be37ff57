"""Rows "healing": our own trouble is nobody's guilt and passes; what is dropped is given back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import sliplm
from families import make
from ledger import Ledger
from sliplm.network import authority, keys
from sliplm.parties.local_worker import LocalWorker

TRIES = 5


def test_dropped_models_and_lost_keys(tmp_path: Path, ledger: Ledger) -> None:
    sliplm.split(make("llama", tmp_path / "model"), tmp_path / "out")
    authority.init(tmp_path / "keys")
    with LocalWorker(tmp_path / "out" / "worker", threads=1, authority=tmp_path / "keys") as worker:
        key = Path(worker.address.partition("?keys=")[2]) / keys.KEY
        freed = healed = guilty = refused = 0
        for _ in range(TRIES):
            model: Any = sliplm.load(tmp_path / "out" / "vault", [worker.address])
            force = model.slip._workers
            link = force.links[0]
            key.rename(key.with_suffix(".away"))
            link.connection.abort()
            try:
                link._drop()
                link.open()
            except sliplm.errors.CredentialError as error:
                refused += 1
                force.failed(link, error)
            guilty += bool(model.slip.quarantined)
            key.with_suffix(".away").rename(key)
            link.open()
            healed += link.connection is not None
            vault, warden = weakref.ref(model.slip), force._warden
            del model
            gc.collect()
            freed += vault() is None and not warden.is_alive() and link.connection is None
    ledger.record(
        "healing: our key file is away", refused, healed, guilty, "lost counts a worker held guilty"
    )
    ledger.record("healing: a model is dropped", TRIES, freed, TRIES - freed, "threads and connections end")
    assert (refused, healed, guilty, freed) == (TRIES, TRIES, 0, TRIES)
