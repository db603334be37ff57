"""One model, one split: what the ledger refuses, remembers, survives and shows."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import sliplm
from sliplm import durable
from sliplm.cli import main
from sliplm.engines import writing
from sliplm.engines.transformers.origin import named_base, warn_of_named_base
from sliplm.errors import CheckpointError, CredentialError, LedgerError, SealError, ShareError, SlipWarning
from sliplm.shares import sealing
from sliplm.shares.keysource import Key, find
from sliplm.shares.ledger import VAULT_FILE, Ledger, add, default_folder
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.sealing import reseal
from sliplm.shares.share import open_sealed_file, open_vault
from sliplm.shares.splitter import Splitter
from sliplm.shares.splitting import split_group

RECIPE = Recipe(rank=2)
OTHER = bytes(range(32))
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ledger") / "mine")


def make(folder: Path, **how: Any) -> Path:
    return families.make(how.pop("family", "llama"), folder, **{"num_hidden_layers": 1} | how)


def split(model: Path, out: Path, recipe: Recipe = RECIPE, **how: Any) -> Path:
    sliplm.split(model, out, recipe, **how)
    return out


def changed(model: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    new = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def noisy(size: float, only: str = "") -> Callable[[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + noise * (size * tensor.norm() / noise.norm()) if only in name else tensor

    return change


def own(key: Any = None) -> Ledger:
    return Ledger(find(key))


def files() -> list[Path]:
    return sorted(own().own.iterdir())


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_second_split_is_refused_by_the_library_itself(model: Path, tmp_path: Path) -> None:
    """The tripwire: `sliplm.split`, and no option, no fixture and no command line."""
    split(model, tmp_path / "first")
    with pytest.raises(LedgerError) as caught:
        sliplm.split(model, tmp_path / "second", Recipe(rank=3))
    (entry,) = own().entries()[0]
    said = str(caught.value)
    assert caught.value.splits == (entry.split_id,)
    for part in (
        "these weights were split before", entry.split_id[:8], entry.date[:10], "mine, rank 2, 12 bits, fast",
        str(tmp_path / "first"), "5 of 5 groups are the same", "distance 0.000", "what each of them hides",
        f"slip ledger forget {entry.split_id[:8]}", "--i-know",
    ):  # fmt: skip
        assert part in said
    assert "\n" not in said
    assert list((tmp_path / "second").iterdir()) == []  # nothing is left that could be mistaken for a share


RELATIVES: dict[str, Callable[[Path, Path], Path]] = {
    "renamed folder": lambda model, to: shutil.copytree(model, to),
    "bfloat16": lambda model, to: make(to, dtype=torch.bfloat16),
    "float16, in shards": lambda model, to: make(to, dtype=torch.float16, max_shard="60KB"),
    "fine-tune, 1 %": lambda model, to: changed(model, to, noisy(0.01)),
    "fine-tune, 5 %": lambda model, to: changed(model, to, noisy(0.05)),
    "fine-tune, 20 %": lambda model, to: changed(model, to, noisy(0.2)),
    "fine-tune, 50 %": lambda model, to: changed(model, to, noisy(0.5)),
    "all but one matrix replaced": lambda model, to: changed(
        model, to, lambda name, w: w if "o_proj" in name else torch.randn(w.shape)
    ),
    "scaled": lambda model, to: changed(model, to, lambda name, w: 2 * w),
}


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split in the default ledger of its own moment; tests take it over by `add`."""
    return split(model, tmp_path_factory.mktemp("first") / "out")


@pytest.mark.parametrize("how", RELATIVES)
def test_a_relative_is_refused(how: str, model: Path, first: Path, tmp_path: Path) -> None:
    add(first / "vault", None)
    relative = RELATIVES[how](model, tmp_path / "other")
    same = how in ("renamed folder", "bfloat16", "float16, in shards", "scaled") or "all but" in how
    with pytest.raises(LedgerError, match="these weights were" if same else "a close relative") as caught:
        split(relative, tmp_path / "out")
    assert ("1 of 5 groups" if "all but" in how else "5 of 5 groups") in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_unrelated_models_are_accepted(family: str, tmp_path: Path) -> None:
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    for seed in range(3):
        path = families.make(family, tmp_path / f"model{seed}", seed=seed, **{layers: 1})
        split(path, tmp_path / f"out{seed}")
    assert len(own().entries()[0]) == 3


def test_what_stays_in_the_vault_counts_for_nothing(model: Path, tmp_path: Path) -> None:
    """Two shares without a common group show nothing together."""
    mlp = Recipe(rank=2, placement="vault", rules=(Rule(pattern="*.mlp.*", placement="split"),))
    attention = Recipe(rank=2, placement="vault", rules=(Rule(pattern="*.self_attn.*", placement="split"),))
    split(model, tmp_path / "none", Recipe(placement="vault"))
    assert own().entries() == ([], [])
    assert not (tmp_path / "none" / "vault" / VAULT_FILE).exists()
    split(model, tmp_path / "mlp", mlp)
    split(model, tmp_path / "attention", attention)
    with pytest.raises(LedgerError) as caught:
        split(model, tmp_path / "all")
    assert len(caught.value.splits) == 2
    assert "and 1 more entries are close" in str(caught.value)


def test_whoever_knows_goes_on_and_both_are_noted(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "a")
    split(model, tmp_path / "b", i_know=True)
    ids = {open_vault(tmp_path / name / "vault").split_id for name in "ab"}
    entries, damaged = own().entries()
    assert ({entry.split_id for entry in entries}, damaged) == (ids, [])
    with pytest.raises(LedgerError) as caught:
        split(model, tmp_path / "c")
    assert set(caught.value.splits) == ids
    for split_id in ids:
        assert own().forget(split_id[:8]) == split_id
    assert own().entries() == ([], [])
    split(model, tmp_path / "c")


def test_forgetting_needs_one_id(model: Path, first: Path) -> None:
    entry = add(first / "vault", None)
    for wrong in ("", "f", entry.split_id[:3], "zzzz", "../..", entry.split_id + "0"):
        with pytest.raises(LedgerError, match="give at least 4 digits"):
            own().forget(wrong)
    assert own().forget(entry.split_id) == entry.split_id


def test_why_two_plain_shares_differ_by_what_one_of_them_hides() -> None:
    """SPEC section 2: shares of ranks 2 and 4 without a secret basis give the triplets 3 and 4 away."""
    weight = np.random.default_rng(0).standard_normal((40, 30), dtype=np.float32)
    two, four = (split_group("g", weight, rank=k, precision=12, rotation="none") for k in (2, 4))
    public = [part.w * part.secrets.scale[:, None] for part in (two, four)]
    u, s, v = np.linalg.svd(weight)
    between = (u[:, 2:4] * s[2:4]) @ v[2:4]
    assert np.linalg.norm(public[0] - public[1] - between) < 0.01 * np.linalg.norm(between)


# --- whose entries -----------------------------------------------------------------------------------------


def test_another_owner_is_not_in_the_way(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "a")
    split(model, tmp_path / "b", key=OTHER)
    assert len(own().entries()[0]) == len(own(OTHER).entries()[0]) == 1
    assert own().own != own(OTHER).own
    # one that found its way into the other's folder does not open, and is not taken for an entry
    (theirs,) = own(OTHER).own.iterdir()
    shutil.copy(theirs, own().own / theirs.name)
    entries, damaged = own().entries()
    assert (len(entries), damaged) == (1, [theirs.stem])


def test_the_bytes_of_a_key_count_not_its_source(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(OTHER.hex())
    key_file.chmod(0o600)
    monkeypatch.setenv("LEDGER_TEST_KEY", OTHER.hex())
    specs = (OTHER, f"file:{key_file}", "env:LEDGER_TEST_KEY", f"command:cat {key_file}")
    assert len({own(spec).own for spec in specs}) == 1
    split(model, tmp_path / "out", key=specs[1])
    for spec in specs:
        with pytest.raises(LedgerError, match="split before"):
            split(model, tmp_path / "again", key=spec)


@pytest.fixture
def stretched(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Fewer kilobytes for Argon2id; the passphrases that it was asked for in a ledger."""
    asked: list[bytes] = []

    def stretch(passphrase: bytes, *numbers: Any) -> bytes:
        asked.append(passphrase)
        return real(passphrase, *numbers)

    real = sealing.stretch
    monkeypatch.setattr("sliplm.shares.ownership.stretch", stretch)
    monkeypatch.setattr(sealing, "PASSPHRASE_MEMORY_KIB", 128)
    monkeypatch.setenv("GOOD", "correct horse")
    monkeypatch.setenv("BAD", "battery staple")
    return asked


def test_a_passphrase_is_stretched_once_whatever_lies_there(
    model: Path, tmp_path: Path, stretched: list[bytes]
) -> None:
    for i in range(20):  # of twenty other owners
        Ledger(Key("key", bytes([i]) * 32, "test")).check_room()
    split(model, tmp_path / "key")
    assert stretched == []
    split(model, tmp_path / "out", key="passphrase:env:GOOD")
    assert len(stretched) == 1
    with pytest.raises(LedgerError, match="split before"):
        split(model, tmp_path / "again", key="passphrase:env:GOOD")
    assert len(stretched) == 2
    split(model, tmp_path / "other", key="passphrase:env:BAD")
    assert len(stretched) == 3
    salt = default_folder() / "passphrase.json"
    assert salt.stat().st_mode & 0o777 == 0o600
    salt.write_text("{}")
    with pytest.raises(LedgerError, match=r"passphrase\.json is damaged"):
        split(model, tmp_path / "last", key="passphrase:env:GOOD")
    assert not (tmp_path / "last" / ".partial").exists()
    copies = sorted(default_folder().glob("*/passphrase.json"))
    assert len(copies) == 2  # of each owner with a passphrase, and of no other
    shutil.copyfile(copies[0], salt)  # what the message offers: found again
    with pytest.raises(LedgerError, match="split before"):
        split(model, tmp_path / "last", key="passphrase:env:GOOD")
    for path in (salt, *copies):
        path.unlink()  # forgotten, and nothing worse
    split(model, tmp_path / "last", key="passphrase:env:GOOD")


def test_a_ledger_goes_along_with_its_vault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = split(model, tmp_path / "out")
    (entry,) = own().entries()[0]
    monkeypatch.setenv("SLIPLM_LEDGER", str(tmp_path / "another machine's"))
    assert own().entries() == ([], [])
    noted = add(out / "vault", None)
    assert (noted.split_id, noted.groups) == (entry.split_id, entry.groups)
    with pytest.raises(LedgerError, match=entry.split_id[:8]):
        split(model, tmp_path / "second")
    # sealed anew: under the new key the sketches are those of the old one
    reseal(out / "vault", None, OTHER)
    with pytest.raises(SealError, match="another key"):
        add(out / "vault", None)
    add(out / "vault", OTHER)
    assert own(OTHER).sketch_key.hex() != noted.sketch_key
    with pytest.raises(LedgerError, match=entry.split_id[:8]):
        split(model, tmp_path / "second", key=OTHER)


def test_the_vaults_entry_is_authenticated(first: Path, tmp_path: Path) -> None:
    vault = shutil.copytree(first / "vault", tmp_path / "vault")
    data = bytearray((vault / VAULT_FILE).read_bytes())
    data[-1] ^= 1
    (vault / VAULT_FILE).write_bytes(data)
    for use in (lambda: open_vault(vault), lambda: add(vault, None)):
        with pytest.raises(ShareError, match=r"ledger\.sealed was altered"):
            use()
    with pytest.raises(ShareError, match=r"has no nothing\.sealed"):
        open_sealed_file(first / "vault", "nothing.sealed", None, 100)
    with pytest.raises(ShareError, match="has no"):
        open_sealed_file(first / "vault", VAULT_FILE, None, 100)  # longer than that
    assert add(first / "vault", None).source == "mine"


def test_a_vault_of_release_0_2_is_noted_and_otherwise_refused(first: Path, tmp_path: Path) -> None:
    """Its worker share counts as published, so the ledger must know it; nothing else opens it."""
    vault = shutil.copytree(first / "vault", tmp_path / "vault")
    families.sign_manifest(vault, lambda manifest: manifest.update(version=2))
    assert add(vault, None).source == "mine"
    with pytest.raises(ShareError, match=r"older release.*--i-know"):
        open_vault(vault)


# --- damage ------------------------------------------------------------------------------------------------


def _other_id(path: Path) -> None:
    path.rename(path.with_name(f"{'0' * 32}.entry"))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "cut off": lambda path: os.truncate(path, 100),
    "one byte": lambda path: os.truncate(path, 1),
    "empty": lambda path: os.truncate(path, 0),
    "too long": lambda path: os.truncate(path, 1 << 40),  # sparse
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "another split's": _other_id,
    "a folder": _folder,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_named_and_fails_closed(
    how: str, model: Path, first: Path, tmp_path: Path
) -> None:
    add(first / "vault", None)
    (path,) = files()
    DAMAGE[how](path)
    (path,) = files()
    assert own().entries() == ([], [path.stem])
    with pytest.raises(LedgerError, match=r"is damaged.*restore the file") as caught:
        split(model, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert caught.value.splits == ()
    if how == "noise":
        split(model, tmp_path / "out", i_know=True)
        assert [entry.source for entry in own().entries()[0]] == ["mine"]
    if how == "cut off":
        own().forget(path.stem[:8])
        split(model, tmp_path / "out")


def test_what_is_no_entry_is_left_alone(first: Path) -> None:
    add(first / "vault", None)
    for name in (f".{'0' * 32}.entry.part", "notes.txt", "0.entry", "lock"):
        (own().own / name).write_text("x")
    entries, damaged = own().entries()
    assert (len(entries), damaged) == (1, [])


# --- crashes, full disks, several at once ------------------------------------------------------------------

KILLED = """
import os, signal, sys
from sliplm.engines import writing
from sliplm.engines.transformers.convert import split
from sliplm.shares.recipe import Recipe
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "after":
    writing.Journal.finish = kill
else:
    writing.Registration.record = kill
split(sys.argv[1], sys.argv[2], Recipe(rank=2))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_entry(when: str, model: Path, tmp_path: Path) -> None:
    """Before its entry is durable nothing is published; after it, the same split goes on."""
    out = tmp_path / "out"
    run = [sys.executable, "-c", KILLED, str(model), str(out), when]
    assert subprocess.run(run, check=False, env=ENV, timeout=120).returncode == -signal.SIGKILL
    assert not (out / "worker").exists()
    noted = own().entries()[0]
    assert len(noted) == (when == "after")
    if noted:  # it might have been published: only the split itself may go on
        with pytest.raises(LedgerError):
            split(model, tmp_path / "second")
    steps: list[str] = []
    split(model, out, progress=lambda done, total, name: steps.append(name))
    (entry,) = own().entries()[0]
    assert entry.split_id == open_vault(out / "vault").split_id
    assert [entry.split_id] == [one.split_id for one in noted] or not noted


def test_killed_between_the_entry_and_the_folders(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: Path) -> None:
        assert len(own().entries()[0]) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_publish", no_more)
        with pytest.raises(KeyboardInterrupt):
            split(model, tmp_path / "out")
    assert not (tmp_path / "out" / "worker").exists()
    split(model, tmp_path / "out")
    assert len(own().entries()[0]) == 1


def test_a_split_that_comes_second_while_both_run(model: Path, tmp_path: Path) -> None:
    """Both saw an empty ledger; whoever finishes last is refused, keeps its work, and may go on knowingly."""
    started: list[str] = []

    def overtaken(done: int, total: int, name: str) -> None:
        if not started:
            started.append(name)
            split(model, tmp_path / "fast")

    slow = tmp_path / "slow"
    with pytest.raises(LedgerError, match=str(tmp_path / "fast")):
        split(model, slow, progress=overtaken)
    assert sorted(path.name for path in slow.iterdir()) == [".partial"]
    with pytest.raises(LedgerError):  # the same again: refused before any work, which is kept
        split(model, slow)
    lines = (slow / ".partial" / "journal").read_text().splitlines()
    assert sum('"group"' in line for line in lines) == 5
    split(model, slow, i_know=True)
    assert len(own().entries()[0]) == 2


def test_of_many_at_once_one_is_noted(first: Path) -> None:
    entry = add(first / "vault", None)
    own().forget(entry.split_id)
    sketches = {bytes.fromhex(entry.sketch_key): entry.sketches}
    outcomes: list[str] = []
    gate = threading.Barrier(8)

    def one(number: int) -> None:
        mine = entry.model_copy(update={"split_id": f"{number:032x}"})
        gate.wait()
        try:
            own().record(mine, sketches, i_know=False)
            outcomes.append("noted")
        except LedgerError:
            outcomes.append("refused")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["noted", *["refused"] * 7]
    assert len(own().entries()[0]) == 1


def test_no_room_for_the_entry_loses_no_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = durable.replace

    def full(path: Path, data: bytes, **more: bool) -> None:
        if path.suffix == ".entry":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "replace", full)
        with pytest.raises(LedgerError, match=r"No space left.*SLIPLM_LEDGER.*finished work is kept"):
            split(model, tmp_path / "out")
    assert not (tmp_path / "out" / "worker").exists()
    monkeypatch.setattr(Splitter, "split_group", None)  # no group is done again
    split(model, tmp_path / "out")
    assert len(own().entries()[0]) == 1


def test_a_ledger_that_cannot_be_written_is_found_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "ledger", Path("/proc/ledger")):
        monkeypatch.setenv("SLIPLM_LEDGER", str(place))
        for i_know in (False, True):
            with pytest.raises(LedgerError, match=r"no share goes out without an entry.*SLIPLM_LEDGER"):
                split(model, tmp_path / "out", i_know=i_know)
            assert not (tmp_path / "out" / ".partial").exists()
    monkeypatch.setenv("SLIPLM_LEDGER", str(tmp_path / "elsewhere"))
    split(model, tmp_path / "out")


# --- what shows --------------------------------------------------------------------------------------------


def test_nothing_of_it_lies_in_clear(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "out")
    ledger = own()
    (entry,) = ledger.entries()[0]
    written = [path for path in default_folder().rglob("*") if path.is_file()]
    everything = b"".join(path.read_bytes() for path in [*written, tmp_path / "out" / "vault" / VAULT_FILE])
    secrets = [base64.b64decode(group.values) for group in entry.groups]
    secrets += [b"mine", b"self_attn", str(tmp_path).encode(), b"rank 2", ledger.sketch_key]
    secrets += [entry.sketch_key.encode(), find(None).secret]
    for secret in secrets:
        runs = [secret[i : i + 8] for i in range(0, max(1, len(secret) - 7), 8)]
        assert not any(run in everything for run in runs)
        assert base64.b64encode(secret)[:12] not in everything
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in written} == {0o700}
    shown = repr(entry) + repr(entry.groups) + repr(ledger) + repr(entry.sketches) + str(entry)
    for hidden in (entry.sketch_key, entry.groups[0].values, "array(", repr(ledger.sketch_key)):
        assert hidden not in shown


def test_any_name_of_a_folder_is_noted(model: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9 \x1b[31m")
    split(model, odd)
    with pytest.raises(LedgerError, match="caf"):
        split(model, tmp_path / "again")


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLIPLM_LEDGER")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "sliplm" / "ledger"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_folder() == Path.home() / ".config" / "sliplm" / "ledger"
    monkeypatch.setenv("SLIPLM_LEDGER", "~/elsewhere")
    assert default_folder() == Path.home() / "elsewhere"


# --- a public base -----------------------------------------------------------------------------------------


def test_a_close_public_model_is_warned_about(model: Path, tmp_path: Path) -> None:
    tuned = changed(model, tmp_path / "tuned", noisy(0.05))
    far = make(tmp_path / "far", seed=5)
    with pytest.warns(SlipWarning) as caught:
        report = sliplm.split(tuned, tmp_path / "out", RECIPE, public=[model, far])
    (warning,) = caught
    said = str(warning.message)
    assert warning.filename == __file__
    for part in (f"close to {model}", "5 of 5 groups are close", "distance 0.0", "--base", "THREAT_MODEL"):
        assert part in said
    near, other = report.public[str(model)], report.public[str(far)]
    assert (near.close, near.compared, other.close, other.compared) == (5, 5, 0, 5)
    assert near.distance == pytest.approx(0.05, rel=0.2)
    assert json.loads(report.to_json())["public"][str(far)]["close"] == 0


def test_what_is_not_warned_about(model: Path, tmp_path: Path) -> None:
    """Another architecture says nothing; a proven rotation needs no warning."""
    wide = make(tmp_path / "wide", vocab_size=500)
    gpt2 = families.make("gpt2", tmp_path / "gpt2", n_layer=1)
    report = sliplm.split(model, tmp_path / "a", RECIPE, public=str(gpt2), i_know=True)
    assert report.public[str(gpt2)].distance is None
    report = sliplm.split(model, tmp_path / "b", Recipe(rank=2, rotation="haar"), public=[model], i_know=True)
    assert report.public[str(model)].same
    with pytest.warns(SlipWarning, match="of 5 groups"):  # another vocabulary: the head is left out
        report = sliplm.split(model, tmp_path / "c", RECIPE, public=[wide, model], i_know=True)
    assert report.public[str(wide)].compared == 4


CARDS = {
    "---\nlicense: mit\nbase_model: meta/llama-7b\n---\n# Mine": "meta/llama-7b",
    "---\nbase_model:\n- meta/llama-7b\ntags:\n- x\n---": "meta/llama-7b",
    "---\nbase_model:\n  - 'meta/llama-7b'\n---\n": "meta/llama-7b",
    '---\nbase_model: ["gpt2"]\n---\n': "gpt2",
    "---\nbase_model: [a/b, c/d]\n---\n": None,
    "---\nbase_model:\n- a/b\n- c/d\n---\n": None,
    "---\nbase_model:\n---\n": None,
    "---\nother: 1\n---\nbase_model: a/b\n": None,
    "base_model: a/b\n": None,
    "---\nbase_model: \x1b[31mred\n---\n": None,
    "": None,
}


@pytest.mark.parametrize("card", CARDS)
def test_the_base_that_a_card_names(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    named = named_base(tmp_path)
    assert named == (None if CARDS[card] is None else ("README.md", CARDS[card]))


def test_a_named_base_is_a_hint(model: Path, tmp_path: Path) -> None:
    assert named_base(tmp_path) is None
    mine = shutil.copytree(model, tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is not a folder"):
        split(mine, tmp_path / "out", public=tmp_path / "none")
    (mine / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/llama-7b"}')
    with pytest.warns(
        SlipWarning, match=r"adapter_config\.json says .* from meta/llama-7b.*--base.*--public"
    ):
        split(mine, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(mine, tmp_path / "haar", Recipe(rank=2, rotation="haar"), i_know=True)
    for junk in (b"[]", b"{", b"\xff", b'{"base_model_name_or_path": 3}'):
        (mine / "adapter_config.json").write_bytes(junk)
        assert named_base(mine) is None


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({"_name_or_path": "meta/llama-7b"}, "meta/llama-7b"),
        ({"_name_or_path": "../models/llama-7b"}, "../models/llama-7b"),
        ({"_name_or_path": "/models/llama-7b/"}, None),
        ({"base_model_name_or_path": "meta/llama-7b", "_name_or_path": "me/mine"}, "meta/llama-7b"),
        ({"_name_or_path": "me/Mine"}, None),
        ({"_name_or_path": "/old/place/mine"}, None),
        ({"_name_or_path": ""}, None),
        ({"_name_or_path": "a\nb"}, None),
        ({"_name_or_path": ["a"]}, None),
    ],
)
def test_the_base_that_a_configuration_names(config: object, base: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert named_base(folder) == (None if base is None else ("config.json", base))


def test_a_model_in_the_hubs_cache_is_not_its_own_base(tmp_path: Path) -> None:
    folder = tmp_path / "models--meta--llama-7b" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_name_or_path": "meta/llama-7b"}')
    assert named_base(folder) is None


@pytest.mark.parametrize("name", ["my-finetune", "llama_FT", "x-sft-2", "fine-tuned", "qlora-merged"])
def test_a_name_that_says_fine_tune_is_a_hint(name: str, tmp_path: Path) -> None:
    with pytest.warns(SlipWarning, match="by its name .* is a fine-tune.*--base"):
        warn_of_named_base(tmp_path / name, level=1)


@pytest.mark.parametrize("name", ["model", "soft", "left", "tuner", "emerged", "Llama-3-8B-Instruct"])
def test_other_names_are_none(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_named_base(tmp_path / name, level=1)


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def slip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The command line, in this process: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["slip", *map(str, words)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return ended.value.code, shown.out, shown.err

    return run


def test_the_commands(slip: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    assert "has no split under this key" in slip("ledger", "list")[1]
    assert slip("split", model, tmp_path / "a", "--rank", 2)[0] == 0
    status, out, err = slip("split", model, tmp_path / "b", "--rank", 3, "--json")
    assert status == 2
    assert err.startswith("error: these weights were split before: split ")
    assert len(err.splitlines()) == 1
    assert json.loads(out.splitlines()[-1])["error"] == "LedgerError"
    status, out, _ = slip("split", model, tmp_path / "b", "--rank", 3, "--json", "--i-know")
    assert (status, json.loads(out.splitlines()[-1])["warnings"]) == (0, [])
    status, out, _ = slip("ledger", "list")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["id", "date", "model", "groups", "recipe", "folder"]
    assert {line[2] for line in lines[1:]} == {"mine"}
    assert {line[3] for line in lines[1:]} == {"5"}
    assert {line[-1] for line in lines[1:]} == {str(tmp_path / name) for name in "ab"}
    listed = json.loads(slip("ledger", "list", "--json")[1])
    assert [one["recipe"] for one in listed["splits"]] == ["rank 2, 12 bits, fast", "rank 3, 12 bits, fast"]
    path = files()[0]
    os.truncate(path, 5)
    assert f"{path.stem[:8]}" in slip("ledger", "list")[1]
    assert json.loads(slip("ledger", "list", "--json")[1])["damaged"] == [path.stem]
    assert "forgotten: split" in slip("ledger", "forget", path.stem[:8])[1]
    assert slip("ledger", "forget", path.stem[:8])[0] == 2
    for vault in ("a", "b"):
        assert "noted: split" in slip("ledger", "add", tmp_path / vault / "vault")[1]
    assert len(own().entries()[0]) == 2
    new = tmp_path / "new"
    new.write_text(OTHER.hex())
    new.chmod(0o600)
    assert slip("keys", "reseal", tmp_path / "a" / "vault", "--new-key", f"file:{new}")[0] == 0
    assert "mine" in slip("ledger", "list", "--key", f"file:{new}")[1]


def test_the_command_warns_of_a_public_model(slip: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    far = make(tmp_path / "far", seed=5)
    words = ("split", model, tmp_path / "out", "--public", model, "--public", far, "--json")
    status, out, err = slip(*words)
    assert status == 0
    (warned,) = json.loads(out.splitlines()[-1])["warnings"]
    assert f"warning: {warned}" in err
    assert f"close to {model}" in warned
    assert f"against {far}: none of 5 comparable groups is close (relative distance 1." in err
    assert "against " + str(model) not in err


def test_a_new_key_is_shown_even_if_the_split_fails(
    slip: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = changed(model, tmp_path / "bad", lambda name, w: w * float("nan") if "o_proj" in name else w)
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(tmp_path / "key"))
    status, _, err = slip("split", bad, tmp_path / "out")
    assert status == 2
    assert "holds NaN" in err
    assert err.count("made just now") == (tmp_path / "key").exists() == 1


def test_the_demo_is_not_in_the_way(
    slip: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the user's own split in the way of the demo, nor an earlier demo."""
    monkeypatch.setenv("SLIPLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sliplm.examples.demo.smollm2", lambda: model)
    for _ in range(2):
        assert slip("demo", "--prepare", tmp_path / "demo")[0] == 0
        for side in ("vault", "worker"):
            shutil.rmtree(tmp_path / "demo" / side)
    assert own().entries() == ([], [])
    split(model, tmp_path / "own")
    assert slip("demo", "--prepare", tmp_path / "demo")[0] == 0


def test_a_missing_key_makes_no_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(CredentialError):
        own()
    assert not default_folder().exists()
