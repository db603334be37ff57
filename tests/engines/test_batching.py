"""Many requests at once: the tokens of one at a time, and a loop that outlives whatever a layer raises."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import families
from sliplm.engines.modules import SlipLinear
from sliplm.engines.transformers.batching import Batch
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.drawing import Drawing, told
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.loop import Request, Room
from sliplm.engines.transformers.scoring import score
from sliplm.errors import InputError, PrecisionError, WorkerUnavailable
from sliplm.parties.local_worker import LocalWorker
from tuning import train_lora

LIMIT = 60.0
ROOM = Room(tokens=1024, batch=24, requests=4)


class Served(NamedTuple):
    model: PreTrainedModel
    plain: PreTrainedModel
    batch: Batch


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("batching")
    base = families.make_with_tokenizer("llama", folder / "base")
    adapters = {"fr": train_lora(base, folder / "fr", target_modules=["q_proj", "down_proj"])}
    split(base, folder / "out", base=base, adapters=adapters)
    with LocalWorker(folder / "out" / "worker") as worker:
        model = load(folder / "out" / "vault", [worker.address])
        with closing(model.slip), Batch(model, ROOM) as batch:
            yield Served(model, reference(folder / "out"), batch)


class Asked(Request):
    """A request that can be waited for."""

    def __init__(self, prompt: Sequence[int], most: int = 12, adapter: str | None = None, **how: Any) -> None:
        self.over, self.begun = threading.Event(), threading.Event()
        super().__init__(prompt, most, Drawing(**how), adapter, self._told)

    def _told(self, _: Request) -> None:
        self.begun.set()
        if self.done:
            self.over.set()

    @property
    def ids(self) -> list[int]:
        assert self.over.wait(LIMIT)
        assert self.error is None, self.error
        return [token.id for token in self.tokens]


def ask(batch: Batch, *requests: Asked) -> list[list[int]]:
    for request in requests:
        batch.submit(request)
    return [request.ids for request in requests]


def alone(model: Any, request: Asked) -> list[int]:
    """Greedily, by `generate`."""
    ids = torch.tensor([request.prompt])
    options = {"do_sample": False, "max_new_tokens": request.most, "pad_token_id": 0}
    with model.slip.adapter(request.adapter):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return made[0, len(request.prompt) :].tolist()


PROMPTS = [[5, 9, 70], [200, 3], list(range(10, 80)), [44]]  # the third takes three steps to be read


def test_greedy_tokens_are_those_of_one_at_a_time(served: Served) -> None:
    requests = [Asked(prompt) for prompt in PROMPTS * 2]
    for request, ids in zip(requests, ask(served.batch, *requests), strict=True):
        assert ids == alone(served.plain, request)


def test_each_request_has_its_adapter(served: Served) -> None:
    requests = [Asked(prompt, adapter=name) for prompt in PROMPTS for name in ("fr", None)]
    found = ask(served.batch, *requests)
    assert found == [alone(served.plain, request) for request in requests]
    assert found[0] != found[1]


def test_a_seed_draws_the_same_whoever_else_asks(served: Served) -> None:
    how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    [once] = ask(served.batch, Asked(PROMPTS[0], **how))
    others = [Asked(prompt, temperature=1.5) for prompt in PROMPTS[1:]]
    again, *_ = ask(served.batch, Asked(PROMPTS[0], **how), *others)
    assert again == once
    [other] = ask(served.batch, Asked(PROMPTS[0], temperature=0.9, top_p=0.8, seed=8))
    assert other != once


def test_probabilities_are_the_model_s(served: Served) -> None:
    request = Asked(PROMPTS[0], temperature=0.7, seed=1, top=3)
    ids = [*request.prompt, *ask(served.batch, request)[0]]
    with torch.inference_mode():
        logits = served.plain(torch.tensor([ids])).logits[0].float()
    for place, token in enumerate(request.tokens, len(request.prompt) - 1):
        truth = told(logits[place], token.id, 3)
        assert token.logprob == pytest.approx(truth.logprob, abs=1e-3)
        assert [number for number, _ in token.top] == [number for number, _ in truth.top]


@pytest.mark.parametrize("adapter", [None, "fr"])
def test_a_text_s_score_is_the_model_s(served: Served, adapter: str | None) -> None:
    ids = list(range(3, 103))
    with torch.inference_mode(), served.plain.slip.adapter(adapter):
        logits = served.plain(torch.tensor([ids[:-1]])).logits[0].float()
    found = score(served.model, ids, 2, adapter)
    assert found == [told(logits[i], ids[i + 1], 2) for i in range(len(ids) - 1)]


def test_a_score_beside_answers_is_the_same(served: Served) -> None:
    """And so are the answers beside it."""
    ids, over = list(range(3, 63)), threading.Event()
    truth, expected = score(served.model, ids, 1), alone(served.plain, Asked(PROMPTS[0]))
    answers: list[list[int]] = []

    def go_on() -> None:
        while not over.is_set():
            answers.extend(ask(served.batch, Asked(PROMPTS[0])))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(20):
            assert score(served.model, ids, 1, turn=served.batch.turn) == truth
    finally:
        over.set()
        thread.join(LIMIT)
    assert answers
    assert all(answer == expected for answer in answers)


class Source:
    """The vault, but for what a test has it do."""

    def __init__(self, product: Any) -> None:
        self._product = product
        self.spoil: Any = None

    def product(self, group: str, x: np.ndarray) -> Any:
        if self.spoil is not None:
            self.spoil(x)
        return self._product(group, x)


@pytest.fixture
def source(served: Served) -> Iterator[Source]:
    source = Source(served.model.slip.product)
    layers = [module.group for module in served.model.modules() if isinstance(module, SlipLinear)]
    before = [layer.source for layer in layers]
    for layer in layers:
        layer.source = source
    yield source
    for layer, old in zip(layers, before, strict=True):
        layer.source = old


@pytest.mark.parametrize("error", [WorkerUnavailable("gone"), RuntimeError("a bug")])
def test_a_layer_that_raises_costs_its_requests_and_no_more(
    served: Served, source: Source, error: Exception
) -> None:
    def spoil(_: np.ndarray) -> None:
        raise error

    source.spoil = spoil
    requests = [Asked(prompt) for prompt in PROMPTS]
    for request in requests:
        served.batch.submit(request)
    for request in requests:
        assert request.over.wait(LIMIT)
        assert request.error is error
    assert served.batch.load == (0, 0, 0.0)
    source.spoil = None
    request = Asked(PROMPTS[0])
    assert ask(served.batch, request) == [alone(served.plain, request)]


def test_an_input_that_cannot_be_computed_costs_nobody_else(served: Served) -> None:
    """One user's prompt must not end the answers of those who share its batch."""

    def spoil(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == 123).any():
            raise PrecisionError("nothing is left")

    bad, good = Asked([7, 123, 9]), [Asked(prompt) for prompt in PROMPTS[:3]]
    expected = [alone(served.plain, request) for request in good]
    handle = served.model.register_forward_pre_hook(spoil, with_kwargs=True)
    try:
        for request in (good[0], bad, *good[1:]):
            served.batch.submit(request)
        assert bad.over.wait(LIMIT)
        assert [request.ids for request in good] == expected
    finally:
        handle.remove()
    assert isinstance(bad.error, PrecisionError)


def test_who_hangs_up_frees_his_place(served: Served, source: Source) -> None:
    gate = threading.Event()
    source.spoil = lambda _: gate.wait(LIMIT)
    left, stays = Asked(PROMPTS[0], most=50), Asked(PROMPTS[1])
    served.batch.submit(left)
    served.batch.submit(stays)
    served.batch.cancel(left)
    gate.set()
    assert stays.ids == alone(served.plain, stays)
    assert not left.done
    assert len(left.tokens) < 50
    assert served.batch.load == (0, 0, 0.0)


def test_a_loop_that_ended_begins_anew(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = served.batch._manager.batch_processor.scheduler
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "schedule_batch", lambda *_: 1 / 0)
        request = Asked(PROMPTS[0])
        served.batch.submit(request)
        assert request.over.wait(LIMIT)
        assert "division" in str(request.error)
        served.batch._manager._generation_thread.join(LIMIT)
    served.batch.revive()
    request = Asked(PROMPTS[0])
    assert ask(served.batch, request) == [alone(served.plain, request)]


@pytest.mark.parametrize(("prompt", "most"), [([], 5), ([1], 0), ([1] * 100, 29)])
def test_what_has_no_room_is_refused(served: Served, prompt: list[int], most: int) -> None:
    with pytest.raises(InputError, match="2 to 128 tokens"):
        served.batch.submit(Asked(prompt, most))


def test_a_model_that_cannot_be_batched_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(InputError, match="no continuous batching for Mamba"):
        Batch(model, ROOM)


class Broken(Drawing):
    """Draws nothing."""

    def next(self, logits: Any) -> Any:
        raise ValueError("broken")


def test_a_token_that_cannot_be_drawn_costs_nobody_else(served: Served) -> None:
    fine = [Asked([5, 6, 7]), Asked([9, 8], temperature=1.0, seed=3)]
    alone_before = ask(served.batch, *fine)
    broken, again = (
        Asked([5, 6, 7], temperature=1.0),
        [Asked([5, 6, 7]), Asked([9, 8], temperature=1.0, seed=3)],
    )
    broken.drawing = Broken(1.0)
    for request in (again[0], broken, again[1]):
        served.batch.submit(request)
    assert broken.over.wait(LIMIT)
    assert isinstance(broken.error, ValueError) and not broken.tokens
    assert [request.ids for request in again] == alone_before
    assert ask(served.batch, Asked([1, 2]))


def test_the_smallest_top_p_takes_the_likeliest(served: Served) -> None:
    [drawn], [greedy] = (
        ask(served.batch, Asked([5, 6, 7], temperature=2.0, top_p=1e-300)),
        ask(served.batch, Asked([5, 6, 7])),
    )
    assert drawn == greedy
