"""Who lied stays out when the vault's process ends: by address and by key, until the owner says otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import sliplm
from families import make
from ledger import Ledger
from sliplm.errors import InputError, SlipError, VerificationError
from sliplm.network import authority
from sliplm.network.transport import Connection
from sliplm.parties.quarantine import Quarantine, plain
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol.worker_side import Deal, Multiply, WorkerSide
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker

Shares = tuple[VaultShare, WorkerShare]

# a vault in a process of its own: exit status 0 when the worker served, 3 when it stayed out
ANEW = """
import sys
from pathlib import Path
import numpy as np
from sliplm.errors import VerificationError
from sliplm.parties.quarantine import Quarantine
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.shares.share import open_vault, open_worker
out, record, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
try:
    with Vault(open_vault(out / "vault"), Terms([address], open_worker(out / "worker"), ahead=0,
               quarantine=Quarantine(record))) as vault:
        name = vault.groups[0]
        vault.product(name, np.ones((1, vault._codecs[0].n), np.float32))
except VerificationError as error:
    print(error)
    sys.exit(3)
"""


class Liar(Worker):
    """Lies as long as it is told to."""

    lies = True
    asked = 0

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        self.asked += 1
        matrix = self._matrices[asked.group]
        if self.lies:
            self._matrices[asked.group] = _Off(matrix)  # type: ignore[call-overload]
        try:
            super()._answer(connection, side, asked)
        finally:
            self._matrices[asked.group] = matrix


class _Off:
    """A matrix whose products are wrong by one."""

    def __init__(self, matrix: object) -> None:
        self._matrix = matrix

    def __getattr__(self, name: str) -> object:
        return getattr(self._matrix, name)

    def product(self, x: np.ndarray, *args: object, **named: object) -> np.ndarray:
        y: np.ndarray = self._matrix.product(x, *args, **named)  # type: ignore[attr-defined]
        y[0, 0] ^= 1
        return y


@contextmanager
def serving(worker: Worker, place: str, keys: Path | None = None) -> Iterator[str]:
    found: list[str] = []
    ready = threading.Event()

    def listening(address: str) -> None:
        found.append(address)
        ready.set()

    thread = threading.Thread(target=worker.serve, args=(place, keys, listening))
    thread.start()
    try:
        assert ready.wait(60)
        yield found[0]
    finally:
        worker.stop()
        thread.join(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("quarantine")
    sliplm.split(make("llama", base / "model"), base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def shares(folder: Path) -> Shares:
    return open_vault(folder / "vault"), open_worker(folder / "worker")


def use(shares: Shares, address: str, record: Path) -> None:
    """A vault of its own, and one product."""
    terms = Terms([address], shares[1], ahead=0, quarantine=Quarantine(record))
    with Vault(shares[0], terms) as vault:
        vault.product(vault.groups[0], np.ones((1, vault._codecs[0].n), np.float32))


def anew(folder: Path, record: Path, address: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", ANEW, str(folder), str(record), address]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


def test_a_liar_stays_out_of_the_next_process(
    folder: Path, shares: Shares, tmp_path: Path, ledger: Ledger
) -> None:
    record, worker = tmp_path / "state" / "quarantine.json", Liar(shares[1], threads=1)
    with serving(worker, f"unix:{tmp_path / 'w'}") as address:
        with pytest.raises(VerificationError, match="is wrong"):
            use(shares, address, record)
        worker.lies, asked = False, worker.asked
        later = anew(folder, record, address)
        assert later.returncode == 3, later.stderr
        assert f"slip quarantine clear {address}" in later.stdout
        other = anew(folder, record, f"unix:{tmp_path}/./w")
        ledger.record(
            "quarantine: a liar asked by a later process",
            2,
            (later.returncode == 3) + (other.returncode == 3),
            worker.asked - asked,
        )
        assert other.returncode == 3, "by another way to the same socket"
        assert worker.asked == asked
        assert Quarantine(record).clear(address)
        assert anew(folder, record, address).returncode == 0
    assert record.stat().st_mode & 0o777 == 0o600


def test_a_liar_is_known_by_its_key_elsewhere(shares: Shares, tmp_path: Path, ledger: Ledger) -> None:
    authority.init(tmp_path / "keys")
    record, keys = tmp_path / "quarantine.json", f"?keys={tmp_path / 'keys' / 'vault'}"
    with serving(Liar(shares[1], threads=1), "127.0.0.1:0", tmp_path / "keys" / "worker") as address:
        with pytest.raises(VerificationError, match="is wrong"):
            use(shares, address + keys, record)
    moved = Liar(shares[1], threads=1)
    moved.lies = False
    with serving(moved, "127.0.0.1:0", tmp_path / "keys" / "worker") as elsewhere:
        with pytest.raises(VerificationError, match="shows the key of"):
            use(shares, elsewhere + keys, record)
        ledger.record("quarantine: a liar that moved to another address", 1, moved.asked == 0, moved.asked)
        assert moved.asked == 0
        assert len(Quarantine(record).entries()) == 1
        assert Quarantine(record).clear(address)
        use(shares, elsewhere + keys, record)


def test_rejoin_trusts_it_again_for_good(shares: Shares, tmp_path: Path) -> None:
    record, worker = tmp_path / "quarantine.json", Liar(shares[1], threads=1)
    honest = Worker(shares[1], threads=1)
    with serving(worker, f"unix:{tmp_path / 'a'}") as bad, serving(honest, f"unix:{tmp_path / 'b'}") as good:
        terms = Terms([bad, good], shares[1], ahead=0, quarantine=Quarantine(record))
        with Vault(shares[0], terms) as vault:
            vault.product(vault.groups[0], np.ones((1, vault._codecs[0].n), np.float32))
            assert list(vault.quarantined) == [bad]
        worker.lies = False
        with Vault(shares[0], terms) as vault:
            assert list(vault.quarantined) == [bad], "remembered, while the other serves"
            vault.rejoin(bad)
            assert not vault.quarantined
        assert Quarantine(record).entries() == []


def test_what_may_be_the_owners_slip_is_not_kept(folder: Path, shares: Shares, tmp_path: Path) -> None:
    """A worker of another split, and something that is no worker, at the address."""
    sliplm.split(make("gpt2", tmp_path / "model"), tmp_path / "out")
    record = tmp_path / "quarantine.json"
    with serving(
        Worker(open_worker(tmp_path / "out" / "worker"), threads=1), f"unix:{tmp_path / 'w'}"
    ) as address:
        with pytest.raises(SlipError):
            use(shares, address, record)
    with serving(Worker(shares[1], threads=1), f"unix:{tmp_path / 'w'}") as address:
        use(shares, address, record)
    assert not record.exists()


def test_a_damaged_record_trusts_nobody(shares: Shares, tmp_path: Path) -> None:
    record = tmp_path / "quarantine.json"
    with serving(Worker(shares[1], threads=1), f"unix:{tmp_path / 'w'}") as address:
        for content in (b"{", b"[1]", b'[{"address": "x"}]', b"\xff", b""):
            record.write_bytes(content)
            with pytest.raises(InputError, match="damaged"):
                use(shares, address, record)
        record.unlink()
        use(shares, address, record)


def test_the_command_lists_and_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from sliplm.cli import app

    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "state"))
    own = Quarantine.own()
    own.add("gpu.example:7400?keys=/somewhere", b"\1" * 32, "worker", "its product is wrong")
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["quarantine", "list", "--json"]).stdout)
    assert [entry["address"] for entry in listed["quarantined"]] == ["gpu.example:7400"]
    assert "gpu.example:7400" in runner.invoke(app, ["quarantine", "list"]).stdout
    assert runner.invoke(app, ["quarantine", "clear", "gpu.example:7400"]).exit_code == 0
    assert own.entries() == []
    assert isinstance(runner.invoke(app, ["quarantine", "clear", "gpu.example:7400"]).exception, InputError)
    assert plain("unix:/a/b") == "unix:/a/b"
