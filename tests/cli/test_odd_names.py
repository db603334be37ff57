"""File names that are no UTF-8, and terminals that cannot write what is to be said: every command goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

import families
import sliplm
from sliplm import cli, filesystem
from sliplm.engines.progress import spinner
from sliplm.engines.transformers.answer import encode, load_tokenizer
from sliplm.errors import InputError
from sliplm.parties.quarantine import Quarantine
from sliplm.places import NewFolder
from sliplm.shares.share import open_vault
from tuning import train_lora

ENCODINGS = ["ascii", "latin-1", "utf-8"]
PROMPT = "h\u00e9llo \U0001f600"


class Place(NamedTuple):
    root: Path
    model: Path
    out: Path
    adapter: Path


class Said(NamedTuple):
    code: int
    out: str
    err: str


def slip(*words: Any, encoding: str = "ascii", errors: str = "strict") -> Said:
    """The command in this process, on streams of an encoding; whatever it writes can be decoded."""
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=how, write_through=True)
        for how in (errors, "backslashreplace")
    ]
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(sys, "argv", ["slip", *map(str, words)])
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return Said(int(code or 0), out, err)


def document(said: Said) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A checkpoint, an adapter and a split below a folder whose name is no UTF-8, and our own files too."""
    folder = tmp_path_factory.mktemp("made")
    families.make_with_tokenizer("llama", folder / "model", num_hidden_layers=1)
    train_lora(folder / "model", folder / "adapter")
    root = Path(os.fsdecode(os.fsencode(folder) + b"/\xffd\xe9"))
    root.mkdir()
    model, adapter = root / "mod\udce9l", root / "fr\udcff"
    (folder / "model").rename(model)
    (folder / "adapter").rename(adapter)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KEY_FILE", "LEDGER", "STATE"):
            patch.setenv(f"SLIPLM_{name}", str(root / "own\udcfe" / name))
        patch.setenv("TMPDIR", str(root / "tmp\udcfd"))
        patch.setattr("tempfile.tempdir", None)
        (root / "tmp\udcfd").mkdir()
        said = slip("split", model, root / "out\udcfc", "--rank", "4", "--json")
        assert said.code == 0, said.err
        assert "\\udcfe" in said.err and document(said)["exchanges"] == 5
        yield Place(root, model, root / "out\udcfc", adapter)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_commands_that_only_tell(place: Place, encoding: str) -> None:
    for words in (
        ["inspect", place.out], ["inspect", place.out / "worker"], ["ledger", "list"], ["--help"],
        ["ledger", "add", place.out / "vault"], ["quarantine", "list"], ["split", "--help"], ["--version"],
        ["reseal", place.out, "--from", place.model],
    ):  # fmt: skip
        said = slip(*words, encoding=encoding)
        assert said.code == 0 and said.out, (words, said)
        if encoding == "ascii":
            assert "\u2500" not in said.out
    found = document(slip("ledger", "list", "--json", encoding=encoding))
    assert found["splits"][0]["folder"] == filesystem.readable(place.out)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_paths_in_json_are_the_very_paths(place: Place, encoding: str) -> None:
    keys = place.root / f"keys-{encoding}"
    assert document(slip("keys", "init", keys, "--json", encoding=encoding))["vault"] == str(keys / "vault")
    assert str(keys) in document(slip("keys", "init", keys, "--json", encoding=encoding))["message"]
    assert "error" in document(slip("inspect", place.root / "none", "--json", encoding=encoding))
    found = document(slip("reseal", place.out, "--from", place.model, "--json", encoding=encoding))
    assert found["vault"] == str(place.out / "vault") and "tokenizer.json" in found["same"]


def test_keys_of_every_kind(place: Place) -> None:
    keys = place.root / "keys\udcfb"
    for words in (["init", keys], ["issue", keys, "w2"], ["revoke", keys, "w2"], ["rotate", keys, "worker"]):
        said = slip("keys", *words)
        assert said.code == 0 and "\\udcfb" in said.out, said
    assert slip("keys", "list", keys).code == 0
    assert slip("keys", "issue", keys, "n\udcff").code == 2
    said = slip("keys", "reseal", place.out / "vault", "--new-key", f"file:{place.root / 'none'}")
    assert said.code == 2 and "cannot be read" in said.err


def test_masks_are_dealt_and_used_and_text_comes_out(place: Place) -> None:
    pool, audit = place.root / "pool\udcff", place.root / "audit\udcff"
    assert slip("deal", place.out / "vault", pool, "--tokens", "160").code == 0
    assert document(slip("deal", place.out / "vault", pool, "--status", "--json"))["tokens"] == 160
    given = ["--max-new-tokens", "2", "--pool", pool, "--audit", audit, "--tokenizer", place.model]
    for prompt in (PROMPT, os.fsencode(PROMPT).decode("ascii", "surrogateescape")):  # as in an ASCII locale
        said = slip("generate", place.out, "--prompt", prompt, *given, "--json")
        assert said.code == 0 and document(said)["tokens"] == 2, said.err
        assert document(said)["prompt_tokens"] == len(PROMPT.encode())
    said = slip("generate", place.out, "--prompt", "bad\udcff", *given)
    assert said.code == 2 and "the prompt is not UTF-8" in said.err
    assert slip("generate", place.out, "--prompt", "x", *given[:2]).code == 0


def test_adapters(place: Place) -> None:
    out = place.root / "based"
    said = slip("split", place.model, out, "--base", place.model, "--adapter", place.adapter)
    assert said.code == 2 and "an adapter cannot be called" in said.err
    said = slip(
        "split", place.model, out, "--base", place.model, "--adapter", f"fr={place.adapter}", "--json"
    )
    assert said.code == 0 and document(said)["base"] == "mod\\udce9l", said.err
    said = slip("generate", out, "--adapter", "f\udcff", "--prompt", "x")
    assert said.code == 2 and "no adapter 'f\\udcff'" in said.err


@pytest.mark.parametrize(
    "address", ["gpu..example:7400", ".:7400", "a" * 64 + ".example:7400", "\udcff:7400"]
)
def test_names_of_no_host_are_told(place: Place, address: str) -> None:
    keys = place.root / "keys-named"
    if not keys.exists():
        slip("keys", "init", keys)
    said = slip(
        "generate", place.out / "vault", "--prompt", "x", "--worker", f"{address}?keys={keys / 'vault'}"
    )
    assert said.code == 2 and "Traceback" not in said.err and "error: " in said.err, said
    said = slip("worker", place.out / "worker", "--listen", address, "--keys", keys / "worker")
    assert said.code == 2 and "error: " in said.err, said


def test_a_socket_under_an_odd_name_serves_and_its_liar_is_remembered(place: Place) -> None:
    """A real worker in a process, in a locale that has ASCII only."""
    address = "unix:" + str(place.root / "s\udcff")
    bare = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = [sys.executable, "-m", "sliplm"]
    with subprocess.Popen(
        [*run, "worker", place.out / "worker", "--listen", address, "--json"],
        stdout=subprocess.PIPE,
        env=bare,
    ) as worker:
        assert worker.stdout is not None
        assert json.loads(worker.stdout.readline())["listening"] == address
        done = subprocess.run(
            [*run, "generate", place.out / "vault", "--worker", address, "--share", place.out / "worker",
             "--prompt", PROMPT, "--max-new-tokens", "2", "--no-chat"],
            capture_output=True, check=False, env=bare,
        )  # fmt: skip
        worker.terminate()
    assert done.returncode == 0 and b"2 tokens" in done.stderr, done.stderr
    done.stdout.decode("ascii")
    Quarantine.own().add(address, None, "worker", "gave a wrong product")
    assert "\\udcff" in slip("quarantine", "list").out
    assert Quarantine.own().find(address, None) is not None
    assert slip("quarantine", "clear", address).code == 0


def test_the_library_too(place: Place, tmp_path: Path) -> None:
    with NewFolder() as folder:
        assert filesystem.readable(folder.path) != str(folder.path)  # our own temporary files lie there
    tokenizer = load_tokenizer(open_vault(place.out / "vault").files)
    assert load_tokenizer(place.model).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InputError, match="not UTF-8"):
        encode(tokenizer, "\ud83d", chat=False)
    with filesystem.utf8_name(place.root) as named:
        assert named.samefile(place.root) and str(named).isascii()
    with sliplm.open(place.out) as model:
        assert model.config.vocab_size == 259
    assert not list((place.root / "tmp\udcfd").iterdir())


def test_plan_and_attack(place: Place) -> None:
    text = place.root / "text\udcff"
    text.write_text("the vault keeps a secret and the worker works. " * 200)
    given = ["--text", text, "--json", "--tokens", "256", "--ranks", "4"]
    said = slip("plan", place.model, place.root / "plan\udcff", *given)
    assert said.code == 0 and document(said), said.err
    assert "mod\\udce9l" in (place.root / "plan\udcff" / "plan.html").read_text(encoding="utf-8")
    said = slip("attack", place.model, place.root / "attack", "--text", text, "--untrained", "--json")
    assert said.code == 2 and "give a longer text" in document(said)["message"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_turns_on_a_terminal_is_in_its_letters(encoding: str) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    screen = Console(file=terminal, force_terminal=True)
    with screen.status("waiting", spinner=spinner(screen)) as status:
        status.update("more")
    said = terminal.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "more" in said and said.isascii() == (encoding == "ascii")


def test_streams_that_are_closed_are_no_error(place: Place) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -m sliplm ledger list >&- 2>&-', sys.executable],
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
