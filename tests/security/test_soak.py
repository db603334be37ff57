"""Three workers, four threads: one worker lies now and then, one is killed and comes back, one is taken out
and comes back.  Every product is right, no mask serves two messages, and only the liar is called one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import rogues
from ledger import Ledger, size
from rogues import LIMIT, Asked, Honest, Means, Rogue, add, one_mask_one_message, read_log, send, serving
from sliplm.errors import SlipError
from sliplm.network.transport import Connection
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.protocol.worker_side import WorkerSide
from sliplm.shares.splitting import CHALLENGE_SETS
from test_malicious import Scene, base, scene  # noqa: F401

THREADS = 4
REQUESTS = 30  # of each thread, in each round


class Moody(Rogue):
    """Lies at random moments, of each group less often than uses its challenges up: that is for good."""

    def __init__(self, means: Means) -> None:
        super().__init__(means, after=0)
        self._told: Counter[int] = Counter()  # lies of each group
        self._mood = random.Random(5)

    @property
    def lies(self) -> int:
        """How often it lied."""
        return self._told.total()

    def lie(
        self, connection: Connection, side: WorkerSide, asked: Asked, x: np.ndarray, y: np.ndarray
    ) -> None:
        """One time in ten."""
        if self._mood.random() < 0.1 and self._told[asked.group] < CHALLENGE_SETS - 1:
            self._told[asked.group] += 1
            y = add(1)(self, asked, x, y)
        send(connection, side.product(1), y)


@contextmanager
def process(share: Path, where: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that writes down what it is sent, in a process of its own; it is killed at the end."""
    command = [sys.executable, rogues.__file__, str(share), f"unix:{where}", str(log)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert started.stdout is not None and started.stdout.readline() == b"ready\n"
        yield started
    finally:
        started.kill()
        started.wait(LIMIT)
        started.stdout.close()


class Crowd:
    """Threads that ask and compare."""

    def __init__(self, scene: Scene, vault: Vault) -> None:
        self.scene, self.vault = scene, vault
        self.asked = self.wrong = 0
        self.failures: list[SlipError] = []
        self._change = threading.Condition()

    def run(self, requests: int, midway: Callable[[], object]) -> None:
        """Each thread asks so often; `midway` is called when half of it is done."""
        half = self.asked + requests * THREADS // 2
        first = self.asked
        threads = [threading.Thread(target=self._ask, args=(first + i, requests)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        with self._change:
            assert self._change.wait_for(lambda: self.asked >= half, 600)
        midway()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive()

    def _ask(self, seed: int, requests: int) -> None:
        generator = np.random.default_rng([seed, 9])
        for _ in range(requests):
            name = self.scene.groups[generator.integers(len(self.scene.groups))]
            shape = int(generator.integers(1, 5)), self.scene.vault.groups[name].n
            wrong = 0
            try:
                wrong = self.scene.wrong(self.vault, (name, generator.standard_normal(shape, np.float32)))
            except SlipError as error:
                self.failures.append(error)
            with self._change:
                self.asked += 1
                self.wrong += wrong
                self._change.notify_all()


def states(vault: Vault) -> dict[str, str]:
    return {status.address: status.state for status in vault.workers}


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_liar_a_crash_and_an_operator(
    base: Path,
    scene: Scene,
    tmp_path: Path,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sliplm.parties.standing._PAUSES", (0.1, 0.5))
    monkeypatch.setattr("sliplm.parties.standing._SUSPENSIONS", (0.3, 1.0))
    share, log, where = base / "out" / "worker", tmp_path / "log", tmp_path / "mortal.sock"
    moody, steady = Moody(scene.means), Honest(scene.means.share)
    liar, mortal, resting = (
        f"unix:{tmp_path / 'liar.sock'}",
        f"unix:{where}",
        f"unix:{tmp_path / 'rest.sock'}",
    )
    requests = size(REQUESTS, 300)
    with (
        serving(moody, tmp_path / "liar.sock"),
        serving(steady, tmp_path / "rest.sock"),
        process(share, where, log) as first,
        Vault(
            scene.vault, Terms([liar, mortal, resting], scene.means.share, ahead=8, timeout=LIMIT)
        ) as vault,
    ):  # fmt: skip
        crowd = Crowd(scene, vault)

        def forgive() -> None:
            """The operator believes that it was a mishap."""
            if states(vault)[liar] == "quarantined":
                vault.rejoin(liar)

        def kill() -> None:
            os.kill(first.pid, signal.SIGKILL)
            forgive()

        def drain() -> None:
            vault.drain(resting)
            forgive()

        def rejoin() -> None:
            vault.rejoin(resting)
            forgive()

        crowd.run(requests, kill)
        assert first.wait(LIMIT) == -signal.SIGKILL
        with process(share, where, log):
            eventually(lambda: states(vault)[mortal] == "up")
            forgive()
            for midway in (forgive, drain, rejoin, forgive):
                crowd.run(requests, midway)
                forgive()
            records = vault.audit.records
            assert states(vault)[mortal] == states(vault)[resting] == "up"
            assert vault.counters.exchanges == crowd.asked - len(crowd.failures)
    logs = [moody.messages, steady.messages, read_log(log, scene.means.share)]
    shared = one_mask_one_message(logs)
    called = {record.address for record in records if record.event == "quarantined"}
    found = sum(record.event == "quarantined" for record in records)
    ledger.record("soak: lies of one worker of three", moody.lies, min(found, moody.lies), crowd.wrong)
    served = crowd.asked - crowd.wrong - len(crowd.failures)
    ledger.record(
        "soak: products", crowd.asked, served, crowd.wrong, "tries: asked for; detected: served, and right"
    )
    sent = sum(map(len, logs))
    ledger.record("soak: messages", sent, sent - shared, shared, "leaked: pairs under one mask")
    assert crowd.failures == []
    assert (crowd.wrong, shared) == (0, 0)
    assert moody.lies > 0 and called == {liar}
    assert found >= moody.lies
    assert all(logs), "each of them was asked"
