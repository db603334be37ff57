"""Fine-tunes of a public mixture, split against it: adapters to its attention, full ones with experts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.lora import read_adapter
from sliplm.engines.transformers.plan import make_plan
from sliplm.errors import AdapterError, CheckpointError, RecipeError
from sliplm.parties.worker import Worker
from sliplm.planning.counts import SplitReport
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.share import open_worker, read_vault_manifest
from test_vault import serving
from tuning import merged, tokens, train_full, train_lora

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "decoder_sparse_step": 1}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = tokens(9, rows=2, length=9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("qwen3_moe", tmp_path_factory.mktemp("public") / "base", **SMALL)


@pytest.fixture(scope="module")
def full(base: Path) -> Path:
    """A full fine-tune, but of one expert, which nobody trained."""
    tuned = train_full(base, base.parent / "full", seed=3)
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tuned, base))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data[2] = before.get_parameter(name)[2]
    model.save_pretrained(tuned)
    return tuned


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def experts(report: SplitReport, number: int) -> set[int]:
    """The ranks of an expert's groups; beside a public base it has its own number."""
    return {g.rank for g in report.groups if g.exchange and g.name.endswith(f".{number}")}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_full_fine_tune_is_split_against_its_base(
    family: str, base: Path, full: Path, tmp_path: Path
) -> None:
    """Cut at nearly all of its energy: it answers as the fine-tune; the worker has the base alone."""
    if family != "qwen3_moe":
        base = families.make(family, tmp_path / "base", num_hidden_layers=1, first_k_dense_replace=0)
        full = train_full(base, tmp_path / "full", seed=3)
    report = split(full, tmp_path / "out", Recipe(energy=0.9999), base=base)
    assert report.left_out is not None
    assert report.left_out < 0.011
    split(base, tmp_path / "alone", base=base)
    for name in ("manifest.json", "share.safetensors"):
        files = [tmp_path / out / "worker" / name for out in ("out", "alone")]
        assert files[0].read_bytes() == files[1].read_bytes(), "a function of the base alone (M40)"
    found = logits(reference(tmp_path / "out"))
    truth, plain = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (full, base))
    assert distance(found, truth) < 0.01 < 0.2 * distance(plain, truth)
    if family == "qwen3_moe":
        assert experts(report, 2) == {0}, "what was not trained costs nothing"
        assert all(rank > 0 for rank in experts(report, 0))
        worker = Worker(open_worker(tmp_path / "out" / "worker"), threads=1)
        with serving(worker, tmp_path / "w") as address:
            hybrid: Any = load(tmp_path / "out" / "vault", [address], ahead=0)
            try:
                assert torch.equal(logits(hybrid), found)
            finally:
                hybrid.slip.close()


def test_adapters_of_the_attention_are_kept_exactly(base: Path, tmp_path: Path) -> None:
    adapters = {
        "fr": train_lora(base, tmp_path / "fr", seed=1, target_modules=ATTENTION),
        "de": train_lora(base, tmp_path / "de", seed=2, r=3, target_modules=r".*self_attn\..*_proj"),
    }
    report = split(base, tmp_path / "out", base=base, adapters=adapters)
    assert {adapter.name: adapter.groups for adapter in report.adapters} == {"fr": 2, "de": 2}
    assert len({g.rank for g in report.groups}) == 1
    worker = Worker(open_worker(tmp_path / "out" / "worker"), threads=1)
    with serving(worker, tmp_path / "w") as address:
        hybrid: Any = load(tmp_path / "out" / "vault", [address], ahead=0)
        local = reference(tmp_path / "out")
        plain = logits(local)
        try:
            assert torch.equal(logits(hybrid), plain)
            for name, folder in adapters.items():
                with hybrid.slip.adapter(name), local.slip.adapter(name):
                    assert torch.equal(logits(hybrid), logits(local))
                    added = logits(local) - plain
                truth = logits(merged(base, folder)) - logits(AutoModelForCausalLM.from_pretrained(base))
                assert distance(added, truth) < 0.02
        finally:
            hybrid.slip.close()


def expert_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """What peft makes of the usual names of layers in a mixture: of experts `target_parameters`."""
    torch.manual_seed(4)
    wanted = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **wanted)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        tuned.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_are_kept_exactly(family: str, base: Path, tmp_path: Path) -> None:
    """Each expert's part is kept beside it, whichever way round its weight lies, at peft's own ranks."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options: dict[str, Any] = {"target_modules": ["v_proj"], "target_parameters": parameters}
    if family == "gpt_oss":
        base = families.make(family, tmp_path / "base", num_hidden_layers=1, intermediate_size=48)
    else:
        options = {}  # gate and up become one weight of twice the rank
    adapter = expert_adapter(base, tmp_path / "adapter", **options)
    report = split(base, tmp_path / "out", base=base, adapters={"x": adapter})
    assert report.adapters[0].groups == 1 + 2 * 4
    local = reference(tmp_path / "out")
    plain = logits(local)
    with local.slip.adapter("x"):
        found = logits(local)
    added = found - plain
    truth = logits(merged(base, adapter)) - logits(AutoModelForCausalLM.from_pretrained(base))
    assert truth.norm() > 0.02 * plain.norm()
    assert distance(added, truth) < 0.02
    worker = Worker(open_worker(tmp_path / "out" / "worker"), threads=1)
    with serving(worker, tmp_path / "w") as address:
        hybrid: Any = load(tmp_path / "out" / "vault", [address], ahead=0, adapter="x")
        try:
            assert torch.equal(logits(hybrid), found)
        finally:
            hybrid.slip.close()


def test_nothing_of_an_experts_adapter_is_approximated(base: Path, tmp_path: Path) -> None:
    """The factors of every expert, beside peft's own difference to the fused weight."""
    adapter = expert_adapter(base, tmp_path / "adapter")
    stored = make_plan(base, Recipe(rank=0)).stored
    read = read_adapter("x", adapter, stored)
    after, before = merged(base, adapter), AutoModelForCausalLM.from_pretrained(base)
    for group in (g for g in stored.layout.groups if g.expert is not None):
        outer, inner = read.factors(group.members[0].module)
        name, number = group.parameters[0], group.expert.number
        true = (after.get_parameter(name) - before.get_parameter(name))[number].detach()
        assert distance(torch.from_numpy(outer @ inner), true) < 1e-5
        assert inner.shape[0] == (4 if "gate_up" in name else 2)


def spoil(folder: Path, change: dict[str, Any]) -> None:
    """Save an adapter's tensors with some changed; None removes."""
    tensors = {**load_file(folder / "adapter_model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "adapter_model.safetensors")


def test_adapters_of_experts_that_do_not_fit_are_refused_before_the_split(base: Path, tmp_path: Path) -> None:
    inside = "base_model.model.model.layers.0.mlp.experts.base_layer"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {f"{inside}.lora_A.weight": torch.zeros(16, 63)}, "fit none of the experts' weights"),
        ({}, {f"{inside}.lora_A.weight": None}, "fit none of the experts' weights"),
        ({}, {f"{inside}.lora_A.weight": torch.zeros(12, 64)}, "with rank 4 calls for"),
        ({}, {f"{inside}.lora_{x}.weight": None for x in "AB"}, "has no tensors for .*gate_up_proj"),
        ({"target_modules": "all-linear"}, {}, r"target_parameters on gate\.weight, .* merge it"),
    ]
    for i, (options, change, said) in enumerate(cases):
        adapter = expert_adapter(base, tmp_path / f"a{i}", **options)
        spoil(adapter, change)
        with pytest.raises(AdapterError, match=said):
            split(base, tmp_path / "out", base=base, adapters={"x": adapter})
    assert not (tmp_path / "out" / "vault").exists()


def test_an_adapter_of_a_router_is_refused_and_its_merge_is_split(base: Path, tmp_path: Path) -> None:
    """The advice works: the merged model against its base, at the adapter's rank."""
    adapter = expert_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    with pytest.raises(AdapterError, match="merge it with peft"):
        split(base, tmp_path / "out", base=base, adapters={"x": adapter})
    merged(base, adapter).save_pretrained(tmp_path / "merged")
    report = split(tmp_path / "merged", tmp_path / "out", Recipe(rank=6), base=base)
    assert report.left_out is not None
    assert report.left_out < 1e-3
    truth = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert distance(logits(reference(tmp_path / "out")), truth) < 0.01


def test_a_base_with_other_experts_is_refused_before_the_split(
    base: Path, full: Path, tmp_path: Path
) -> None:
    other = families.make("qwen3_moe", tmp_path / "other", **SMALL, num_experts=6)
    with pytest.raises(CheckpointError, match=r"has no group .*experts"):
        split(other, tmp_path / "out", base=base)
    wide = families.make("qwen3_moe", tmp_path / "wide", **SMALL, moe_intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"experts.* is .* and .* in"):
        split(full, tmp_path / "out", base=wide)
    rule = Rule(pattern="*.experts", placement="vault")
    adapter = train_lora(base, tmp_path / "a", seed=1, target_modules=["q_proj"])
    keep = Rule(pattern="*q_proj*", placement="vault")
    with pytest.raises(RecipeError, match="which the recipe keeps whole"):
        split(base, tmp_path / "out", Recipe(rules=(rule, keep)), base=base, adapters={"a": adapter})
    assert not (tmp_path / "out" / "vault").exists()
    report = split(full, tmp_path / "out", Recipe(rank=4, rules=(rule,)), base=base)
    assert not any(g.exchange for g in report.groups if g.placement == "split")
    kept = read_vault_manifest(tmp_path / "out" / "vault").kept
    assert sum(g.expert is not None for g in kept) == 8
