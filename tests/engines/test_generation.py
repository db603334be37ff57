"""Every way to generate that transformers has gives the tokens of the quantised model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MaxTimeCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

import families
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.recipe import Recipe


class Models(NamedTuple):
    folder: Path
    address: str
    hybrid: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = families.byte_tokenizer()
    families.make_with_tokenizer(request.param, folder / "model")
    families.make(request.param, folder / "assistant", seed=1, vocab_size=len(tokenizer))
    split(folder / "model", folder, recipe=Recipe(rank=4, precision=12))
    with LocalWorker(folder / "worker") as worker:
        hybrid = load(folder / "vault", [worker.address])
        with closing(hybrid.slip):
            yield Models(folder, worker.address, hybrid, reference(folder), tokenizer)


def same(both: Models, texts: list[str] | None = None, **options: Any) -> torch.Tensor:
    """Generate with both models from the same seed; return the tokens, which must be equal."""
    inputs = both.tokenizer(
        texts or ["The vault"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    found = []
    for model in (both.hybrid, both.reference):
        torch.manual_seed(3)
        found.append(model.generate(**inputs, **{"max_new_tokens": 16, "pad_token_id": 0, **options}))
    assert torch.equal(found[0], found[1])
    assert found[0].shape[1] > inputs["input_ids"].shape[1]
    return found[0]


BATCH = ["The worker sees", "only", "uniform numbers, whatever the input"]


def test_greedy(both: Models) -> None:
    same(both, do_sample=False)


def test_without_a_cache(both: Models) -> None:
    assert torch.equal(same(both, do_sample=False, use_cache=False), same(both, do_sample=False))


def test_sampling(both: Models) -> None:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
    same(both, BATCH, num_return_sequences=2, **options)


def test_beams(both: Models) -> None:
    tokens = same(both, BATCH[:2], num_beams=3, num_return_sequences=2, do_sample=False, length_penalty=0.7)
    assert tokens.shape[0] == 4


def test_batch_with_left_padding(both: Models) -> None:
    together = same(both, BATCH, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    for row, text in enumerate(BATCH):
        alone = same(both, [text], do_sample=False, max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_streaming(both: Models) -> None:
    inputs = both.tokenizer("stream", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(both.tokenizer, skip_prompt=True, timeout=60)
    options = {**inputs, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    thread = threading.Thread(target=both.hybrid.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=60)
    expected = both.reference.generate(**options)[0, inputs["input_ids"].shape[1] :]
    assert text == both.tokenizer.decode(expected)


class After(StoppingCriteria):
    """Stop at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        done = input_ids.shape[1] >= self.length
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool)  # type: ignore[return-value]


def test_stopping_criteria(both: Models) -> None:
    stop = StoppingCriteriaList([After(13), MaxTimeCriteria(60.0)])
    assert same(both, do_sample=False, stopping_criteria=stop).shape[1] == 13


def test_stop_strings(both: Models) -> None:
    prompt, options = "The vault", {"do_sample": True, "max_new_tokens": 40}
    free = same(both, [prompt], **options)[0]
    new = both.tokenizer.decode(free[len(prompt) : -1])
    letter = next(c for c in new if c.isascii() and c.isalpha())
    stopped = same(both, [prompt], **options, stop_strings=[letter], tokenizer=both.tokenizer)[0]
    assert len(stopped) < len(free)
    assert torch.equal(stopped, free[: len(stopped)])
    assert both.tokenizer.decode(stopped).endswith(letter)


def test_prompt_lookup(both: Models) -> None:
    texts = ["abcabcabcabcabc"]
    speculated = same(both, texts, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(speculated, same(both, texts, do_sample=False))


def test_assisted(both: Models) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(both.folder / "assistant")
    assisted = same(both, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, same(both, do_sample=False))


def test_scores(both: Models) -> None:
    inputs = both.tokenizer("scores", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True}
    found = [m.generate(**inputs, **options, do_sample=False) for m in (both.hybrid, both.reference)]
    assert all(torch.equal(a, b) for a, b in zip(found[0].scores, found[1].scores, strict=True))


def test_inference_mode(both: Models) -> None:
    with torch.inference_mode():
        inside = same(both, do_sample=False)
    assert torch.equal(inside, same(both, do_sample=False))


def test_static_cache(both: Models) -> None:
    same(both, do_sample=False, cache_implementation="static")


def test_pipeline(both: Models) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [
        pipeline("text-generation", model=model, tokenizer=both.tokenizer)("A worker", **options)
        for model in (both.hybrid, both.reference)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0]["generated_text"].startswith("A worker")


def test_pipeline_of_a_folder(both: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_WORKERS", both.address)
    run = pipeline("text-generation", model=str(both.folder / "vault"))
    with closing(run.model.slip):
        found = run("A worker", max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found[0]["generated_text"].startswith("A worker")
