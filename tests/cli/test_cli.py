"""The commands as a user runs them: real processes on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import families
from sliplm.cli import main
from sliplm.cli.inspect import fold, pattern
from sliplm.cli.screen import number, percent, printable, showing_warnings, size
from sliplm.errors import SlipWarning
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.manifest import WorkerGroup

ENV = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
}
SLIP = [sys.executable, "-m", "sliplm"]


def slip(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*SLIP, *map(str, arguments)], env=ENV, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # a pipe gets no control codes
    return done


def run_here(monkeypatch: pytest.MonkeyPatch, arguments: list[object]) -> object:
    """The same command line in this process, for the many that end at once; its exit status."""
    monkeypatch.setattr(sys, "argv", ["slip", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    return families.make_with_tokenizer("llama", folder, template=template, num_hidden_layers=3)


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    target = model.parent / "out"
    report = last_json(slip("split", model, target, "--rank", 4, "--precision", 10, "--json"))
    assert report["exchanges"] == 13
    assert {(g["rank"], g["precision"], g["rotation"]) for g in report["groups"]} == {(4, 10, "fast")}
    return target


# --- split ------------------------------------------------------------------------------------------------


def test_split_says_what_is_where(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('rank = 2\nrotation = "haar"\n[[rules]]\npattern = "lm_head"\nplacement = "vault"\n')
    done = slip("split", model, tmp_path / "out", "--recipe", recipe, "--rank", 3)
    assert "12 groups" in done.stdout
    assert "exchanges" in done.stdout
    groups = last_json(slip("inspect", tmp_path / "out", "--json"))["groups"]
    assert {(g["rank"], g["rotation"]) for g in groups if g["placement"] == "split"} == {(3, "haar")}
    assert [g["name"] for g in groups if g["placement"] == "vault"] == ["lm_head"]
    assert "whole, in the vault" in slip("inspect", tmp_path / "out").stdout


def test_a_checkpoint_without_a_tokenizer_is_no_dead_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families.make("llama", tmp_path / "bare", vocab_size=259, num_hidden_layers=1)
    done = slip("split", tmp_path / "bare", tmp_path / "out", "--rank", 2)
    assert "--tokenizer FOLDER (the checkpoint has no tokenizer)" in " ".join(done.stdout.split())
    assert run_here(monkeypatch, ["generate", tmp_path / "out", "--prompt", "a"]) == 2
    assert "no tokenizer came with the checkpoint" in capsys.readouterr().err
    words = ("generate", tmp_path / "out", "--prompt", "a", "--max-new-tokens", 2, "--json")
    assert last_json(slip(*words, "--tokenizer", model))["tokens"] > 0
    assert run_here(monkeypatch, [*words, "--tokenizer", tmp_path / "bare"]) == 2
    assert "has no tokenizer that can be used" in capsys.readouterr().err


def test_split_continues(model: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; import sliplm\n"
        "names = []\n"
        "def progress(done, total, name):\n"
        "    names.append(name)\n"
        "    if len(names) == 6: os._exit(7)\n"
        "sliplm.split(sys.argv[1], sys.argv[2], progress=progress)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(model), str(tmp_path)], env=ENV, timeout=120, check=False
    )
    assert killed.returncode == 7
    done = slip("split", model, tmp_path)
    assert "continuing an earlier run: 5 of 13 groups are done" in done.stderr


def test_bad_inputs(
    model: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [
        (["split", tmp_path / "nothing", tmp_path / "o"], "is not a folder"),
        (["split", model, out], "exists"),
        (["split", model, tmp_path / "o", "--rank", 5000], "rank 5000"),
        (["split", model, tmp_path / "o", "--rotation", "slow"], "choose fast, haar or none"),
        (["split", model, tmp_path / "o", "--recipe", tmp_path / "none.json"], "cannot be read"),
        (["inspect", tmp_path], "has no manifest.json"),
        (["generate", tmp_path, "--prompt", "x"], "manifest.json"),
        (["generate", out / "vault", "--prompt", "x"], "--worker"),
        (["generate", out, "--prompt", "x", "--worker", f"unix:{tmp_path}/none.sock"], "none.sock"),
        (["generate", out, "--prompt", "", "--no-chat"], "prompt is empty"),
    ]
    for arguments, said in cases:
        status = run_here(monkeypatch, arguments)
        shown = capsys.readouterr()
        assert status == 2, arguments
        assert said in shown.err, arguments
        assert shown.err.startswith("error: "), arguments
        assert len(shown.err.splitlines()) == 1, arguments
        assert shown.out == "", arguments
    error = last_json(slip("split", tmp_path / "nothing", tmp_path / "o", "--json", status=2))
    assert error["error"] == "CheckpointError"


def test_usage_errors() -> None:
    assert "Usage" in slip("generate", "x", "--prompt", "x", "--max-new-tokens", 0, status=2).stderr


def test_help_has_examples() -> None:
    for command in ("demo", "plan", "split", "inspect", "generate"):
        assert f"slip {command}" in slip(command, "--help").stdout.split("Example", 1)[1]
    assert re.fullmatch(r"sliplm \d+\.\d+\S*\n", slip("--version").stdout)


# --- inspect ----------------------------------------------------------------------------------------------


def test_inspect(out: Path) -> None:
    folded = slip("inspect", out).stdout
    assert "model.layers.{0..2}. x3" in folded
    assert "13 exchanges" in folded
    everything = slip("inspect", out / "vault", "--all").stdout
    assert "model.layers.1." in everything
    assert "{" not in everything


def test_inspect_fits_eighty_columns_whole(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENV, "COLUMNS", "80")
    text = slip("inspect", out).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"a token +max \|v\| *\n", text)  # the last column is there
    entry = re.search(r"^max \|v\| +(0[.][0-9]+) ", text, re.MULTILINE)
    assert entry is not None
    assert 0.1 < float(entry[1]) < 0.9


def test_inspect_worker_alone(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "worker", tmp_path / "w")
    shown = slip("inspect", tmp_path / "w").stdout
    assert "13 integer matrices" in shown
    assert "rank" not in shown
    document = last_json(slip("inspect", tmp_path / "w", "--json"))
    assert len(document["groups"]) == 13
    assert set(document["groups"][0]) == {"name", "rows", "columns", "dtype"}
    with (tmp_path / "w" / "share.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert "altered or damaged" in slip("inspect", tmp_path / "w", status=2).stderr


def test_fold_and_pattern() -> None:
    def group(name: str, rows: int = 4) -> WorkerGroup:
        return WorkerGroup(name=name, rows=rows, columns=4, dtype="I8")

    names = ["h.0.mlp", "h.0.attn", "h.1.mlp", "h.1.attn", "h.3.mlp", "head"]
    found = fold([*map(group, names), group("h.2.mlp", 5)], lambda g: g.rows, all_groups=False)
    assert [pattern([g.name for g in same]) for same in found] == [
        "h.{0..1,3}.mlp", "h.{0..1}.attn", "head", "h.2.mlp"
    ]  # fmt: skip


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 99_940, 99_960, 1_234_567, 5e13)] == [
        "0 B", "999 B", "1 kB", "99.9 kB", "100 kB", "1.23 MB", "50 TB"
    ]  # fmt: skip
    assert (number(12), number(134_515_008), percent(0.0847), percent(2)) == (
        "12",
        "135 M",
        "8.47 %",
        "200 %",
    )
    assert printable("a\x1b[2Jb\n") == "a\ufffd[2Jb\n"


# --- generate ---------------------------------------------------------------------------------------------


def test_generate(out: Path) -> None:
    done = slip("generate", out, "--prompt", "Hello", "--max-new-tokens", 5, "--json")
    document = last_json(done)
    assert len(done.stdout.splitlines()) == 1
    assert document["prompt_tokens"] == len("[Hello]")  # the chat template
    assert 1 <= document["tokens"] <= 5
    assert document["exchanges"] == 13 * document["tokens"]
    assert document["text"] in done.stderr
    plain = slip("generate", out, "--prompt", "[Hello]", "--max-new-tokens", 5, "--no-chat")
    assert plain.stdout == printable(document["text"]) + "\n"


def test_generate_with_a_worker_of_its_own(out: Path) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "0.8", "--json"]
    with LocalWorker(out / "worker", threads=1) as worker:
        for folder, inputs in ((out, "1"), (out / "vault", "2")):
            done = slip("generate", folder, "--worker", worker.address, "--inputs", inputs, *options)
            assert last_json(done)["tokens"] >= 1


# --- Ctrl-C -----------------------------------------------------------------------------------------------


def test_interrupt_stops_the_worker(out: Path) -> None:
    arguments = ["generate", str(out), "--prompt", "Hello", "--max-new-tokens", "100000", "--no-chat"]
    with running(arguments) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it generates
        workers = children(process.pid)
        assert workers
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "interrupted"
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@contextmanager
def running(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*SLIP, *arguments], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_warning_of_ours_is_a_line_and_others_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with showing_warnings():
            warnings.warn("a row lost precision", SlipWarning, stacklevel=1)
            warnings.warn("other", DeprecationWarning, stacklevel=1)
    assert [str(other.message) for other in others] == ["other"]
    assert capsys.readouterr().err == "warning: a row lost precision\n"
