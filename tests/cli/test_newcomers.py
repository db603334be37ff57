"""What somebody meets who tries sliplm for the first time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import families
import sliplm
from sliplm.errors import ShareError
from sliplm.parties.local_worker import LocalWorker
from test_cli import run_here
from test_generation import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("newcomer") / "my model"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    families.make("llama", folder, vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    target = model.parent / "it's out"
    sliplm.split(model, target, sliplm.Recipe(rank=4))
    return target


# --- the wrong folder -------------------------------------------------------------------------------------


def test_a_wrong_folder_is_named_with_the_right_one(
    model: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vault, worker = out / "vault", out / "worker"
    cases: list[tuple[list[object], str]] = [
        (["worker", vault], f"{vault} is the secret vault: it stays with you."),
        (["worker", vault], f"Give the worker's folder, {worker}"),
        (["worker", out], f"the vault and the worker: give {worker}"),
        (["worker", model], "is a model that was not split"),
        (["worker", tmp_path / "none"], "does not exist: give the folder `worker`"),
        (["generate", model, "--prompt", "x"], "is a model that was not split"),
        (["generate", worker, "--prompt", "x", "--worker", "unix:/x"], f"give the vault's, {vault}"),
        (["deal", out, tmp_path / "pool", "--status"], f"give {vault}"),
        (["deal", vault, tmp_path / "pool", "--tokens", 5, "--share", vault], "is the secret vault"),
        (["keys", "reseal", worker], f"give the vault's, {vault}"),
        (["ledger", "add", worker], f"give the vault's, {vault}"),
        (["inspect", model], "is a model that was not split"),
    ]  # fmt: skip
    for arguments, said in cases:
        assert run_here(monkeypatch, arguments) == 2, arguments
        shown = capsys.readouterr().err
        assert said in shown, arguments
        assert len(shown.splitlines()) == 1, arguments


def test_a_wrong_folder_in_python_does_not_blame_the_worker(model: Path, out: Path, tmp_path: Path) -> None:
    from sliplm.engines.transformers.load import reference

    def enter(worker: LocalWorker) -> Any:
        with worker:
            pytest.fail("it started")

    nowhere = ["127.0.0.1:1"]
    for call, said in (
        (lambda: sliplm.open(model), "is a model that was not split"),
        (lambda: sliplm.open(tmp_path / "none"), "does not exist"),
        (lambda: sliplm.open(out / "vault"), f"give {out}"),
        (lambda: sliplm.load(out, nowhere), f"give {out / 'vault'}"),
        (lambda: sliplm.load(out / "worker", nowhere), f"give the vault's, {out / 'vault'}"),
        (lambda: sliplm.load(model, nowhere), "is a model that was not split"),
        (lambda: sliplm.load(out / "vault", nowhere, share=out / "vault"), "is the secret vault"),
        (lambda: sliplm.load(out / "vault", nowhere, share=tmp_path / "none"), "to make masks from"),
        (lambda: reference(out / "vault"), f"give {out}"),
        (lambda: enter(LocalWorker(out / "vault")), "is the secret vault"),
        (lambda: enter(LocalWorker(out)), f"give {out / 'worker'}"),
    ):
        with pytest.raises(ShareError) as caught:
            call()
        assert said in str(caught.value)
        assert "did not start" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
