"""The transformers engine: split layers, loading, and exactness against the quantised model."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import families
from sliplm.engines.modules import SlipLinear, replace
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.load import open as open_split
from sliplm.engines.transformers.quantizer import SlipConfig, SlipQuantizer
from sliplm.errors import InputError, MismatchError, SealError, ShareError
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.manifest import Member
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import record

RECIPE = Recipe(rank=4, precision=12)
PASSED = "ignore:You passed `quantization_config`:UserWarning"  # transformers says so for every method


# --- the split layers alone ---------------------------------------------------------------------------


class CountingSource:
    """Multiplies in the clear and counts."""

    def __init__(self, weights: dict[str, np.ndarray[Any, Any]]) -> None:
        self.weights = weights
        self.calls = 0

    def product(self, group: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.calls += 1
        assert (x.dtype, x.ndim, x.flags.c_contiguous) == (np.float32, 2, True)
        return x @ self.weights[group].T


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6)
        self.k = nn.Linear(8, 3, bias=False)
        self.o = Conv1D(5, 8)


MEMBERS = {"q+k": (Member("q", 6), Member("k", 3)), "o": (Member("o", 5),)}


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, CountingSource]:
    """The plain module, the replaced one and its source."""
    plain = Attention().requires_grad_(False)
    qk = torch.cat([plain.q.weight, plain.k.weight]).numpy()
    source = CountingSource({"q+k": qk, "o": plain.o.weight.T.contiguous().numpy()})
    hybrid = copy.deepcopy(plain)
    replace(hybrid, MEMBERS, source)
    return plain, hybrid, source


def test_members_share_one_product(pair: tuple[Any, Any, CountingSource]) -> None:
    plain, hybrid, source = pair
    x = torch.randn(2, 3, 8)
    for name in ("q", "k", "o"):
        torch.testing.assert_close(getattr(hybrid, name)(x), getattr(plain, name)(x))
    assert source.calls == 2
    assert all(layer(x).is_contiguous() for layer in (hybrid.q, hybrid.k))


def test_a_second_call_of_a_member_is_a_new_product(pair: tuple[Any, Any, CountingSource]) -> None:
    _, hybrid, source = pair
    x = torch.randn(1, 8)
    hybrid.q(x), hybrid.q(x), hybrid.k(x), hybrid.k(x)
    assert source.calls == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_is_a_new_product(pair: tuple[Any, Any, CountingSource], mode: Any) -> None:
    plain, hybrid, source = pair
    with mode():
        x = torch.randn(2, 8)
        hybrid.q(x)
        x.mul_(2)
        torch.testing.assert_close(hybrid.k(x), plain.k(x))
        x[0, 0] = 7.0
        torch.testing.assert_close(hybrid.q(x), plain.q(x))
        assert source.calls == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_unchanged_input_is_served_from_one_product(
    pair: tuple[Any, Any, CountingSource], mode: Any
) -> None:
    _, hybrid, source = pair
    with mode():
        x = torch.randn(2, 8)
        hybrid.q(x), hybrid.k(x)
    assert source.calls == 1


def test_a_recycled_tensor_is_a_new_product(pair: tuple[Any, Any, CountingSource]) -> None:
    plain, hybrid, source = pair
    for _ in range(20):  # each time at the address of the one before, were it not held
        x = torch.randn(2, 8)
        hybrid.q(x)
        x = torch.randn(2, 8)
        torch.testing.assert_close(hybrid.k(x), plain.k(x))
    assert source.calls == 40


def test_the_input_is_let_go_after_the_last_member(pair: tuple[Any, Any, CountingSource]) -> None:
    _, hybrid, _ = pair
    x = torch.randn(2, 8)
    hybrid.q(x)
    held = hybrid.q.group._held
    assert held.now._input is x
    hybrid.k(x)
    assert held.now is None


def test_an_error_leaves_nothing_behind(pair: tuple[Any, Any, CountingSource]) -> None:
    plain, hybrid, source = pair
    x, weights = torch.randn(2, 8), source.weights
    hybrid.q(torch.randn(2, 8))
    source.weights = {}
    with pytest.raises(KeyError):
        hybrid.k(x)
    assert hybrid.k.group._held.now is None
    source.weights = weights
    torch.testing.assert_close(hybrid.k(x), plain.k(x))


def test_threads_do_not_see_each_others_products(pair: tuple[Any, Any, CountingSource]) -> None:
    plain, hybrid, source = pair
    x = torch.randn(2, 8)
    hybrid.q(x)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(hybrid.k(x)))
    thread.start()
    thread.join(timeout=10)
    torch.testing.assert_close(found[0], plain.k(x))
    assert source.calls == 2


def test_dtypes_and_shapes(pair: tuple[Any, Any, CountingSource]) -> None:
    plain, hybrid, source = pair
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(3, 8).to(dtype)
        y = hybrid.q(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, plain.q(x.float()).to(dtype), rtol=1e-2, atol=1e-2)
    transposed = torch.randn(8, 3).T
    torch.testing.assert_close(hybrid.q(transposed), plain.q(transposed))
    assert hybrid.q(torch.randn(8)).shape == (6,)
    calls = source.calls
    assert hybrid.q(torch.randn(0, 8)).shape == (0, 6)
    assert source.calls == calls


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 7),
        torch.tensor(1.0),
        torch.ones(2, 8, dtype=torch.int64),
        torch.randn(2, 8, device="meta"),
        torch.randn(2, 8, requires_grad=True),
    ],
    ids=["width", "scalar", "integers", "device", "gradient"],
)
def test_inputs_that_cannot_be_used(pair: tuple[Any, Any, CountingSource], x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="group q\\+k"):
        pair[1].q(x)


def test_no_gradient_is_fine_where_none_is_recorded(pair: tuple[Any, Any, CountingSource]) -> None:
    with torch.no_grad():
        assert not pair[1].q(torch.randn(2, 8, requires_grad=True)).requires_grad


def test_a_split_layer_has_no_weight_and_is_not_copied(pair: tuple[Any, Any, CountingSource]) -> None:
    layer = pair[1].q
    assert not hasattr(layer, "weight")
    assert list(layer.state_dict()) == ["bias"]
    with pytest.raises(AttributeError, match="no party has it"):
        _ = layer.weight
    with pytest.raises(InputError, match="copied or pickled"):
        copy.deepcopy(layer)
    with pytest.raises(InputError, match="copied or pickled"):
        pickle.dumps(layer)


@pytest.mark.parametrize(
    "give",
    [
        lambda layer, w: setattr(layer, "weight", w),
        lambda layer, w: layer.register_parameter("weight", w),
        lambda layer, w: layer.register_buffer("weight", w.data),
        lambda layer, w: layer.load_state_dict({"weight": w}, strict=False),
        lambda layer, w: nn.Sequential(layer).load_state_dict({"0.weight": w}),
        lambda layer, w: torch.func.functional_call(layer, {"weight": w}, (torch.ones(1, 8),)),
    ],
)
def test_a_weight_that_would_change_no_answer_is_refused(
    pair: tuple[Any, Any, CountingSource], give: Callable[[Any, Any], object]
) -> None:
    with torch.no_grad(), pytest.raises(InputError, match="split it again"):
        give(pair[1].q, nn.Parameter(torch.ones(6, 8)))
    assert list(pair[1].q.state_dict()) == ["bias"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"g": (Member("q", 6), Member("nothing", 3))}, "nothing"),
        ({"g": (Member("q", 7),)}, "6 rows"),
        ({"g": (Member("q", 6),), "h": (Member("q", 6),)}, "twice"),
        ({"g": ()}, "width"),
    ],
)
def test_replace_checks_all_before_it_changes_any(groups: Any, message: str) -> None:
    module = Attention()
    with pytest.raises(ShareError, match=message):
        replace(module, {"first": (Member("o", 5),), **groups}, None)
    assert not any(isinstance(child, SlipLinear) for child in module.modules())


# --- families: the hybrid model is the quantised model, bit for bit -----------------------------------


@dataclass
class Case:
    folder: Path
    address: str
    original: PreTrainedModel
    hybrid: PreTrainedModel
    reference: PreTrainedModel


@pytest.fixture(scope="module", params=families.DENSE)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    families.make(request.param, folder / "model")
    split(folder / "model", folder, recipe=RECIPE)
    original = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with LocalWorker(folder / "worker") as worker, ExitStack() as stack:
        hybrid = load(folder / "vault", [worker.address])
        stack.enter_context(closing(hybrid.slip))
        yield Case(folder, worker.address, original, hybrid, reference(folder))


def batch() -> dict[str, torch.Tensor]:
    """Three prompts of 9, 5 and 1 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 300, (3, 9), generator=generator)
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """A padded prompt's logits and those of four decode steps: [3, 13, vocabulary]."""
    inputs = batch()
    out = model(**inputs, use_cache=True)
    found, mask = [out.logits], inputs["attention_mask"]
    for step in range(4):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        token = torch.full((3, 1), 10 + step)
        out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


def real_tokens() -> torch.Tensor:
    """Which of `logits`' places are no padding: bool [3, 13]."""
    return torch.cat([batch()["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1).bool()


def test_logits_are_those_of_the_quantised_model(case: Case) -> None:
    assert torch.equal(logits(case.hybrid), logits(case.reference))


def test_logits_are_close_to_the_original(case: Case) -> None:
    p = logits(case.original)[real_tokens()].double().log_softmax(-1)
    q = logits(case.hybrid)[real_tokens()].double().log_softmax(-1)
    assert torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean") < 1e-5


def test_generate_gives_the_tokens_of_the_quantised_model(case: Case) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = case.hybrid.generate(**batch(), **options)
    assert torch.equal(tokens, case.reference.generate(**batch(), **options))


def test_split_layers_hold_no_weight(case: Case) -> None:
    split_names = {n for n, m in case.hybrid.named_modules() if isinstance(m, SlipLinear)}
    linear = {n for n, m in case.original.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert split_names == linear
    names = set(case.hybrid.state_dict())
    assert not names & {f"{name}.weight" for name in linear}
    original = case.original.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in case.hybrid.state_dict().items())


# --- loading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("llama")
    families.make("llama", folder / "model", num_hidden_layers=1)
    split(folder / "model", folder, recipe=RECIPE)
    original = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with LocalWorker(folder / "worker") as worker:
        hybrid = load(folder / "vault", [worker.address])
        with closing(hybrid.slip):
            yield Case(folder, worker.address, original, hybrid, reference(folder))


@pytest.mark.filterwarnings(PASSED)
def test_from_pretrained_with_a_configuration(llama: Case) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for device_map")
    model = AutoModelForCausalLM.from_pretrained(
        llama.folder / "vault",
        quantization_config=SlipConfig(workers=[llama.address], ahead=2, timeout=20.0),
        attn_implementation="eager",
        device_map="cpu",
        dtype=torch.float32,
    )
    with closing(model.slip):
        assert model.config._attn_implementation == "eager"
        difference = (logits(model) - logits(llama.reference))[real_tokens()]
        assert difference.abs().max() < 1e-2  # another attention rounds otherwise
        assert model.config.to_dict()["quantization_config"] == {"quant_method": "slip"}


def test_from_pretrained_with_the_environment(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_WORKERS", llama.address)
    model = AutoModelForCausalLM.from_pretrained(llama.folder / "vault")
    with closing(model.slip):
        assert torch.equal(logits(model), logits(llama.reference))
    monkeypatch.delenv("SLIPLM_WORKERS")
    with pytest.raises(InputError, match="SLIPLM_WORKERS"):
        AutoModelForCausalLM.from_pretrained(llama.folder / "vault")


@pytest.mark.parametrize("order", ["import sliplm, transformers", "import transformers, sliplm"])
def test_importing_sliplm_is_enough(order: str) -> None:
    program = f"""
{order}
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.from_pretrained
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("slip" in AUTO_QUANTIZER_MAPPING)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout == "True\n"


def test_loading_says_nothing(llama: Case, caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        load(llama.folder / "vault", [llama.address]).slip.close()
    finally:
        library.removeHandler(caplog.handler)
    assert [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING] == []


def test_bfloat16(llama: Case) -> None:
    model = load(llama.folder / "vault", [llama.address], dtype=torch.bfloat16)
    with closing(model.slip):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        found = logits(model)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, logits(reference(llama.folder, dtype=torch.bfloat16)))
        torch.testing.assert_close(found.float(), logits(llama.reference), rtol=0.1, atol=0.1)


def test_open_runs_both_sides(llama: Case) -> None:
    with open_split(llama.folder) as model:
        assert torch.equal(logits(model), logits(llama.reference))


def test_two_threads_generate_at_once(llama: Case) -> None:
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[90, 8, 1, 30, 44]])]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = [llama.reference.generate(prompt, **options) for prompt in prompts]
    found: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        found[i] = llama.hybrid.generate(prompts[i], **options)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_plain_calls_need_no_no_grad_and_training_is_refused(llama: Case) -> None:
    model = llama.hybrid
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(**batch()).logits.requires_grad
    model.get_input_embeddings().requires_grad_(True)
    try:
        with pytest.raises(InputError, match="cannot be trained"):
            model(**batch(), labels=batch()["input_ids"])
    finally:
        model.requires_grad_(False)


def test_not_a_number_is_refused(llama: Case) -> None:
    embeddings = torch.full((1, 3, llama.hybrid.config.hidden_size), float("nan"))
    with pytest.raises(InputError):
        llama.hybrid(inputs_embeds=embeddings)


def test_saving_is_refused(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be saved"):
        llama.hybrid.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("workers", [[], "127.0.0.1:7400", [""]])
def test_workers_must_be_a_list(llama: Case, workers: Any) -> None:
    with pytest.raises(InputError, match="list of addresses"):
        load(llama.folder / "vault", workers)


def test_another_key_is_refused(llama: Case) -> None:
    with pytest.raises(SealError, match="another key"):
        load(llama.folder / "vault", [llama.address], key=bytes(32))


def test_other_devices_are_refused(llama: Case) -> None:
    with pytest.raises(InputError, match="CPU"):
        SlipQuantizer(SlipConfig()).validate_environment(device_map={"": "mps"})
    with pytest.raises(InputError, match="CPU"):
        llama.hybrid.lm_head(torch.zeros(1, llama.hybrid.config.hidden_size, device="meta"))


def test_folders_that_are_no_vault(llama: Case, tmp_path: Path) -> None:
    for folder in (tmp_path, llama.folder / "model", llama.folder / "worker"):
        with pytest.raises(ShareError, match="vault"):
            load(folder, [llama.address])


def test_another_model_class_is_refused(llama: Case) -> None:
    with pytest.raises(ShareError, match="AutoModelForCausalLM"):
        load(llama.folder / "vault", [llama.address], model_class=AutoModel)


def test_compiled_models_run(llama: Case) -> None:
    compiled = torch.compile(llama.hybrid, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch()).logits, llama.reference(**batch()).logits)


def test_the_worker_of_another_split(llama: Case, tmp_path: Path) -> None:
    split(llama.folder / "model", tmp_path, recipe=RECIPE)
    with LocalWorker(tmp_path / "worker") as worker, pytest.raises(MismatchError):
        load(llama.folder / "vault", [worker.address])
    with pytest.raises(MismatchError):
        load(llama.folder / "vault", [llama.address], share=tmp_path / "worker")


def test_a_missing_kept_tensor(llama: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    vault = shutil.copytree(llama.folder / "vault", tmp_path / "vault")
    tensors = load_file(vault / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, vault / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShareError, match=r"model\.safetensors"):  # its digest
        load(vault, [llama.address], share=llama.folder / "worker")

    def without_norm(manifest: dict[str, Any]) -> None:
        """As a faulty splitter would have it."""
        manifest["files"]["model.safetensors"] = record(vault / "model.safetensors").model_dump()
        manifest["kept_tensors"] = [t for t in manifest["kept_tensors"] if t["name"] != "model.norm.weight"]

    families.sign_manifest(vault, without_norm)
    with pytest.raises(ShareError, match=r"lacks model\.norm\.weight"):
        load(vault, [llama.address], share=llama.folder / "worker")
