"""A worker share that several workers hold together: real processes; some die, lie or are strangers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.load import open as open_split
from sliplm.engines.transformers.resealing import reseal
from sliplm.engines.transformers.thief import thief
from sliplm.errors import (
    MismatchError,
    RecipeError,
    ShareError,
    SlipError,
    VerificationError,
    WorkerUnavailable,
)
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.local_worker import LocalWorker
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol.vault_side import VaultSide
from sliplm.shares.manifest import MAX_GROUPS, ShardOf
from sliplm.shares.shards import balanced, open_all, own_shard, shards_of
from sliplm.shares.share import MANIFEST, SHARE, open_vault, open_worker, read_vault_manifest
from test_cli import ENV, SLIP, last_json, run_here, slip
from test_vault import Rogue, add, serving

IDS = torch.tensor([[1, 7, 42, 100, 5]])


class Scene(NamedTuple):
    """A model, a split of it in two shards, and a worker process of each twice: 1, 1, 2, 2."""

    model: Path
    out: Path
    workers: list[LocalWorker]

    @property
    def addresses(self) -> list[str]:
        return [worker.address for worker in self.workers]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make_with_tokenizer("llama", tmp_path_factory.mktemp("shards") / "model")


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    split(model, model.parent / "out", shards=2)
    return model.parent / "out"


@contextmanager
def running(*shares: Path) -> Iterator[list[LocalWorker]]:
    """A process for each."""
    with ExitStack() as stack:
        yield [stack.enter_context(LocalWorker(share, threads=1)) for share in shares]


@pytest.fixture(scope="module")
def scene(model: Path, out: Path) -> Iterator[Scene]:
    with running(*[out / f"worker-{number}" for number in (1, 1, 2, 2)]) as workers:
        yield Scene(model, out, workers)


def greedy(model: Any, tokens: int = 12) -> list[int]:
    found: list[int] = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=tokens, do_sample=False
    )[0].tolist()
    return found


def test_greedy_text_is_that_of_the_split_in_one_piece(scene: Scene, tmp_path: Path) -> None:
    """Against a public base both splits have the same integers: the same bits come out."""
    split(scene.model, tmp_path / "one", base=scene.model)
    split(scene.model, tmp_path / "two", base=scene.model, shards=2)
    one, two = (read_vault_manifest(tmp_path / name / "vault") for name in ("one", "two"))
    assert one.split_id != two.split_id
    whole, parts = open_worker(tmp_path / "one" / "worker"), open_all(open_vault(tmp_path / "two" / "vault"))
    assert all(np.array_equal(whole.matrices[name], parts.matrices[name]) for name in whole.names)
    with open_split(tmp_path / "one") as unsharded, open_split(tmp_path / "two") as sharded:
        assert greedy(sharded) == greedy(unsharded)
        assert torch.equal(sharded(IDS).logits, unsharded(IDS).logits)


def test_two_shards_of_two_replicas_are_the_quantised_model(scene: Scene) -> None:
    """Bit for bit; each group is asked of those that hold it."""
    expected = reference(scene.out)
    with load(scene.out / "vault", scene.addresses) as hybrid:
        assert torch.equal(hybrid(IDS).logits, expected(IDS).logits)
        assert greedy(hybrid) == greedy(expected)
        assert [status.shard for status in hybrid.slip.workers] == [
            "worker-1",
            "worker-1",
            "worker-2",
            "worker-2",
        ]
        served = [status.served for status in hybrid.slip.workers]
        assert hybrid.slip.counters.retries == 0
        counts = [shard.groups for shard in shards_of(read_vault_manifest(scene.out / "vault"))]
        assert (served[0] + served[1]) * counts[1] == (served[2] + served[3]) * counts[0]


def test_a_replica_that_is_killed_costs_nothing(scene: Scene) -> None:
    """In the middle of a text; when the other one dies too, the error names the shard."""
    expected = greedy(reference(scene.out))
    with running(scene.out / "worker-2", scene.out / "worker-2") as (first, second):
        with load(scene.out / "vault", [scene.addresses[0], first.address, second.address]) as hybrid:
            state = {"left": 30}

            def killing(*_: object) -> None:
                state["left"] -= 1
                if state["left"] == 0:
                    victim = max((first, second), key=lambda worker: served(hybrid, worker.address))
                    os.kill(victim.pid, signal.SIGKILL)

            handle = hybrid.model.layers[0].register_forward_hook(killing)
            state["left"] = 4  # tokens
            assert greedy(hybrid) == expected
            handle.remove()
            assert hybrid.slip.counters.retries == 1
            assert sorted(status.state for status in hybrid.slip.workers) == ["lost", "up", "up"]
            for worker in (first, second):
                worker.close()
            with pytest.raises(WorkerUnavailable, match="no worker serves for shard worker-2 now"):
                hybrid(IDS)
            assert not hybrid.slip.serves


def served(hybrid: Any, address: str) -> int:
    return next(status.served for status in hybrid.slip.workers if status.address == address)


def test_a_lying_shard_is_caught_and_its_replica_serves(scene: Scene, tmp_path: Path) -> None:
    liar = Rogue(open_worker(scene.out / "worker-1"), add(1))
    expected = reference(scene.out)(IDS).logits
    with serving(liar, tmp_path / "liar") as address:
        with load(scene.out / "vault", [address, *scene.addresses[1:3]]) as hybrid:
            for _ in range(3):  # whoever served last is asked first: the liar's turn may come late
                hybrid.slip._workers._members[0].last = 1 << 30
                assert torch.equal(hybrid(IDS).logits, expected)
            assert list(hybrid.slip.quarantined) == [address]
        with pytest.raises(VerificationError, match=r"shard worker-1 .*wrong"):
            with load(scene.out / "vault", [address, scene.addresses[2]]) as hybrid:
                hybrid(IDS)


def test_strangers_are_refused_with_what_is_wrong(scene: Scene, tmp_path: Path) -> None:
    """An altered manifest, a shard of another split, and one that answers for another."""
    altered = tmp_path / "altered"
    shutil.copytree(scene.out / "worker-2", altered)
    text = json.loads((altered / MANIFEST).read_text())
    (altered / MANIFEST).write_text(json.dumps(text, indent=1))
    split(scene.model, tmp_path / "other", shards=2, i_know=True)
    good = scene.addresses[0]
    with running(altered, tmp_path / "other" / "worker-2") as (bad, other):
        with pytest.raises(MismatchError, match=r"worker-2 .*none of the 2 shards that the vault's manifest"):
            load(scene.out / "vault", [good, bad.address])
        with pytest.raises(MismatchError, match=r"worker-2 .*this worker holds split"):
            load(scene.out / "vault", [good, other.address])
        with load(scene.out / "vault", [good, bad.address, scene.addresses[3]]) as hybrid:
            assert list(hybrid.slip.quarantined) == [bad.address]
            assert greedy(hybrid, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 1, "shards": 2, "first": 0}, "none of the 2 shards"),
        ({"number": 3, "shards": 2, "first": 4}, "do not agree"),
        ({"number": 2, "shards": 2, "first": 0}, "do not agree"),
        (None, "is not a valid manifest|none of the 2 shards|holds split"),
    ],
)
def test_a_shard_that_says_it_is_another_is_a_stranger(
    scene: Scene, tmp_path: Path, change: dict[str, int] | None, message: str
) -> None:
    """Without a running worker: what its manifest says, and what the vault makes of what it would show."""
    shutil.copytree(scene.out / "worker-2", tmp_path / "w")
    manifest = json.loads((tmp_path / "w" / MANIFEST).read_text())
    manifest["shard"] = change
    (tmp_path / "w" / MANIFEST).write_text(json.dumps(manifest))
    known = read_vault_manifest(scene.out / "vault")
    shapes = [(group.rows, group.columns) for group in known.groups]

    def shown() -> None:
        from sliplm.protocol.worker_side import WorkerSide

        share = open_worker(tmp_path / "w")
        worker = WorkerSide(share.split_id, [share.matrices[n].shape for n in share.names], own_shard(share))
        vault = VaultSide(known.split_id, shapes, shards=shards_of(known))
        hello = vault.hello(bytes(32))
        worker.header(hello[:28])
        worker.payload(hello[28:])
        welcome = worker.welcome(bytes(32))
        vault.header(welcome[:28])
        vault.payload(welcome[28:])

    with pytest.raises(SlipError, match=message):
        shown()


def test_the_error_names_the_shard_that_nobody_serves(scene: Scene) -> None:
    with pytest.raises(
        WorkerUnavailable, match=r"none of the workers .* serves shard worker-2: start one with"
    ):
        load(scene.out / "vault", scene.addresses[:2])
    away = f"unix:{scene.out}/nobody"
    with pytest.raises(WorkerUnavailable, match=r"for shard worker-1 now .*nobody"):
        load(scene.out / "vault", [away, scene.addresses[3]])


def test_one_that_is_away_is_asked_once_it_is_back(scene: Scene, tmp_path: Path) -> None:
    """Who was away at the start may hold any shard: that shows when it comes."""
    expected = reference(scene.out)(IDS).logits
    later = tmp_path / "later"
    with running(scene.out / "worker-2") as (second,):
        addresses = [f"unix:{later}", scene.addresses[0], second.address]
        with load(scene.out / "vault", addresses) as hybrid:
            second.close()
            with serving(Worker(open_worker(scene.out / "worker-2")), later):
                assert torch.equal(hybrid(IDS).logits, expected)
            assert hybrid.slip.workers[0].shard == "worker-2"


def test_experts_of_a_layer_in_two_shards(tmp_path: Path) -> None:
    """What is asked together is asked of each shard apart."""
    split(families.make("mixtral", tmp_path / "model"), tmp_path / "out", shards=3)
    shards = shards_of(read_vault_manifest(tmp_path / "out" / "vault"))
    vault, whole = open_vault(tmp_path / "out" / "vault"), open_all(open_vault(tmp_path / "out" / "vault"))
    rng, local = np.random.default_rng(1), LocalProducts(vault, whole)
    asked = [(name, rng.standard_normal((2, s.n), np.float32)) for name, s in vault.groups.items()]
    with running(*[tmp_path / "out" / shard.folder for shard in shards]) as workers:
        terms = Terms([worker.address for worker in workers], whole, ahead=0)
        with Vault(vault, terms) as hybrid:
            for order in (asked, asked[::-1]):
                for y, (name, x) in zip(hybrid.products(order), order, strict=True):
                    assert np.array_equal(y, local.product(name, x))
            assert hybrid.counters.exchanges == 6


# --- dealing ----------------------------------------------------------------------------------------------


@contextmanager
def dealers(*shares: Path, folder: Path) -> Iterator[list[str]]:
    """`slip worker --role dealer` processes."""
    processes, addresses = [], []
    try:
        for i, share in enumerate(shares):
            command = [
                *SLIP,
                "worker",
                share,
                "--role",
                "dealer",
                "--json",
                "--listen",
                f"unix:{folder}/d{i}",
            ]
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=ENV)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            addresses.append(json.loads(process.stdout.readline())["listening"])
        yield addresses
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)
            assert process.stdout is not None
            process.stdout.close()


def test_dealers_deal_for_the_groups_that_they_hold(scene: Scene, tmp_path: Path) -> None:
    expected = reference(scene.out)(IDS).logits
    with dealers(scene.out / "worker-2", scene.out / "worker-1", folder=tmp_path) as addresses:
        with load(scene.out / "vault", scene.addresses, dealers=addresses, ahead=2) as hybrid:
            assert torch.equal(hybrid(IDS).logits, expected)
            assert {status.state for status in hybrid.slip.dealers} == {"up"}
            assert all(status.served for status in hybrid.slip.dealers)
        with pytest.raises(WorkerUnavailable, match=r"none of the dealers .* shard worker-1"):
            load(scene.out / "vault", scene.addresses, dealers=addresses[:1])
        with pytest.raises(SlipError, match="cannot be its own dealer"):
            load(scene.out / "vault", addresses, dealers=addresses)
        pool = tmp_path / "pool"
        named = [part for address in addresses for part in ("--dealer", address)]
        assert (
            last_json(slip("deal", scene.out / "vault", pool, "--tokens", 6, *named, "--json"))["tokens"] >= 6
        )
    with load(scene.out / "vault", scene.addresses, pool=pool) as hybrid:
        assert torch.equal(hybrid(IDS).logits, expected)


def test_masks_are_dealt_from_all_shards_on_this_machine(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `slip deal` and by the vault; one shard alone will not do, and says so."""
    assert run_here(monkeypatch, ["deal", scene.out / "vault", tmp_path / "pool", "--tokens", 2]) == 0
    capsys.readouterr()
    for share in (scene.out, None):
        with load(scene.out / "vault", scene.addresses, share=share) as hybrid:
            hybrid(IDS)
    with pytest.raises(ShareError, match="one shard of 2: give the folder in which all lie"):
        load(scene.out / "vault", scene.addresses, share=scene.out / "worker-1")
    shutil.copytree(scene.out, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "worker-2")
    shutil.copytree(scene.out / "worker-1", tmp_path / "mixed" / "worker-2")
    with pytest.raises(ShareError, match="is not the shard worker-2"):
        load(tmp_path / "mixed" / "vault", scene.addresses)
    shutil.rmtree(tmp_path / "mixed" / "worker-2")
    with pytest.raises(ShareError, match="worker-2"):
        load(tmp_path / "mixed" / "vault", scene.addresses)


# --- folders ----------------------------------------------------------------------------------------------


def test_what_lies_in_the_folders(scene: Scene) -> None:
    """Whole groups, neighbours together, each once, and digests of everything in the vault's manifest."""
    manifest = read_vault_manifest(scene.out / "vault")
    shares = [open_worker(scene.out / f"worker-{number}") for number in (1, 2)]
    assert [name for share in shares for name in share.names] == [group.name for group in manifest.groups]
    assert [own_shard(share) for share in shares] == list(shards_of(manifest))
    assert [share.manifest.shard for share in shares] == [
        ShardOf(number=1, shards=2, first=0), ShardOf(number=2, shards=2, first=len(shares[0].names))
    ]  # fmt: skip
    assert [shard.files for shard in manifest.shards] == [share.digests for share in shares]
    assert manifest.worker_files == {}
    sizes = [sum(matrix.nbytes for matrix in share.matrices.values()) for share in shares]
    largest = max(matrix.nbytes for share in shares for matrix in share.matrices.values())
    assert abs(sizes[0] - sizes[1]) <= largest
    assert {path.name for path in scene.out.iterdir()} == {"vault", "worker-1", "worker-2"}
    assert all((scene.out / f"worker-{number}").stat().st_mode & 0o777 == 0o755 for number in (1, 2))


def test_a_split_in_one_piece_is_as_it_was(model: Path, tmp_path: Path) -> None:
    """No field is added: older releases read it, and a public base's folder keeps its bytes."""
    split(model, tmp_path / "out", shards=1, i_know=True)
    worker = json.loads((tmp_path / "out" / "worker" / MANIFEST).read_text())
    vault = json.loads((tmp_path / "out" / "vault" / MANIFEST).read_text())
    assert list(worker) == ["format", "version", "split_id", "groups", "files"]
    assert "shards" not in vault
    assert set(vault["worker_files"]) == {MANIFEST, SHARE}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vault", "worker"}


@pytest.mark.parametrize("number", [0, -1, 10, True, 1.5, "2"])
def test_a_number_of_shards_that_makes_no_sense(model: Path, tmp_path: Path, number: Any) -> None:
    with pytest.raises(RecipeError, match="from 1 to 9"):
        split(model, tmp_path / "out", shards=number)
    assert not (tmp_path / "out").exists()


def test_bad_numbers_on_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, message in (
        (0, "greater than or equal to 1"),
        (-1, "greater than or equal to 1"),
        (99, "from 1 to 9"),
    ):
        assert run_here(monkeypatch, ["split", model, tmp_path / "out", "--shards", number])
        assert message in capsys.readouterr().err


def test_an_interrupted_split_goes_on_with_the_same_shards(model: Path, tmp_path: Path) -> None:
    """Finished groups are kept; another number of shards begins anew; nothing looks whole before it is."""
    out, seen = tmp_path / "out", list[str]()

    def stop(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(model, out, shards=3, progress=stop, i_know=True)
    assert {path.name for path in out.iterdir()} == {".partial"}
    before = [(out / ".partial" / f"worker-{n}" / SHARE).read_bytes() for n in (1, 2)]
    split(model, out, shards=3, i_know=True)
    after = open_worker(out / "worker-1")
    assert before[0] == (out / "worker-1" / SHARE).read_bytes()
    assert after.manifest.shard is not None
    with pytest.raises(ShareError, match="worker-1 exists"):
        split(model, out, shards=2, i_know=True)
    shutil.rmtree(out / "vault")
    with pytest.raises(ShareError, match="worker-1 exists"):
        split(model, out, i_know=True)
    seen.clear()
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        split(model, other, shards=2, progress=stop, i_know=True)
    split(model, other, shards=4, i_know=True)
    assert len(read_vault_manifest(other / "vault").shards) == 4
    assert {path.name for path in other.iterdir()} == {"vault", *(f"worker-{n}" for n in range(1, 5))}


def test_tools_that_read_a_split(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect of both sides, reseal, the plan's thief, and what a wrong folder is told."""
    assert run_here(monkeypatch, ["inspect", scene.out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [shard["folder"] for shard in found["shards"]] == ["worker-1", "worker-2"]
    assert sum(len(shard["groups"]) for shard in found["shards"]) == 9
    assert run_here(monkeypatch, ["inspect", scene.out]) == 0
    assert "worker-2" in capsys.readouterr().out
    assert run_here(monkeypatch, ["inspect", scene.out / "worker-2"]) == 0
    assert "shard 2 of 2" in capsys.readouterr().out
    assert run_here(monkeypatch, ["inspect", scene.out / "worker-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shard"]["number"] == 2
    assert run_here(monkeypatch, ["worker", scene.out]) == 2
    assert "give one of its shards, such as" in capsys.readouterr().err
    with pytest.raises(ShareError, match=r"it stays with you\. Give the worker's folder, .*worker-1"):
        open_worker(scene.out / "vault")
    shutil.copytree(scene.out, tmp_path / "out")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "generation_config.json").write_text('{"max_length": 9}')
    reseal(tmp_path / "out" / "vault", tmp_path / "new")
    assert (
        read_vault_manifest(tmp_path / "out" / "vault").shards
        == read_vault_manifest(scene.out / "vault").shards
    )
    assert thief(scene.model, tmp_path / "out")(IDS).logits.shape[:2] == IDS.shape


def test_a_shard_is_signed_and_verified_alone(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing", reason="pip install 'sliplm[signing]'")
    shutil.copytree(scene.out / "worker-2", tmp_path / "w")
    shutil.copytree(scene.out / "worker-1", tmp_path / "v")
    signer = tmp_path / "signer"
    assert run_here(monkeypatch, ["keys", "signing", signer]) == 0
    assert run_here(monkeypatch, ["sign", tmp_path / "w", "--key", signer / "key.pem"]) == 0
    assert run_here(monkeypatch, ["verify", tmp_path / "w", "--signed-by", signer / "public.pem"]) == 0
    shutil.copy(tmp_path / "w" / "model.sig", tmp_path / "v")
    capsys.readouterr()
    assert run_here(monkeypatch, ["verify", tmp_path / "v", "--signed-by", signer / "public.pem"]) == 2
    assert "does not show" in capsys.readouterr().err


def test_the_command_says_where_each_shard_goes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, ["split", model, tmp_path / "out", "--shards", 2, "--i-know"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "worker-1 to worker-2 go to one worker each" in said


# --- how groups are cut into shards -----------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.data())
def test_shards_are_balanced_as_well_as_can_be(sizes: list[int], data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, len(sizes)))
    counts = balanced(sizes, shards)
    assert len(counts) == shards
    assert sum(counts) == len(sizes)
    assert min(counts) >= 1

    def largest(cuts: tuple[int, ...]) -> int:
        ends = (0, *cuts, len(sizes))
        return max(sum(sizes[a:b]) for a, b in pairwise(ends))

    ends = np.cumsum(counts)[:-1].tolist()
    assert largest(tuple(ends)) == min(map(largest, combinations(range(1, len(sizes)), shards - 1)))


def test_as_many_shards_as_groups() -> None:
    assert balanced([1] * MAX_GROUPS, MAX_GROUPS) == [1] * MAX_GROUPS
    assert balanced([5, 1, 1, 1], 2) == [1, 3]
