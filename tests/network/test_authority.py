"""The owner's authority: what it writes, who gets what, and what it takes back."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import CredentialError, InputError
from sliplm.network import authority, keys
from sliplm.shares import sealing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fresh keys."""
    authority.init(tmp_path / "keys")
    return tmp_path / "keys"


def certificate(folder: Path) -> x509.Certificate:
    """A party's certificate."""
    return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())


def revoked(folder: Path) -> set[int]:
    """The serial numbers in a folder's list."""
    return {entry.serial_number for entry in x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes())}


def test_modes_whatever_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        authority.init(tmp_path / "keys")
        authority.issue(tmp_path / "keys", "worker", "second")
        authority.rotate(tmp_path / "keys", "second")
    finally:
        os.umask(mask)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").rglob("*")}
    party = {"key.pem", "certificate.pem", "authority.pem", "revoked.pem"}
    home = {"key.pem", "certificate.pem", "issued.json", "revoked.pem"}
    for name in ("vault", "worker", "dealer", "second", "authority"):
        inside = {path.name for path in (tmp_path / "keys" / name).iterdir()}
        assert inside == (home if name == "authority" else party)
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in found.items())
    assert len(found) == 5 * 5
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_the_authority_key_goes_nowhere(folder: Path) -> None:
    secret = (folder / "authority" / "key.pem").read_bytes()
    assert all(secret != path.read_bytes() for path in folder.glob("[vwd]*/*"))


@pytest.mark.parametrize("taken", ["authority", "vault", "worker", "dealer"])
def test_keys_are_never_overwritten(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "key.pem").write_text("mine")
    with pytest.raises(CredentialError, match="never overwritten"):
        authority.init(tmp_path)
    assert (tmp_path / taken / "key.pem").read_text() == "mine"


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CredentialError, match="cannot be written"):
        authority.init(tmp_path / "file" / "keys")


@pytest.mark.parametrize("days", [0, -1, 10**6])
def test_days(tmp_path: Path, days: int) -> None:
    with pytest.raises(InputError):
        authority.init(tmp_path / "keys", days=days)
    assert not (tmp_path / "keys").exists()


def test_how_long_certificates_live(tmp_path: Path) -> None:
    authority.init(tmp_path / "keys", days=30)
    authority.issue(tmp_path / "keys", "vault", "long", days=36500)
    now = datetime.datetime.now(datetime.UTC)
    ends = {
        name: (certificate(tmp_path / "keys" / name).not_valid_after_utc - now).days
        for name in ("vault", "long", "authority")
    }
    assert ends == {"vault": 29, "long": 3649, "authority": 3649}  # none outlives the authority
    listed = x509.load_pem_x509_crl((tmp_path / "keys" / "vault" / "revoked.pem").read_bytes())
    assert listed.next_update_utc == certificate(tmp_path / "keys" / "authority").not_valid_after_utc


def test_issue_lists_and_names(folder: Path) -> None:
    for role, name in (("worker", "a"), ("dealer", "b"), ("vault", "second-vault"), ("worker", "9" * 63)):
        made = authority.issue(folder, authority.role_of(role), name)
        assert made == folder / name
        assert keys.context(made, authority.role_of(role)).own.name == name
    listed = authority.issued(folder)
    assert [(entry.name, entry.role) for entry in listed] == [
        ("vault", "vault"),
        ("worker", "worker"),
        ("dealer", "dealer"),
        ("a", "worker"),
        ("b", "dealer"),
        ("second-vault", "vault"),
        ("9" * 63, "worker"),
    ]
    for entry in listed:
        found = certificate(folder / entry.name)
        assert entry.serial == f"{found.serial_number:x}"
        assert entry.fingerprint == keys.fingerprint(found).hex()
        assert entry.not_after == found.not_valid_after_utc
        assert entry.revoked is None


@pytest.mark.parametrize("name", ["", "authority", "A", "a_b", "../a", "a/b", "a" * 64, "é", "a\n"])
def test_names_that_are_none(folder: Path, name: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="a name is"):
        authority.issue(folder, "worker", name)
    assert sorted(folder.rglob("*")) == before


@given(st.text(max_size=70))
def test_a_name_is_a_safe_folder(text: str) -> None:
    if keys.is_name(text):
        assert 1 <= len(text) <= 63
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_name_that_is_taken(folder: Path) -> None:
    with pytest.raises(CredentialError, match="slip keys rotate"):
        authority.issue(folder, "worker", "worker")
    (folder / "mine").mkdir()
    with pytest.raises(CredentialError, match="never overwritten"):
        authority.issue(folder, "worker", "mine")
    assert len(authority.issued(folder)) == 3
    shutil.rmtree(folder / "worker")  # it went to its machine: the name is taken all the same
    with pytest.raises(CredentialError, match="slip keys rotate"):
        authority.issue(folder, "vault", "worker")


def test_role_that_is_none() -> None:
    with pytest.raises(InputError, match="vault, a worker or a dealer"):
        authority.role_of("authority")


def test_revoke_reaches_everybody_here(folder: Path) -> None:
    authority.issue(folder, "worker", "away")
    shutil.rmtree(folder / "away")
    assert all(revoked(folder / name) == set() for name in ("authority", "vault", "worker"))
    number = certificate(folder / "worker").serial_number
    (gone,) = authority.revoke(folder, "worker")
    assert gone.serial == f"{number:x}"
    assert gone.revoked is not None
    assert all(revoked(folder / name) == {number} for name in ("authority", "vault", "worker"))
    assert not (folder / "away").exists()
    assert [entry.revoked is not None for entry in authority.issued(folder)] == [False, True, False, False]
    assert authority.revoke(folder, "worker") == (gone,)  # once more: the same moment, the same list
    authority.issue(folder, "worker", "later")
    assert revoked(folder / "later") == {number}


def test_revoke_by_serial(folder: Path) -> None:
    number = certificate(folder / "vault").serial_number
    (gone,) = authority.revoke(folder, f"{number:X}")
    assert gone.name == "vault"
    with pytest.raises(InputError, match="no certificate"):
        authority.revoke(folder, "nobody")


def test_rotate(folder: Path) -> None:
    old, secret = certificate(folder / "worker"), (folder / "worker" / "key.pem").read_bytes()
    made = authority.rotate(folder, "worker", days=10)
    new = certificate(folder / "worker")
    assert made.serial == f"{new.serial_number:x}"
    assert made.role == "worker"
    assert secret != (folder / "worker" / "key.pem").read_bytes()
    assert revoked(folder / "vault") == revoked(folder / "worker") == {old.serial_number}
    assert keys.context(folder / "worker", "worker").own.serial == new.serial_number
    shutil.rmtree(folder / "worker")
    authority.revoke(folder, "worker")
    authority.rotate(folder, "worker")  # also a name that is revoked, and whose folder went away
    assert len(revoked(folder / "vault")) == 2
    keys.context(folder / "worker", "worker")
    with pytest.raises(InputError, match="no certificate"):
        authority.rotate(folder, "nobody")


def interrupted(monkeypatch: pytest.MonkeyPatch, writes: int, command: Callable[[], object]) -> bool:
    """Run a command that dies before its write number `writes`; False if it came to its end."""
    left = [writes]
    real = authority.replace

    def replace(path: Path, content: bytes) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(authority, "replace", replace)
        try:
            command()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("name", ["worker", "vault"])
def test_cut_short_anywhere_and_run_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No certificate can be in use that is not listed, and the second run makes all good."""
    for writes in range(20):
        here = tmp_path / str(writes)
        authority.init(here)  # one of its own: the list of one authority only grows
        before = certificate(here / name).serial_number
        cut = interrupted(monkeypatch, writes, lambda here=here: authority.rotate(here, name))  # type: ignore[misc]
        listed = {entry.serial for entry in authority.issued(here)}
        assert f"{certificate(here / name).serial_number:x}" in listed
        authority.rotate(here, name)
        good = certificate(here / name).serial_number
        entries = {int(entry.serial, 16): entry for entry in authority.issued(here)}
        assert {number for number, entry in entries.items() if entry.name == name and not entry.revoked} == {
            good
        }
        for party in ("authority", "vault", "worker"):
            assert before in revoked(here / party) == {n for n, entry in entries.items() if entry.revoked}
        keys.context(here / name, authority.role_of(name))
        if not cut:
            return
    pytest.fail("rotate writes more files than this test knows")


@pytest.mark.parametrize(
    "damage", [None, b"", b"{}x", b'{"version": 2}', b'{"certificates": [{"name": "../x"}]}']
)
def test_damaged_register(folder: Path, damage: bytes | None) -> None:
    path = folder / "authority" / "issued.json"
    path.unlink() if damage is None else path.write_bytes(damage)
    commands: tuple[Callable[[], object], ...] = (
        lambda: authority.issued(folder),
        lambda: authority.issue(folder, "worker", "new"),
        lambda: authority.revoke(folder, "worker"),
        lambda: authority.rotate(folder, "worker"),
    )
    for command in commands:
        with pytest.raises(CredentialError, match=r"issued\.json"):
            command()
    assert not (folder / "new").exists()


def test_authority_that_cannot_sign(folder: Path, tmp_path: Path) -> None:
    key = folder / "authority" / "key.pem"
    for mode in (0o644, 0o640, 0o440, 0o620, 0o601):  # what may be mounted for a party may not be for it
        key.chmod(mode)
        with pytest.raises(CredentialError, match="signs certificates and is open to others: chmod 600 it"):
            authority.revoke(folder, "worker")
    key.chmod(0o600)
    whole = key.read_bytes()
    shutil.copyfile(folder / "vault" / "key.pem", key)
    with pytest.raises(CredentialError, match="is not the key of"):
        authority.revoke(folder, "worker")
    key.write_bytes(b"-----BEGIN PRIVATE KEY-----")
    with pytest.raises(CredentialError, match="cannot be used") as caught:
        authority.revoke(folder, "worker")
    assert "BEGIN" not in str(caught.value)
    key.write_bytes(whole)
    with pytest.raises(CredentialError, match="not a key folder"):
        authority.revoke(tmp_path, "worker")
    authority.revoke(folder, "worker")


def test_two_commands_at_once(folder: Path) -> None:
    with authority._open(folder), pytest.raises(CredentialError, match="try again"):
        authority.revoke(folder, "worker")
    authority.revoke(folder, "worker")


def test_no_secret_in_repr(folder: Path) -> None:
    with authority._open(folder) as signer:
        assert repr(signer).endswith("key hidden)")


# the command line


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`slip keys`, in its own process."""
    command = [sys.executable, "-m", "sliplm", "keys", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert json.loads(run("init", folder, "--json").stdout)["vault"] == str(folder / "vault")
    done = run("issue", folder, "second", "--role", "worker", "--json")
    assert json.loads(done.stdout) == {"name": "second", "role": "worker", "folder": str(folder / "second")}
    keys.context(folder / "second", "worker")
    rotated = json.loads(run("rotate", folder, "second", "--json").stdout)
    assert (rotated["name"], rotated["revoked"]) == ("second", None)
    gone = json.loads(run("revoke", folder, rotated["serial"], "--json").stdout)["revoked"]
    assert [entry["serial"] for entry in gone] == [rotated["serial"]]
    entries = json.loads(run("list", folder, "--json").stdout)["certificates"]
    assert [(entry["name"], entry["revoked"] is None) for entry in entries] == [
        ("vault", True), ("worker", True), ("dealer", True), ("second", False), ("second", False),
    ]  # fmt: skip
    table = run("list", folder).stdout
    assert table.count("revoked") == 2 and table.count("good") == 3
    again = run("issue", folder, "second", "--json")
    assert again.returncode == 2
    assert json.loads(again.stdout)["error"] == "CredentialError"
    assert run("issue", folder, "new", "--role", "king").returncode == 2


def test_reseal(tmp_path: Path) -> None:
    old, new = bytes(32), bytes(range(32))
    data_key = sealing.make_seal(tmp_path, old)
    sealing.seal_manifest(tmp_path, data_key, b"{}")
    command = [sys.executable, "-m", "sliplm", "keys", "reseal", str(tmp_path)]
    command += ["--key", "env:OLD", "--new-key", "env:NEW", "--json"]
    environment = os.environ | {"OLD": old.hex(), "NEW": new.hex()}
    for status in (0, 2):  # the second time the old key is no longer the one
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        assert done.returncode == status
        assert new.hex() not in done.stdout + done.stderr
    assert json.loads(done.stdout)["error"] == "SealError"
    assert sealing.open_seal(tmp_path, new) == data_key
