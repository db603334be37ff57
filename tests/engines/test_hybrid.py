"""What people do with a model: adapters by the call, threads, casts, tracing; right or refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import families
from sliplm.engines.modules import GroupProduct
from sliplm.engines.torch.convert import split_module
from sliplm.engines.torch.load import reference_module
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import reference
from sliplm.errors import InputError, SlipWarning
from tuning import tokens, train_lora


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hybrid")
    base = families.make("llama", folder / "base")
    adapter = train_lora(base, folder / "fr", target_modules=["q_proj", "down_proj"])
    split(base, folder / "out", base=base, adapters={"fr": adapter})
    return reference(folder / "out")


@pytest.fixture(scope="module")
def french(model: Any) -> Tensor:
    with model.slip.adapter("fr"):
        return logits(model)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens(9), **options).logits
    return found


def in_thread(call: Callable[[], Any]) -> list[Any]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found


def test_the_adapter_is_an_argument_of_the_call(model: Any, french: Tensor) -> None:
    assert torch.equal(logits(model, adapter="fr"), french)
    assert not torch.equal(logits(model), french)
    with model.slip.adapter("fr"):
        assert torch.equal(logits(model), french)
        assert not torch.equal(logits(model, adapter="base"), french)
    with pytest.raises(InputError, match="no adapter 'de': it has fr"):
        logits(model, adapter="de")


def test_generate_takes_the_adapter_in_a_thread_of_its_own(model: Any) -> None:
    """The pattern of TextIteratorStreamer."""
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = tokens(9)
    with model.slip.adapter("fr"):
        truth = model.generate(prompt, **options)
    (found,) = in_thread(lambda: model.generate(prompt, adapter="fr", **options))
    assert torch.equal(found, truth)
    assert not torch.equal(model.generate(prompt, **options), truth)


def test_a_thread_without_a_choice_is_warned_about(model: Any) -> None:
    with model.slip.adapter("fr"), pytest.warns(SlipWarning, match=r"generate\(\.\.\., adapter='fr'\)"):
        in_thread(lambda: logits(model))


def test_a_thread_with_a_choice_is_not(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlipWarning)
        with model.slip.adapter("fr"):
            assert in_thread(lambda: logits(model, adapter="base"))
        with model.slip.adapter("base"):  # what the thread takes anyway
            assert in_thread(lambda: logits(model))
        assert in_thread(lambda: logits(model))


def test_trainer_evaluates_and_does_not_train(model: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": tokens(9)[0], "labels": tokens(9)[0]}] * 2
    args = TrainingArguments(str(tmp_path / "runs"), report_to=[], use_cpu=True, disable_tqdm=True)
    assert Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"] > 0
    with pytest.raises(InputError, match="cannot be trained, only evaluated"):
        Trainer(model, args, train_dataset=rows).train()


def test_casts(model: Any) -> None:
    exact = logits(model)
    for cast, dtype in (
        (model.half, torch.float16),
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (model.bfloat16, torch.bfloat16),
        (model.float, torch.float32),
    ):
        cast()
        assert logits(model).dtype is dtype
        assert torch.dist(logits(model).float(), exact) < 0.05 * exact.norm()


def test_other_numbers_of_tokens_are_refused(model: Any) -> None:
    size = model.config.vocab_size
    assert model.resize_token_embeddings(size).num_embeddings == size
    with pytest.raises(InputError, match="on the original, save it and split again"):
        model.resize_token_embeddings(size + 1)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_compiled_and_not_recorded(model: Any) -> None:
    model.float()
    assert torch.equal(torch.compile(model, backend="eager")(tokens(9)).logits, logits(model))
    for record, strict in (
        (torch.jit.trace, False),
        (torch.export.export, False),
        (torch.export.export, True),
    ):
        with pytest.raises(InputError, match="cannot be traced or exported"):
            record(model, (tokens(9),), strict=strict)
    with pytest.raises(InputError, match="cannot be scripted"):
        torch.jit.script(model)


# --- plain modules ----------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        x.data.mul_(-2)  # counted by nobody
        return torch.relu(first) + self.b(x)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    out, module = tmp_path_factory.mktemp("two") / "out", Two().eval()
    split_module(module, torch.randn(3, 64), out)
    return module, reference_module(Two(), out)


def test_a_write_through_data_between_two_layers_is_seen(two: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(5, 64)
    with torch.no_grad():
        plain, found = (module(x.clone()) for module in two)
    assert torch.dist(found, plain) < 0.01 * plain.norm()


def test_a_module_is_compiled(two: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(5, 64)
    with torch.no_grad():
        found = torch.compile(two[1], backend="eager")(x.clone())
        assert torch.equal(found, two[1](x.clone()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("use", "word"),
    [
        (lambda module, x: torch.jit.trace(module, x), "cannot be traced"),
        (lambda module, x: torch.jit.script(module), "cannot be scripted"),
        (lambda module, x: torch.jit.script(module.b), "cannot be scripted"),
        (lambda module, x: torch.jit.script(nn.Sequential(module, nn.ReLU())), "cannot be scripted"),
        (lambda module, x: torch.export.export(module, (x,)), "cannot be traced or exported"),
        (lambda module, x: torch.export.export(module, (x,), strict=True), "cannot be traced or exported"),
        (lambda module, x: torch.func.vmap(module)(x), "a batch in the place of vmap"),
        (lambda module, x: torch.func.grad(lambda x: module(x).sum())(x), "torch.func"),
    ],
    ids=["trace", "script", "script-layer", "script-around", "export", "strict", "vmap", "grad"],
)
def test_what_has_no_values_is_refused(
    two: tuple[nn.Module, nn.Module], use: Callable[[Any, Tensor], Any], word: str
) -> None:
    with pytest.raises(InputError, match=word):
        use(two[1], torch.randn(3, 64))


def test_a_product_is_handed_out_only_for_the_same_contents() -> None:
    class Sums:
        def product(self, group: str, x: Any) -> Any:
            return x @ torch.ones(4, 6).numpy()

    group = GroupProduct("g", [3, 3], Sums())
    x = torch.ones(2, 4)
    group.rows_of(0, x)
    x.numpy()[:] = 5  # a view that torch does not count either
    assert (group.rows_of(1, x) == 20).all()
