"""The model that is served: its names, its tokenizer, its batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from sliplm.engines.transformers.answer import encode
from sliplm.engines.transformers.batching import Batch
from sliplm.errors import InputError
from sliplm.parties.adapters import BASE
from sliplm.serving.asked import Body, Chat
from sliplm.serving.refusals import Refusal, no_model, wrong

USUAL: Final = 1024
"""Tokens of an answer in a chat where none are named, if there is room."""


class Served:
    """One split model under its own name, and with each of its adapters under that adapter's.

    Args:
        name: of the model without an adapter.
        model: what `sliplm.load` gives.
        batch: of that model.

    Raises: InputError for a name that an adapter has, or a tokenizer without a fast form.
    """

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase, batch: Batch) -> None:
        self.name, self.model, self.batch = name, model, batch
        self.adapters: tuple[str, ...] = model.slip.adapter.names
        if name in self.adapters or BASE in self.adapters:
            raise InputError(f"an adapter is called {name}: serve the model under another --name")
        self._tokenizer = tokenizer
        self.fast: Any = getattr(tokenizer, "_tokenizer", None)
        if self.fast is None:
            raise InputError(
                "this tokenizer has no fast form, which decodes token by token: save one that has"
            )
        self.begun = int(time.time())

    def __repr__(self) -> str:
        return f"Served({self.name}, {len(self.adapters)} adapters)"

    @property
    def names(self) -> tuple[str, ...]:
        """What `model` may hold."""
        return (self.name, *self.adapters)

    def adapter(self, name: str) -> str | None:
        """The adapter that a model's name stands for.  Raises: Refusal for a name that is not served."""
        if name not in self.names:
            raise no_model(name)
        return None if name == self.name else name

    async def encode(self, body: Body) -> list[list[int]]:
        """The tokens of each prompt, beside whatever else goes on.

        Raises: Refusal for what cannot be encoded.
        """
        return await asyncio.to_thread(self._encode, body)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """A token by itself, with the blank that it may begin with."""
        text = str(self._tokenizer.decode([token]))
        stored = self._tokenizer.convert_ids_to_tokens(token)
        blank = isinstance(stored, str) and stored.startswith("▁") and not text.startswith(" ")
        return " " + text if blank else text

    def _encode(self, body: Body) -> list[list[int]]:
        try:
            if isinstance(body, Chat):
                return [self._ids([message.plain() for message in body.messages])]
            return [self._ids(prompt) if isinstance(prompt, str) else self._checked(prompt)
                    for prompt in body.prompts]  # fmt: skip
        except InputError as error:
            raise wrong(
                str(error).partition(":")[0], "messages" if isinstance(body, Chat) else "prompt"
            ) from error

    def _ids(self, prompt: Any) -> list[int]:
        chat = None if not isinstance(prompt, str) else False
        found: list[int] = encode(self._tokenizer, prompt, chat)["input_ids"][0].tolist()
        return found

    def _checked(self, ids: list[int]) -> list[int]:
        known = self.model.config.get_text_config().vocab_size
        if max(ids) >= known:
            raise wrong(f"token ids are below {known}", "prompt")
        return ids


def room(served: Served, body: Body, prompt: Sequence[int]) -> int:
    """How many tokens an answer to this prompt may have.

    Raises: Refusal for more than there is room for.
    """
    longest = served.batch.longest
    left, asked = longest - len(prompt), body.most if isinstance(body, Chat) else body.max_tokens
    if asked is None:
        asked = min(USUAL, left)
    if asked > left or left < 1:
        raise _too_long(
            len(prompt) + max(1, asked), longest, "messages" if isinstance(body, Chat) else "prompt"
        )
    return asked


def _too_long(asked: int, longest: int, param: str) -> Refusal:
    return wrong(
        f"this model takes {longest} tokens, and prompt and answer would have {asked}: shorten the prompt or "
        "ask for fewer",
        param,
        "context_length_exceeded",
    )
