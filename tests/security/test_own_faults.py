"""Faults of our own attester, verifier or certificate make nobody guilty, say whose they are, and pass."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from ledger import Ledger
from sliplm import places
from sliplm.cli import app
from sliplm.errors import (
    AttestationError,
    InputError,
    OwnEvidenceError,
    PassingCredentialError,
    PlaceError,
    SlipError,
    WorkerFault,
    WorkerUnavailable,
)
from sliplm.network import authority, keys
from sliplm.network.attestation import MAX_EVIDENCE, SoftwareAttester, SoftwareVerifier
from sliplm.parties.quarantine import Quarantine
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from test_vault import Logging, Shares, folder, group, inputs, serving, shares
from test_workforce import eventually, quick

__all__ = ["folder", "group", "quick", "shares"]

ROW = "quarantine: faults of our own"
pytestmark = pytest.mark.usefixtures("quick")
OURS, THEIRS = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def missing_command() -> bytes:
    return subprocess.run(["/nonexistent/attester"], capture_output=True, check=True).stdout


def slow_command() -> bytes:
    return subprocess.run(["sleep", "30"], capture_output=True, check=True, timeout=0.05).stdout


def failing_command() -> bytes:
    return subprocess.run(["false"], capture_output=True, check=True).stdout


def no_descriptors() -> bytes:
    raise OSError(errno.EMFILE, "Too many open files")


def refusing() -> bytes:
    raise AttestationError("the machine's service gives no quote")


def nothing() -> Any:
    return None


FAULTS: list[Callable[[], Any]] = [
    missing_command, slow_command, failing_command, no_descriptors, refusing, nothing,
    lambda: bytes(MAX_EVIDENCE + 1), lambda: 1 / 0, lambda: 1000,
]  # fmt: skip


class Moody:
    """An attester that is good, or fails in one of these ways."""

    def __init__(self, good: SoftwareAttester) -> None:
        self.good = good
        self.fails: Callable[[], Any] | None = None

    def evidence(self, binding: bytes) -> bytes:
        return self.good.evidence(binding) if self.fails is None else self.fails()


class Judge:
    """A verifier that is good, or fails."""

    def __init__(self, good: SoftwareVerifier) -> None:
        self.good = good
        self.fails: Callable[[], Any] | None = None

    def verify(self, evidence: bytes, binding: bytes) -> None:
        self.good.verify(evidence, binding)
        if self.fails is not None:
            self.fails()


def fail_and_heal(
    vault: Vault, name: str, x: np.ndarray, party: Any, fault: Callable[[], Any]
) -> tuple[SlipError, str]:
    """The error of a request while a party's fault lasts, and how the worker stood; then it is put right."""
    expected = vault.product(name, x)
    party.fails = fault
    vault._workers.links[0].rest(WorkerUnavailable, "a new connection")
    vault._workers.links[0].admit()
    with pytest.raises(SlipError) as caught:
        vault.product(name, x)
    state = vault.workers[0].state
    assert not vault.quarantined
    party.fails = None
    if state == "suspended":
        eventually(lambda: vault.workers[0].state == "up")
    assert np.array_equal(vault.product(name, x), expected)
    assert vault.workers[0].state == "up"
    return caught.value, state


@pytest.mark.parametrize(
    "which", ["vault's attester", "vault's verifier", "worker's attester", "worker's verifier"]
)
def test_a_fault_of_an_attester_or_a_verifier_passes(
    shares: Shares, group: str, tmp_path: Path, which: str, ledger: Ledger
) -> None:
    worker, record = Logging(shares[1]), tmp_path / "quarantine.json"
    mine, yours = Moody(SoftwareAttester(OURS, b"v")), Moody(SoftwareAttester(THEIRS, b"w"))
    judges = (
        Judge(SoftwareVerifier(THEIRS.public_key(), [b"w"])),
        Judge(SoftwareVerifier(OURS.public_key(), [b"v"])),
    )
    worker._attester, worker._verifier = yours, judges[1]
    party = {
        "vault's attester": mine, "vault's verifier": judges[0],
        "worker's attester": yours, "worker's verifier": judges[1],
    }[which]  # fmt: skip
    faults = [fault for fault in FAULTS if "attester" in which or fault in FAULTS[:4]]
    x = inputs(shares, group, 1)
    with serving(worker, tmp_path / "w") as address:
        terms = Terms(
            [address], shares[1], ahead=0, attester=mine, verifier=judges[0], quarantine=Quarantine(record)
        )
        with Vault(shares[0], terms) as vault:
            for fault in faults:
                error, state = fail_and_heal(vault, group, x, party, fault)
                kinds = {"vault's attester": OwnEvidenceError, "vault's verifier": PassingCredentialError}
                assert isinstance(error, kinds.get(which, WorkerFault)), fault
                assert state == ("lost" if which in kinds else "suspended")
                assert ("our own evidence" in str(error)) == (which == "vault's attester")
    assert not record.exists()
    ledger.record(ROW, len(faults), len(faults), 0, "attester, verifier, certificate: nobody is quarantined")


def test_a_peer_that_does_not_take_our_evidence_is_asked_again_later(
    shares: Shares, group: str, tmp_path: Path, ledger: Ledger
) -> None:
    """An old measurement of ours; then its owner allows it."""
    worker = Logging(shares[1])
    worker._attester = SoftwareAttester(THEIRS, b"w")
    worker._verifier = SoftwareVerifier(OURS.public_key(), [b"newer"])
    judge = SoftwareVerifier(THEIRS.public_key(), [b"w"])
    record, good = tmp_path / "quarantine.json", Logging(shares[1])
    good._attester = worker._attester
    with serving(worker, tmp_path / "w") as address, serving(good, tmp_path / "g") as other:
        terms = Terms(
            [address, other], shares[1], ahead=0, attester=SoftwareAttester(OURS, b"older"), verifier=judge,
            quarantine=Quarantine(record),
        )  # fmt: skip
        with Vault(shares[0], terms) as vault:
            assert vault.workers[0].state == "lost" and "refuses (evidence)" in vault.workers[0].reason
            vault.product(group, inputs(shares, group, 1))
            worker._verifier = SoftwareVerifier(OURS.public_key(), [b"older"])
            eventually(lambda: vault.workers[0].state == "up")
    assert not record.exists()
    ledger.record(ROW, 1, 1, 0)


# --- our certificate ---------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from sliplm.parties.worker import run
run(Path(sys.argv[1]), "127.0.0.1:0", Path(sys.argv[2]), json_ready=True, threads=1)
"""


@pytest.fixture(scope="module")
def far(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A worker in a process of its own, and the folder of all keys."""
    root = tmp_path_factory.mktemp("far") / "keys"
    authority.init(root)
    command = [sys.executable, "-c", RUN, str(folder / "worker"), str(root / "worker")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["listening"], root
        finally:
            process.terminate()


def unknown(root: Path, mine: Path) -> None:
    """Our certificate is another authority's."""
    authority.init(root.parent / "others")
    for name in (keys.CERTIFICATE, keys.KEY):
        shutil.copyfile(root.parent / "others" / "vault" / name, mine / name)


def revoked(root: Path, mine: Path) -> None:
    """Our certificate is revoked there, and our list is an older one."""
    authority.issue(root, "vault", "old")
    for name in (keys.CERTIFICATE, keys.KEY):
        shutil.copyfile(root / "old" / name, mine / name)
    list_here = (root / "vault" / keys.REVOKED).read_bytes()
    authority.revoke(root, "old")
    (mine / keys.REVOKED).write_bytes(list_here)


def bad_purpose(root: Path, mine: Path) -> None:
    """Our certificate says vault, and is for servers."""
    usage = authority._USAGE["vault"]
    authority._USAGE["vault"] = ExtendedKeyUsageOID.SERVER_AUTH
    try:
        authority.issue(root, "vault", "odd")
    finally:
        authority._USAGE["vault"] = usage
    for name in (keys.CERTIFICATE, keys.KEY):
        shutil.copyfile(root / "odd" / name, mine / name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(unknown, "unknown ca.*one `slip keys init`"), (bad_purpose, "certificate.*key folder of our role"),
     (revoked, "revoked.*slip keys rotate")],
)  # fmt: skip
def test_a_peer_that_refuses_our_certificate_is_not_guilty(
    far: tuple[str, Path], shares: Shares, group: str, tmp_path: Path, ledger: Ledger,
    spoil: Callable[[Path, Path], None], said: str,
) -> None:  # fmt: skip
    """It is named, the error says that ours is wrong, and all is well when ours is put right."""
    address, root = far
    mine, record = tmp_path / "mine", tmp_path / "quarantine.json"
    shutil.copytree(root / "vault", mine)
    x = inputs(shares, group, 1)
    terms = Terms([f"{address}?keys={mine}"], shares[1], ahead=0, quarantine=Quarantine(record))
    with Vault(shares[0], terms) as vault:
        expected = vault.product(group, x)
        spoil(root, mine)
        vault._workers.links[0].rest(WorkerUnavailable, "a new connection")
        vault._workers.links[0].admit()
        with pytest.raises(PassingCredentialError, match=f"{address} refuses our certificate .*{said}"):
            vault.product(group, x)
        assert vault.workers[0].state == "lost" and not vault.quarantined
        for name in (keys.CERTIFICATE, keys.KEY, keys.REVOKED):
            shutil.copyfile(root / "vault" / name, mine / name)
        assert np.array_equal(vault.product(group, x), expected)
        assert vault.workers[0].state == "up"
    assert not record.exists()
    ledger.record(ROW, 1, 1, 0)


def test_a_folder_of_another_role_is_an_error_of_ours(far: tuple[str, Path], shares: Shares) -> None:
    address, root = far
    with pytest.raises((PassingCredentialError, InputError), match="does not hold a vault's certificate"):
        Vault(shares[0], Terms([f"{address}?keys={root / 'worker'}"], shares[1], ahead=0))


# --- the record of liars without a place ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["SLIPLM_HOME", "SLIPLM_STATE", "home", "none", "read-only"])
def test_the_record_of_liars_lies_where_things_lie_or_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in places.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(places, "home", lambda: tmp_path if place == "home" else None)
    if place.startswith("SLIPLM"):
        monkeypatch.setenv(place, str(tmp_path))
    if place == "read-only":
        (tmp_path / "a file").touch()
        monkeypatch.setenv("SLIPLM_HOME", str(tmp_path / "a file"))  # root writes to all folders
    expected = {
        "SLIPLM_HOME": "state/anchors/", "SLIPLM_STATE": "", "home": ".local/state/sliplm/anchors/",
    }.get(place)  # fmt: skip
    own = Quarantine.own()
    if place == "read-only":
        with pytest.raises(InputError, match="cannot be read"):
            own.entries()
    own.add("unix:/x", None, "worker", "a test")
    if expected is None:
        said = {"none": "is forgotten when this process ends", "read-only": "cannot be"}[place]
        assert said in caplog.text
    else:
        assert own.path == tmp_path / f"{expected}quarantine.json"
        assert [entry.address for entry in Quarantine.own().entries()] == ["unix:/x"]
    if place == "none":
        assert own.entries() == []
        for words in (["list"], ["clear", "unix:/x"]):
            assert isinstance(CliRunner().invoke(app, ["quarantine", *words]).exception, PlaceError)
