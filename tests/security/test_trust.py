"""Trust anchors and records that others can write to, and secrets on their way out of their process."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import shlex
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import families
from ledger import Ledger as Table
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.errors import CredentialError, LedgerError, SecretError, SlipError
from sliplm.masks.maskfile import Owner
from sliplm.masks.masks import Batch
from sliplm.network import authority, keys
from sliplm.parties.codec import GroupCodec
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares import sealing
from sliplm.shares.keysource import Key
from sliplm.shares.ledger import Ledger
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import VaultShare, open_vault

ROW = "trust anchors"
NOTE = "files that others write, older lists, cheap guesses, secrets copied or passed on"
SECRET = "correct-horse-battery-staple"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority.init(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.mark.parametrize("role", keys.ROLES)
@pytest.mark.parametrize("name", [keys.AUTHORITY, keys.REVOKED, keys.CERTIFICATE])
@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_anchors_that_others_can_write_are_refused(
    folder: Path, role: keys.Role, name: str, mode: int, ledger: Table
) -> None:
    path = folder / role / name
    path.chmod(mode)
    with pytest.raises(CredentialError, match=f"{name} can be written by others: chmod go-w"):
        keys.context(folder / role, role)
    path.chmod(mode & ~0o022)  # what the message says to do
    keys.context(folder / role, role)
    ledger.record(ROW, 1, 1, 0, NOTE)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_a_folder_that_others_can_write_is_refused(folder: Path, mode: int, ledger: Table) -> None:
    (folder / "vault").chmod(mode)
    with pytest.raises(CredentialError, match=r"replaced by others.*chmod go-w"):
        keys.context(folder / "vault", "vault")
    with pytest.raises(CredentialError, match="replaced by others"):
        keys.Revocations(folder / "vault")
    (folder / "vault").chmod(mode & ~0o022)
    keys.context(folder / "vault", "vault")
    ledger.record(ROW, 2, 2, 0)


def test_a_sticky_folder_will_do_for_files_of_our_own(folder: Path) -> None:
    (folder / "vault").chmod(0o1777)  # as secrets are mounted in containers
    keys.context(folder / "vault", "vault")


def test_an_older_list_unrevokes_nobody_in_a_running_process(folder: Path, ledger: Table) -> None:
    path = folder / "vault" / keys.REVOKED
    older = path.read_bytes()
    serial = authority.issued(folder)[-1].serial
    known, credentials = keys.Revocations(folder / "vault"), keys.Credentials(folder / "vault", "vault")
    authority.revoke(folder, serial)
    known.refresh()
    credentials.context()
    assert int(serial, 16) in known
    path.write_bytes(older)
    for attempt in (known.refresh, credentials.context, lambda: keys.Revocations(folder / "vault")):
        with pytest.raises(CredentialError, match="older than one that was in force"):
            attempt()
    assert int(serial, 16) in known
    shutil.copyfile(folder / "authority" / keys.REVOKED, path)  # what the message says to do
    known.refresh()
    credentials.context()
    ledger.record(ROW, 3, 3, 0)


OTHER_WORK = [
    {"memory_kib": 128}, {"iterations": 1}, {"memory_kib": 128, "iterations": 1}, {"lanes": 1},
    {"memory_kib": 1 << 20}, {"memory_kib": 1 << 20, "iterations": 16, "lanes": 16}, {"iterations": 3},
    {"memory_kib": 257}, {"memory_kib": 1 << 40}, {"iterations": 1 << 40}, {"lanes": 0}, {"lanes": None},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHER_WORK, ids=str)
def test_the_ledger_stretches_with_its_own_numbers_only(
    tmp_path: Path, other: dict[str, int], monkeypatch: pytest.MonkeyPatch, ledger: Table
) -> None:
    """Less work would be cheap to guess at; more takes memory, and makes another owner who split nothing."""
    monkeypatch.setattr(sealing, "PASSPHRASE_MEMORY_KIB", 256)  # a test need not wait
    monkeypatch.setattr(sealing, "PASSPHRASE_ITERATIONS", 2)
    owner = Key("passphrase", SECRET.encode(), "test")
    Ledger(owner, tmp_path)
    path = tmp_path / "passphrase.json"
    written = path.read_bytes()
    found = json.loads(written)
    found["argon2id"] |= other
    path.write_text(json.dumps(found))
    asked: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr("sliplm.shares.ownership.stretch", lambda *numbers: asked.append(numbers))
        with pytest.raises(LedgerError, match=r"other work than a passphrase needs|is damaged"):
            Ledger(owner, tmp_path)
    assert not asked, "refused before any memory is taken"
    path.write_bytes(written)
    Ledger(owner, tmp_path)
    ledger.record(ROW, 1, 1, 0)


@pytest.mark.parametrize("how", ["another salt", "gone"])
def test_a_ledger_whose_salt_was_changed_forgets_nobody(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, ledger: Table
) -> None:
    """Another salt names another folder: what was split would not be found, and could be split again."""
    monkeypatch.setattr(sealing, "PASSPHRASE_MEMORY_KIB", 256)
    owner = Key("passphrase", SECRET.encode(), "test")
    Ledger(owner, tmp_path).check_room()
    path, own = tmp_path / "passphrase.json", Ledger(owner, tmp_path).own
    path.unlink()
    if how == "another salt":
        Ledger(owner, tmp_path / "elsewhere")
        shutil.copyfile(tmp_path / "elsewhere" / "passphrase.json", path)
    with pytest.raises(LedgerError, match="their splits would be forgotten: cp ") as refused:
        Ledger(owner, tmp_path)
    advice = str(refused.value).partition("forgotten: ")[2].partition(";")[0]
    subprocess.run(shlex.split(advice), check=True)  # what the message says to do
    assert Ledger(owner, tmp_path).own == own
    ledger.record(ROW, 1, 1, 0)


def test_a_ledger_of_before_the_copies_is_read_and_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "PASSPHRASE_MEMORY_KIB", 256)
    owner = Key("passphrase", SECRET.encode(), "test")
    Ledger(owner, tmp_path).check_room()
    own = Ledger(owner, tmp_path).own
    (own / "passphrase.json").unlink()
    assert Ledger(owner, tmp_path).own == own
    Ledger(owner, tmp_path).check_room()
    assert (own / "passphrase.json").read_bytes() == (tmp_path / "passphrase.json").read_bytes()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("split")
    families.make("llama", place / "model")
    split(place / "model", place / "out", recipe=Recipe(rank=4, precision=12))
    return place / "out"


def test_secrets_of_the_environment_do_not_reach_the_worker(
    out: Path, monkeypatch: pytest.MonkeyPatch, ledger: Table
) -> None:
    names = ("SLIPLM_KEY", "SLIPLM_KEY_FILE", "MY_PASSPHRASE", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    for name in names:
        monkeypatch.setenv(name, SECRET)
    with LocalWorker(out / "worker") as worker:
        seen = Path(f"/proc/{worker.pid}/environ").read_bytes()
    assert b"PATH=" in seen
    assert SECRET.encode() not in seen
    ledger.record(ROW, len(names), len(names), 0)


WAYS_OUT: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "old pickle": lambda item: pickle.dumps(item, protocol=0),
    "in a dictionary": lambda item: pickle.dumps({"held": [item]}),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda item: torch.save(item, io.BytesIO()),
}


def holders(share: VaultShare) -> list[Any]:
    """One of everything that holds secrets and is easily made."""
    secrets = next(iter(share.groups.values()))
    codec = GroupCodec(secrets)
    return [
        share, secrets, codec, Batch(bytes(32), 0, 4, np.zeros((2, 3), np.uint32)),
        Owner("0" * 32, "0" * 32, bytes(32)),
        Ledger(Key("key", bytes(32), "test"), Path("/nonexistent")),
    ]  # fmt: skip


def test_what_holds_secrets_is_not_copied_or_written(out: Path, ledger: Table) -> None:
    tries = 0
    for item in holders(open_vault(out / "vault")):
        for way in WAYS_OUT.values():
            with pytest.raises(SecretError, match="holds secrets and cannot be copied or pickled"):
                way(item)
            tries += 1
    ledger.record(ROW, tries, tries, 0)


def test_a_running_model_is_not_pickled(out: Path, ledger: Table) -> None:
    with LocalWorker(out / "worker") as worker:
        model: Any = load(out / "vault", [worker.address])
        try:
            for item in (model, model.slip, reference(out).slip):
                for way in ("pickle", "deepcopy", "torch.save"):
                    with pytest.raises(SlipError):
                        WAYS_OUT[way](item)
                    ledger.record(ROW, 1, 1, 0)
        finally:
            model.slip.close()


def test_no_secret_in_what_is_shown(out: Path, ledger: Table) -> None:
    share = open_vault(out / "vault")
    texts = []
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("test of what is shown")
    logger.propagate = False
    logger.addHandler(handler)
    for item in holders(share):
        logger.warning("%r %s", item, [item])
        try:
            raise ValueError(item)  # noqa: TRY301
        except ValueError as error:
            lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
            texts.append("".join(line for line in lines if "share = " not in line))
    logger.removeHandler(handler)
    everything = "".join((stream.getvalue(), *texts, repr(share)))
    secrets = next(iter(share.groups.values()))
    for secret in (share.data_key, secrets.seed):
        assert repr(secret) not in everything
        assert secret.hex() not in everything
    ledger.record(ROW, 2 * len(texts), 2 * len(texts), 0)
