"""Small files of a vault changed without another split: exactly those, by exact names, all or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import families
import sliplm
from sliplm import durable
from sliplm.engines.transformers.answer import load_tokenizer
from sliplm.engines.transformers.companions import copied
from sliplm.errors import CheckpointError, InputError, SealError, ShareError
from sliplm.masks.anchor import file_anchor
from sliplm.masks.poolfolder import PoolWriter, stock
from sliplm.parties.codec import GroupCodec
from sliplm.parties.dealer import Dealing, ShareDealer
from sliplm.shares import ledger, sealing
from sliplm.shares.revision import Revision
from sliplm.shares.share import check_pair, open_vault, open_worker

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
KEPT = ("share.safetensors", "model.safetensors", "ledger.sealed", "config.json", "tokenizer.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split model with a tokenizer, a template of its own name and generation settings."""
    folder = tmp_path_factory.mktemp("made")
    families.make_with_tokenizer("llama", folder / "model", num_hidden_layers=1)
    named = folder / "model" / "additional_chat_templates"
    named.mkdir()
    (named / "tool.jinja").write_text("old")
    sliplm.split(folder / "model", folder / "out", sliplm.Recipe(rank=4))
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def new_files(folder: Path) -> Path:
    """What an owner wants to change, among what he would never want to go along."""
    folder.mkdir()
    GenerationConfig(max_new_tokens=3, eos_token_id=2).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "README.md").write_text("of no use")
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    (folder / "model.safetensors").write_bytes(b"another")
    (folder / "config.json").write_text("{}")
    return folder


def test_listed_files_change_and_nothing_else_does(out: Path, tmp_path: Path) -> None:
    before, opened = contents(out), open_vault(out / "vault")
    found = sliplm.reseal(
        out / "vault", new_files(tmp_path / "new"), remove=["additional_chat_templates/tool.jinja"]
    )
    assert found.changed == ("generation_config.json",) and found.added == ("chat_template.jinja",)
    assert found.removed == ("additional_chat_templates/tool.jinja",) and not found.same
    after, again = contents(out), open_vault(out / "vault")
    changed = {"vault/manifest.json", "vault/seal.json", "vault/generation_config.json"}
    assert {name for name in before if name in after and after[name] != before[name]} == changed
    assert after.keys() - before.keys() == {"vault/chat_template.jinja"}
    assert before.keys() - after.keys() == {"vault/additional_chat_templates/tool.jinja"}
    old, new = (json.loads(one["vault/manifest.json"]) for one in (before, after))
    assert {name for name in old if old[name] != new[name]} == {"files"}
    old, new = (json.loads(one["vault/seal.json"]) for one in (before, after))
    assert {name for name in old if old[name] != new[name]} == {"manifest"}
    assert again.files["chat_template.jinja"].decode() == TEMPLATE
    assert again.data_key == opened.data_key and again.pool_name == opened.pool_name
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in (out / "vault").iterdir())
    assert not (out / "vault" / "additional_chat_templates").exists()
    assert load_tokenizer(again.files).apply_chat_template([{"content": "x"}], tokenize=False) == "<x>"


def test_worker_pool_and_ledger_still_match(out: Path, tmp_path: Path) -> None:
    vault, worker = open_vault(out / "vault"), open_worker(out / "worker")
    codecs = [GroupCodec(group) for group in vault.groups.values()]
    shapes = [(codec.m, codec.n) for codec in codecs]
    args = tmp_path / "pool", vault.pool_name, vault.pool_key, shapes
    with PoolWriter(*args, file_anchor()) as writer:
        writer.add(0, 5, Dealing(codecs, ShareDealer(worker), None).products)
    sliplm.reseal(out / "vault", new_files(tmp_path / "new"))
    again = open_vault(out / "vault")
    check_pair(again, open_worker(out / "worker"))
    assert stock(tmp_path / "pool", again.pool_name, again.pool_key, shapes)[0].ready == 5
    assert ledger.add(out / "vault", None).split_id == again.split_id
    with sliplm.open(out, pool=tmp_path / "pool", share=out / "worker") as model:
        assert model.generation_config.max_new_tokens == 3


def test_a_whole_tokenizer_and_named_templates_go_along(out: Path, tmp_path: Path) -> None:
    tokenizer = families.byte_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "rag": "{{ messages[0].content }}!"}
    tokenizer.save_pretrained(tmp_path / "new")
    found = sliplm.reseal(out / "vault", tmp_path / "new")
    assert set(found.added) == {"chat_template.jinja", "additional_chat_templates/rag.jinja"}
    assert "tokenizer.json" in found.same
    templates = load_tokenizer(open_vault(out / "vault").files).chat_template
    assert set(templates) == {"default", "rag", "tool"}
    assert sliplm.reseal(out / "vault", tmp_path / "new").added == ()


def test_the_same_files_change_nothing(out: Path, tmp_path: Path) -> None:
    before = contents(out)
    (tmp_path / "new").mkdir()
    for name, data in copied(out / "vault").items():
        (tmp_path / "new" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "new" / name).write_bytes(data)
    found = sliplm.reseal(out / "vault", tmp_path / "new")
    assert not (found.added or found.changed or found.removed) and len(found.same) > 3
    assert contents(out) == before


def broken(folder: Path, kind: str) -> Path:
    new_files(folder)
    texts = {
        "settings": ("generation_config.json", '{"temperature": '),
        "values": ("generation_config.json", '{"max_new_tokens": -3}'),
        "template": ("chat_template.jinja", "{% for x in %}"),
        "tokenizer": ("tokenizer.json", '{"version": "1.0"'),
        "code": (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}, "tokenizer_class": "Own"}',
        ),
    }
    if kind in texts:
        name, text = texts[kind]
        (folder / name).write_text(text)
    elif kind == "another's":
        larger = families.byte_tokenizer()
        larger.add_tokens([f"word{i}" for i in range(9)])
        larger.save_pretrained(folder)
    elif kind == "no folder":
        shutil.rmtree(folder)
    else:
        (folder / "chat_template.jinja").unlink()
        if kind == "fifo":
            os.mkfifo(folder / "chat_template.jinja")
        else:
            (folder / "generation_config.json").unlink()
    return folder


KINDS = {
    "settings": "generation_config.json", "values": "generation_config.json", "template": "template",
    "tokenizer": "tokenizer", "another's": "another model's", "code": "tokenizer_config.json",
    "fifo": "chat_template.jinja", "nothing": "none of the files", "no folder": "no folder",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    out: Path, tmp_path: Path, kind: str
) -> None:
    before = contents(out)
    with pytest.raises(CheckpointError, match=KINDS[kind]):
        sliplm.reseal(out / "vault", broken(tmp_path / "new", kind))
    assert contents(out) == before


@pytest.mark.parametrize("name", ["config.json", "share.safetensors", "../out/worker/manifest.json", "x", ""])
def test_only_such_files_can_be_removed(out: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json"):
        sliplm.reseal(out / "vault", remove=[name])


def test_other_bad_arguments(out: Path, tmp_path: Path) -> None:
    new = new_files(tmp_path / "new")
    with pytest.raises(InputError, match="say what to change"):
        sliplm.reseal(out / "vault")
    with pytest.raises(InputError, match="choose one"):
        sliplm.reseal(out / "vault", new, remove=["generation_config.json"])
    with pytest.raises(CheckpointError, match="the vault itself"):
        sliplm.reseal(out / "vault", out / "vault")
    with pytest.raises(ShareError, match="`vault` that a split wrote"):
        sliplm.reseal(tmp_path, new)
    (tmp_path / "key").write_text("1" * 64)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(SealError, match="another key"):
        sliplm.reseal(out / "vault", new, key=f"file:{tmp_path / 'key'}")
    (out / "vault" / "generation_config.json").write_text("{}")
    with pytest.raises(ShareError, match="generation_config"):
        sliplm.reseal(out / "vault", new)


# --- crashes ---------------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "fchmod")
REAL = {name: getattr(os, name) for name in CALLS}


def revise(vault: Path) -> None:
    """Files that are changed, added and removed, in folders and beside them."""
    with Revision(vault, None) as revision:
        revision.change(
            {
                "generation_config.json": b"{}",
                "additional_chat_templates/new.jinja": b"x",
                "chat_template.jinja": b"y",
            },
            ["additional_chat_templates/tool.jinja", "tokenizer_config.json"],
        )


def dies_at(count: int, work: Callable[[], None]) -> bool:
    """Run in a process of its own that is killed before its `count`-th change of a folder; whether it was."""
    child = os.fork()
    if child == 0:
        left = count
        for name in CALLS:

            def dying(*args: Any, _real: Any = REAL[name], **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _real(*args, **more)

            setattr(os, name, dying)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_crash_leaves_the_old_vault_or_the_new_one(made: Path, tmp_path: Path) -> None:
    old = open_vault(made / "vault").files
    whole = {
        **old,
        "generation_config.json": b"{}",
        "additional_chat_templates/new.jinja": b"x",
        "chat_template.jinja": b"y",
    }
    new = {
        name: data for name, data in whole.items() if "tool" not in name and name != "tokenizer_config.json"
    }
    seen: list[bool] = []
    count, killed = 0, True
    while killed:
        count += 1
        vault = Path(shutil.copytree(made / "vault", tmp_path / str(count)))
        killed = dies_at(count, lambda: revise(vault))  # noqa: B023
        found = dict(open_vault(vault).files)
        assert found in (old, new), count
        seen.append(found == new)
        assert seen == sorted(seen)  # there is one step that decides
        with Revision(vault, None) as again:  # puts things in order
            assert again.files == found
        assert not list(vault.rglob("*.part"))
        assert {*contents(vault)} - {"manifest.json", "seal.json"} == {*again.manifest.files}
        shutil.rmtree(vault)
    assert count > 20 and seen[0] is False and seen.count(True) > 3


@pytest.mark.parametrize("where", ["new file", "manifest", "seal"])
def test_a_full_disk_leaves_the_old_vault(
    out: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)
    wanted = {"new file": "generation_config", "manifest": "manifest", "seal": "seal"}[where]
    real = os.open

    def full(path: Any, *args: Any, **more: Any) -> int:
        if wanted in str(path) and str(path).endswith(durable.PART) and args[0] & os.O_CREAT:
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ShareError, match="room"):
        sliplm.reseal(out / "vault", new_files(tmp_path / "new"))
    monkeypatch.undo()
    assert contents(out) == before


def test_the_key_may_change_at_the_same_time(out: Path, tmp_path: Path) -> None:
    """The seal is read, changed and written by both, and neither loses what the other wrote."""
    (tmp_path / "key").write_text("1" * 64)
    (tmp_path / "key").chmod(0o600)
    vault = str(out / "vault")
    script = f"from sliplm.shares.sealing import reseal; reseal({vault!r}, None, 'file:{tmp_path / 'key'}')"
    with Revision(out / "vault", None) as revision:
        other = subprocess.Popen([sys.executable, "-c", script])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(3)
        revision.change({"generation_config.json": b"{}"})
    assert other.wait(60) == 0
    assert open_vault(out / "vault", f"file:{tmp_path / 'key'}").files["generation_config.json"] == b"{}"
    assert sealing.read_seal(out / "vault").manifest is not None


def test_the_command(out: Path, tmp_path: Path) -> None:
    def slip(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sliplm", "reseal", *words], capture_output=True, text=True, check=False
        )

    done = slip(str(out), "--from", str(new_files(tmp_path / "new")), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changed"] == ["generation_config.json"]
    assert "added: chat_template.jinja" in done.stderr
