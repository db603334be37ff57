"""A prompt as tokens: what a chat template may do wrong."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sliplm.engines.transformers.answer import encode
from sliplm.errors import InputError


@pytest.mark.parametrize("template", ["{{ raise_exception('no users here') }}", "{% if %}", "{{ a.b.c }}"])
def test_a_template_s_error_is_ours(template: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"chat template cannot be used .*--no-chat"):
        encode(tokenizer, "a")
    assert encode(tokenizer, "a", chat=False)["input_ids"].tolist() == [[0]]
