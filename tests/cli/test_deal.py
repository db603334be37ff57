"""`slip deal`: tops up, refuses what does not fit, keeps whole batches; its masks serve a vault."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sliplm
from families import make
from sliplm.cli import app
from sliplm.cli.deal import _bytes
from sliplm.errors import InputError, MaskError, MismatchError, PoolError
from sliplm.masks.anchor import FileAnchor, file_anchor
from sliplm.masks.pool import DiskPool
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.shares.share import open_vault, open_worker
from test_vault import serving


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("deal")
    sliplm.split(make("llama", base / "model", num_hidden_layers=1), base / "out")
    return base / "out"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "state"))


def slip(*words: object) -> str:
    result = CliRunner().invoke(app, ["deal", *map(str, words)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def ready(out: Path, pool: Path) -> list[int]:
    document = json.loads(slip(out / "vault", pool, "--status", "--json"))
    return [group["ready"] for group in document["groups"]]


def disk_pool(out: Path, pool: Path, **options: int) -> DiskPool:
    share = open_vault(out / "vault")
    shapes = [(secrets.m, secrets.n) for secrets in share.groups.values()]
    return DiskPool(pool, share.split_id, share.pool_key, shapes, file_anchor(), **options)


def test_a_vault_computes_with_dealt_masks(out: Path, tmp_path: Path) -> None:
    slip(out / "vault", tmp_path / "pool", "--tokens", 30)
    share, worker = open_vault(out / "vault"), open_worker(out / "worker")
    local = LocalProducts(share, worker)
    with (
        serving(Worker(worker, threads=1), tmp_path / "w") as address,
        disk_pool(out, tmp_path / "pool") as pool,
        Vault(share, Terms([address], pool=pool)) as vault,
    ):
        rng = np.random.default_rng(0)
        for _ in range(3):
            for name, secrets in share.groups.items():
                x = rng.standard_normal((10, secrets.n)).astype(np.float32)
                assert np.array_equal(vault.product(name, x), local.product(name, x))
        with pytest.raises(MaskError):
            vault.product(name, x)


def test_it_tops_up(out: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert "masks for 20 tokens are ready" in slip(out / "vault", pool, "--tokens", 20)
    files = sorted(pool.rglob("*.masks"))
    slip(out / "vault", pool, "--tokens", 15)
    assert sorted(pool.rglob("*.masks")) == files
    slip(out / "vault", pool, "--tokens", 25)
    assert set(ready(out, pool)) == {25}
    with disk_pool(out, pool, reserve=8) as masks:
        masks.take(0, 8)
        slip(out / "vault", pool, "--tokens", 25, "--share", out / "worker")
    assert set(ready(out, pool)) == {25}


def test_what_does_not_fit_is_not_begun(out: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    slip(out / "vault", pool, "--tokens", 3)
    with pytest.raises(
        PoolError, match=r"the limit leaves room for .*about \d+ tokens fit; nothing was dealt"
    ):
        slip(out / "vault", pool, "--tokens", 1000, "--limit", "1M")
    with pytest.raises(PoolError, match=r"the disk has room for .*nothing was dealt"):
        slip(out / "vault", pool, "--tokens", 10**11)
    assert set(ready(out, pool)) == {3}
    slip(out / "vault", pool, "--tokens", 100, "--limit", "1M")


def test_ctrl_c_leaves_whole_batches(out: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    command = [sys.executable, "-m", "sliplm", "deal", str(out / "vault"), str(pool), "--tokens", "2000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while len(list(pool.rglob("*.masks"))) < 12 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert not list(pool.rglob("*.part"))
    there = ready(out, pool)
    assert min(there) >= 1024
    slip(out / "vault", pool, "--tokens", max(there))
    assert set(ready(out, pool)) == {max(there)}


def test_an_anchor_of_the_owners_choice(out: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sliplm.masks.anchor import FileAnchor\n"
        f"pool, old, new = sys.argv[1:]; place = FileAnchor(Path({str(tmp_path / 'elsewhere')!r}))\n"
        "sys.exit(0 if place.swap(pool, None if old == '-' else old, new) else 3)\n"
    )
    (tmp_path / "anchor.py").write_text(code)
    anchor = ["--anchor", f"{sys.executable} {tmp_path / 'anchor.py'}"]
    slip(out / "vault", tmp_path / "pool", "--tokens", 2, *anchor)
    slip(out / "vault", tmp_path / "pool", "--tokens", 3, *anchor)
    with pytest.raises(PoolError, match="its anchor is another one"):
        slip(out / "vault", tmp_path / "pool", "--tokens", 4)
    share = open_vault(out / "vault")
    shapes = [(secrets.m, secrets.n) for secrets in share.groups.values()]
    place = FileAnchor(tmp_path / "elsewhere")
    with DiskPool(tmp_path / "pool", share.split_id, share.pool_key, shapes, place) as masks:
        assert masks.available(0) == 3


def test_what_is_no_order(out: Path, tmp_path: Path) -> None:
    for words in ([], ["--tokens", 3, "--status"]):
        with pytest.raises(InputError, match="--tokens 10000, or"):
            slip(out / "vault", tmp_path / "pool", *words)
    with pytest.raises(InputError, match="--limit lots"):
        slip(out / "vault", tmp_path / "pool", "--tokens", 1, "--limit", "lots")
    with pytest.raises(PoolError, match="holds no pool"):
        slip(out / "vault", tmp_path / "pool", "--status")
    assert [_bytes(text) for text in ("5", "2k", "1.5 MB", "20G", "1T")] == [
        5, 2000, 1_500_000, 20 * 10**9, 10**12,
    ]  # fmt: skip


def test_another_splits_share_deals_nothing(out: Path, tmp_path: Path) -> None:
    sliplm.split(out.parent / "model", tmp_path / "other")
    with pytest.raises(MismatchError):
        slip(out / "vault", tmp_path / "pool", "--tokens", 1, "--share", tmp_path / "other" / "worker")
    assert not (tmp_path / "pool").exists()


def test_the_record_says_how_much_was_dealt_here(out: Path, tmp_path: Path) -> None:
    pool, audit = tmp_path / "pool", tmp_path / "audit.jsonl"
    slip(out / "vault", pool, "--tokens", 2, "--audit", audit)
    slip(out / "vault", pool, "--tokens", 2, "--audit", audit)  # nothing is missing
    (event,) = [json.loads(line) for line in audit.read_text().splitlines()]
    rows = 2 * len(open_vault(out / "vault").groups)
    assert (event["event"], event["role"], event["peer"]) == ("dealt", "vault", None)
    assert event["reason"].startswith(f"{rows} rows into {pool}") and "this machine" in event["reason"]
