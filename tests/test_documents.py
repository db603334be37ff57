"""The documents: the tutorial's commands run, links lead somewhere, and the tests that are named exist."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import families

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LIMIT = 300  # seconds for one block
HOUSE = ROOT / "src" / "sliplm"
MAP = ROOT / "docs" / "ARCHITECTURE.md"


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def make_model(folder: Path, *, chat: bool = False) -> None:
    """A checkpoint with a tokenizer, as a user would have it: about a token for each word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train(list(map(str, DOCUMENTS)), trainer)
    families.make("llama", folder, vocab_size=tokenizer.get_vocab_size())
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}" if chat else None
    made.save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def command(block: Block) -> list[str]:
    if block.language == "python":
        return [sys.executable, "-c", block.text]
    return ["bash", "-euo", "pipefail", "-c", block.text]


def run(block: Block, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        command(block), cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def serving(block: Block, folder: Path, env: dict[str, str]) -> Iterator[None]:
    """A block that does not end: a second terminal."""
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {block.text}"], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line.startswith(("listening on", "serving ")), (folder / "worker.log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def tell(document: str, folder: Path) -> str:
    """Run all blocks of a document in order, as its reader would; what they print."""
    make_model(folder / "my-model", chat=document == "serving.md")
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": scripts, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    env |= {"SLIPLM_KEY_FILE": str(folder / "key"), "SLIPLM_STATE": str(folder / "anchors")}
    ports = {str(port): str(free_port()) for port in (7400, 7401, 7402, 8000)}
    story = [
        block._replace(text=re.sub(r"\b(740[012]|8000)\b", lambda port: ports[port[0]], block.text))
        for block in blocks(ROOT / "docs" / document)
        if block.language in ("sh", "python")
    ]
    said: list[str] = []

    def go_on(rest: list[Block]) -> None:
        for i, block in enumerate(rest):
            if block.text.startswith(("slip worker", "slip serve")):
                with serving(block, folder, env):
                    return go_on(rest[i + 1 :])
            said.append(run(block, folder, env))
        return None

    go_on(story)
    return "\n".join(said)


def test_the_first_example_of_the_readme(tmp_path: Path) -> None:
    """A fine-tune against its base."""
    make_model(tmp_path / "public-model")
    shutil.copytree(tmp_path / "public-model", tmp_path / "my-finetune")
    tuned = LlamaForCausalLM.from_pretrained(tmp_path / "my-finetune")
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.1)
    tuned.save_pretrained(tmp_path / "my-finetune")
    [example] = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    said = run(example, tmp_path, dict(os.environ))
    assert said.startswith("The capital of France is")


def test_the_tutorial_asks_for_no_more_tokens_than_its_text_has(tmp_path: Path) -> None:
    """Whatever the tokenizer: words are fewer than tokens."""
    [plan] = [block.text for block in blocks(ROOT / "docs" / "tutorial.md") if "slip plan" in block.text]
    text, asked = re.search(r"<<'END'\n(.*)END\n", plan, re.DOTALL), re.search(r"--tokens (\d+)", plan)
    assert text is not None and asked is not None
    assert int(asked[1]) <= len(text[1].split())
    make_model(tmp_path)
    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path)(text[1])["input_ids"]
    assert int(asked[1]) <= len(tokens) < 2 * len(text[1].split())  # tokens, not bytes


def test_the_tutorial(tmp_path: Path) -> None:
    everything = tell("tutorial.md", tmp_path)
    assert "workers caught cheating: {}" in everything
    divergence = re.search(r"KL divergence: (\S+)", everything)
    assert divergence is not None
    assert abs(float(divergence[1])) < 1e-4


def test_the_page_for_operators(tmp_path: Path) -> None:
    """Two workers, a dealer, a pool, a revocation: the commands of the page, and what they leave."""
    everything = tell("operations.md", tmp_path)
    assert "revoked: worker worker-2" in everything
    assert "masks for " in everything
    assert (tmp_path / "audit.jsonl").exists()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page asks by curl")
def test_the_page_on_serving(tmp_path: Path) -> None:
    """From a checkpoint to a served model in three commands."""
    everything = tell("serving.md", tmp_path)
    assert '"object":"chat.completion"' in everything
    assert '"finish_reason":"length"' in everything or '"finish_reason":"stop"' in everything
    assert "revoked: harness" in everything
    assert everything.count("slip-") == 4


def test_the_page_on_other_models(tmp_path: Path) -> None:
    """MiniLM and EfficientNet, as trained: what the page says comes out."""
    said = tell("other-models.md", tmp_path).split("\n")
    meal, stocks = map(float, said[0].split())
    assert meal > 0.5 > 0.2 > stocks
    assert "_depthwise_conv: it is used by a convolution in 32 groups" in said[2]
    assert said[3] == "True"


def test_the_vectors_of_the_specification(tmp_path: Path) -> None:
    vectors = [block for block in blocks(ROOT / "docs" / "SPEC.md") if block.language == "python"]
    assert vectors
    for block in vectors:
        run(block, tmp_path, dict(os.environ))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        file = ""
        for named, test in re.findall(r"`(tests/(?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`", line):
            file = named or file
            if file:
                text = (ROOT / file).read_text(encoding="utf-8")
                assert not test or f"def {test}(" in text, f"{file}::{test}"


def test_requirements_are_numbered_without_gaps() -> None:
    text = (ROOT / "docs" / "SPEC.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^- \*\*M(\d+)\*\*", text, re.MULTILINE)]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert f"**M1** to **M{len(numbers)}**" in " ".join(text.split())


def layers() -> list[str]:
    """What lies in the house, from the roof down, as import-linter holds it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [contract] = settings["contracts"]
    floors = [floor for layer in contract["layers"] for floor in layer.split(" | ")]
    return [floor.removeprefix("sliplm.") for floor in floors]


def test_the_layers_are_all_that_lies_in_the_house() -> None:
    """A package or module that no layer names may import whatever it likes."""
    files = [path for path in HOUSE.glob("*.py") if path.stem not in ("__init__", "__main__")]
    folders = [path for path in HOUSE.iterdir() if any(path.rglob("*.py"))]
    assert sorted(layers()) == sorted(path.stem for path in (*files, *folders))
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_architecture_names_what_exists() -> None:
    """Each path, and each name in one of the files that its sentence or line names."""
    text = MAP.read_text(encoding="utf-8")
    found = 0
    for part in re.split(r"\n\n|\n(?=\d+\. |\| )", text):
        quoted = [
            name for name in re.findall(r"`([^`]+)`", part) if not re.match("slip|(make|python) ", name)
        ]
        paths = [name for name in quoted if "/" in name or name.endswith(".py")]
        for path in paths:
            assert (HOUSE / path).exists() or (ROOT / path).exists(), path
        modules = [
            importlib.import_module(
                "sliplm." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            )
            for path in paths
            if path.endswith(".py") and (HOUSE / path).exists()
        ]
        for name in (name for name in quoted if name not in paths):
            assert any(has(module, name) for module in modules), f"{name} in none of {paths}"
            found += 1
    assert found > 40


def has(module: Any, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def test_the_architecture_and_its_picture_go_the_same_ways() -> None:
    """The picture is what its script draws today, and its numbers are those of the page."""
    script = runpy.run_path(str(ROOT / "docs" / "make_architecture_svg.py"))
    drawn = (ROOT / "docs" / "pictures" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == script["picture"](), "run python docs/make_architecture_svg.py"
    ways: list[list[str]] = []
    for number, path in re.findall(r"^(\d+)\. `([^`]+)`", MAP.read_text(encoding="utf-8"), re.MULTILINE):
        if number == "1":
            ways.append([])
        ways[-1].append(path)
        assert int(number) == len(ways[-1])
    assert ways == [list(script["WEIGHT"]), list(script["TOKEN"])]


def test_the_architecture_has_each_floor_in_its_place() -> None:
    rows = re.findall(r"^\| (`.*?) \|", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    floors = [re.sub(r"/$|\.py$", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert floors == layers()
