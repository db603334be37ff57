"""A text as windows of tokens."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sliplm.errors import CheckpointError, InputError
from sliplm.filesystem import utf8_name
from sliplm.reading import open_regular

MAX_TEXT_BYTES = 1 << 30
_LETTERS = 12  # of a text for each token that is wanted: more than any tokenizer takes on average


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        InputError: it cannot be read, is too long or no text.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(f"{path} is longer than {MAX_TEXT_BYTES} bytes; give a part of it")
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text") from error


def windows_of(model_dir: Path, text: str, tokens: int, window: int) -> Tensor:
    """The beginning of a text: int64 [count, window], about `tokens` in all, with the checkpoint's tokenizer.

    Where the tokenizer starts a text with a special token, each window starts with it.

    Raises:
        CheckpointError: the checkpoint has no tokenizer.
        InputError: the text is too short for one window.
    """
    try:
        with utf8_name(model_dir) as named:
            tokenizer = AutoTokenizer.from_pretrained(named, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{model_dir} has no tokenizer that transformers can load; put the model's tokenizer files there"
        ) from error
    start = _start(tokenizer("").input_ids, tokenizer.eos_token_id)
    room = window - len(start)
    if tokens < 2 or room < 1:
        raise InputError(f"{tokens} tokens in windows of {window}: take two tokens a window at least")
    count = max(1, tokens // window)
    ids = tokenizer(text[: _LETTERS * count * window], add_special_tokens=False).input_ids
    if len(ids) < count * room:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        count = min(count, len(ids) // room)
    if not count:
        raise InputError(
            f"the text has {len(ids)} tokens; give one of {room} at least, or a smaller --tokens"
        )
    body = torch.tensor(ids[: count * room], dtype=torch.int64).view(count, room)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, len(start)), body], dim=1)


def _start(ids: list[int], end: int | None) -> list[int]:
    """The special tokens in front of an empty text."""
    return [token for token in ids if token != end][:1]
