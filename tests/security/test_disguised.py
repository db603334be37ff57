"""What is no regular file in place of one: pools, keys, adapters, checkpoints and records refuse it at once.

A FIFO would be waited on for ever, a device has no end.  Each file that is read from a folder which others
may reach is put in disguise; whoever reads it then ends with a typed error, and never waits.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import families
import sliplm
from ledger import Ledger as Table
from sliplm.arithmetic.field import P, derive_key
from sliplm.errors import PoolError, SlipError
from sliplm.masks.anchor import FileAnchor
from sliplm.masks.masks import Dealt
from sliplm.masks.pool import DiskPool
from sliplm.masks.poolfolder import PoolWriter, stock
from sliplm.network import authority, keys
from sliplm.parties.audit import AuditLog
from sliplm.parties.quarantine import Quarantine
from sliplm.sensitivity.text import read_text
from sliplm.shares import sealing
from sliplm.shares.folders import wrong_folder
from sliplm.shares.keysource import Key, find
from sliplm.shares.ledger import Ledger
from sliplm.shares.recipe import Recipe

ROW = "folders: no regular file in place of one"
NOTE = "FIFOs, sockets, devices, folders, links to them or to nothing"
pytestmark = pytest.mark.timeout(120)

SPLIT, SHAPES = "5" * 32, [(3, 4), (2, 2)]
SECRET = b"pool of a test"
KINDS = ("fifo", "link to a fifo", "device", "socket", "folder", "dangling link", "link to itself")


def disguise(path: Path, kind: str, spare: Path) -> None:
    """Put something else in place of a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        fifo = spare / f"fifo {secrets.token_hex(4)}"
        os.mkfifo(fifo)
        path.symlink_to(fifo)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # the name of a socket has 107 bytes at most
        with closing(socket.socket(socket.AF_UNIX)) as bound:
            bound.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nothing" if kind == "dangling link" else path.name)


def pool_key(pool_id: str) -> bytes:
    return derive_key(SECRET.ljust(32), pool_id)


def product(group: int, fresh: Callable[[], tuple[bytes, Any]]) -> Dealt:
    _, r = fresh()
    matrix = np.arange(SHAPES[group][0] * SHAPES[group][1]).reshape(SHAPES[group])
    return Dealt((r.astype(object) @ matrix.T.astype(object) % P).astype(np.uint32))


Case = tuple[Path, list[Callable[[], Any]]]


def pool_cases(base: Path) -> list[Case]:
    pool, anchor = base / "pool", FileAnchor(base / "anchors")

    def writer() -> PoolWriter:
        return PoolWriter(pool, SPLIT, pool_key, SHAPES, anchor)

    with writer() as dealing:
        for group in range(len(SHAPES)):
            dealing.add(group, 200, product)
    folder = pool / SPLIT
    batch = sorted(folder.glob("*.masks"))[0]
    token = next(path for path in (base / "anchors").iterdir() if path.name != "lock")

    def vault() -> None:
        with DiskPool(pool, SPLIT, pool_key, SHAPES, anchor, reserve=1) as disk:
            disk.take(0, 1)

    def deal() -> None:
        with writer() as dealing:
            dealing.add(0, 1, product)

    look = lambda: stock(pool, SPLIT, pool_key, SHAPES)  # noqa: E731
    return [
        (folder / "state.json", [vault, deal, look]),
        (batch, [vault, look]),
        (folder / "vault.lock", [vault]),
        (folder / "deal.lock", [deal]),
        (token, [vault, deal]),
        (base / "anchors" / "lock", [vault, deal]),
    ]


def key_cases(base: Path) -> list[Case]:
    folder = base / "keys"
    authority.init(folder)
    party = folder / "vault"
    opened: list[Callable[[], Any]] = [lambda: keys.context(party, "vault")]
    listed: list[Callable[[], Any]] = [*opened, lambda: keys.Revocations(party)]
    signs: list[Callable[[], Any]] = [lambda: authority.issue(folder, "worker", secrets.token_hex(4))]
    secret = base / "key"
    secret.write_text("0" * 64)
    secret.chmod(0o600)
    return [
        (party / keys.KEY, opened),
        (party / keys.CERTIFICATE, opened),
        (party / keys.AUTHORITY, listed),
        (party / keys.REVOKED, listed),
        (folder / "authority" / keys.KEY, signs),
        (folder / "authority" / keys.CERTIFICATE, signs),
        (folder / "authority" / authority.ISSUED, [*signs, lambda: authority.issued(folder)]),
        (
            base / "key",
            [lambda: find(f"file:{secret}"), lambda: find(f"passphrase:file:{secret}")],
        ),
    ]


def record_cases(base: Path, kind: str) -> list[Case]:
    who = Key("passphrase", b"correct horse", "test")
    home = base / "ledger"
    Ledger(who, home).check_room()
    quarantine = Quarantine(base / "quarantine.json")
    quarantine.add("unix:/x", None, "worker", "a test")
    (base / "recipe.json").write_text("{}")
    (base / "text.txt").write_text("words")
    audit = base / "audit.jsonl"
    audit.write_text("")
    return [
        (home / "passphrase.json", [lambda: Ledger(who, home)]),
        (home / "lock", [lambda: Ledger(who, home).check_room()]),
        (quarantine.path or base, [quarantine.entries, lambda: quarantine.clear("unix:/x")]),
        (base / "recipe.json", [lambda: Recipe.read(base / "recipe.json")]),
        (base / "text.txt", [lambda: read_text(base / "text.txt")]),
        *([] if kind in ("device", "dangling link") else [(audit, [lambda: AuditLog(audit)])]),  # a wish
    ]


def check(cases: list[Case], kind: str, spare: Path, table: Table) -> None:
    spare.mkdir()
    tries = refused = 0
    for path, readers in cases:
        kept = spare / "kept"
        path.rename(kept)
        for read in readers:
            disguise(path, kind, spare)
            tries += 1
            with pytest.raises(SlipError):
                read()
            refused += 1
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        kept.rename(path)
        for read in readers:
            read()  # the very file is good
    table.record(ROW, tries, refused, 0, NOTE)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_a_pool_s_files(tmp_path: Path, kind: str, ledger: Table) -> None:
    check(pool_cases(tmp_path), kind, tmp_path / "spare", ledger)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_keys(tmp_path: Path, kind: str, ledger: Table) -> None:
    check(key_cases(tmp_path), kind, tmp_path / "spare", ledger)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_records(
    tmp_path: Path, kind: str, ledger: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "PASSPHRASE_MEMORY_KIB", 256)
    check(record_cases(tmp_path, kind), kind, tmp_path / "spare", ledger)


def test_a_batch_that_is_exchanged_while_the_pool_is_open(tmp_path: Path, ledger: Table) -> None:
    batch, _ = pool_cases(tmp_path)[1]
    (tmp_path / "spare").mkdir()
    with DiskPool(tmp_path / "pool", SPLIT, pool_key, SHAPES, FileAnchor(tmp_path / "anchors")) as disk:
        disguise(batch, "fifo", tmp_path / "spare")
        with pytest.raises(PoolError, match="no regular file"):
            disk.take(0, 1)
    ledger.record(ROW, 1, 1, 0)


def test_an_audit_file_that_becomes_a_fifo_stops_nobody(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    (tmp_path / "audit.jsonl").unlink()
    os.mkfifo(tmp_path / "audit.jsonl")
    log.write("lost", "a test")
    assert len(log.records) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("llama", tmp_path_factory.mktemp("disguised") / "model", num_hidden_layers=1)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_a_checkpoint_s_or_an_adapter_s_files(
    model: Path, tmp_path: Path, kind: str, ledger: Table
) -> None:
    adapter, mine = tmp_path / "adapter", tmp_path / "model"
    adapter.mkdir()
    shutil.copytree(model, mine)
    (mine / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copyfile(model / "model.safetensors", adapter / "adapter_model.safetensors")
    tries = 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / file).rename(tmp_path / "kept")
        disguise(adapter / file, kind, tmp_path)
        with pytest.raises(SlipError, match="adapter fr"):
            sliplm.split(model, tmp_path / "out", base=model, adapters={"fr": adapter})
        disguise(adapter / file, "dangling link", tmp_path)
        (tmp_path / "kept").rename(adapter / file)
        tries += 1
    for file in ("config.json", "model.safetensors"):
        disguise(mine / file, kind, tmp_path)
        if file == "model.safetensors":
            shutil.copyfile(model / "config.json", mine / "config.json")
            (mine / "model.safetensors.index.json").unlink()
        with pytest.raises(SlipError):
            sliplm.split(mine, tmp_path / "out")
        disguise(mine / file, "dangling link", tmp_path)
        (mine / file).unlink()
        tries += 1
    disguise(mine / "model.safetensors.index.json", kind, tmp_path)
    with pytest.raises(SlipError):
        sliplm.split(mine, tmp_path / "out")
    ledger.record(ROW, tries + 1, tries + 1, 0)


def test_a_manifest_that_is_a_fifo_holds_up_no_message(tmp_path: Path) -> None:
    (tmp_path / "vault").mkdir()
    os.mkfifo(tmp_path / "vault" / "manifest.json")
    assert wrong_folder(tmp_path / "vault", "vault") is not None
    with pytest.raises(SlipError):
        sliplm.load(tmp_path / "vault", workers=["unix:/x"])
