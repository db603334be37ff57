"""Generate an answer to a prompt, its text handed over as it comes, its speed measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from sliplm.engines.transformers.opened import private_folder
from sliplm.errors import InputError, ShareError


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
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library of tokenizers has no kind of its own for a damaged file
        raise ShareError(
            f"{source} has no tokenizer that can be used: name a folder that has the model's (slip generate "
            "--tokenizer FOLDER; in Python transformers.AutoTokenizer)"
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None = None) -> dict[str, Tensor]:
    """A prompt as the arguments of `generate`.

    Args:
        chat: as a user's message in the model's chat template; None if it has one.

    Raises:
        InputError: the prompt is empty, or there is no chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise InputError("this model has no chat template: leave --chat out, or use --no-chat")
    if has_template if chat is None else chat:
        message = [{"role": "user", "content": prompt}]
        try:
            found = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
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
    stream = _Stream(tokenizer, show)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        model.generate(**inputs, **sampling, max_new_tokens=new_tokens, pad_token_id=pad, streamer=stream)
    return Answer(
        text=stream.text,
        tokens=tuple(stream.tokens),
        prompt_tokens=inputs["input_ids"].shape[1],
        first_seconds=stream.seconds[0],
        decode_seconds=sum(stream.seconds[1:]),
    )


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
