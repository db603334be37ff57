"""The red team on a small model that was really trained: what breaks the plain split breaks it here too."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from typer.testing import CliRunner

import families
from sliplm.arithmetic.rotation import make as make_rotation
from sliplm.attacks import ATTACKS
from sliplm.attacks.a01_as_is import AsIs
from sliplm.attacks.a03_full import Full
from sliplm.attacks.a04_core import Core, core_delta
from sliplm.attacks.a05_align import (
    Align,
    aligned,
    levelled,
    polar,
    second_moments,
    weighted_fit,
    without_top,
)
from sliplm.attacks.a06_match import match
from sliplm.attacks.a07_two_shares import TwoShares
from sliplm.attacks.a09_distil import Distil
from sliplm.attacks.a10_head import head_core, logit_basis
from sliplm.attacks.a11_fit import CLOSE, fit, signs_to_guess, study, true_signs
from sliplm.attacks.campaign import NONE, lines, standard_recipes
from sliplm.attacks.case import Placement, ShareView, layers
from sliplm.attacks.fitting import TRIALS, fit_study
from sliplm.attacks.folder import prepare
from sliplm.attacks.former import DEFAULT
from sliplm.attacks.pages import write_report
from sliplm.attacks.relatives import distance, perturbed, tune
from sliplm.attacks.runner import run as run_plan
from sliplm.attacks.runs import Line, Run, Runs
from sliplm.attacks.scene import Scene
from sliplm.attacks.schedule import Job, Plan, Schedule
from sliplm.attacks.scoring import interval, relative, score
from sliplm.attacks.student import build_student
from sliplm.attacks.summary import document, summarise
from sliplm.attacks.text import Text, _parts, tokenise
from sliplm.attacks.training import Training, train
from sliplm.cli import app
from sliplm.errors import CheckpointError, InputError, MismatchError
from sliplm.shares.recipe import Recipe
from test_worker import wait_for_end
from test_workforce import eventually

CPU = torch.device("cpu")
VOCABULARY, WINDOW = 40, 32
EVERYTHING = Placement("all", None)
FIRST = layers("0-0", range(1), 2)
RECIPES = {name: recipe.model_copy(update={"rank": recipe.rank // 4}) for name, recipe in
           standard_recipes().items()}  # fmt: skip  # matrices here are 64 wide


def sentences(count: int) -> torch.Tensor:
    """A language whose next token follows from the last two, four times out of five: int64 [count]."""
    random = torch.Generator().manual_seed(1)
    follows = torch.randint(VOCABULARY, (VOCABULARY, VOCABULARY), generator=random)
    surprise = torch.rand(count, generator=random) < 0.2
    strange = torch.randint(VOCABULARY, (count,), generator=random)
    text = [1, 2]
    for i in range(2, count):
        text.append(int(strange[i]) if surprise[i] else int(follows[text[-2], text[-1]]))
    return torch.tensor(text)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.of(sentences(40_000), WINDOW, held_out=30)


@pytest.fixture(scope="module")
def victim(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained on that language until it guesses far better than chance."""
    folder = families.make("llama", tmp_path_factory.mktemp("victim"), vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    random = torch.Generator().manual_seed(2)
    for _ in range(500):
        part = text.train[torch.randint(len(text.train), (32,), generator=random)]
        optimiser.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    assert score(model.eval(), text.test).accuracy > 0.5
    return folder


@pytest.fixture(scope="module")
def scene(victim: Path, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("splits")
    done: list[tuple[int, int]] = []
    prepare(victim, folder, RECIPES, lambda *progress: done.append(progress))
    assert len(done) == 5
    prepare(victim, folder, RECIPES, lambda *_: pytest.fail("made again"))
    return Scene(victim, folder, text, RECIPES, CPU, {"5%": 0.05, "same": victim})


def restored(scene: Scene, attack: object, recipe: str, variant: str, rate: float, tokens: int) -> float:
    """Accuracy after an attack on block 0 with the victim's logits."""
    case = scene.case(recipe, FIRST)
    start = attack.start(case, scene.oracle, variant, 0)  # type: ignore[attr-defined]
    student = build_student(case, start, CPU, 0)
    if rate:
        train(student, scene, Training("logits", tokens, rate, 0))
    return score(student, scene.text.test).accuracy


def test_the_plain_split_is_stolen_and_the_default_is_worth_no_more_than_no_share(scene: Scene) -> None:
    """The measurement of docs/red-team.md in small: one seed, one budget, and margins for it."""
    tokens = 24_000
    plain = restored(scene, Full(), "plain", "", 1e-2, tokens)
    default = max(restored(scene, Full(), "default", "", rate, tokens) for rate in (3e-3, 1e-2))
    black = max(restored(scene, Distil(), NONE, "scaled", rate, tokens) for rate in (3e-3, 1e-2))
    assert plain > 2 * black
    assert default < 1.5 * black


def test_of_a_plain_share_a_few_numbers_are_all_that_is_missing(scene: Scene) -> None:
    """Attack 4 trains k x k numbers a matrix and gets what is left of the victim."""
    white = score(scene.victim, scene.text.test).accuracy
    assert restored(scene, Core(), "plain", "core", 1e-2, 96_000) > 0.8 * white


def test_without_training_a_share_is_worth_nothing(scene: Scene) -> None:
    chance = 0.1
    assert score(scene.victim, scene.text.test).accuracy > 5 * chance
    for recipe in ("plain", "default", "haar"):
        assert restored(scene, AsIs(), recipe, "", 0.0, 0) < 2.5 * chance


def test_an_attacker_never_holds_what_is_protected(scene: Scene) -> None:
    for placement in (EVERYTHING, FIRST):
        case = scene.case("default", placement, "5%")
        true = dict(scene.victim.named_parameters(remove_duplicate=False))
        hidden = {name for view in case.shares.values() for name in view.parts()}
        assert hidden
        assert not hidden & set(case.known)
        assert bool(case.known) == (placement is FIRST)
        for view in case.shares.values():
            for name, part in view.parts().items():
                assert not torch.allclose(part, true[name], atol=0.1 * float(true[name].std()))
        assert case.relative is not None
        assert all(not torch.equal(case.relative[name], true[name]) for name in hidden)


def test_a_share_is_the_artefact_with_its_scales(scene: Scene) -> None:
    """Of a plain share, W minus its top triplets, up to the fixed point's rounding."""
    state = dict(scene.victim.named_parameters(remove_duplicate=False))
    for view in scene.case("plain", EVERYTHING).shares.values():
        rest = without_top(view.stack(state), view.rank)
        assert float((view.matrix - rest).norm() / rest.norm()) < 2e-3


def test_the_null_space_of_a_plain_share_is_what_was_removed_and_a_rotated_one_has_none_of_it(
    scene: Scene,
) -> None:
    state = dict(scene.victim.named_parameters(remove_duplicate=False))

    def inside(view: ShareView) -> float:
        """Part of the removed W_C that lies in the span which attack 4 trains in."""
        delta = core_delta(view)
        weight = view.stack(state)
        removed = weight - without_top(weight, view.rank)
        if "left" not in delta.train:
            basis = torch.linalg.qr(delta.left)[0]
            removed_in = basis @ (basis.T @ removed)
        else:
            basis = torch.linalg.qr(delta.right.T)[0]
            removed_in = removed @ basis @ basis.T
        return float((removed_in.norm() / removed.norm()) ** 2)

    for view in scene.case("plain", EVERYTHING).shares.values():
        assert inside(view) > 0.99
    for recipe in ("default", "haar"):
        found = [inside(view) for view in scene.case(recipe, EVERYTHING).shares.values()]
        assert float(np.mean(found)) < 0.3  # as much as a random span holds


def test_two_plain_shares_differ_by_the_triplets_between_their_ranks(scene: Scene) -> None:
    """Why a second split of the same weights is refused."""
    case = scene.case("plain", EVERYTHING)
    assert case.second is not None
    state = dict(scene.victim.named_parameters(remove_duplicate=False))
    for name, view in case.shares.items():
        weight = view.stack(state)
        between = without_top(weight, 2) - without_top(weight, 4)
        assert float((case.second[name].matrix - view.matrix - between).norm() / between.norm()) < 0.05
    start = TwoShares().start(case, scene.oracle, "all", 0)
    assert start is not None
    assert start.notes["gained"] == 1.0
    rotated = scene.case("default", EVERYTHING)
    assert rotated.second is not None
    view, other = rotated.shares["lm_head"], rotated.second["lm_head"]
    cosine = float((view.matrix * other.matrix).sum() / view.matrix.norm() / other.matrix.norm())
    assert abs(cosine) < 0.1


# --- relatives -----------------------------------------------------------------------------------------


def test_an_alignment_by_singular_vectors_is_the_relative_with_the_shares_spectrum(scene: Scene) -> None:
    case, other = scene.case("haar", EVERYTHING, "5%"), scene.case("default", EVERYTHING)
    assert case.relative is not None
    for name, view in case.shares.items():
        assert view.level
        base = view.stack(case.relative)
        estimate = aligned(view, base)
        rest = without_top(base, view.rank)
        _, d_out, d_in = levelled(rest)
        between = (estimate - (base - rest)) / d_out[:, None] / d_in
        found, wanted = torch.linalg.svdvals(between), torch.linalg.svdvals(view.matrix)
        wanted *= between.norm() / view.matrix.norm()
        count = len(wanted) - view.rank
        assert torch.allclose(found[:count], wanted[:count], rtol=0.02, atol=0.02 * float(wanted[0]))
        # and that is all it takes of the share: one in another basis gives the same
        again = aligned(other.shares[name], base)
        assert float((estimate - again).norm() / estimate.norm()) < 1e-2
    plain = next(iter(scene.case("plain", EVERYTHING).shares.values()))
    assert not plain.level


@pytest.mark.parametrize("weighted", [False, True])
def test_of_a_level_share_the_relative_is_made_level_first(weighted: bool) -> None:
    """Without that the share's spectrum would be put on a matrix of another shape, which it does not fit."""
    random = torch.Generator().manual_seed(0)
    true = torch.randn(48, 32, generator=random) * torch.logspace(-1, 1, 32)
    base = true * (1 + 0.01 * torch.randn(48, 32, generator=random))
    whole, d_out, d_in = levelled(true)
    turn = polar(torch.randn(48, 48, generator=random)), polar(torch.randn(32, 32, generator=random))
    size = float(d_out.square().mean() * d_in.square().mean()) ** 0.5
    view = ShareView("g", (), turn[0] @ whole @ turn[1].T * size, 0, level=True)
    x = torch.randn(100, 32, generator=random)
    moments = x.T @ x / 100 if weighted else None

    def wrong(view: ShareView) -> float:
        return float((aligned(view, base, moments) - true).norm() / true.norm())

    assert wrong(view) < 0.02
    assert wrong(replace(view, level=False)) > 0.2
    estimate, found = match(view, base, columns=True)
    assert not found.any()
    assert torch.allclose(estimate, base, rtol=1e-3, atol=1e-4)  # nobody found: the relative as it was


def test_the_weighted_fit_improves_what_it_is_to_improve() -> None:
    random = torch.Generator().manual_seed(0)
    target = torch.randn(24, 16, generator=random)
    share = polar(torch.randn(24, 24, generator=random)) @ (
        target + 0.3 * torch.randn(24, 16, generator=random)
    )
    x = torch.randn(400, 16, generator=random) * torch.linspace(3, 0.3, 16)
    moments = x.T @ x / 400
    root = torch.linalg.cholesky(moments)
    values = torch.linalg.svdvals(share)
    left_to, _, right_to = torch.linalg.svd(target, full_matrices=False)
    before = ((left_to * values @ right_to - target) @ root).norm()
    found = weighted_fit(share, target, moments)
    assert float(((found - target) @ root).norm()) < float(before)
    assert torch.allclose(torch.linalg.svdvals(found), values, rtol=1e-2)  # still a rotation of the share


def test_second_moments_are_of_what_the_group_reads(scene: Scene) -> None:
    case = scene.case("default", EVERYTHING)
    name = next(name for name in case.shares if "down_proj" in name)
    windows = scene.text.train[:3]
    seen: list[torch.Tensor] = []
    module = scene.victim.get_submodule(case.shares[name].members[0].module)
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        scene.victim(input_ids=windows)
    x = seen[0].flatten(0, 1)
    assert torch.allclose(second_moments(scene.victim, case.shares, windows)[name], x.T @ x / 3, rtol=1e-3)


def test_matching_undoes_permuted_and_scaled_rows_but_finds_no_partner_in_a_hidden_basis() -> None:
    """The obfuscation that ArrowMatch was made against falls to attack 6; a secret basis gives it nothing."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(60, 48, generator=random)
    true = base + 0.05 * torch.randn(60, 48, generator=random)
    order, scale = torch.randperm(60, generator=random), torch.rand(60, generator=random) + 0.5
    view = ShareView("g", (), (true * scale[:, None])[order], 0)
    estimate, found = match(view, base, columns=False)
    assert bool(found.all())
    assert float((estimate - true).norm() / (base - true).norm()) < 0.7
    hidden = ShareView("g", (), polar(torch.randn(60, 60, generator=random)) @ true, 0)
    estimate, found = match(hidden, base, columns=False)
    assert float(found.float().mean()) < 0.3


def test_relatives_are_as_far_as_they_say(scene: Scene, victim: Path, tmp_path: Path) -> None:
    state = dict(scene.victim.named_parameters())
    assert distance(perturbed(scene.victim, 0.05), state) == pytest.approx(0.05, rel=1e-3)
    same = scene.case("default", EVERYTHING, "same").relative
    assert same is not None
    assert distance({name: same[name] for name in state}, state) == 0.0


def test_a_tuned_relative_is_a_checkpoint_near_the_victim(tmp_path: Path) -> None:
    model = families.make_with_tokenizer("llama", tmp_path / "model", num_hidden_layers=1)
    tune(model, tmp_path / "tuned", CPU)
    true, moved = (
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (model, tmp_path / "tuned")
    )
    assert 1e-4 < distance(moved, true) < 0.1


# --- the head, the fast transform ----------------------------------------------------------------------


def test_logits_span_the_columns_of_the_head(scene: Scene) -> None:
    head = scene.victim.get_output_embeddings().weight.detach()
    scene.oracle.forget()
    small = head.shape[1] >= VOCABULARY  # here the head is wide: its columns span all logits
    basis, values = logit_basis(scene.oracle, min(head.shape[1], VOCABULARY - 2))
    assert scene.oracle.asked > 0
    assert basis.shape == (VOCABULARY, min(head.shape[1], VOCABULARY - 2))
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-3)
    assert bool((values[:-1] >= values[1:]).all())
    assert small
    # a share in another basis does not lie in that span: there is no core to train
    view = scene.case("default", EVERYTHING).shares["lm_head"]
    outside = replace(view, matrix=torch.randn(VOCABULARY, 20, generator=torch.Generator().manual_seed(0)))
    assert head_core(outside, basis[:, :20]) is None


def test_the_fit_reads_an_unprotected_square_matrix_if_it_is_told_the_signs_and_not_else() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64))
    trials = list(study(weight, 64, ranks=(0, 16), close=(0.001, 0.05), given=(0.0,)))
    told = [t for t in trials if t.given == 1.0 and t.rank == 0 and t.closeness == 0.001]
    assert told[0].solved
    assert told[0].error < 1e-2
    assert not any(t.solved for t in trials if t.closeness >= 0.05)
    assert not any(t.solved for t in trials if t.rank == 16)
    today = [t for t in trials if t.kind == DEFAULT]
    assert [t.given for t in today] == [1.0, 1.0]
    assert not any(t.solved for t in today)  # the angles leave no lattice, whatever signs are told
    assert all(t.error > 0.9 for t in today)
    guessed = [t for t in trials if t.given == 0.0]
    assert not guessed[0].solved
    assert 0.9 < guessed[0].error < 1.1  # the share's spectrum, and no more


def test_the_fit_cannot_read_a_haar_share_even_with_all_signs() -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((64, 64))
    noise = random.standard_normal((64, 64))
    base = weight + noise * 1e-3 * np.linalg.norm(weight) / np.linalg.norm(noise)
    q_out, q_in = (
        make_rotation("haar", bytes([i]) * 32, 64).apply(np.eye(64, dtype=np.float32)).T.astype(float)
        for i in (1, 2)
    )
    share = q_out @ weight @ q_in.T
    signs = true_signs(share, base, 0, q_out)
    found = fit(share, base, 0, signs, np.zeros(64, bool))
    assert not found.solved
    assert np.linalg.norm(found.estimate - weight) > 0.9 * np.linalg.norm(base - weight)


def test_signs_to_guess() -> None:
    assert signs_to_guess(np.diag(np.arange(1.0, 17.0))) == 1  # singular vectors are coordinates
    assert signs_to_guess(np.random.default_rng(0).standard_normal((64, 64))) > 40
    with pytest.raises(ValueError, match="do not tile"):
        fit(np.eye(24), np.eye(24), 0, np.ones(24), np.zeros(24, bool))


# --- students, training, scores ------------------------------------------------------------------------


def test_a_student_trains_what_its_attack_names_and_nothing_else(scene: Scene) -> None:
    for attack in ATTACKS:
        for recipe, kin in (("plain", ""), ("default", "5%"), (NONE, "")):
            case = scene.case(recipe, FIRST, kin)
            for variant in attack.variants:
                start = attack.start(case, scene.oracle, variant, 0)
                if start is None:
                    continue
                student = build_student(case, start, CPU, 0)
                trained = {n for n, p in student.named_parameters() if p.requires_grad}
                hidden = {f"{member.module}" for members in case.groups.values() for member in members}
                assert all(any(name.startswith(module) for module in hidden) for name in trained)
                assert bool(trained) == (start.whole or bool(start.deltas))


def test_who_has_no_share_may_begin_with_copies_of_the_blocks_that_are_in_clear(scene: Scene) -> None:
    assert Distil().start(scene.case(NONE, EVERYTHING), scene.oracle, "neighbour", 0) is None
    case = scene.case(NONE, FIRST)
    start = Distil().start(case, scene.oracle, "neighbour", 0)
    assert start is not None
    matrices = [name for name, p in scene.victim.named_parameters() if p.ndim == 2 and ".layers.0." in name]
    assert len(matrices) == 7
    assert start.state.keys() == set(matrices)
    for name in matrices:
        assert torch.equal(start.state[name], scene.victim.get_parameter(name.replace(".0.", ".1.")))


def test_training_is_repeatable_and_counts_what_it_asks(scene: Scene) -> None:
    case = scene.case(NONE, FIRST)
    start = Distil().start(case, scene.oracle, "scaled", 0)
    assert start is not None
    found = []
    for _ in range(2):
        scene.oracle.forget()
        student = build_student(case, start, CPU, 0)
        train(student, scene, Training("logits", 20 * WINDOW, 1e-3, 0))
        assert scene.oracle.asked == 20 * WINDOW
        found.append(student.get_parameter("model.layers.0.mlp.up_proj.weight").clone())
    assert torch.equal(*found)
    scene.oracle.forget()
    train(build_student(case, start, CPU, 0), scene, Training("text", 20 * WINDOW, 1e-3, 0))
    assert scene.oracle.asked == 0


def test_the_oracle_answers_as_the_victim_does(scene: Scene) -> None:
    indices = torch.tensor([3, 5, 3])
    with torch.no_grad():
        wanted = scene.victim(input_ids=scene.text.train[indices]).logits
    assert torch.allclose(scene.oracle.answers(indices), wanted, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "mistral"])
def test_other_families_answer_as_they_do(family: str, tmp_path: Path) -> None:
    """GPT-2 keeps weights transposed, Gemma caps its logits, OPT projects its last states."""
    folder = families.make(family, tmp_path / "model", vocab_size=VOCABULARY)
    text = Text.of(sentences(8 * 20), 8, 4)
    prepare(folder, tmp_path / "splits", {"plain": Recipe(rank=2, rotation="none")}, lambda *_: None)
    scene = Scene(folder, tmp_path / "splits", text, {"plain": Recipe(rank=2, rotation="none")}, CPU)
    with torch.no_grad():
        wanted = scene.victim(input_ids=text.train[:2]).logits
    assert torch.allclose(scene.oracle.answers(torch.arange(2)), wanted, atol=1e-4)
    case = scene.case("plain", EVERYTHING)
    start = Core().start(case, scene.oracle, "core and all", 0)
    assert start is not None
    student = build_student(case, start, CPU, 0)
    true = dict(scene.victim.named_parameters(remove_duplicate=False))
    for view in case.shares.values():
        for name, part in view.parts().items():
            assert part.shape == true[name].shape
    assert train(student, scene, Training("logits", 4 * 8, 1e-3, 0)) == 4


def test_intervals_are_students() -> None:
    values = [0.1, 0.12, 0.17]
    wanted = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx(wanted)
    ratio = relative([0.2, 0.2, 0.2], [0.1, 0.1, 0.1])
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert relative([0.2], [0.0]).mean == math.inf
    wide = relative([0.2, 0.25, 0.3], [0.1, 0.1, 0.1])
    assert wide.low < 2.5 < wide.high
    alone = relative([0.2], [0.1, 0.12, 0.17])  # the spread of one line alone would look like that of both
    assert alone.low == alone.mean == alone.high


def test_a_long_text_is_cut_between_lines_and_keeps_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = families.byte_tokenizer()
    whole = "one line\nand two\n\n" + "and a long one, longer than a part\n" + "the end"
    wanted = tokenizer(whole, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("sliplm.attacks.text._PART", 9)
    assert list(_parts(whole))[:2] == ["one line\nand two\n", "\nand a long one, longer than a part\n"]
    assert tokenise(tokenizer, whole).tolist() == wanted
    assert tokenise(tokenizer, "").shape == (0,)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="longer text"):
        Text.of(torch.zeros(100, dtype=torch.int64), 32, 30)


# --- campaigns -----------------------------------------------------------------------------------------


def a_run(line: Line, budget: float, valid: float, *, rate: float = 1e-3, seed: int = 0) -> Run:
    return Run(line.place, budget, "v", rate, seed, 10, 10, 1, valid, 1 / valid, valid, 0.1, {})


def test_every_split_meets_every_attack_that_applies() -> None:
    found = lines(tuple(RECIPES), [EVERYTHING], ["text", "logits"], ["5%"])
    numbers = {
        recipe: {line.attack for line in found if line.recipe == recipe} for recipe in ("plain", "haar")
    }
    assert numbers["plain"] == {1, 2, 3, 4, 5, 6, 7, 10}
    assert numbers["haar"] == {1, 2, 3, 4, 5, 6, 10}  # no second haar split is made
    assert {line.attack for line in found if line.recipe == NONE} == {9, 10}
    hidden = lines(("default",), [FIRST], ["hidden"])
    assert {(line.attack, line.recipe) for line in hidden} == {(8, NONE), (8, "default")}
    only = lines(("default",), [EVERYTHING], ["text"], (), [4])
    assert {line.attack for line in only} == {4, 9}  # the black-box line always runs


def test_the_best_of_a_cell_go_on_and_the_first_is_repeated(tmp_path: Path) -> None:
    cell = [Line(n, "default", EVERYTHING, "text") for n in (1, 2, 3, 4)]
    runs = Runs(tmp_path / "runs.jsonl")
    schedule = Schedule(Plan(tuple(cell), (0.001, 0.01), seeds=3, keep=2), runs)
    quality = {1: 50.0, 2: 10.0, 3: 30.0, 4: 20.0}
    first = [schedule.next() for _ in cell]
    assert schedule.next() is None
    for job in first:
        assert job is not None
        runs.add(a_run(job.line, job.budget, quality[job.line.attack]))
        schedule.done(job, finished=True)
    after = []
    while (job := schedule.next()) is not None:
        after.append(job)
    assert Job(cell[1], 0.001, None, seeds=3) in after
    assert {(job.line.attack, job.budget) for job in after if not job.seeds} == {(2, 0.01), (4, 0.01)}
    assert all(job.before == 0.001 for job in after if not job.seeds)


def test_what_time_cut_off_leads_to_nothing_more(tmp_path: Path) -> None:
    line = Line(3, "default", EVERYTHING, "text")
    schedule = Schedule(Plan((line,), (0.001, 0.01), seeds=3), Runs(tmp_path / "runs.jsonl"))
    job = schedule.next()
    assert job is not None
    schedule.done(job, finished=False)
    assert schedule.next() is None


def test_the_table_chooses_by_the_validation_text_and_reports_the_test(tmp_path: Path) -> None:
    good, bad, black = (
        Line(3, "default", EVERYTHING, "text"),
        Line(2, "default", EVERYTHING, "text"),
        Line(9, NONE, EVERYTHING, "text"),
    )
    runs = [
        replace(a_run(good, 0.01, 10.0), accuracy=0.2, perplexity=12.0),
        replace(a_run(bad, 0.01, 11.0), accuracy=0.9, perplexity=1.0),  # lucky on the test text: not chosen
        replace(a_run(black, 0.01, 10.0), accuracy=0.2),
        replace(a_run(black, 0.01, 10.0, seed=1), accuracy=0.2),
    ]
    found = summarise(runs)
    assert len(found.cells) == 1
    assert found.cells[0].best.line[0] == 3
    assert found.cells[0].relative_to_black.mean == pytest.approx(1.0)
    assert found.original is None
    nothing = summarise([runs[0], replace(runs[2], accuracy=0.0, perplexity=math.inf)])
    written = json.loads(json.dumps(document(nothing, None, complete=True), allow_nan=False))
    assert written["cells"][0]["relative_to_black"]["mean"] is None
    assert written["cells"][0]["best"]["accuracies"] == [0.2]


def test_runs_are_kept_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    line = Line(3, "default", EVERYTHING, "text")
    first, second = Runs(path), Runs(path)
    first.add(a_run(line, 0.01, 10.0))
    second.add(a_run(line, 0.01, 9.0, rate=3e-3))
    assert Runs(path).best(line, 0.01) == ("v", 3e-3)
    assert Runs(path).best_perplexity(line, 0.1) == math.inf
    with path.open("a") as file:
        file.write('{"line": [1]}\n')
    with pytest.raises(InputError, match="is no run: remove it"):
        Runs(path)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint with a tokenizer, a text, and what `slip attack` made of them."""
    folder = tmp_path_factory.mktemp("campaign")
    model = families.make_with_tokenizer("llama", folder / "model", num_hidden_layers=2)
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 120)
    out = folder / "out"
    done = CliRunner().invoke(app, [*command(model, out, text), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["complete"]
    assert document["original"]["perplexity"] > 1
    return model, text, out


def command(model: Path, out: Path, text: Path) -> list[str]:
    return [
        *("attack", str(model), str(out), "--text", str(text), "--window", "16", "--device", "cpu"),
        *("--placement", "0-0", "--access", "logits", "--budget", "1%,2%", "--seeds", "2"),
        *("--only", "default", "--attack", "3"),
    ]


def test_slip_attack_writes_a_page_a_table_and_pictures(campaign: tuple[Path, Path, Path]) -> None:
    _, _, out = campaign
    found = json.loads((out / "attack.json").read_text())
    budgets = {cell["budget"] for cell in found["cells"]}
    assert budgets == {0.01, 0.02}
    assert all(len(cell["best"]["accuracies"]) == 2 for cell in found["cells"])
    page = (out / "attack.html").read_text()
    assert "Rel.Black" in page
    assert "3 full" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (out / "restored-0-0-logits.png").read_bytes().startswith(b"\x89PNG")


def test_slip_attack_continues_and_repeats_nothing(campaign: tuple[Path, Path, Path]) -> None:
    model, text, out = campaign
    before = (out / "runs.jsonl").read_text().splitlines()
    kept = before[: len(before) // 2]
    (out / "runs.jsonl").write_text("\n".join(kept) + "\n")
    done = CliRunner().invoke(app, command(model, out, text))
    assert done.exit_code == 0, done.output
    nothing_cut = r"protected: 0-0; he has: logits *\n.*with the share +without +Rel\.Black *\n"
    assert re.search(nothing_cut, done.output)
    assert re.search(r"default +3 full .*%.*%.* to \S+ *\n", done.output)
    after = (out / "runs.jsonl").read_text().splitlines()
    assert after[: len(kept)] == kept
    assert len(after) == len(before)
    assert {run["accuracy"] for run in map(json.loads, after)} == {
        run["accuracy"] for run in map(json.loads, before)
    }


def test_nothing_goes_on_when_slip_attack_is_killed(
    campaign: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, text, _ = campaign
    long = [*command(model, tmp_path / "out", text), "--budget", "100000%"]
    main = subprocess.Popen([sys.executable, "-m", "sliplm", *long], stderr=subprocess.DEVNULL)
    try:
        first = tmp_path / "out/runs.jsonl"  # its first line comes from a child that is about to train
        eventually(first.exists, 60)
        family = children(main.pid)
        assert family
    finally:
        main.kill()
        main.wait()
    for child in family:
        wait_for_end(child)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--placement", "7-9"], "blocks such as 0-3 of 0-1"),
        (["--placement", "last-9"], "blocks such as"),
        (["--access", "mind"], "choose from text, logits, hidden"),
        (["--budget", "3"], "percentages above 0"),
        (["--budget", "nan%"], "percentages above 0"),
        (["--relative", "nowhere"], "give NAME=DIR, the folder"),
        (["--only", "other"], "there is no split other"),
        (["--recipe", "x"], "a short name and a file"),
        (["--device", "tpu"], "choose cpu, cuda or auto"),
    ],
)
def test_what_makes_no_sense_is_told(
    given: list[str], word: str, campaign: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, text, _ = campaign
    done = CliRunner().invoke(app, [*command(model, tmp_path / "out", text), *given])
    assert isinstance(done.exception, InputError)
    assert word in str(done.exception)


@pytest.fixture
def odd(campaign: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """The model with fewer tokens than its tokenizer makes."""
    model, _, _ = campaign
    shutil.copytree(model, tmp_path / "odd")
    found = AutoModelForCausalLM.from_pretrained(model)
    found.resize_token_embeddings(20)
    found.save_pretrained(tmp_path / "odd")
    return tmp_path / "odd"


def test_another_vocabulary_is_told_before_anything_is_made(
    campaign: tuple[Path, Path, Path], odd: Path, tmp_path: Path
) -> None:
    model, text, _ = campaign
    for given, word in (
        (command(odd, tmp_path / "out", text), "and the model has 20: give the folder"),
        ([*command(model, tmp_path / "out", text), "--relative", f"kin={odd}"], "is no relative of"),
    ):
        done = CliRunner().invoke(app, given)
        assert isinstance(done.exception, InputError), done.exception
        assert word in str(done.exception)
    assert not (tmp_path / "out" / "splits").exists()


def test_what_fails_in_a_process_is_told_as_it_is(campaign: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Not that a pool broke: here the splits are gone that the processes open."""
    model, _, out = campaign
    windows = Text.of(torch.randint(3, 20, (64 * 16,)), 16, 2)
    opened = partial(Scene, model / "none", out / "splits", windows, {})
    plan = Plan((), (0.001,), 1)
    with pytest.raises(OSError, match="none"):
        run_plan(opened, plan, tmp_path / "runs.jsonl", lambda _: None, [torch.device("cpu")])


def test_untrained_rows_are_there_once(campaign: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, text, _ = campaign
    given = [*command(model, tmp_path / "out", text), "--untrained", "--budget", "1%,2%,2%"]
    done = CliRunner().invoke(app, given)
    assert done.exception is None, done.exception
    rows = [line.split() for line in done.output.splitlines() if " default " in f" {line} "]
    assert rows
    assert len({tuple(row) for row in rows}) == len(rows)
    found = json.loads((tmp_path / "out" / "attack.json").read_text())["cells"]
    places = [tuple(cell[name] for name in ("recipe", "placement", "access", "relative")) for cell in found]
    assert len(set(places)) == len(places)


def test_results_of_another_text_or_recipe_are_not_mixed(
    campaign: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, text, out = campaign
    (tmp_path / "other").write_text("Another beginning. " + text.read_text())
    before = (out / "runs.jsonl").read_bytes()
    done = CliRunner().invoke(app, command(model, out, tmp_path / "other"))
    assert isinstance(done.exception, MismatchError)
    assert "other text" in str(done.exception)
    done = CliRunner().invoke(app, [*command(model, out, text), "--window", "24"])
    assert isinstance(done.exception, MismatchError)
    with pytest.raises(MismatchError, match="another recipe"):
        prepare(model, out / "splits", {"default": Recipe(rank=3)}, lambda *_: None)
    assert (out / "runs.jsonl").read_bytes() == before


def test_a_model_that_predicts_no_text_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    for name in ("attack", "plan"):
        done = CliRunner().invoke(app, [name, str(tmp_path / "bert"), str(tmp_path / "out")])
        assert isinstance(done.exception, CheckpointError)
        assert "only causal" in str(done.exception)
        assert not (tmp_path / "out").exists()


def test_a_text_in_another_encoding(campaign: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, _, _ = campaign
    (tmp_path / "text").write_bytes(b"\xff\xfe" * 100)
    done = CliRunner().invoke(app, command(model, tmp_path / "out", tmp_path / "text"))
    assert isinstance(done.exception, InputError)
    assert "UTF-8" in str(done.exception)


def test_align_needs_a_relative(scene: Scene) -> None:
    assert Align().start(scene.case("default", EVERYTHING), scene.oracle, "singular vectors", 0) is None


def test_the_study_of_the_fit_is_kept_and_shown(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model", hidden_size=16, num_hidden_layers=1)
    done: list[int] = []
    found = fit_study(model, tmp_path, done.append)
    assert done == list(range(1, len(found.trials) + 1))
    assert len(found.trials) == TRIALS - len(CLOSE)  # rank 16 would leave nothing
    assert {trial.n for trial in found.trials} == {16}
    assert fit_study(model, tmp_path, lambda _: pytest.fail("made again")) == found
    write_report(tmp_path, "m", summarise([]), complete=True, fitted=found)
    assert found.group in (tmp_path / "attack.html").read_text()
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(InputError, match="no study of attack 11"):
        fit_study(model, tmp_path, done.append)
