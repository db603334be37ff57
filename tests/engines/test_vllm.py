"""vLLM as the vault's engine: plain vLLM's tokens, through a server of its own; `make test-vllm`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from openai import APIError, InternalServerError, OpenAI
from transformers import AutoModelForCausalLM

import families
import sliplm
from rogues import serving
from server import Paced
from sliplm.engines.transformers.answer import load_tokenizer
from sliplm.errors import PrecisionError, WorkerUnavailable
from sliplm.examples import smollm2
from sliplm.examples.demo import prepare
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.share import open_worker
from ties import same_up_to_ties

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed: make test-vllm has an environment with it"
)

LIMIT = 400.0
THINGS = ("water", "iron", "the moon", "bees", "ink", "salt", "the sea", "music")
PROMPTS = [f"Of {thing} it is known that" for thing in THINGS]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


class Counting(Paced):
    """It knows how many products it was asked for."""

    asked = 0

    def _answer(self, *args: Any) -> None:
        self.asked += 1
        super()._answer(*args)


class Server:
    """vLLM's own server, whose log is in the folder where a test's worker listens."""

    def __init__(self, port: int, log: Path) -> None:
        self.root, self._log = f"http://127.0.0.1:{port}", log
        self.client = OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=LIMIT)

    @property
    def folder(self) -> Path:
        return self._log.parent

    @property
    def log(self) -> str:
        return self._log.read_text()

    def up(self) -> bool:
        """Whether it lives."""
        try:
            return httpx.get(f"{self.root}/health", timeout=LIMIT).status_code == 200
        except httpx.HTTPError:
            return False

    def tokens(self, prompt: Any, most: int = 24) -> list[list[int]]:
        """What it answers, greedily: the tokens for each prompt."""
        more = {"return_token_ids": True, "ignore_eos": True}
        made = self.client.completions.create(
            model="m", prompt=prompt, max_tokens=most, temperature=0, extra_body=more
        )
        return [choice.token_ids for choice in made.choices]  # type: ignore[attr-defined]


@contextmanager
def vllm(model: Path, log: Path, *options: str, **settings: str) -> Iterator[Server]:
    """Serve a model with float32, by the command of the documents."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-num-seqs", "16", *options,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **offline, **settings}
        )
    server = Server(port, log)
    try:
        until = time.monotonic() + LIMIT
        while not server.up():
            assert process.poll() is None and time.monotonic() < until, server.log[-4000:]
            time.sleep(0.2)
        yield server
    finally:
        server.client.close()
        process.terminate()
        process.wait(60)


def test_a_batchs_tokens_are_those_of_plain_vllm(tmp_path: Path) -> None:
    """A real model, torch.compile included, its worker a process of its own; but for ties, which rounding to
    12 bits may turn over.
    """
    tokenizer, out, found = load_tokenizer(smollm2()), prepare(None, sliplm.split).out, []
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    with LocalWorker(out / "worker") as worker:
        for model in (smollm2(), out / "vault"):
            options = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 28)]
            with vllm(model, tmp_path / "log", *options, SLIPLM_WORKERS=worker.address) as server:
                found.append(server.tokens([prompt[0].tolist() for prompt in prompts]))
    plain: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    for prompt, theirs, mine in zip(prompts, *found, strict=True):
        assert same_up_to_ties(plain, prompt, mine, theirs), (mine, theirs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split model with a chat template, of two layers."""
    folder = tmp_path_factory.mktemp("tiny")
    families.make_with_tokenizer(
        "llama", folder / "base", template=TEMPLATE, hidden_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, eos_token_id=258,
    )  # fmt: skip
    sliplm.split(folder / "base", folder / "out", i_know=True)
    return folder / "out"


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Counting:
    return Counting(open_worker(tiny / "worker"))


@pytest.fixture(scope="module")
def served(tiny: Path, worker: Counting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a cache of few blocks, so that what failed has left is soon handed out again."""
    folder = tmp_path_factory.mktemp("served")
    extra = json.dumps({"workers": [f"shm:{folder / 'w'}"], "timeout": 5.0})
    small = ["--kv-cache-memory-bytes", str(17 << 15), "--block-size", "32"]
    with (
        serving(worker, folder / "w"),
        vllm(tiny / "vault", folder / "log", *small, "--model-loader-extra-config", extra) as server,
    ):
        yield server


def test_trying_a_model_out_burns_no_masks(served: Server, worker: Counting) -> None:
    """vLLM warms up on thousands of rows; the first request's are the first that are asked for."""
    assert "Warming up" in served.log and worker.asked == 0
    served.tokens("a", 2)
    assert worker.asked == 2 * 9  # two steps of two layers with four groups each, and the head


def test_a_chat_by_openais_client(served: Server) -> None:
    said = served.client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Why?"}], max_tokens=8, temperature=0
    )
    assert said.usage is not None and said.usage.completion_tokens > 0
    assert said.choices[0].finish_reason in ("length", "stop")


def test_without_workers_requests_fail_and_the_server_lives(
    tiny: Path, served: Server, worker: Counting
) -> None:
    before = served.tokens(PROMPTS)
    worker.stop()
    for _ in range(4):  # over all blocks of the cache
        with ThreadPoolExecutor(8) as pool:
            for answer in [pool.submit(served.tokens, prompt, 40) for prompt in PROMPTS]:
                assert isinstance(answer.exception(LIMIT), InternalServerError)
    with pytest.raises(APIError):
        for _ in served.client.completions.create(model="m", prompt="a", stream=True):
            pass
    assert served.up()
    assert "requests fail, at group" in served.log
    with serving(Counting(open_worker(tiny / "worker")), served.folder / "w"):
        until = time.monotonic() + LIMIT
        while True:
            try:
                after = served.tokens(PROMPTS)
                break
            except InternalServerError:
                assert time.monotonic() < until
                time.sleep(0.2)
        assert after == before


@pytest.mark.filterwarnings("ignore")
def test_a_row_that_cannot_be_computed_fails_alone() -> None:
    from vllm.forward_context import create_forward_context, override_forward_context

    from sliplm.engines.vllm.products import Products, product

    asked: list[int] = []

    class Source:
        def product(self, group: str, x: np.ndarray) -> np.ndarray:
            asked.append(len(x))
            if group == "gone":
                raise WorkerUnavailable("gone")
            if (x == 7).any():
                raise PrecisionError("nothing is left")
            return x[:, :2] * 2

    products = Products()
    products.vault = Source()  # type: ignore[assignment]
    x = torch.arange(16.0).reshape(8, 2)  # the fourth row has a 7
    assert not product(x, products.number, "g", 2, False).any() and asked == []  # before a first step
    products._dummies = False
    y = product(x.to(torch.bfloat16), products.number, "g", 2, False)
    assert y.dtype is torch.bfloat16
    good = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(y[good].float(), x[good] * 2) and y[3].isnan().all()
    asked.clear()
    parts = [product(x[:3].clone(), products.number, "g", 2, True) for _ in range(2)]
    assert asked == [3] and all(torch.equal(part, x[:3] * 2) for part in parts)
    asked.clear()
    x[:4] = torch.nan
    y = product(x, products.number, "g", 2, False)
    assert asked == [4] and y[:4].isnan().all() and torch.equal(y[4:], x[4:] * 2)
    assert product(x, products.number, "gone", 2, False).isnan().all()
    with override_forward_context(create_forward_context(None, _vllm_config())):
        assert not product(x, products.number, "g", 2, False).any()
    assert not product(x, products.number, "g", 2, False).any()  # the head, after that


def _vllm_config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig()


@pytest.mark.parametrize(
    ("option", "says"),
    [("enable_prefix_caching=True", "prefix caching"), ("tensor_parallel_size=2", "parallel engines")],
)
def test_what_a_vault_does_not_do_is_refused(tiny: Path, option: str, says: str) -> None:
    text = f"from vllm import LLM\nif __name__ == '__main__': LLM({str(tiny / 'vault')!r}, {option})"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode and f"without {says}" in done.stderr
