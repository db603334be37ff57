"""lm-eval's API model at the server: each score is what its `hf` class gives; `make test-lm-eval`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from served import Model, Running
from sliplm.examples import PROMPTS

pytestmark = [
    pytest.mark.skipif(
        find_spec("lm_eval") is None,
        reason="lm_eval is not installed: make test-lm-eval has an environment with it",
    ),
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and datasets' own
]

LENGTH = 512  # of the tests' model
# `hf` adds at most 146 logarithms of one sign in float32, the API's class in float64: 145 * 2**-24 at most
ROUNDING = 1e-5
QUANTISED = 1e-3  # a score's part that quantised weights may cost; 2e-4 was measured

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["I", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


class Harness:
    """lm-eval with a task of each kind, made of the package's prompts.

    Of a question's answers one is the next question, one is short, and one is how the model itself begins.
    """

    def __init__(self, model: Model) -> None:
        self.documents = [
            {"question": prompt, "text": f"{prompt} {after}", "answers": [f" {after}", " No.", own]}
            for prompt, after in zip(PROMPTS, PROMPTS[1:] + PROMPTS[:1], strict=True)
            if (own := model.text(prompt, 1)) and own.isascii()  # tokens are bytes, not all of them text
        ]

    def scores(self, lm: Any) -> dict[str, list[Any]]:
        """Task by task, what each request got: (sum of logarithms, whether greedy); a sum; a text."""
        from datasets import Dataset
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        made = {
            "test_split": "test",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(self.documents)},
        }
        found = simple_evaluate(
            lm,
            tasks=[{"task": name, **made, **task} for name, task in TASKS.items()],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        assert found is not None
        return {name: [part[0] for one in found["samples"][name] for part in one["resps"]] for name in TASKS}

    def of(self, plain: Any, tokenizer: Any) -> dict[str, list[Any]]:
        """Of a model in this process."""
        from lm_eval.models.huggingface import HFLM

        return self.scores(HFLM(pretrained=plain, tokenizer=tokenizer, max_length=LENGTH, batch_size=1))


@pytest.fixture(scope="module")
def harness(model: Model) -> Harness:
    return Harness(model)


@pytest.fixture(scope="module")
def truth(harness: Harness, model: Model) -> dict[str, list[Any]]:
    return harness.of(model.plain, model.tokenizer)


@pytest.mark.parametrize(
    "options",
    [{}, {"tokenized_requests": False}, {"batch_size": 8, "num_concurrent": 4}],
    ids=["tokens", "texts", "batches at once"],
)
def test_scores_through_the_api_are_the_models_own(
    running: Running,
    model: Model,
    harness: Harness,
    truth: dict[str, list[Any]],
    tmp_path: Path,
    options: Any,
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model.tokenizer.save_pretrained(tmp_path)
    found = harness.scores(
        LocalCompletionsAPI(
            base_url=f"{running.server.url}/completions",
            model=running.server.name,
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_length=LENGTH,
            header={"Authorization": f"Bearer {running.keys['alice']}"},
            **options,
        )
    )
    count = len(harness.documents)
    assert [len(found[name]) for name in TASKS] == [3 * count, count, count]
    sums, greedy = zip(*found["choices"], strict=True)
    wanted, greedily = zip(*truth["choices"], strict=True)
    assert sums == pytest.approx(wanted, rel=ROUNDING)
    assert greedy == greedily
    assert sum(greedy) == count > 4  # the model's own beginnings, and no other answer
    assert found["text"] == pytest.approx(truth["text"], rel=ROUNDING)
    assert found["answers"] == truth["answers"]


def test_scores_are_nearly_those_of_the_model_before_the_split(
    model: Model, harness: Harness, truth: dict[str, list[Any]]
) -> None:
    original = AutoModelForCausalLM.from_pretrained(model.out.parent / "base", dtype=torch.float32)
    found = harness.of(original, model.tokenizer)
    assert [got for got, _ in found["choices"]] == pytest.approx(
        [wanted for wanted, _ in truth["choices"]], rel=QUANTISED
    )
    assert found["text"] == pytest.approx(truth["text"], rel=QUANTISED)
