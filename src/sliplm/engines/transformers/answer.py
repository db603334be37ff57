"""Generate an answer to a prompt, its text handed over as it comes, its speed measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from sliplm.engines.transformers.opened import private_folder
from sliplm.errors import InputError, ShareError
from sliplm.filesystem import utf8_name

Message = dict[str, str]
"""`role`: user or assistant, and `content`."""


@dataclass(frozen=True)
class Answer:
    """What a model generated.

    Attributes:
        text: without special tokens.
        tokens: as generated, an end token included.
        prompt_tokens: how many tokens the prompt has.
        first_seconds: until the first token: reading the prompt.
        decode_seconds: from the first token to the last.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, without reading the prompt; 0 for a single token."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


def load_tokenizer(source: Path | str | Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, or among the verified files of a vault (`model.slip.files`).

    Code that came with it is never run.

    Raises:
        ShareError: there is none.
    """
    if isinstance(source, Mapping):
        with private_folder(source) as folder:
            return load_tokenizer(folder)
    try:
        with utf8_name(Path(source)) as folder:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library of tokenizers has no kind of its own for a damaged file
        raise ShareError(
            f"{source} has no tokenizer that can be used: name a folder that has the model's (slip generate "
            "--tokenizer FOLDER; in Python transformers.AutoTokenizer)"
        ) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], chat: bool | None = None
) -> dict[str, Tensor]:
    """A prompt as the arguments of `generate`.

    Args:
        prompt: a text, or the messages of a conversation.
        chat: a text as a user's message in the model's chat template; None if it has one.

    Raises:
        InputError: the prompt is empty or no text, or there is no chat template.
    """
    if isinstance(prompt, str):
        prompt = _utf8(prompt)
    has_template = bool(tokenizer.chat_template)
    talk = chat or not isinstance(prompt, str)
    if talk:
        _check_template(tokenizer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{**message, "content": _utf8(message["content"])} for message in messages]
    if talk or (has_template and chat is None):
        try:
            found = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise InputError(
                f"the model's chat template cannot be used ({error}): use --no-chat to continue plain text"
            ) from error
    else:
        found = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if found["input_ids"].shape[1] == 0:
        raise InputError("the prompt is empty: give a text to continue")
    return {name: found[name].long() for name in ("input_ids", "attention_mask")}


def _utf8(prompt: str) -> str:
    """A prompt as Unicode; a command's arguments may come as bytes in disguise.  Raises: InputError."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(prompt).decode()
        except UnicodeError:
            raise InputError("the prompt is not UTF-8: write it in a terminal or file that is") from None
    return prompt


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise InputError("this model has no chat template: give a --prompt, without --chat, to be continued")


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Generate up to `new_tokens` tokens; greedily at temperature 0.

    Args:
        inputs: as `encode` returns them.
        show: called with the whole text so far after every token; the time it takes is not counted.
    """
    return _answer(model, tokenizer, inputs, new_tokens, temperature, show, None)[0]


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    new_tokens: int,
    temperature: float,
    show: Callable[[str], None],
    cache: Cache | None,
) -> tuple[Answer, Cache | None]:
    """As `answer`; `cache` is what the model has read of the first of `inputs`, and then of all it can."""
    stream = _Stream(tokenizer, show)
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    if cache is not None:
        options["past_key_values"] = cache
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        made = model.generate(
            **inputs, **options, max_new_tokens=new_tokens, pad_token_id=pad, streamer=stream,
            return_dict_in_generate=True,
        )  # fmt: skip
    found = Answer(
        text=stream.text,
        tokens=tuple(stream.tokens),
        prompt_tokens=inputs["input_ids"].shape[1],
        first_seconds=stream.seconds[0],
        decode_seconds=sum(stream.seconds[1:]),
    )
    return found, _continued(getattr(made, "past_key_values", None))


def _continued(cache: Any) -> Cache | None:
    """The same if a model can read on from it, many tokens at once: attention's can, a recurrent state may
    not.
    """
    plain = type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
    return cache if plain else None


class Conversation:
    """Messages that go back and forth; what the model has read of them, it does not read again.

    Args:
        new_tokens: of each answer at most.
        temperature: as of `answer`.

    Raises:
        InputError: there is no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int, temperature: float
    ) -> None:
        _check_template(tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._new_tokens, self._temperature = new_tokens, temperature
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._messages: list[Message] = []
        self._read: list[int] = []  # tokens that the cache stands for
        self._cache: Cache | None = None

    def say(self, text: str, show: Callable[[str], None] = lambda text: None) -> Answer:
        """The model's answer to a message.

        Raises:
            InputError: the template cannot be used, or all that was said is more than the model takes.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        inputs = encode(self._tokenizer, messages)
        ids: list[int] = inputs["input_ids"][0].tolist()
        room = self._new_tokens if self._longest is None else min(self._new_tokens, self._longest - len(ids))
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids)} tokens, and the model takes {self._longest}: begin another"
            )
        known = self._cache if ids[: len(self._read)] == self._read and len(self._read) < len(ids) else None
        found, cache = _answer(self._model, self._tokenizer, inputs, room, self._temperature, show, known)
        self._messages = [*messages, {"role": "assistant", "content": found.text}]
        self._read = [*ids, *found.tokens[:-1]]  # the last one is made and not read
        whole = cache is not None and cache.get_seq_length() == len(self._read)
        self._cache = cache if whole else None
        return found


@dataclass
class _Stream(BaseStreamer):  # type: ignore[misc]
    """Receives the prompt, then one token after the other."""

    tokenizer: PreTrainedTokenizerBase
    show: Callable[[str], None]
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # the model's time for each token
    _prompt: bool = True
    _finished: str = ""  # text of whole lines, which is not decoded again
    _line: list[int] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    @property
    def text(self) -> str:
        return self._finished + str(self.tokenizer.decode(self._line, skip_special_tokens=True))

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.seconds.append(time.perf_counter() - self._since)
        self.tokens += value.reshape(-1).tolist()
        self._line += value.reshape(-1).tolist()
        text = self.text
        if text.endswith("\n"):
            self._finished, self._line = text, []
        self.show(text.rstrip("\ufffd"))  # a letter of several tokens is shown when it is whole
        self._since = time.perf_counter()

    def end(self) -> None:
        self.show(self.text)
