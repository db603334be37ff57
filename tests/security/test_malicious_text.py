"""Whole texts: a worker that misbehaves in the middle changes no token, and none comes from a bad product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import sliplm
from ledger import Ledger
from rogues import ROGUES, Honest, Means, Rogue, one_mask_one_message, serving
from sliplm.engines.transformers.load import reference
from sliplm.errors import SlipError
from sliplm.shares.share import open_worker
from test_malicious import advises, base, scene, slow_pauses  # noqa: F401

TOKENS = 8
PROMPT = torch.tensor([[1, 17, 200, 45, 99]])
LIARS = (
    "one entry by one",
    "the last entry of the last row",
    "replayed from another token",
    "random bytes",
    "FAULT with terminal escapes",
    "stalls for ever",
    "half an answer, then hangs up",
    "hangs up on every question",
    "an expired certificate",
    "revoked while it is asked",
)


class Text(NamedTuple):
    """What is right, and the exchanges that one token takes."""

    tokens: list[int]
    exchanges: int


class Collector(BaseStreamer):
    """What a user would have seen."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Keep the prompt, and each token."""
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """All came."""
        self.ended = True

    @property
    def said(self) -> list[int]:
        """The tokens after the prompt."""
        assert self.tokens[: PROMPT.numel()] == PROMPT.flatten().tolist()
        return self.tokens[PROMPT.numel() :]


@contextmanager
def hybrid(folder: Path, workers: list[str], timeout: float) -> Iterator[Any]:
    model = sliplm.load(folder / "out" / "vault", workers, ahead=0, timeout=timeout)
    with closing(model.slip):
        yield model


def generate(model: PreTrainedModel, streamer: Collector | None = None) -> list[int]:
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    mask = torch.ones_like(PROMPT)
    found = model.generate(PROMPT, attention_mask=mask, pad_token_id=0, streamer=streamer, **options)
    return found[0, PROMPT.shape[1] :].tolist()


@pytest.fixture(autouse=True)
def another_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a copy of one authority: what one of them revoked, the others have not."""
    monkeypatch.setattr("sliplm.network.trust._revoked", {})


@pytest.fixture(scope="module")
def text(base: Path) -> Text:
    """Undisturbed."""
    honest = Honest(open_worker(base / "out" / "worker"))
    with serving(honest, base / "text.sock") as address, hybrid(base, [address], 30) as model:
        collector = Collector()
        tokens = generate(model, collector)
        assert tokens == collector.said == generate(reference(base / "out"))
        exchanges = model.slip.counters.exchanges
    assert len(set(tokens)) > 2 and exchanges % TOKENS == 0
    return Text(tokens, exchanges // TOKENS)


def rogue_of(name: str, means: Means, text: Text) -> tuple[Rogue, int]:
    """(one that begins in the middle of a token, the tokens before it)."""
    whole = 3
    return ROGUES[name](means, after=whole * text.exchanges + text.exchanges // 2), whole


@pytest.mark.parametrize("name", LIARS)
def test_the_text_is_the_undisturbed_one(
    name: str,
    base: Path,
    scene: Any,
    text: Text,
    ledger: Ledger,
) -> None:
    rogue, _ = rogue_of(name, scene.means, text)
    honest = Honest(scene.means.share)
    with ExitStack() as stack:
        bad = stack.enter_context(serving(rogue, scene.means.keys, "rogue"))
        good = stack.enter_context(serving(honest, scene.means.keys, "honest"))
        model = stack.enter_context(hybrid(base, [bad, good], rogue.timeout))
        collector = Collector()
        tokens = generate(model, collector)
        wrong = sum(a != b for a, b in zip(collector.said, text.tokens, strict=True))
        ends = [status.state for status in model.slip.workers]
        ledger.record(f"text: {name}", 1, ends == [rogue.ends, "up"], wrong)
        assert tokens == collector.said == text.tokens
        assert ends == [rogue.ends, "up"]
        assert len(honest.messages) == (TOKENS * text.exchanges) - rogue.after
    assert one_mask_one_message([rogue.messages, honest.messages]) == 0


@pytest.mark.parametrize("name", LIARS)
def test_alone_no_token_comes_of_a_bad_product(
    name: str,
    base: Path,
    scene: Any,
    text: Text,
    ledger: Ledger,
) -> None:
    """What was streamed are the tokens before the lie, all of them and no other; then the error."""
    rogue, before = rogue_of(name, scene.means, text)
    with ExitStack() as stack:
        bad = stack.enter_context(serving(rogue, scene.means.keys, "rogue"))
        model = stack.enter_context(hybrid(base, [bad], rogue.timeout))
        collector = Collector()
        with pytest.raises(SlipError) as caught:
            generate(model, collector)
        leaked = sum(
            collector.said[i : i + 1] != text.tokens[i:before][:1] for i in range(len(collector.said))
        )
        ledger.record(f"text: {name}", 1, isinstance(caught.value, rogue.error), leaked)
        assert collector.said == text.tokens[:before]
        assert not collector.ended
        assert isinstance(caught.value, rogue.error) and advises(caught.value)
        rogue.heal()
        model.slip.rejoin(bad)
        assert generate(model) == text.tokens, "the model lives on"
