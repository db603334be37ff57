"""From tokens to the text of one answer as it comes: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_BEFORE: Final = 6  # tokens of the prompt that decide how the first token is written
_HELD: Final = 64  # tokens without a whole character at their end; then it never will be one
_HALF: Final = "\N{REPLACEMENT CHARACTER}"


class TextSoFar:
    """The text of an answer, token by token.

    Args:
        tokenizer: of the `tokenizers` library.
        prompt: token ids that the answer continues.
        stops: texts that end the answer; neither they nor what follows belong to it.

    Attributes:
        stopped: whether one of them was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = list(prompt[-_BEFORE:])
        self._shown = len(self._ids)  # of these ids, whose text was taken
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What may be shown now that this token came."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._held += self._new(whole=False)
        self.stopped, shown, self._held = cut(self._held, self._stops)
        return shown

    def end(self) -> str:
        """What was held back, now that nothing more comes."""
        if self.stopped:
            return ""
        self.stopped, shown, held = cut(self._held + self._new(whole=True), self._stops)
        self._held = ""
        return shown if self.stopped else shown + held

    def _new(self, *, whole: bool) -> str:
        """The text of the ids that was not taken yet, unless it ends with half a character.

        A token's text may depend on the one before it, so those are decoded that were taken last, too.
        """
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        waits = text.endswith(_HALF) and len(self._ids) - self._shown < _HELD
        if len(text) <= len(before) or (waits and not whole):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def cut(text: str, stops: Sequence[str]) -> tuple[bool, str, str]:
    """Whether a text holds one of the stop texts, what may be shown of it, and what must wait: an end that
    one of them may begin with.
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if places:
        return True, text[: min(places)], ""
    begun = [n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
    shown = len(text) - max(begun, default=0)
    return False, text[:shown], text[shown:]
