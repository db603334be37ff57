"""Which layers are found to share an input, per family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import families
from sliplm.engines.groups import group_name
from sliplm.engines.transformers.layout import discover
from sliplm.errors import CheckpointError

LLAMA = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]
LAYERS = {
    "llama": ("model.layers.{}.", LLAMA),
    "mistral": ("model.layers.{}.", LLAMA),
    "qwen2": ("model.layers.{}.", LLAMA),
    "qwen3": ("model.layers.{}.", LLAMA),
    "gemma2": ("model.layers.{}.", LLAMA),
    "gemma3": ("model.layers.{}.", LLAMA),
    "phi": (
        "model.layers.{}.",
        ["self_attn.q_proj+self_attn.k_proj+self_attn.v_proj+mlp.fc1", "self_attn.dense", "mlp.fc2"],
    ),
    "gpt2": ("transformer.h.{}.", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "opt": (
        "model.decoder.layers.{}.",
        ["self_attn.q_proj+k_proj+v_proj", "self_attn.out_proj", "fc1", "fc2"],
    ),
}
BEFORE = {"opt": ["model.decoder.project_in"]}
AFTER = {"opt": ["model.decoder.project_out"]}
TIED = {
    "llama": "model.embed_tokens.weight",
    "gemma2": "model.embed_tokens.weight",
    "gemma3": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
}


@pytest.mark.parametrize("family", families.DENSE)
def test_groups_of_a_family(family: str, tmp_path: Path) -> None:
    layout = discover(families.make(family, tmp_path / family))
    prefix, rest = LAYERS[family]
    expected = [prefix.format(layer) + name for layer in range(2) for name in rest]
    expected = [*BEFORE.get(family, []), *expected, *AFTER.get(family, []), "lm_head"]
    assert [group.name for group in layout.groups] == expected
    assert layout.unsplittable == {}
    tied = {"lm_head.weight": TIED[family]} if family in TIED else {}
    assert layout.tied == tied
    assert [a.heads for a in layout.attention] == [4, 4]
    for group in layout.groups:
        assert {member.columns for member in group.members} == {group.columns}
        assert all(
            member.transposed == (family == "gpt2" and group.name != "lm_head") for member in group.members
        )


def test_sizes(tmp_path: Path) -> None:
    groups = {group.name: group for group in discover(families.make("llama", tmp_path / "llama")).groups}
    sizes = {name: (group.rows, group.columns) for name, group in groups.items() if ".1." not in name}
    assert sizes == {
        "model.layers.0.self_attn.q_proj+k_proj+v_proj": (128, 64),
        "model.layers.0.self_attn.o_proj": (64, 64),
        "model.layers.0.mlp.gate_proj+up_proj": (352, 64),
        "model.layers.0.mlp.down_proj": (64, 176),
        "lm_head": (300, 64),
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_groups_and_routers_stay(family: str, tmp_path: Path) -> None:
    layout = discover(families.make(family, tmp_path / family))
    layers, experts = ((0, 1), 3) if family == "mixtral" else ((1,), 4)
    assert layout.unsplittable == {}
    assert [group.name for group in layout.routers] == [f"model.layers.{i}.mlp.gate" for i in layers]
    assert [group.name for group in layout.groups if group.expert is not None] == [
        f"model.layers.{i}.mlp.experts.{weight}.{number}"
        for i in layers
        for weight in ("gate_up_proj", "down_proj")
        for number in range(experts)
    ]
    use = {group.expert.use for group in layout.groups if group.expert is not None}
    assert use == {2 / experts}
    names = [group.name for group in layout.groups]
    assert "model.layers.1.self_attn.q_proj+k_proj+v_proj" in names
    assert ("model.layers.0.mlp.gate_proj+up_proj" in names) == (family == "qwen3_moe")


def test_windows_are_counted_where_the_configuration_has_them(tmp_path: Path) -> None:
    layout = discover(families.make("gemma2", tmp_path))
    assert [a.window for a in layout.attention] == [32, None]


def test_group_names() -> None:
    assert group_name(["lm_head"]) == "lm_head"
    assert group_name(["a.b.q", "a.b.k"]) == "a.b.q+k"
    assert group_name(["a.b.q", "a.c"]) == "a.b.q+c"
    assert group_name(["a", "a.b"]) == "a+a.b"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (None, "no config.json"),
        ("{", "cannot use"),
        ("[]", "cannot use"),
        ({"model_type": "no_such_model"}, "cannot use"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}, "their own code"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "slip"}}, "already split"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot use|no causal"),
    ],
)
def test_a_bad_configuration(tmp_path: Path, config: object, word: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(CheckpointError, match=word):
        discover(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        discover(tmp_path / "absent")
