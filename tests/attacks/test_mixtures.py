"""The red team on mixtures: an expert's share is a share like any other, and attacked like one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import families
from sliplm.attacks.a01_as_is import AsIs
from sliplm.attacks.a02_lora import Lora
from sliplm.attacks.a03_full import Full
from sliplm.attacks.a04_core import Core, core_delta
from sliplm.attacks.a05_align import Align
from sliplm.attacks.a06_match import Match
from sliplm.attacks.a07_two_shares import TwoShares
from sliplm.attacks.a09_distil import Distil
from sliplm.attacks.campaign import NONE
from sliplm.attacks.case import Attack, Placement, layers
from sliplm.attacks.folder import prepare
from sliplm.attacks.scene import Scene
from sliplm.attacks.scoring import score
from sliplm.attacks.student import LowRank, build_student
from sliplm.attacks.text import Text
from sliplm.attacks.training import Training, train
from sliplm.cli import app
from sliplm.shares.recipe import Recipe

CPU = torch.device("cpu")
EVERYTHING = Placement("all", None)
PLAIN = Recipe(rank=6, rotation="none")
RECIPES = {"plain": PLAIN, "default": Recipe(rank=6), "plain-again": PLAIN.model_copy(update={"rank": 3})}
FAMILIES = {"mixtral": ("gate_up_proj", "down_proj"), "gpt_oss": ("gate_up_proj", "down_proj")}  # transposed
ON_SHARES: tuple[Attack, ...] = (AsIs(), Lora(), Full(), Core(), TwoShares(), Align(), Match())


@pytest.fixture(scope="module", params=FAMILIES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp(request.param)
    model = families.make(request.param, folder / "model", vocab_size=40, intermediate_size=48)
    prepare(model, folder / "splits", RECIPES, lambda *_: None)
    words = torch.randint(40, (4000,), generator=torch.Generator().manual_seed(1))
    return Scene(model, folder / "splits", Text.of(words, 16, held_out=8), RECIPES, CPU, {"5%": 0.05})


def weights(scene: Scene) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in scene.victim.named_parameters(remove_duplicate=False)}


def test_every_expert_is_among_what_is_attacked(scene: Scene) -> None:
    """And of a plain share the removed part lies in its null space, as attack 4 has it."""
    case, true = scene.case("plain", EVERYTHING), weights(scene)
    experts = [view for view in case.shares.values() if view.members[0].expert is not None]
    count = len(true[experts[0].members[0].parameter])
    assert len(experts) == 2 * 2 * count
    assert {view.members[0].expert for view in experts} == set(range(count))
    for view in experts:
        removed = view.stack(true) - view.matrix
        values = torch.linalg.svdvals(removed)
        assert values[view.rank] < 1e-2 * values[0]
        delta = core_delta(view)
        one = removed if "right" in delta.train else removed @ delta.right.T @ delta.right
        if "right" in delta.train:
            basis = torch.linalg.qr(delta.left)[0]
            one = basis @ basis.T @ removed
        assert torch.dist(one, removed) < 2e-2 * removed.norm()


@pytest.mark.parametrize("attack", ON_SHARES, ids=lambda attack: attack.name)
def test_attacks_put_experts_where_they_belong(scene: Scene, attack: Attack) -> None:
    true, start = weights(scene), None
    for recipe in ("plain", "default"):
        case = scene.case(recipe, EVERYTHING, "5%" if attack.number in (5, 6) else "")
        for variant in attack.variants:
            start = attack.start(case, scene.oracle, variant, 0)
            if start is None:
                continue
            student = build_student(case, start, CPU, 0)
            assert score(student, scene.text.test).perplexity > 1
            for view in case.shares.values():
                part = view.members[0]
                if part.expert is not None:
                    guess, truth = part.of(start.state), view.stack(true)
                    assert guess.shape == truth.shape
                    if attack.number in (5, 6):
                        assert torch.dist(guess, truth) < (0.2 if recipe == "plain" else 2.0) * truth.norm()
                    if attack.number in (1, 3):
                        held = student.get_parameter(part.parameter)[part.expert].detach()
                        assert torch.equal(held.T if part.transposed else held, view.matrix)
    assert start is not None or attack.number == 7  # of "default" there is no second split here


def test_what_is_removed_of_experts_is_trained_alone(scene: Scene) -> None:
    """Attack 2: their share stands still, and each has a part of its own."""
    case = scene.case("plain", layers("1-1", range(1, 2), 2))
    start = Lora().start(case, scene.oracle, "1", 0)
    assert start is not None
    student = build_student(case, start, CPU, 0)
    parts = [module for module in student.modules() if isinstance(module, LowRank)]
    before = [{name: p.detach().clone() for name, p in part.factors.items()} for part in parts]
    assert len(parts) >= 2 * len(next(p for p in weights(scene).values() if p.ndim == 3))
    train(student, scene, Training("logits", 2000, 1e-2, 0))
    moved = [any(not torch.equal(p, old[name]) for name, p in part.factors.items())
             for part, old in zip(parts, before, strict=True)]  # fmt: skip
    assert all(moved)


def test_without_a_share_experts_start_untrained_at_the_size_of_weights(scene: Scene) -> None:
    case = scene.case(NONE, EVERYTHING)
    for variant in ("scaled", "scaled, low rank"):
        start = Distil().start(case, scene.oracle, variant, 0)
        assert start is not None
        for name, true in weights(scene).items():
            if true.ndim == 3:
                assert start.state[name].norm() == pytest.approx(float(true.norm()), rel=0.35)
        assert score(build_student(case, start, CPU, 0), scene.text.test).perplexity > 1


def test_slip_attack_takes_a_mixture(tmp_path: Path) -> None:
    model = families.make_with_tokenizer(
        "qwen3_moe", tmp_path / "model", num_hidden_layers=1, decoder_sparse_step=1
    )
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 120)
    words = ["attack", str(model), str(tmp_path / "out"), "--text", str(text), "--window", "16"]
    words += [
        "--device",
        "cpu",
        "--access",
        "logits",
        "--only",
        "haar",
        "--attack",
        "1",
        "--untrained",
        "--json",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["complete"]
    assert {cell["recipe"] for cell in found["cells"]} == {"haar"}
