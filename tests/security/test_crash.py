"""kill -9 of a vault, again and again: no mask serves two messages, by the worker's own log."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import families
import sliplm
from crash_vault import POINTS
from ledger import Ledger, size
from reuse import bound, reused
from sliplm.masks.anchor import FileAnchor
from sliplm.masks.poolfolder import PoolWriter, stock
from sliplm.parties.codec import GroupCodec
from sliplm.parties.dealer import Dealing, ShareDealer
from sliplm.shares.share import VaultShare, open_vault, open_worker
from test_vault import Logging, serving

KILLS = size(20, 200)
SECONDS = 0.25  # a vault lives so long at most once it has begun
ON_DISK = [point for point in POINTS if "memory" not in point and point != "any time"]
IN_MEMORY = [*(point for point in POINTS if "memory" in point or "message" in point)]


class Scene:
    """A split model, a worker with a log, a pool of masks."""

    def __init__(self, folder: Path) -> None:
        sliplm.split(families.make("llama", folder / "model", num_hidden_layers=1), folder / "out")
        self.folder, self.out = folder, folder / "out"
        self.vault, self.worker = open_vault(self.out / "vault"), open_worker(self.out / "worker")
        codecs = [GroupCodec(group) for group in self.vault.groups.values()]
        self.shapes = [(codec.m, codec.n) for codec in codecs]
        self.products = Dealing(codecs, ShareDealer(self.worker), None).products

    def deal(self, pool: Path, anchors: Path, rows: int) -> None:
        """Batches of rows that a reservation does not divide, until so many are ready."""
        args = pool, self.vault.split_id, self.vault.pool_key, self.shapes
        with PoolWriter(*args, FileAnchor(anchors)) as writer:
            ready = [group.ready for group in stock(*args)]
            for group, have in enumerate(ready):
                for _ in range(max(0, rows - have) // 50):
                    writer.add(group, 50, self.products)


class Killer:
    """Starts vaults, kills them, and says how that went."""

    def __init__(self, scene: Scene, address: str, masks: Sequence[Path]) -> None:
        script = Path(__file__).with_name("crash_vault.py")
        command = [sys.executable, str(script), str(scene.out / "vault"), address, *map(str, masks)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def kill_one(self, point: str) -> dict[str, Any]:
        times = 1 + secrets.randbelow(40 if "message" in point or "taken" in point else 8)
        seconds = 0.05 + secrets.randbelow(1000) / 1000 * SECONDS if point == "any time" else 4 * SECONDS
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([point, times, seconds]).encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def check(worker: Logging, vault: VaultShare) -> tuple[int, int]:
    """(rows, pairs under one mask) over all groups of a worker's log."""
    rows = pairs = 0
    for index, group in enumerate(vault.groups.values()):
        log = [message for number, message in worker.messages if number == index]
        if log:
            messages = np.concatenate(log)
            rows += len(messages)
            pairs += len(reused(messages, bound(group.norm, group.n)))
    return rows, pairs


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("crash"))


def test_killed_with_a_pool_on_disk(scene: Scene, tmp_path: Path, ledger: Ledger) -> None:
    worker = Logging(scene.worker)
    pool, anchors = tmp_path / "pool", tmp_path / "anchors"
    answers = []
    with serving(worker, tmp_path / "w") as address, Killer(scene, address, (pool, anchors)) as killer:
        for number in range(KILLS):
            if number % 5 == 0:
                scene.deal(pool, anchors, 5000)  # beside a pool that was left by a killed vault
            point = ON_DISK[number // 2 % len(ON_DISK)] if number % 2 else "any time"
            answers.append(killer.kill_one(point))
        answers.append(killer.kill_one("any time"))  # after the last kill, too, it opens
    errors = [answer["error"] for answer in answers if answer["error"]]
    assert not errors  # every pool opened again, and gave masks
    rows, pairs = check(worker, scene.vault)
    products, points = (sum(answer[what] for answer in answers) for what in ("products", "point"))
    assert pairs == 0
    assert products > KILLS
    ledger.record(
        "kill -9 of a vault, masks on disk", KILLS, KILLS - len(errors), pairs,
        f"{rows:,} rows in {products:,} products; {points} at named points; detected: opened again",
    )  # fmt: skip


def test_killed_with_masks_in_memory(scene: Scene, tmp_path: Path, ledger: Ledger) -> None:
    worker = Logging(scene.worker)
    with (
        serving(worker, tmp_path / "w") as address,
        Killer(scene, address, [scene.out / "worker"]) as killer,
    ):
        answers = [
            killer.kill_one(IN_MEMORY[number // 2 % len(IN_MEMORY)] if number % 2 else "any time")
            for number in range(KILLS)
        ]
    assert not [answer["error"] for answer in answers if answer["error"]]
    rows, pairs = check(worker, scene.vault)
    assert pairs == 0
    products = sum(answer["products"] for answer in answers)
    assert products > 0
    ledger.record(
        "kill -9 of a vault, masks in memory", KILLS, KILLS, pairs,
        f"{rows:,} rows in {products:,} products; detected: started again",
    )  # fmt: skip


def test_reuse_would_be_found(scene: Scene, tmp_path: Path, ledger: Ledger) -> None:
    """The control: pool *and* anchor are put back from a backup, which nothing on this machine can notice."""
    worker = Logging(scene.worker)
    state, backup = tmp_path / "state", tmp_path / "backup"
    scene.deal(state / "pool", state / "anchors", 1000)
    shutil.copytree(state, backup)
    with (
        serving(worker, tmp_path / "w") as address,
        Killer(scene, address, (state / "pool", state / "anchors")) as killer,
    ):
        assert killer.kill_one("any time")["error"] is None
        shutil.rmtree(state)
        shutil.copytree(backup, state)
        assert killer.kill_one("any time")["error"] is None
    pairs = check(worker, scene.vault)[1]
    assert pairs > 0
    ledger.record("control: pool and anchor put back together", 1, pairs > 0, 0, f"{pairs:,} reuses found")


def test_a_restored_pool_serves_nothing(scene: Scene, tmp_path: Path, ledger: Ledger) -> None:
    """The same without the anchor: refused before any message."""
    worker = Logging(scene.worker)
    pool, anchors, backup = tmp_path / "pool", tmp_path / "anchors", tmp_path / "backup"
    tries = size(4, 20)
    refused = 0
    with serving(worker, tmp_path / "w") as address, Killer(scene, address, (pool, anchors)) as killer:
        for _ in range(tries):
            scene.deal(pool, anchors, 500)
            shutil.copytree(pool, backup)
            answer = killer.kill_one("any time")
            assert answer["error"] is None
            assert answer["products"] > 0  # else nothing was burnt, and the backup is as good as the pool
            shutil.rmtree(pool)
            shutil.move(backup, pool)
            answer = killer.kill_one("any time")
            refused += "restored backup" in (answer["error"] or "") and answer["products"] == 0
            shutil.rmtree(pool)
    pairs = check(worker, scene.vault)[1]
    assert refused == tries
    assert pairs == 0
    ledger.record("a pool restored from a backup after a kill", tries, refused, pairs)
