"""Folders that others can write to: what is added, exchanged or disguised is refused, and never loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from ledger import Ledger
from sliplm.engines.transformers import quantizer
from sliplm.engines.transformers.answer import load_tokenizer
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.quantizer import SlipConfig
from sliplm.errors import CheckpointError, ShareError, SlipWarning
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import open_vault, open_worker

ROW = "folders"
# transformers says at each loading that it heeds what the user passed
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
TOKENS = torch.tensor([[1, 17, 20, 45]])
ADDED: dict[str, bytes] = {
    "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "r": 4}',
    "adapter_model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "chat_template.json": b'{"chat_template": "evil"}',
    "chat_template.jinja": b"evil",
    "additional_chat_templates/evil.jinja": b"evil",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "custom_generate/generate.py": b"raise SystemExit",
    "model.safetensors.index.json": b"{}",
    "tokenization_evil.py": b"raise SystemExit",
    ".hidden": b"",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split model with a tokenizer and generation settings."""
    folder = tmp_path_factory.mktemp("made")
    families.make_with_tokenizer("llama", folder / "model")
    split(folder / "model", folder / "out", recipe=Recipe(rank=4, precision=12))
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def add(folder: Path, name: str) -> None:
    """Put a file there that no split wrote."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(ADDED[name])


def ways(out: Path) -> dict[str, Callable[[], Any]]:
    """Every way to a vault's small files."""
    config = SlipConfig(workers=["127.0.0.1:1?keys=/nowhere"])
    return {
        "open_vault": lambda: open_vault(out / "vault"),
        "load": lambda: load(out / "vault", ["127.0.0.1:1?keys=/nowhere"]),
        "reference": lambda: reference(out),
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(
            out / "vault", quantization_config=config
        ),
    }


@pytest.mark.parametrize("name", list(ADDED))
def test_an_added_file_is_refused_by_name(out: Path, name: str, ledger: Ledger) -> None:
    add(out / "vault", name)
    add(out / "worker", name)
    refused = 0
    for what, way in {**ways(out), "worker": lambda: open_worker(out / "worker")}.items():
        with pytest.raises(ShareError, match=re.escape(name.split("/")[0])):
            raise AssertionError(f"{what} gave {way()}")
        refused += 1
    ledger.record(ROW, refused, refused, 0, "files added, exchanged, disguised; code named by a checkpoint")


def test_litter_of_the_system_is_left_alone_and_never_read(out: Path) -> None:
    for name in (".DS_Store", "._config.json", "Thumbs.db", ".nfs00a1", ".seal.json.part"):
        (out / "vault" / name).write_bytes(b"\xff")
        (out / "vault" / name).chmod(0)
    assert set(open_vault(out / "vault").files) >= {"config.json", "tokenizer.json"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "longer", "same length", "dangling link", "device"])
def test_what_is_in_place_of_a_file_is_refused_at_once(
    out: Path, name: str, kind: str, ledger: Ledger
) -> None:
    path = out / "vault" / name
    data = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nothing")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(data + b" " if kind == "longer" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ShareError, match=name):
        open_vault(out / "vault")
    ledger.record(ROW, 1, 1, 0)


def test_a_link_to_the_very_bytes_is_the_file(out: Path, tmp_path: Path) -> None:
    path = out / "vault" / "config.json"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    os.link(out / "vault" / "tokenizer.json", tmp_path / "second name")
    assert open_vault(out / "vault").files["config.json"] == (tmp_path / "elsewhere").read_bytes()


def evil(path: Path) -> None:
    """Another model of the same shapes, and other ways to generate."""
    found = json.loads(path.read_bytes())
    found |= {"rms_norm_eps": 0.5, "max_new_tokens": 1, "eos_token_id": [7]}
    replacement = path.with_name(".evil.part")
    replacement.write_text(json.dumps(found))
    replacement.replace(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_file_exchanged_after_the_check_is_not_used(
    out: Path, name: str, monkeypatch: pytest.MonkeyPatch, ledger: Ledger
) -> None:
    honest = reference(out)
    wanted = honest(TOKENS).logits
    opened = quantizer.open_vault

    def then_exchanged(*args: Any) -> Any:
        found = opened(*args)
        evil(out / "vault" / name)
        return found

    monkeypatch.setattr(quantizer, "open_vault", then_exchanged)
    model: Any = reference(out)
    assert torch.equal(model(TOKENS).logits, wanted)
    assert model.generation_config.to_dict() == honest.generation_config.to_dict()
    assert model.name_or_path == str(out / "vault")
    assert len(load_tokenizer(model.slip.files)) == len(families.byte_tokenizer())
    ledger.record(ROW, 1, 1, 0)


def test_a_config_exchanged_before_from_pretrained_checks_it_is_noticed(
    out: Path, monkeypatch: pytest.MonkeyPatch, ledger: Ledger
) -> None:
    path = out / "vault" / "config.json"
    honest, opened = path.read_bytes(), quantizer.open_vault

    def restored_first(*args: Any) -> Any:
        path.write_bytes(honest)
        return opened(*args)

    evil(path)
    monkeypatch.setattr(quantizer, "open_vault", restored_first)
    with pytest.raises(ShareError, match="rms_norm_eps"):
        ways(out)["from_pretrained"]()
    ledger.record(ROW, 1, 1, 0)


@pytest.fixture(scope="module")
def worker(made: Path) -> Iterator[LocalWorker]:
    with LocalWorker(made / "worker") as running:
        yield running


def test_from_pretrained_takes_its_generation_settings_from_the_verified_file(
    out: Path, worker: LocalWorker, monkeypatch: pytest.MonkeyPatch, ledger: Ledger
) -> None:
    opened = quantizer.open_vault

    def then_exchanged(*args: Any) -> Any:
        found = opened(*args)
        evil(out / "vault" / "generation_config.json")
        return found

    monkeypatch.setattr(quantizer, "open_vault", then_exchanged)
    model: Any = AutoModelForCausalLM.from_pretrained(
        out / "vault", quantization_config=SlipConfig(workers=[worker.address])
    )
    with closing(model.slip):
        assert model.generation_config.max_new_tokens is None
        assert model.generation_config.eos_token_id != [7]
    ledger.record(ROW, 1, 1, 0)


# code that comes with a checkpoint


def checkpoint(tmp_path: Path, **config: Any) -> Path:
    """A tiny model whose config.json says more, with code beside it that must never run."""
    folder = tmp_path / "model"
    families.make("llama", folder)
    for name in ("tokenization_evil.py", "modeling_evil.py", "tokenizer_evil.py"):
        (folder / name).write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["EvilModel"], "auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilModel"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.EvilConfig"}},
    ],
)
def test_a_model_of_its_own_code_is_refused_by_the_name_of_the_file(
    tmp_path: Path, config: dict[str, Any], ledger: Ledger
) -> None:
    folder = checkpoint(tmp_path, **config)
    with pytest.raises(CheckpointError, match=r"config\.json.*modeling_evil"):
        split(folder, tmp_path / "out", recipe=Recipe(rank=4))
    assert not (folder / "ran").exists()
    ledger.record(ROW, 1, 1, 0)


def test_a_tokenizer_of_its_own_code_is_refused_by_the_name_of_the_file(
    tmp_path: Path, ledger: Ledger
) -> None:
    folder = checkpoint(tmp_path)
    names = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*tokenization_evil"):
        split(folder, tmp_path / "out", recipe=Recipe(rank=4))
    assert not (folder / "ran").exists()
    ledger.record(ROW, 1, 1, 0)


def test_where_a_built_in_class_serves_the_code_is_left_behind(tmp_path: Path, ledger: Ledger) -> None:
    folder = checkpoint(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM"})
    with pytest.warns(SlipWarning, match="modeling_evil.*LlamaConfig"):
        split(folder, tmp_path / "out", recipe=Recipe(rank=4))
    vault = tmp_path / "out" / "vault"
    assert "auto_map" not in json.loads((vault / "config.json").read_bytes())
    assert not [path for path in vault.iterdir() if path.suffix == ".py"]
    assert not (folder / "ran").exists()
    ledger.record(ROW, 1, 1, 0)
