"""Bodies that are wrong a million times, and prompts that take long: neither stops the server for others."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from sliplm.serving.asked import CHOICES, STOP, Chat, Completion, refused
from sliplm.serving.clients import Client
from sliplm.serving.desk import OF_ONE, Desk
from sliplm.serving.limits import Limits
from sliplm.serving.refusals import Refusal

MANY = 1000


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("prompt", [None] * MANY, "invalid_value"),
        ("prompt", [[]] * MANY, "invalid_value"),
        ("prompt", [[None]] * MANY, "invalid_value"),
        ("prompt", [[None] * MANY], "invalid_value"),
        ("prompt", ["a"] * (CHOICES + 1), "invalid_value"),
        ("prompt", [1] * MANY + ["a"], "invalid_value"),
        ("messages", [0] * MANY, "invalid_value"),
        ("messages", [{}] * MANY, "invalid_value"),
        ("messages", [{"role": "user", "content": [{}] * MANY}], "invalid_value"),
        (
            "messages",
            [{"role": "user", "content": "a"} | {str(i): i for i in range(MANY)}],
            "unknown_parameter",
        ),
        ("logit_bias", {str(i): "" for i in range(MANY)}, "unsupported_parameter"),
        ("stop", [""] * MANY, "invalid_value"),
        ("stop", "x" * (STOP + 1), "invalid_value"),
    ],
)
def test_a_body_is_refused_at_its_first_mistakes(field: str, value: Any, code: str) -> None:
    body: dict[str, Any] = {"model": "tiny", field: value}
    kind = Chat if field == "messages" else Completion
    if kind is Completion and field != "prompt":
        body["prompt"] = "a"
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10  # one of each way to read it, not one of each entry
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    refusal = refused(errors)
    assert refusal.status == 400
    if code != "invalid_value":
        assert refusal.code == code


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": []}, "prompt", "a list of token ids"),
        ({"prompt": [-1]}, "prompt", "a list of token ids"),
        ({"prompt": "\ud800"}, "prompt", "half a character"),
        ({"prompt": ["a"] * 17}, "prompt", "more than 16 prompts"),
        ({"stop": ["a"] * 5}, "stop", "a list of up to 4"),
        ({"seed": 2**63}, "seed", "less than 9223372036854775808"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "nothing but text"),
        ({"messages": "a"}, "messages", "list"),
    ],
)
def test_a_refusal_says_what_a_field_takes(change: dict[str, Any], param: str, words: str) -> None:
    kind, needed = (Chat, {}) if "messages" in change else (Completion, {"prompt": "a"})
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", **needed, **change})
    refusal = refused([error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()])
    assert (refusal.param, words in str(refusal)) == (param, True)


def test_what_is_no_json_object_is_told_how_to_be_one() -> None:
    with pytest.raises(ValidationError) as caught:
        Completion.model_validate('{"model": "tiny"}')  # as it comes without a content type
    assert "Content-Type: application/json" in str(refused(caught.value.errors()))


def test_of_many_unknown_fields_the_first_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        Completion.model_validate({"model": "tiny", "prompt": "a"} | {f"x{i}": i for i in range(MANY)})
    [error] = caught.value.errors()
    assert refused([error]).param == "x0"


def test_of_each_client_one_prompt_is_read_at_a_time() -> None:
    """While a long one is, others are; and what waits counts as under way."""
    served: Any = SimpleNamespace(model=SimpleNamespace(slip=None), batch=None)
    people: Any = object()
    figures: Any = None
    desk = Desk(served, people, Limits(), figures)
    alice, bob = (Client(name=name, sha256="0" * 64, created="") for name in ("alice", "bob"))

    async def story() -> None:
        read, order = asyncio.Event(), []

        async def encode(client: Client, name: str, wait: bool) -> None:
            async with desk.encoding(client, 1):
                order.append(f"{name} begins")
                if wait:
                    await read.wait()
                order.append(f"{name} ends")

        tasks = [asyncio.create_task(encode(alice, str(i), True)) for i in range(2)]
        await asyncio.sleep(0)
        await encode(bob, "bob", False)
        assert order == ["0 begins", "bob begins", "bob ends"]
        assert desk.under_way == {"alice": 2, "bob": 0}
        desk.under_way["alice"] = OF_ONE
        with pytest.raises(Refusal, match="answers under way"):
            await encode(alice, "no", False)
        desk.under_way["alice"] = 2
        read.set()
        await asyncio.gather(*tasks)
        assert order[3:] == ["0 ends", "1 begins", "1 ends"]
        assert desk.under_way.total() == 0

    asyncio.run(story())
