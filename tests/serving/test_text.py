"""The text of an answer as it comes is its text in the end, and nothing of a stop text is ever shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import families
from sliplm.serving.text import TextSoFar, cut

TOKENIZER = families.byte_tokenizer()


@given(text=st.text(max_size=40), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    ids = TOKENIZER(text)["input_ids"]
    so_far, shown = TextSoFar(TOKENIZER._tokenizer, [5, 6], stops), ""
    for number in ids:
        shown += so_far.add(number)
        assert not any(stop in shown for stop in stops)
    shown += so_far.end()
    places = [text.index(stop) for stop in stops if stop in text]
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert whole == text
    if not places:
        assert shown == text
    assert so_far.stopped == bool(places)
    if places:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


@given(ids=st.lists(st.integers(3, 258), max_size=60))
def test_bytes_that_are_no_text_come_out_as_they_are_decoded(ids: list[int]) -> None:
    so_far = TextSoFar(TOKENIZER._tokenizer, [], [])
    assert "".join(map(so_far.add, ids)) + so_far.end() == TOKENIZER.decode(ids)


def test_half_a_character_waits() -> None:
    first, second = TOKENIZER("é")["input_ids"]
    so_far = TextSoFar(TOKENIZER._tokenizer, [], [])
    assert (so_far.add(first), so_far.add(second)) == ("", "é")


def test_what_may_begin_a_stop_text_waits() -> None:
    assert cut("Hello EN", ["END"]) == (False, "Hello ", "EN")
    assert cut("Hello ENx", ["END"]) == (False, "Hello ENx", "")
    assert cut("Hello END.", ["END"]) == (True, "Hello ", "")
