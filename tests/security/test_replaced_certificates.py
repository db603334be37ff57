"""Rows "healing": certificates are replaced, and parties stop for a while, under a running vault: whoever has
a new certificate or comes back serves at once, whoever shows a revoked one never again.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import sliplm
from families import make
from ledger import Ledger
from sliplm.errors import SlipError, VerificationError
from sliplm.network import authority, keys
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.local_worker import worker_environment
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.shares.share import open_vault, open_worker

LIMIT = 60.0
PARTIES = ("worker", "dealer")


@dataclass
class Scene:
    """A split, keys, and one worker and one dealer in processes of their own."""

    out: Path
    keys: Path
    processes: dict[str, subprocess.Popen[bytes]]
    addresses: dict[str, str]

    @contextmanager
    def vault(self, timeout: float = LIMIT) -> Iterator[Vault]:
        """With nobody else to ask; masks are dealt for each request."""
        terms = Terms(
            [self.addresses["worker"]], dealers=[self.addresses["dealer"]], ahead=0, timeout=timeout
        )
        with Vault(open_vault(self.out / "vault"), terms) as vault:
            yield vault

    def wrong(self, vault: Vault) -> int:
        """Ask; 1 if the answer is not the undisturbed one."""
        share = open_vault(self.out / "vault")
        name = vault.groups[0]
        x = np.random.default_rng(1).standard_normal((2, share.groups[name].n)).astype(np.float32)
        local = LocalProducts(share, open_worker(self.out / "worker"))
        return int(not np.array_equal(vault.product(name, x), local.product(name, x)))


@contextmanager
def party(share: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`slip worker` with a key folder: the process, and where it listens."""
    command = [sys.executable, "-P", "-m", "sliplm", "worker", str(share), "--json", "--threads", "1"]
    command += ["--listen", "127.0.0.1:0", "--keys", str(folder)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, env=worker_environment())
    try:
        assert started.stdout is not None
        yield started, json.loads(started.stdout.readline())["listening"]
    finally:
        started.kill()
        started.wait(LIMIT)
        if started.stdout is not None:
            started.stdout.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("rotation")
    make("llama", folder / "model")
    sliplm.split(folder / "model", folder / "out", i_know=True)
    home = folder / "keys"
    authority.init(home)
    share = folder / "out" / "worker"
    with party(share, home / "worker") as worker, party(share, home / "dealer") as dealer:
        found = dict(zip(PARTIES, (worker, dealer), strict=True))
        processes = {name: process for name, (process, _) in found.items()}
        addresses = {name: f"{where}?keys={home / 'vault'}" for name, (_, where) in found.items()}
        yield Scene(folder / "out", home, processes, addresses)


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(vault: Vault, address: str) -> list[str]:
    return [
        record.event
        for record in list(vault.audit.records)
        if record.address == address and record.event not in ("masks renewed", "masks dropped")
    ]


def test_certificates_are_replaced_under_a_running_vault(scene: Scene, ledger: Ledger) -> None:
    """Twice each, with requests all the while: the new one is taken, and no request fails."""
    tries = wrong = 0
    with scene.vault() as vault:
        for name in (*PARTIES, "vault", *PARTIES):
            authority.rotate(scene.keys, name)
            tries += 1
            for _ in range(3):
                wrong += scene.wrong(vault)
            for each, address in scene.addresses.items():
                if each == name:
                    eventually(lambda address=address: events(vault, address)[-2:] == ["revoked", "rejoined"])  # type: ignore[misc]
            wrong += scene.wrong(vault)
        guilty = len(vault.quarantined)
        assert vault.quarantined == {}
    ledger.record("healing: certificates are replaced in use", tries, tries - guilty, wrong)
    assert wrong == 0


def test_whoever_shows_the_old_certificate_stays_out(scene: Scene, ledger: Ledger, tmp_path: Path) -> None:
    """It computes nothing more."""
    authority.issue(scene.keys, "worker", "thief")
    shutil.copytree(scene.keys / "thief", tmp_path / "kept")
    share = scene.out / "worker"
    with party(share, tmp_path / "kept") as (_, where):
        address = f"{where}?keys={scene.keys / 'vault'}"
        terms = Terms([address], dealers=[scene.addresses["dealer"]], ahead=0, timeout=LIMIT)
        with Vault(open_vault(scene.out / "vault"), terms) as vault:
            wrong = scene.wrong(vault)
            served = vault.counters.exchanges
            authority.rotate(scene.keys, "thief")
            eventually(lambda: list(vault.quarantined) == [address])
            with pytest.raises(VerificationError, match="revoked"):
                scene.wrong(vault)
            leaked = vault.counters.exchanges - served
            assert events(vault, address) == ["revoked", "quarantined"]
    ledger.record("healing: the old one is shown again", 1, 1, leaked + wrong)
    assert (leaked, wrong) == (0, 0)


def test_the_new_certificate_comes_later_than_the_list(scene: Scene, tmp_path: Path) -> None:
    """Its holder stays away until then, and is nobody's enemy; the same for the vault's own."""
    for name in (*PARTIES, "vault"):
        with scene.vault() as vault:
            authority.revoke(scene.keys, name)
            eventually(lambda vault=vault: not _answers(scene, vault))  # type: ignore[misc]
            assert vault.quarantined == {}, name
            authority.rotate(scene.keys, name)
            eventually(lambda vault=vault: _answers(scene, vault))  # type: ignore[misc]
            assert vault.quarantined == {}, name


def _answers(scene: Scene, vault: Vault) -> bool:
    try:
        return not scene.wrong(vault)
    except SlipError:
        return False


@pytest.mark.parametrize("name", PARTIES)
def test_the_only_one_stops_for_a_while(
    scene: Scene, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It does not rest for minutes: where there is nobody else, it is looked for all the time."""
    monkeypatch.setattr("sliplm.parties.standing._SUSPENSIONS", (1e6, 1e6))
    address = scene.addresses[name]
    with scene.vault(timeout=1.0) as vault:
        eventually(lambda: _answers(scene, vault))
        scene.processes[name].send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(SlipError):
                scene.wrong(vault)
            time.sleep(2.5)  # some looks in vain
        finally:
            scene.processes[name].send_signal(signal.SIGCONT)
        eventually(lambda: _answers(scene, vault))
        said = [event for event in events(vault, address) if event != "rejoined"]
        assert len(said) <= 3, "looks in vain are not written down"
        assert vault.quarantined == {}
    ledger.record(f"healing: the only {name} stops for a while", 1, 1, 0)


def test_an_expired_certificate_is_replaced(
    scene: Scene, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each folder in turn: new handshakes fail until then, and no longer."""
    for name in (*PARTIES, "vault"):
        with scene.vault() as vault:
            wrong = scene.wrong(vault)
            with monkeypatch.context() as patch:
                past = keys.now() - timedelta(days=2)
                patch.setattr(authority, "now", lambda past=past: past)
                authority.rotate(scene.keys, name, days=1)
            eventually(lambda vault=vault: not _answers(scene, vault))  # type: ignore[misc]
            authority.rotate(scene.keys, name)
            eventually(lambda vault=vault: _answers(scene, vault))  # type: ignore[misc]
            assert vault.quarantined == {}, name
            ledger.record("healing: expired certificates are replaced", 1, 1, wrong)
