"""LoRA folders: peft's ways to write one that are kept exactly, and what is refused, by name."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import reference
from sliplm.engines.transformers.lora import read_adapter
from sliplm.engines.transformers.plan import Plan, make_plan
from sliplm.errors import AdapterError
from sliplm.planning.counts import report_for
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import read_vault_manifest
from tuning import LAYERS, merged, tokens, train_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("llama", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_lora(
        base, tmp_path_factory.mktemp("plain") / "plain", target_modules=["q_proj", "down_proj"]
    )


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(plain, tmp_path / "adapter")


def check_exact(base: Path, adapter: Path, out: Path) -> None:
    """The split gives the logits of peft's merged model, up to the base's 12 bits."""
    split(base, out, base=base, adapters={"x": adapter})
    with torch.inference_mode():
        found = reference(out, adapter="x")(tokens(9)).logits
        truth, bare = merged(base, adapter)(tokens(9)).logits, reference(out)(tokens(9)).logits
    assert torch.dist(found, truth) < 3e-3 * truth.norm()
    assert torch.dist(bare, truth) > 3e-2 * truth.norm()


@pytest.mark.parametrize(
    "config",
    [
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"k_proj": 3, ".*down_proj": 30},
        },
        {"use_rslora": True},
        {"target_modules": r".*layers\.1\..*(q_proj|gate_proj)", "init_lora_weights": "gaussian"},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "lora_dropout": 0.1},
        {"target_modules": ["q_proj", "lm_head"], "r": 1},
        {"init_lora_weights": "orthogonal", "r": 4},
    ],
    ids=lambda config: "+".join(config),
)  # fmt: skip
def test_what_peft_writes_is_kept_exactly(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    check_exact_unmerged(base, train_lora(base, tmp_path / "adapter", **config), tmp_path / "out")


def check_exact_unmerged(base: Path, adapter: Path, out: Path) -> None:
    """As `check_exact`, by peft's layers as they are: a merge would change the embedding with a tied head."""
    split(base, out, base=base, adapters={"x": adapter})
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        bare = model(tokens(9)).logits
        model.load_adapter(str(adapter))
        truth, found = model(tokens(9)).logits, reference(out, adapter="x")(tokens(9)).logits
    assert torch.dist(found, truth) < 3e-3 * truth.norm()
    assert torch.dist(bare, truth) > 3e-2 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_exact(
    base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    check_exact(base, adapter, tmp_path / "out")


def test_gpt2_s_fan_in_fan_out(tmp_path: Path) -> None:
    gpt2 = families.make("gpt2", tmp_path / "base")
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    check_exact(gpt2, train_lora(gpt2, tmp_path / "adapter", steps=12, **config), tmp_path / "out")


def test_names_without_the_causal_head_s_prefix(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter that was trained on AutoModel lacks the leading `model.`."""
    tensors = {
        name.replace("base_model.model.model.", "base_model.model."): tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    assert all(name.startswith("base_model.model.layers.") for name in tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    split(base, tmp_path / "out", base=base, adapters={"x": adapter})
    (report,) = report_for(read_vault_manifest(tmp_path / "out" / "vault")).adapters
    assert report.groups == 4


FOREIGN: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "inside a vision model": lambda name: name.replace("l.model.layers", "l.model.language_model.layers"),
    "inside an older one": lambda name: name.replace("l.model.layers", "l.language_model.model.layers"),
    "with its name": lambda name: name.replace(".weight", ".default.weight"),
    "without peft's": lambda name: name.removeprefix("base_model.model."),
    "half of peft's": lambda name: name.replace("base_model.model.", "base_model.", 1),
}


@pytest.mark.parametrize("rename", FOREIGN.values(), ids=list(FOREIGN))
def test_foreign_names_mean_the_same(
    base: Path, plain: Path, adapter: Path, rename: Callable[[str], str]
) -> None:
    tensors = {rename(name): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    stored = _plan(base).stored
    found, truth = read_adapter("x", adapter, stored), read_adapter("x", plain, stored)
    assert found.ranks == truth.ranks
    for module in truth.ranks:
        for ours, theirs in zip(found.factors(module), truth.factors(module), strict=True):
            assert np.array_equal(ours, theirs)


def test_patterns_count_by_the_names_of_training(base: Path, plain: Path, adapter: Path) -> None:
    """An alpha for one layer is found though that layer is called otherwise here."""
    rename = FOREIGN["inside a vision model"]
    tensors = {rename(name): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    name = "model.language_model.layers.0.self_attn.q_proj"
    _config(lambda c: c.update(alpha_pattern={name: 4 * c["lora_alpha"]}))(adapter)
    stored, module = _plan(base).stored, "model.layers.0.self_attn.q_proj"
    found, truth = (read_adapter("x", folder, stored).factors(module)[0] for folder in (adapter, plain))
    assert np.allclose(found, 4 * truth)


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "use_dora, which is no plain LoRA: merge it with peft"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(lm_head\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "which changes the base"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_other_kinds_are_refused_by_name(
    base: Path, tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"target_modules": LAYERS, "task_type": "CAUSAL_LM"} | config
        get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path / "adapter", word)


def refused(base: Path, adapter: Path, word: str) -> None:
    out = adapter.parent / "out"
    with pytest.raises(AdapterError, match=word) as caught:
        split(base, out, base=base, adapters={"mine": adapter})
    assert "mine" in str(caught.value)
    assert not (out / "vault").exists()
    assert not (out / "worker").exists()


def test_another_method_is_refused(base: Path, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path / "adapter", "of the kind IA3, and only LORA")


def test_pickles_are_not_opened(base: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    refused(base, adapter, f"has no {WEIGHTS}")
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    refused(base, adapter, "pickle file only")


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text())
        change(config)
        (adapter / CONFIG).write_text(json.dumps(config))

    return spoil


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})

    return spoil


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def _cut(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[: len(data) - 100])


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_cut, "truncated or damaged"),
        (lambda adapter: (adapter / CONFIG).unlink(), "cannot be read"),
        (lambda adapter: (adapter / CONFIG).write_text("{"), "no valid JSON"),
        (lambda adapter: (adapter / CONFIG).write_text("[]"), "of the kind None"),
        (_config(lambda c: c.update(r="8")), "r: "),
        (_config(lambda c: c.update(r=9)), r"rank 9 calls for \(9, 176\)"),
        (_config(lambda c: c.update(rank_pattern={"q_proj": 0})), "rank_pattern.q_proj: "),
        (_config(lambda c: c.update(rank_pattern={"(": 3})), "a pattern that is none"),
        (_config(lambda c: c.update(target_modules="(")), "a pattern that is none"),
        (_config(lambda c: c.update(a_new_field={"on": 1})), "uses a_new_field"),
        (_config(lambda c: c["target_modules"].append("v_proj")), "no tensors for .*v_proj"),
        (_tensors(lambda t: t.pop(f"{FIRST}.lora_A.weight")), "lacks lora_A.weight of .*q_proj"),
        (_tensors(lambda t: [t.pop(f"{FIRST}.lora_{x}.weight") for x in "AB"]), "no tensors for .*q_proj"),
        (_tensors(lambda t: t.update({f"{FIRST}.weight": torch.zeros(3)})), "q_proj.weight, which is no"),
        (_tensors(lambda t: t.update({k: torch.zeros(0) for k in t})), "empty, .* ZeRO stage 3"),
        (
            _tensors(lambda t: t.update({k.replace(".weight", ".b.weight"): v + 0 for k, v in [*t.items()]})),
            "two tensors for lora_.*selected_adapters",
        ),
        (_tensors(lambda t: t.update({"stray": torch.zeros(3)})), "stray, which is no plain"),
        (
            _tensors(lambda t: t.update({k.replace("layers.0", "layers.7"): v + 0 for k, v in [*t.items()]})),
            "layers.7.* no linear layer of this model",
        ),
        (
            _tensors(lambda t: t.update({f"{FIRST}.base_layer.weight": torch.zeros(64, 64)})),
            "base_layer.weight, which is no plain",
        ),
        (_tensors(lambda t: t[f"{FIRST}.lora_B.weight"].fill_(torch.nan)), "NaN"),
        (_tensors(lambda t: t[f"{FIRST}.lora_B.weight"].fill_(3e38)), "beyond float32"),
        (_tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(8, 64).char()})), "type I8"),
    ],
)  # fmt: skip
def test_a_spoilt_adapter_is_refused(
    base: Path, adapter: Path, spoil: Callable[[Path], None], word: str
) -> None:
    spoil(adapter)
    refused(base, adapter, word)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_of_ours(base: Path, plain: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A byte changed or a piece cut off, in either file: the adapter is refused, or it still is one."""
    plan = _plan(base)
    adapter = tmp_path / "damaged"
    shutil.copytree(plain, adapter, dirs_exist_ok=True)
    file = adapter / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    text = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, min(len(text), 3000) - 1))
    if data.draw(st.booleans()):
        text[place] ^= data.draw(st.integers(1, 255))
    else:
        del text[place:]
    file.write_bytes(text)
    with contextlib.suppress(AdapterError):
        read_adapter("mine", adapter, plan.stored)


@functools.cache
def _plan(base: Path) -> Plan:
    return make_plan(base, Recipe(rank=0))


def test_the_adapter_of_another_model_is_refused(base: Path, plain: Path, tmp_path: Path) -> None:
    wider = families.make("llama", tmp_path / "wider", hidden_size=96)
    copy = shutil.copytree(plain, tmp_path / "adapter")
    refused(wider, copy, "the adapter of another model")
    gpt2 = families.make("gpt2", tmp_path / "gpt2")
    refused(gpt2, copy, "no linear layer of this model")


def test_no_message_shows_a_weight(base: Path, adapter: Path) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FIRST}.lora_A.weight"] = torch.full((3, 64), 0.123456789)

    _tensors(mark)(adapter)
    with pytest.raises(AdapterError) as caught:
        split(base, adapter.parent / "out", base=base, adapters={"mine": adapter})
    assert "0.123" not in str(caught.value)
    assert np.float32(0.123456789).tobytes().hex() not in str(caught.value)
