"""Answers in OpenAI's forms: whole, and as chunks of a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sliplm.engines.transformers.drawing import Token
from sliplm.serving.answering import Piece

LEAST = -9999.0
"""What stands for the logarithm of nothing: JSON has no infinity."""

Spell = Callable[[int], str]


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def chat_choice(index: int, pieces: Sequence[Piece], spell: Spell, *, told: bool) -> dict[str, Any]:
    """One answer of a chat; with probabilities if they are told."""
    tokens = [token for piece in pieces for token in piece.tokens]
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
        "logprobs": {"content": [chat_token(t, spell) for t in tokens], "refusal": None} if told else None,
        "finish_reason": pieces[-1].end,
    }


def chat_delta(piece: Piece, spell: Spell, *, told: bool, first: bool) -> dict[str, Any]:
    """The same of a piece, in a stream."""
    delta = ({"role": "assistant"} if first else {}) | (
        {"content": piece.text} if piece.text or first else {}
    )
    told_here = told and piece.tokens
    return {
        "index": piece.choice,
        "delta": delta,
        "logprobs": {"content": [chat_token(t, spell) for t in piece.tokens]} if told_here else None,
        "finish_reason": piece.end,
    }


def chat_token(token: Token, spell: Spell) -> dict[str, Any]:
    """A token with its probability, as chats have it."""
    top = [_spelt(number, logprob, spell) for number, logprob in token.top]
    return _spelt(token.id, token.logprob, spell) | {"top_logprobs": top}


def text_choice(
    index: int, pieces: Sequence[Piece], spell: Spell, *, told: bool, at: int = 0
) -> dict[str, Any]:
    """One completion, or a piece of it.

    Args:
        at: characters of it that came before.
    """
    tokens = [token for piece in pieces for token in piece.tokens]
    return {
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": text_tokens(tokens, spell, at) if told else None,
        "finish_reason": pieces[-1].end,
    }


def text_tokens(tokens: Iterable[Token], spell: Spell, at: int) -> dict[str, list[Any]]:
    """Tokens with their probabilities, as completions have them; of a text's first token there is none."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text, known = spell(token.id), not math.isnan(token.logprob)
        top: dict[str, float] = {}
        for number, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(spell(number), _finite(logprob))
        found["tokens"].append(text)
        found["token_logprobs"].append(_finite(token.logprob) if known else None)
        found["top_logprobs"].append(top if known else None)
        found["text_offset"].append(at)
        at += len(text)
    return found


def event(data: dict[str, Any] | str) -> bytes:
    """One event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _spelt(number: int, logprob: float, spell: Spell) -> dict[str, Any]:
    text = spell(number)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
