"""What somebody meets who tries sliplm for the first time."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import families
import sliplm
from sliplm.engines.transformers.answer import Conversation, answer, encode
from sliplm.errors import InputError, ShareError, SlipWarning
from sliplm.network import authority
from sliplm.parties.local_worker import LocalWorker
from sliplm.parties.quarantine import Entry
from terminal import Terminal
from test_cli import ENV, SLIP, run_here, slip

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("newcomer") / "my model"
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return families.make_with_tokenizer("llama", folder, template=template, num_hidden_layers=1)


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
    vault, worker, keys = out / "vault", out / "worker", tmp_path / "keys"
    authority.init(keys)
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
        (["deal", vault, worker, "--tokens", 5], "where a pool has no place"),
        (["deal", vault, out, "--tokens", 5], "where a pool has no place"),
        (["worker", worker, "--listen", "127.0.0.1:0", "--keys", keys], f"such as {keys / 'worker'}"),
        (["generate", out, "--prompt", "x", "--worker", f"127.0.0.1:1?keys={keys}"], "for each party"),
        (["keys", "reseal", worker], f"give the vault's, {vault}"),
        (["ledger", "add", worker], f"give the vault's, {vault}"),
        (["inspect", model], "is a model that was not split"),
    ]  # fmt: skip
    for arguments, said in cases:
        assert run_here(monkeypatch, arguments) == 2, arguments
        shown = capsys.readouterr().err
        assert said in shown, arguments
        assert shown.splitlines()[-1].startswith("error: "), arguments
        assert shown.count("error: ") == 1, arguments


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


# --- what is suggested, and how it looks ------------------------------------------------------------------


def test_a_split_ends_with_a_command_that_runs_as_written_and_says_to_bring_the_key(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "it's out; touch broken"
    key = Path(os.environ["SLIPLM_KEY_FILE"])
    with Terminal([*SLIP, "split", str(model), str(out), "--rank", "4"], ENV) as terminal:
        assert terminal.status() == 0
        lines = terminal.lines
    assert max(map(len, (line for line in lines if str(tmp_path) not in line))) <= 80
    bars = [line for line in lines if line.startswith("splitting") and "groups" in line]
    assert bars
    assert all("of 5 groups, " in line and "…" not in line for line in bars)
    [hint] = [line.removeprefix("Try it: ") for line in lines if line.startswith("Try it: ")]
    assert shlex.split(hint) == ["slip", "generate", str(out), "--prompt", "Hello"]
    closing = "".join(lines[lines.index(f"Try it: {hint}") + 1 :])
    assert str(key) in closing.replace(" ", "")
    scripts = {**ENV, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{hint} --max-new-tokens 2"],
        cwd=tmp_path, env=scripts, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "broken").exists()


def test_a_passphrase_is_asked_for_without_a_bar_in_its_place(model: Path, tmp_path: Path) -> None:
    words = ["split", str(model), str(tmp_path / "out"), "--rank", "2", "--key", "passphrase", "--i-know"]
    with Terminal([*SLIP, *words], ENV) as terminal:
        for asked in ("Passphrase of the vault share: ", "The same again: "):
            terminal.wait_for(asked)
            assert "splitting" not in terminal.text
            terminal.send("a b\n")
        assert terminal.status() == 0
        assert "100% 5 of 5 groups" in terminal.text
        assert "--prompt 'Hello' --key passphrase" in terminal.text


def test_other_suggested_commands_are_quoted(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry = Entry(address="unix:/a b/$(w).sock", spki=None, role="worker", time="2026-01-01", reason="lied")
    assert shlex.split(entry.why().partition(": slip ")[2]) == ["quarantine", "clear", entry.address]
    vault = tmp_path / "a vault"
    shutil.copytree(out / "vault", vault)
    (tmp_path / "key").write_text("00" * 32)
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("SLIPLM_LEDGER", str(tmp_path / "key"))  # a file: no ledger can be there
    assert run_here(monkeypatch, ["keys", "reseal", vault, "--new-key", f"file:{tmp_path / 'key'}"]) == 0
    again = capsys.readouterr().err.rpartition("; then: slip ")[2]
    assert shlex.split(again) == ["ledger", "add", str(vault), "--key", f"file:{tmp_path / 'key'}"]


def test_a_fine_tune_at_eighty_columns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    sliplm.split(tmp_path / "tuned", tmp_path / "out", sliplm.Recipe(energy=0.5), base=model)
    monkeypatch.setenv("COLUMNS", "80")
    for folder in (tmp_path / "out", tmp_path / "out" / "worker"):
        assert run_here(monkeypatch, ["inspect", folder]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)


def test_tables_of_the_benches_at_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    decode, exactness, breadth = map(importlib.import_module, ("decode", "exactness", "breadth"))
    keys = (*decode.PHASES, "ratio", "over_float32", "cpu", "tokens", "masks_per_second")
    seconds = (f"{who}_seconds" for who in (*decode.DTYPES, "hybrid"))
    cases = dict.fromkeys(decode.CASES, dict.fromkeys((*keys, *seconds), 123.456))
    subject = SimpleNamespace(
        title="EfficientNet-lite0", guess={"top-1": 0.5, "top-5": 0.5, "agreement": 0.5}
    )
    removal = {"k": 16, "residual": subject.guess, "rotated": subject.guess}
    kinds = dict.fromkeys(("bfloat16", "p12", "base p12"), 1.234e-12)
    for table, first in (
        (decode.table([{"bits": bits, **cases} for bits in (12, 8)]), "masks dealt a second"),
        (exactness.table("a model", {f"x{n}": kinds for n in (1, 100, 1000)}), "base p12"),
        (breadth.table(subject, [removal], subject.guess), "no share"),
    ):
        screen = Console(width=80, file=io.StringIO())
        screen.print(table)
        text = screen.file.getvalue()  # type: ignore[attr-defined]
        assert first in text
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80


# --- generate ---------------------------------------------------------------------------------------------


def test_generate_says_what_it_waits_for(out: Path) -> None:
    with Terminal([*SLIP, "generate", str(out), "--prompt", "Hi", "--max-new-tokens", "3"], ENV) as terminal:
        assert terminal.status() == 0
        said = terminal.text
    plain = slip("generate", out, "--prompt", "Hi", "--max-new-tokens", 3).stdout
    assert plain.replace("\n", "\r\n") in said  # nothing comes between its tokens
    steps = ["loading", "starting a worker, opening the vault", "tokens, and dealing masks"]
    places = [said.index(step) for step in steps]
    assert places == sorted(places)
    assert re.search(r"\d+ tokens, \S+ a second; \d+ exchanges", said)
    assert max(map(len, terminal.lines)) <= 80


def test_a_conversation_on_a_terminal(out: Path) -> None:
    """Two questions and Ctrl-D; the second answer is that to all that was said."""
    with Terminal([*SLIP, "generate", str(out), "--max-new-tokens", "4"], ENV) as terminal:
        terminal.wait_for("> ")
        terminal.send("one\n")
        terminal.wait_for("> ", 2)
        terminal.send("\n")  # nothing is said
        terminal.wait_for("> ", 3)
        terminal.send("two\n")
        terminal.wait_for("> ", 4)
        terminal.send("\x04")
        assert terminal.status() == 0
        assert "Ctrl-D ends it" in terminal.text
        assert re.search(r"\d+ tokens, \S+ a second", terminal.text)


def test_ctrl_c_ends_a_conversation(out: Path) -> None:
    with Terminal([*SLIP, "generate", str(out)], ENV) as terminal:
        terminal.wait_for("> ")
        terminal.interrupt()
        assert terminal.status() == 130
        assert "interrupted" in terminal.text
        assert "Traceback" not in terminal.text


def test_a_prompt_from_standard_input(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(data: bytes, *options: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert run_here(monkeypatch, ["generate", out, "--max-new-tokens", 4, *options]) == 0
        return capsys.readouterr().out

    plain = json.loads(ask(b"", "--prompt", "Hello\nyou", "--json"))
    for found in (ask(b"Hello\nyou\n", "--json"), ask(b"Hello\nyou\r\n", "--prompt", "-", "--json")):
        for name in ("text", "tokens", "prompt_tokens", "exchanges"):
            assert json.loads(found)[name] == plain[name]
    assert ask(b"one\n\ntwo\n", "--chat").count("\n") >= 2


def test_prompts_that_are_none(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, options, said in (
        (b"\xff\xfe", [], "standard input is no text in UTF-8"),
        (b"", ["--no-chat"], "the prompt is empty"),
        (b"", ["--prompt", "a\udcff"], "the prompt is not UTF-8"),
        (b"x", ["--chat", "--json"], "--json is for one answer"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert run_here(monkeypatch, ["generate", out, "--max-new-tokens", 1, *options]) == 2
        shown = capsys.readouterr()
        assert said in shown.err
    monkeypatch.setattr(sys, "stdin", None)
    assert run_here(monkeypatch, ["generate", out]) == 2
    assert "there is no prompt: give --prompt TEXT" in capsys.readouterr().err


def test_a_model_without_a_chat_template_holds_no_conversation(
    model: Path, out: Path, tmp_path: Path
) -> None:
    families.byte_tokenizer().save_pretrained(tmp_path)
    words = [*SLIP, "generate", str(out), "--tokenizer", str(tmp_path)]
    with Terminal(words, ENV) as terminal:
        assert terminal.status() == 2
        assert "this model has no chat template: give a --prompt" in " ".join(terminal.text.split())
        assert "> " not in terminal.text


def test_a_conversation_reads_nothing_twice_and_answers_as_if_it_did(out: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(259)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for m in messages %} w7 {{ m.content }} {% endfor %} w7"
    with sliplm.open(out) as split:
        talk = Conversation(split, tokenizer, 5, 0.0)
        messages: list[dict[str, str]] = []
        for text in ("w11 w12 w13 w14", "w21 w22", "w31"):
            before = split.slip.counters.rows
            found = talk.say(text)
            read = split.slip.counters.rows - before
            messages.append({"role": "user", "content": text})
            again = answer(split, tokenizer, encode(tokenizer, messages), new_tokens=5)
            assert again.tokens == found.tokens
            if len(messages) > 1:
                assert read < split.slip.counters.rows - before - read
            messages.append({"role": "assistant", "content": found.text})
        with pytest.raises(InputError, match=r"the conversation has \d+ tokens, and the model takes 128"):
            talk.say("w1 " * 200)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--prepare", "{file}/x"],
        ["plan", "{none}", "{file}"],
        ["split", "{none}", "{file}"],
        ["attack", "{none}", "{file}"],
        ["inspect", "{none}"],
        ["ledger", "list", "--key", "file:{none}"],
        ["ledger", "forget", "00", "--key", "file:{none}"],
        ["ledger", "add", "{none}"],
        ["keys", "init", "{file}"],
        ["keys", "issue", "{none}", "x"],
        ["keys", "list", "{none}"],
        ["keys", "revoke", "{none}", "x"],
        ["keys", "rotate", "{none}", "x"],
        ["keys", "reseal", "{none}"],
        ["quarantine", "list"],
        ["quarantine", "clear", "x:1"],
        ["worker", "{none}"],
        ["deal", "{none}", "{file}", "--status"],
        ["generate", "{none}", "--prompt", "x"],
        ["reseal", "{none}"],
        ["generate", "{none}", "--max-new-tokens", "0"],
        ["split", "--no-such-option"],
        ["inspect"],
        ["split", "{none}", "{file}", "--precision", "many"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_errors_of_every_command_with_json(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line for people on stderr; on stdout one document, nothing before it, nothing after it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "state"))
    if arguments[0] == "demo":
        monkeypatch.setattr("sliplm.examples.demo.smollm2", lambda: tmp_path / "none")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "quarantine.json").write_text("[" if arguments[1:2] == ["list"] else "[]")
    places = {"none": tmp_path / "none", "file": tmp_path / "file"}
    words = [word.format(**places) for word in arguments]
    assert run_here(monkeypatch, [*words, "--json"]) == 2
    shown = capsys.readouterr()
    [line] = shown.out.splitlines()
    document = json.loads(line)
    assert set(document) == {"error", "message"}
    assert document["message"]
    assert shown.err.strip()
    assert run_here(monkeypatch, words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.strip()


def test_a_crash_shows_no_variables(model: Path, tmp_path: Path) -> None:
    """A bug of ours in the middle of a split: the traceback has lines of code, and no key."""
    key = "5ec7e7" * 10 + "abcd"
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o600)
    script = (
        "import sys\n"
        "import sliplm.engines.writing as writing\n"
        "from sliplm.cli import main\n"
        "def crash(*args, **options):\n"
        "    secret = open(sys.argv[1]).read()\n"
        "    raise RuntimeError('a bug')\n"
        "writing.make_seal = crash\n"
        "path = sys.argv[1]\n"
        "sys.argv[1:] = ['split', sys.argv[2], sys.argv[3], '--key', 'file:' + path]\n"
        "key = open(path).read()\n"
        "sys.argv[0] = 'slip'\n"
        "sys.argv.insert(1, path)\n"
        "del sys.argv[1]\n"
        "main()\n"
    )
    script = script.replace("open(sys.argv[1]).read()", "key")
    words = [str(tmp_path / "key"), str(model), str(tmp_path / "out")]
    with Terminal([sys.executable, "-c", script, *words], ENV) as terminal:
        assert terminal.status() == 1
        said = terminal.text
    assert "RuntimeError: a bug" in said
    assert "Traceback" in said
    assert "5ec7e7" not in said
    assert "locals" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{out}"],
        ["inspect", "{none}"],
        ["split"],
        ["worker", "{out}/worker", "--listen", "127.0.0.1:0"],  # it has no keys
    ],
)
def test_a_caller_in_python_has_his_handlers_back(
    arguments: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run_here(monkeypatch, [word.format(out=out, none=tmp_path / "none") for word in arguments])
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL, signal.SIG_IGN, before[2]]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_lost_key_is_not_replaced_without_a_word(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("SLIPLM_LEDGER", str(tmp_path / "ledger"))
    with pytest.warns(SlipWarning, match="was made just now. Keep a copy") as first:
        sliplm.split(model, tmp_path / "one", sliplm.Recipe(rank=2))
    assert "another key" not in str(first[0].message)
    (tmp_path / "key").unlink()
    with pytest.warns(SlipWarning, match=r"has splits under another key.* put it back"):
        sliplm.split(model, tmp_path / "two", sliplm.Recipe(rank=2))
