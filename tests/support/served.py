"""One split model with an adapter, one server with clients of several kinds, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import families
from rogues import serving
from server import Paced, Server, slip_serve
from sliplm.engines.transformers.answer import encode, load_tokenizer
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import reference
from sliplm.serving import clients
from sliplm.shares.share import open_worker
from tuning import train_lora

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Model(NamedTuple):
    out: Path
    plain: Any
    tokenizer: Any

    def tokens(self, prompt: Any, most: int, adapter: str | None = None) -> list[int]:
        """What the quantised model generates by itself, greedily."""
        chat = None if not isinstance(prompt, str) else False
        inputs = encode(self.tokenizer, prompt, chat)
        options = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
        with self.plain.slip.adapter(adapter), torch.inference_mode():
            made = self.plain.generate(**inputs, **options)
        found: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
        return found

    def text(self, prompt: Any, most: int, adapter: str | None = None) -> str:
        """The same as text."""
        return str(self.tokenizer.decode(self.tokens(prompt, most, adapter), skip_special_tokens=True))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("served")
    base = families.make_with_tokenizer(
        "llama", folder / "base", template=TEMPLATE, max_position_embeddings=512, eos_token_id=258
    )
    adapters = {"fr": train_lora(base, folder / "fr", target_modules=["q_proj", "down_proj"])}
    split(base, folder / "tiny", base=base, adapters=adapters)
    return Model(folder / "tiny", reference(folder / "tiny"), load_tokenizer(base))


class Running(NamedTuple):
    server: Server
    worker: Paced
    folder: Path
    keys: dict[str, str]


@pytest.fixture(scope="session")
def running(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    people = folder / "clients"
    keys = {
        "alice": clients.add(people, "alice", logprobs=5, echo=True),
        "bob": clients.add(people, "bob"),
        "graph": clients.add(people, "graph", watch=True, ask=False),
        "carol": clients.add(people, "carol", budget=60),
        "dave": clients.add(people, "dave", minute=100),
    }
    worker = Paced(open_worker(model.out / "worker"))
    with serving(worker, folder / "w") as address:
        options = ["--clients", str(people), "--cache-tokens", "2048", "--batch-tokens", "64"]
        with slip_serve(model.out, folder, *options, workers=[address]) as server:
            yield Running(server, worker, folder, keys)


@pytest.fixture
def slow(running: Running) -> Iterator[None]:
    """Tokens take their time: 20 ms for each of a token's nine exchanges."""
    running.worker.pause = 0.02
    yield
    running.worker.pause = 0.0
