"""The server as OpenAI's own client finds it: every text, score and figure is the quantised model's."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from served import Model, Running
from sliplm.engines.transformers.drawing import told

TALK: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def client(running: Running) -> OpenAI:
    return running.server.client(running.keys["alice"])


def test_models(client: OpenAI, running: Running) -> None:
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {running.server.name, "fr"} == {"tiny", "fr"}
    assert client.models.retrieve("fr").id == "fr"


@pytest.mark.parametrize("adapter", [None, "fr"])
def test_a_chat(client: OpenAI, model: Model, adapter: str | None) -> None:
    found = client.chat.completions.create(
        model=adapter or "tiny", messages=TALK, max_tokens=20, temperature=0
    )
    [choice] = found.choices
    assert choice.message.content == model.text(TALK, 20, adapter)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert found.model == (adapter or "tiny")
    assert found.usage is not None
    prompt = len("<system>Be short.<user>Why?<assistant>")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, 20)


def test_a_chat_as_a_stream(client: OpenAI, model: Model) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=TALK, max_completion_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == model.text(TALK, 20)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_that_says_its_usage_with_every_piece(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"stream_options": {
            "include_usage": True, "continuous_usage_stats": True,
        }},
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert len(counts) > 2 and counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 12


def test_message_parts_are_one_text(client: OpenAI, model: Model) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    found = client.chat.completions.create(model="tiny", messages=parts, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == model.text([{"role": "user", "content": "ab"}], 8)


def test_completions_of_several_prompts(client: OpenAI, model: Model) -> None:
    prompts = ["The vault", "only", "uniform numbers, whatever the input"]
    found = client.completions.create(model="tiny", prompt=prompts, max_tokens=16, temperature=0)
    assert [choice.text for choice in found.choices] == [model.text(prompt, 16) for prompt in prompts]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, prompts))
    ids = model.tokenizer(prompts)["input_ids"]
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=16, temperature=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]


def test_a_completion_as_a_stream(client: OpenAI, model: Model) -> None:
    stream = client.completions.create(model="fr", prompt="The", max_tokens=30, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == model.text("The", 30, "fr")


def test_a_stop_text_ends_an_answer_and_is_not_shown(client: OpenAI, model: Model) -> None:
    whole = model.text("The vault", 40)
    stop = whole[12:14]
    place = whole.index(stop)
    for stream in (False, True):
        found: Any = client.completions.create(
            model="tiny",
            prompt="The vault",
            max_tokens=40,
            temperature=0,
            stop=[stop, "never"],
            stream=stream,
        )
        chunks = list(found) if stream else [found]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:place]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_again(client: OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        found = client.completions.create(
            model="tiny", prompt="The", max_tokens=12, temperature=1.2, top_p=0.9, n=3, seed=seed
        )
        return [choice.text for choice in found.choices]

    first = ask(5)
    assert len(set(first)) == 3
    assert ask(5) == first
    assert ask(6) != first


def test_probabilities_of_a_chat(client: OpenAI, model: Model) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    ids = model.tokens(TALK, 6)
    prompt = model.tokenizer("<system>Be short.<user>Why?<assistant>")["input_ids"]
    with torch.inference_mode():
        logits = model.plain(torch.tensor([prompt + ids])).logits[0].float()
    for i, entry in enumerate(logprobs.content):
        truth = told(logits[len(prompt) - 1 + i], ids[i], 3)
        assert entry.logprob == pytest.approx(truth.logprob, abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [p for _, p in truth.top], abs=1e-3
        )
    assert len(logprobs.content) == 6


def test_an_echo_scores_a_text(client: OpenAI, model: Model) -> None:
    """What evaluation harnesses ask for."""
    text = "uniform numbers, whatever"
    found = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=1)
    [choice] = found.choices
    assert choice.text == text
    assert choice.logprobs is not None
    scores, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
    assert scores is not None
    assert tops is not None
    ids = model.tokenizer(text)["input_ids"]
    with torch.inference_mode():
        logits = model.plain(torch.tensor([ids[:-1]])).logits[0].float()
    truth = [told(row, number, 1) for row, number in zip(logits, ids[1:], strict=True)]
    assert scores == [None, *[token.logprob for token in truth]]  # every score, exactly
    assert tops[1] is not None
    assert max(tops[1].values()) == truth[0].top[0][1]
    assert choice.logprobs.text_offset == list(range(len(text)))


def test_scores_beside_each_other_and_beside_answers(running: Running, model: Model) -> None:
    """As evaluation harnesses ask, several at a time: every score to the bit."""
    texts = [f"text {i}, which is scored" for i in range(8)]

    def ask(text: str) -> list[float | None]:
        found = running.server.client(running.keys["alice"]).completions.create(
            model="tiny", prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return logprobs.token_logprobs

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(ask, texts))
    for text, found in zip(texts, scores, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model.plain(torch.tensor([ids[:-1]])).logits[0].float()
        truth = [told(row, number, 1).logprob for row, number in zip(logits, ids[1:], strict=True)]
        assert found[1:-1] == truth


def test_an_echo_goes_on(client: OpenAI, model: Model) -> None:
    found = client.completions.create(
        model="tiny", prompt="The", max_tokens=9, echo=True, logprobs=0, temperature=0
    )
    [choice] = found.choices
    assert choice.text == "The" + model.text("The", 9)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 3 + 9
    assert all(math.isfinite(score) for score in (choice.logprobs.token_logprobs or [])[1:])


def test_many_at_once(running: Running, model: Model) -> None:
    def ask(i: int) -> str:
        found = running.server.client(running.keys["bob"]).completions.create(
            model=["tiny", "fr"][i % 2], prompt=f"prompt {i}", max_tokens=12, temperature=0
        )
        return found.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(16)))
    assert texts == [model.text(f"prompt {i}", 12, [None, "fr"][i % 2]) for i in range(16)]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-4"}, 404, "model_not_found"),
        ({"max_tokens": -1}, 400, "invalid_value"),
        ({"max_tokens": 10**30}, 400, "invalid_value"),
        ({"max_tokens": 600}, 400, "context_length_exceeded"),
        ({"prompt": "long " * 200}, 400, "context_length_exceeded"),
        ({"prompt": ""}, 400, None),
        ({"prompt": []}, 400, "invalid_value"),
        ({"prompt": [5000]}, 400, None),
        ({"prompt": [[]]}, 400, "invalid_value"),
        ({"prompt": "\ud800"}, 400, "invalid_value"),
        ({"n": 17}, 400, "invalid_value"),
        ({"n": 9, "prompt": ["a", "b"]}, 400, None),
        ({"temperature": -0.1}, 400, "invalid_value"),
        ({"temperature": "hot"}, 400, "invalid_value"),
        ({"top_p": 0}, 400, "invalid_value"),
        ({"logit_bias": {"5": 100}}, 400, "unsupported_parameter"),
        ({"frequency_penalty": 1.0}, 400, "unsupported_parameter"),
        ({"suffix": "x"}, 400, "unsupported_parameter"),
        ({"best_of": 3}, 400, "unsupported_parameter"),
        ({"tools": []}, 400, "unknown_parameter"),
        ({"stream_options": {"include_usage": True}}, 400, None),
        ({"max_tokens": 0}, 400, None),
    ],
)
def test_what_is_refused(running: Running, change: dict[str, Any], status: int, code: str | None) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2} | change
    found = running.server.post("/completions", body, running.keys["bob"])
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (status, code), error
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_errors_are_those_of_openai_s_client(running: Running) -> None:
    client = running.server.client(running.keys["bob"])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="unknown field 'tools'"):
        client.chat.completions.create(model="tiny", messages=TALK, tools=[])
    with pytest.raises(openai.AuthenticationError):
        running.server.client("slip-wrong").models.list()
    with pytest.raises(openai.PermissionDeniedError, match="logprobs"):
        client.chat.completions.create(model="tiny", messages=TALK, logprobs=True)


def test_a_budget_is_used_up(running: Running) -> None:
    client = running.server.client(running.keys["carol"])
    ask: Any = {"model": "tiny", "prompt": "ab", "temperature": 0}
    assert client.completions.create(**ask, max_tokens=40).usage is not None
    with pytest.raises(openai.RateLimitError, match="18 tokens left, and this request may take 19"):
        client.completions.create(**ask, max_tokens=17)
    assert client.completions.create(**ask, max_tokens=16).choices[0].finish_reason == "length"
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**ask, max_tokens=1)
    assert caught.value.code == "insufficient_quota"
    audit = (running.folder / "clients" / "audit.jsonl").read_text()
    for level in (50, 80, 100):
        assert audit.count(f'"reason":"{level}% of its budget is used"') == 1


def test_a_minute_is_used_up(running: Running) -> None:
    client = running.server.client(running.keys["dave"])
    client.completions.create(model="tiny", prompt="ab", max_tokens=90)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="ab", max_tokens=90)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_no_prompt_and_no_key_is_in_the_log(running: Running) -> None:
    secret = "xyzzy plugh"
    client = running.server.client(running.keys["alice"])
    client.completions.create(model="tiny", prompt=secret, max_tokens=4)
    running.server.post(
        "/completions", {"model": "tiny", "prompt": secret, "temperature": secret}, running.keys["bob"]
    )
    running.server.post("/completions", {"model": secret, "prompt": secret, secret: 1}, running.keys["bob"])
    running.server.post("/completions", {"prompt": secret}, "slip-" + secret)
    audit = (running.folder / "clients" / "audit.jsonl").read_text()
    for text in (running.server.log, audit, (running.folder / "clients" / "clients.json").read_text()):
        assert "xyzzy" not in text
        assert not any(key in text for key in running.keys.values())
