"""`slip plan`: right figures, kept through a kill, small in memory, and a recipe that holds its budget."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import families
from sliplm.cli.plan import STAGES, _grid
from sliplm.engines.source import stack
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.perplexity import perplexity
from sliplm.errors import CheckpointError, InputError, MismatchError, RecipeError, ShareError
from sliplm.planning.planner import Amount, Budget
from sliplm.sensitivity import factors as factors_module
from sliplm.sensitivity import pages, study
from sliplm.sensitivity.factors import Factors, Library, factor
from sliplm.sensitivity.removal import Loss, MixedRowsError, Removal
from sliplm.sensitivity.run import Made, Wish, plan
from sliplm.sensitivity.subject import Subject, kinds_of, open_subject
from sliplm.sensitivity.text import windows_of
from sliplm.sensitivity.variants import Grid, Variant, steps, variants
from sliplm.shares.recipe import Recipe
from sliplm.shares.splitting import top_triplets
from test_cli import ENV, last_json, run_here, slip
from test_report import assert_alone, parsed

CPU = torch.device("cpu")
GRID = Grid(ranks=(1, 2, 4), layer_ranks=(2, 4), steps=3)
TEXT = " ".join(f"The vault keeps {i} secrets of {i * i % 97} matrices." for i in range(60))
WISH = Wish(Budget(), 120, GRID, CPU)


def make(family: str, folder: Path, *, start: bool = False, **config: Any) -> Path:
    """A checkpoint with a tokenizer, which puts <s> in front of a text if `start`."""
    tokenizer = families.byte_tokenizer()
    families.make(family, folder, vocab_size=len(tokenizer), **config)
    if start:
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("plan") / "model", num_hidden_layers=3)


def windows(model: Path, tokens: int = 120, window: int = 30) -> torch.Tensor:
    return windows_of(model, TEXT, tokens, window)


def library(subject: Subject, folder: Path, rank: int = 4) -> dict[str, Factors]:
    folder.mkdir(exist_ok=True)
    return Library(folder, subject, rank).complete(CPU, lambda done, total, name: None)


def original(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- spectra ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spectra_are_those_of_the_stacked_matrices(family: str, tmp_path: Path) -> None:
    subject = open_subject(make(family, tmp_path / "model"))
    found = library(subject, tmp_path / "work", rank=5)
    assert list(found) == [part.name for part in subject.parts]
    for part in subject.parts:
        weight = stack(subject.stored.read, part.group)
        values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        mine = found[part.name]
        assert np.allclose(mine.values.numpy(), values, atol=1e-6 * values[0])
        assert mine.energy == pytest.approx(np.square(values).sum(), rel=1e-6)
        for rank in (1, 3, 5):
            a, b = top_triplets(weight, rank)  # what the split takes
            best = a @ b
            assert np.linalg.norm((mine.a[:, :rank] @ mine.b[:rank]).numpy() - best) < 1e-4 * np.linalg.norm(
                best
            )
            assert mine.share(rank) == pytest.approx(np.square(values[:rank]).sum() / mine.energy, rel=1e-5)


def test_a_very_large_matrix_is_decomposed_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors_module, "EXACT_SVD", 32)
    random = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=random))[0] for n in (90, 60))
    values = 0.7 ** torch.arange(40)
    weight = (left * values) @ right.T
    found = factor(weight, 4)
    assert found.values.tolist() == pytest.approx(values[:4].tolist(), rel=1e-4)
    assert found.energy == pytest.approx(float(values.square().sum()), rel=1e-4)
    assert torch.dist(found.a @ found.b, (left[:, :4] * values[:4]) @ right[:, :4].T) < 1e-3


def test_factors_are_kept_and_made_anew_only_for_a_larger_rank(llama: Path, tmp_path: Path) -> None:
    subject = open_subject(llama)
    first = library(subject, tmp_path, rank=4)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    less = library(subject, tmp_path, rank=2)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times
    name = subject.parts[0].name
    assert less[name].a.shape[1] == 2
    assert torch.equal(less[name].b, first[name].b[:2])
    (tmp_path / "00003.safetensors").write_bytes(b"torn")
    assert torch.equal(library(subject, tmp_path, rank=4)[subject.parts[3].name].a,
                       first[subject.parts[3].name].a)  # fmt: skip
    assert library(subject, tmp_path, rank=6)[name].a.shape[1] == 6
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


# --- removal ----------------------------------------------------------------------------------------------


def without(model: PreTrainedModel, subject: Subject, factors: dict[str, Factors], variant: Variant) -> None:
    """Edit the weights: W - A_k B_k."""
    for part in subject.parts:
        if part.name not in variant.groups:
            continue
        top = factors[part.name].a[..., : variant.rank] @ factors[part.name].b[..., : variant.rank, :]
        if (expert := part.group.expert) is not None:
            module = model.get_submodule(expert.module)
            fused = module.get_parameter(expert.weight)
            fused.data.sub_(top.mT if module.is_transposed else top)
            continue
        for member, rows in zip(
            part.group.members, top.split([m.rows for m in part.group.members]), strict=True
        ):
            module = model.get_submodule(member.module)
            weight = module.weight.detach() - (rows.T if member.transposed else rows)
            module.weight = torch.nn.Parameter(weight)  # of its own, should it be tied


def losses(
    model: Path, subject: Subject, factors: dict[str, Factors], batch: Sequence[Variant], rows: int = 8
) -> list[Loss]:
    removal = Removal(original(model), subject.parts, factors, CPU)
    try:
        return removal.losses(batch, windows(model), rows)
    finally:
        removal.close()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mixtral", "gpt_oss"])
def test_removal_by_hooks_equals_edited_weights(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "model")
    subject = open_subject(folder)
    factors = library(subject, tmp_path / "work")
    chosen = [v for v in variants(subject, GRID) if v.rank in (0, 2, 4)][::5]
    assert {v.table for v in chosen} >= {"whole", "kind", "layer"}
    for variant in chosen:
        edited = original(folder)
        without(edited, subject, factors, variant)
        found = losses(folder, subject, factors, [variant])[0]
        assert found.tokens == 4 * 29
        expected = perplexity(edited, windows(folder).reshape(-1), window=30)
        assert found.perplexity == pytest.approx(expected, rel=2e-5), variant.key


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3_moe"])
def test_variants_side_by_side_are_the_same_as_alone(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "model")
    subject = open_subject(folder)
    factors = library(subject, tmp_path / "work")
    every = variants(subject, GRID)
    together = losses(folder, subject, factors, every, rows=2 * len(every))
    alone = [losses(folder, subject, factors, [variant])[0].mean for variant in every]
    assert [loss.mean for loss in together] == pytest.approx(alone, rel=1e-6)
    assert len({round(mean, 6) for mean in alone}) > len(every) // 2  # they do differ


def test_a_plan_studies_experts_like_other_matrices(tmp_path: Path) -> None:
    """By layer and weight, with their spectra; and gives the model's own way of running experts back."""
    folder = make("mixtral", tmp_path / "model", num_hidden_layers=1)
    subject = open_subject(folder)
    assert subject.kinds == ("q+k+v", "o", "gate_up", "down", "lm_head")
    up = next(part for part in subject.parts if part.kind == "gate_up")
    assert [group.name for group in up.groups] == [f"{up.name}.{i}" for i in range(3)]
    found = library(subject, tmp_path / "work")[up.name]
    weights = [stack(subject.stored.read, group).astype(np.float64) for group in up.groups]
    values = np.array([np.linalg.svd(weight, compute_uv=False) for weight in weights])
    assert np.allclose(found.values.numpy(), np.sqrt(np.square(values).mean(0)), rtol=1e-4)
    assert found.share(4) == pytest.approx(np.square(values[:, :4]).sum() / np.square(values).sum(), rel=1e-4)
    assert (found.a.shape, found.b.shape) == ((3, up.group.rows, 4), (3, 4, 64))
    model = original(folder)
    before = model.config._experts_implementation
    removal = Removal(model, subject.parts, library(subject, tmp_path / "work"), CPU)
    assert model.config._experts_implementation != before
    removal.close()
    assert model.config._experts_implementation == before
    assert not any(name.startswith("sliplm") for name in ALL_EXPERTS_FUNCTIONS)
    made = plan(folder, tmp_path / "out", TEXT, Wish(Budget(exchanges=4), 60, GRID, CPU))
    assert {choice.kind: choice.groups for choice in made.advice.choices}["gate_up"] == 3
    worth = made.results.worth()
    assert all(list(worth[kind]) == [1, 2, 4] and worth[kind][4] > 0 for kind in subject.kinds)
    assert made.advice.report.exchanges <= 4


def test_a_model_that_mixes_rows_takes_one_variant_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plan(llama, tmp_path / "a", TEXT, WISH).results.measurements
    real = Removal.losses

    def mixed(self: Removal, batch: Sequence[Variant], *rest: Any) -> list[Loss]:
        if len(batch) > 1:
            raise MixedRowsError
        return real(self, batch, *rest)

    monkeypatch.setattr(Removal, "losses", mixed)
    found = plan(llama, tmp_path / "b", TEXT, WISH).results.measurements
    assert [m.loss for m in found] == pytest.approx([m.loss for m in expected], rel=1e-6)
    # a layer that sees other rows than the batch has is noticed
    subject = open_subject(llama)
    removal = Removal(original(llama), subject.parts, library(subject, tmp_path / "w"), CPU)
    removal._active, removal._rows, removal._length = [{subject.parts[0].name: 1}, {}], 8, 30
    with pytest.raises(MixedRowsError):
        removal._model.get_submodule(subject.parts[0].group.modules[0])(torch.ones(7, 64))


# --- which groups are taken together ------------------------------------------------------------------------


def test_the_tables_name_the_groups_that_they_are_about(llama: Path) -> None:
    subject = open_subject(llama)
    assert subject.kinds == ("q+k+v", "o", "gate+up", "down", "lm_head")
    assert subject.layers == (0, 1, 2)
    every = variants(subject, GRID)
    assert len({v.key for v in every}) == len(every)
    by_key = {v.key: v.groups for v in every}
    names = [part.name for part in subject.parts]
    assert by_key["whole||0"] == ()
    assert by_key["kind|all|4"] == tuple(names)
    assert by_key["kind|down|1"] == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    assert by_key["kind|lm_head|2"] == ("lm_head",)
    assert by_key["layer|1|4"] == tuple(name for name in names if ".1." in name)
    assert by_key["first|2|4"] == tuple(name for name in names if ".0." in name or ".1." in name)
    assert by_key["last|1|4"] == tuple(name for name in names if ".2." in name)
    assert by_key["first|3|4"] == by_key["last|3|4"] == tuple(names[:-1])
    assert len(every) == 1 + 6 * 3 + 3 * 2 + 2 * 3


def test_steps_reach_both_ends() -> None:
    assert list(steps(4, 6)) == [1, 2, 3, 4]
    assert steps(30, 6) == [1, 2, 4, 8, 15, 30]
    assert steps(100, 2) == [1, 100]


def test_kinds_have_short_names_of_their_own() -> None:
    names = [
        f"model.layers.{i}.{tail}" for i in (0, 10) for tail in ("self_attn.q_proj+k_proj", "mlp.down_proj")
    ]
    assert kinds_of([*names, "lm_head"]) == ["q+k", "down", "q+k", "down", "lm_head"]
    gpt = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    assert kinds_of(gpt) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert kinds_of(["a.0.b", "b"]) == ["*.b", "b"]


def test_ranks_that_make_no_sense_are_refused() -> None:
    for ranks in ((), (0, 1), (1, 5000)):
        with pytest.raises(InputError, match="ranks are numbers from 1 to 1024"):
            Grid(ranks=ranks, layer_ranks=(1,), steps=3)
    assert _grid("cpu", "8,2,2", None) == Grid(ranks=(2, 8), layer_ranks=(16,), steps=6)
    for text in ("", "1;2", "1,", "-1", "a", "1,9999999"):
        with pytest.raises(InputError, match="--ranks"):
            _grid("cpu", text, None)


# --- text -------------------------------------------------------------------------------------------------


def test_windows_start_as_the_tokenizer_starts_a_text(tmp_path: Path) -> None:
    plain, started = make("llama", tmp_path / "a"), make("llama", tmp_path / "b", start=True)
    ids = families.byte_tokenizer()(TEXT).input_ids
    assert windows(plain).reshape(-1).tolist() == ids[:120]
    found = windows(started)
    assert found.shape == (4, 30)
    assert found[:, 0].tolist() == [1] * 4
    assert found[:, 1:].reshape(-1).tolist() == ids[: 4 * 29]
    assert windows_of(plain, TEXT, 10**6, 50).shape == (len(ids) // 50, 50)  # as much as there is
    with pytest.raises(InputError, match="the text has 2 tokens"):
        windows_of(plain, "ab", 100, 50)


# --- a whole plan -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    out = tmp_path_factory.mktemp("plan") / "out"
    return out, plan(llama, out, TEXT, WISH)


def test_the_files_of_a_plan(made: tuple[Path, Made]) -> None:
    out, result = made
    assert {file.name for file in out.iterdir()} == {".work", *(file.name for file in result.files)}
    assert {"plan.html", "plan.json", "recipe.json"} < {file.name for file in result.files}
    assert sum(file.suffix == ".png" for file in result.files) == 5
    assert json.loads((out / "plan.json").read_text()) == result.document
    assert Recipe.read(out / "recipe.json") == result.advice.recipe
    assert {path.stat().st_mode & 0o077 for path in out.iterdir()} == {0}


def test_the_page_has_the_numbers_and_loads_nothing(made: tuple[Path, Made]) -> None:
    out, result = made
    assert_alone(out / "plan.html")
    shown = " ".join(parsed(out / "plan.html").texts)
    assert "no security claim" in shown
    assert f"{result.results.parameters:,}" in shown
    assert f"{result.advice.report.vault_macs.total:,}" in shown
    for measured in result.results.measurements:
        value = measured.perplexity
        assert (f"{value:.2f}" if value < 100 else f"{value:,.0f}") in shown, measured
    for cost in result.results.costs:
        assert f"{cost.macs:,}" in shown


def test_costs_are_those_of_a_split(llama: Path, made: tuple[Path, Made], tmp_path: Path) -> None:
    cost = next(cost for cost in made[1].results.costs if cost.rank == 4)
    report = split(llama, tmp_path, Recipe(rank=4))
    assert (cost.macs, cost.bytes) == (report.vault_macs.total, report.vault_bytes)
    assert cost.macs_share == report.vault_macs_share
    assert cost.bytes_share == report.vault_bytes_share
    assert cost.low_rank + cost.rotations + cost.checks == cost.macs
    q = next(group for group in report.groups if group.name.endswith("o_proj"))
    assert cost.kinds["o"] == pytest.approx(q.vault_macs_share)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("exchanges", [None, 4])
def test_a_split_by_the_recipe_costs_what_the_plan_says(
    family: str, exchanges: int | None, tmp_path: Path
) -> None:
    folder = make(family, tmp_path / "model")
    budget = Budget(Amount(0.95, is_share=True), exchanges=exchanges)
    advice = plan(folder, tmp_path / "plan", TEXT, Wish(budget, 60, GRID, CPU)).advice
    report = split(folder, tmp_path / "split", Recipe.read(tmp_path / "plan" / "recipe.json"))
    for field in ("kept_bytes", "vault_bytes", "worker_bytes", "plain_macs", "vault_macs", "exchanges",
                  "bytes_to_worker", "bytes_from_worker"):  # fmt: skip
        assert getattr(report, field) == getattr(advice.report, field), field
    assert report.vault_macs_share <= 0.95
    assert exchanges is None or report.exchanges <= exchanges


def test_a_budget_that_cannot_be_met_is_told_before_anything_is_measured(llama: Path, tmp_path: Path) -> None:
    wish = Wish(Budget(Amount(0.01, is_share=True)), 120, GRID, CPU)
    with pytest.raises(RecipeError, match="no recipe meets this budget"):
        plan(llama, tmp_path / "out", TEXT, wish)
    assert not (tmp_path / "out").exists()


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "<b>bold & 'x'")
    out = tmp_path / "out"
    plan(folder, out, TEXT, Wish(Budget(), 60, Grid((1,), (1,), 2), CPU))
    assert_alone(out / "plan.html")
    assert "Plan for <b>bold & 'x'" in " ".join(parsed(out / "plan.html").texts)


def test_of_a_model_that_is_worse_than_a_guess_only_the_energy_counts(made: tuple[Path, Made]) -> None:
    results = made[1].results
    assert results.base.perplexity > results.vocabulary
    for kind, line in results.worth().items():
        assert line == {rank: results.energy(kind, rank) / 2 for rank in GRID.ranks}
        assert list(line.values()) == sorted(line.values())


def test_worth_is_the_mean_of_damage_and_energy(made: tuple[Path, Made]) -> None:
    found = made[1].results
    base, guess = 3.0, math.log(found.vocabulary)
    taught = {1: 3.5, 2: math.inf, 4: 3.2}  # beyond a guess counts as a guess, and worth does not fall
    changed = [
        m.model_copy(update={"loss": taught[m.rank] if m.of == "down" else base})
        if m.table in ("kind", "whole") and (m.of == "down" or m.table == "whole")
        else m
        for m in found.measurements
    ]
    results = found.model_copy(update={"measurements": tuple(changed)})
    energy = {rank: results.energy("down", rank) for rank in GRID.ranks}
    line = results.worth()["down"]
    assert line[1] == pytest.approx((0.5 / (guess - base) + energy[1]) / 2)
    assert line[2] == line[4] == pytest.approx((1 + energy[2]) / 2)
    assert line[4] >= energy[4] / 2


def test_losses_that_cannot_be_computed_are_drawn_and_written(
    made: tuple[Path, Made], tmp_path: Path
) -> None:
    results = made[1].results
    endless = [
        m.model_copy(update={"loss": math.inf, "perplexity": math.inf}) for m in results.measurements[1:]
    ]
    results = results.model_copy(update={"measurements": (results.measurements[0], *endless)})
    sections = pages.sections(results, made[1].advice, "none")
    assert "infinite" in str(sections)
    assert json.loads(results.model_dump_json())["measurements"][1]["perplexity"] is None


# --- resumption -------------------------------------------------------------------------------------------

# makes a plan, and stops for ever before the step whose stage and number are given
CHILD = """
import sys, time
from pathlib import Path
import torch
from sliplm.planning.planner import Budget
from sliplm.sensitivity import pages, study
from sliplm.sensitivity.run import Wish, plan
from sliplm.sensitivity.variants import Grid
model, out, text, stage, number = sys.argv[1:]
study._rows = lambda *_, **__: 1  # one variant at a time
left = int(number)
def progress(at, done, total, name):
    global left
    if at == stage:
        left -= 1
        if left < 0:
            print("waiting", flush=True)
            time.sleep(600)
wish = Wish(Budget(), 120, Grid((1, 2, 4), (2, 4), 3), torch.device("cpu"))
plan(Path(model), Path(out), text, wish, progress)
"""


def kill_before(
    stage: str, number: int, model: Path, out: Path, check: Callable[[], None] | None = None
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model), str(out), TEXT, stage, str(number)], env=ENV,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"waiting\n"
        if check is not None:
            check()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)


def journal(out: Path) -> list[str]:
    return (out / ".work" / "journal").read_text().splitlines()


def test_a_killed_plan_is_continued(
    llama: Path, made: tuple[Path, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    kill_before("spectra", 5, llama, out)
    factor_files = sorted((out / ".work").glob("*.safetensors"))
    assert len(factor_files) == 5
    times = [file.stat().st_mtime_ns for file in factor_files]

    def another() -> None:
        with pytest.raises(ShareError, match="another process makes a plan"):
            plan(llama, out, TEXT, WISH)

    kill_before("losses", 7, llama, out, another)
    assert [file.stat().st_mtime_ns for file in factor_files] == times
    before = journal(out)
    assert len(before) == 1 + 7
    assert not (out / "plan.html").exists()
    with (out / ".work" / "journal").open("a") as file:
        file.write('{"text": "abc", "vari')  # a line cut off by the kill
    monkeypatch.setattr(study, "_rows", lambda *_, **__: 1)
    told: list[tuple[str, int, int, str]] = []
    found = plan(llama, out, TEXT, WISH, lambda *step: told.append(step))
    assert journal(out)[:8] == before
    total = len(found.results.measurements)
    assert len(journal(out)) == 1 + total
    assert {step[2] for step in told if step[0] == "losses"} == {total - 7}
    assert {step[0] for step in told} == set(STAGES)
    expected = [m.loss for m in made[1].results.measurements]
    assert [m.loss for m in found.results.measurements] == pytest.approx(expected, rel=1e-6)


def test_a_second_budget_measures_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = plan(llama, out, TEXT, WISH)
    lines = journal(out)
    monkeypatch.setattr(study, "open_model", lambda *_: pytest.fail("the model was loaded"))
    budget = Budget(Amount(1.0, is_share=True), exchanges=9)
    second = plan(llama, out, TEXT, Wish(budget, 120, GRID, CPU))
    assert journal(out) == lines
    assert second.results == first.results
    assert second.advice.recipe != first.advice.recipe
    assert Recipe.read(out / "recipe.json") == second.advice.recipe


def test_work_on_another_text_is_not_used_and_not_lost(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = plan(llama, out, TEXT, WISH).results
    second = plan(llama, out, TEXT[300:], WISH).results
    assert second.base.loss != first.base.loss
    assert len(journal(out)) == 1 + len(first.measurements) + len(second.measurements)
    assert plan(llama, out, TEXT, WISH).results == first


def test_a_folder_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", make("llama", tmp_path / "other", seed=1)
    plan(llama, out, TEXT, WISH)
    lines = journal(out)
    with pytest.raises(MismatchError, match="another checkpoint"):
        plan(other, out, TEXT, WISH)
    assert journal(out) == lines
    (out / ".work" / "journal").write_text("{}\n")
    with pytest.raises(ShareError, match="damaged; remove"):
        plan(llama, out, TEXT, WISH)


# --- memory -----------------------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
import torch
from sliplm.planning.planner import Budget
from sliplm.sensitivity.run import Wish, plan
from sliplm.sensitivity.variants import Grid
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
small, model, out, text, offload = sys.argv[1:]
wish = Wish(Budget(), 40, Grid((1,), (1,), 2), torch.device("cpu"), offload == "yes")
plan(Path(small), Path(out) / "small", text, wish)  # code, caches, fonts, thread pools
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
before = kilobytes("VmRSS")
made = plan(Path(model), Path(out) / "large", text, wish)
print(kilobytes("VmHWM") - before, made.results.base.loss)
"""


def test_a_model_larger_than_memory_is_measured(llama: Path, tmp_path: Path) -> None:
    model = make("llama", tmp_path / "model", hidden_size=320, intermediate_size=840, num_hidden_layers=20)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 80e6
    grown, loss = {}, {}
    for offload in ("yes", "no"):
        run = [sys.executable, "-c", MEASURED, llama, model, tmp_path / offload, TEXT, offload]
        done = subprocess.run(
            [str(word) for word in run], check=True, env=ENV, capture_output=True, text=True, timeout=300
        )
        last = done.stdout.split()
        grown[offload], loss[offload] = int(last[-2]) * 1024, float(last[-1])
    assert grown["yes"] < 0.5 * size, f"{grown} bytes more for a model of {size}"
    assert grown["no"] > 0.9 * size  # the measure sees a model that is held whole
    assert loss["yes"] == pytest.approx(loss["no"], rel=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_weights_on_the_disk_give_the_same_losses(family: str, tmp_path: Path) -> None:
    """In half precision, which is widened on the way; with experts, which are converted."""
    folder = make(family, tmp_path / "model", dtype=torch.bfloat16)
    found = [
        plan(folder, tmp_path / str(offload), TEXT, Wish(Budget(), 60, GRID, CPU, offload)).results
        for offload in (True, False)
    ]
    assert found[0] == found[1]
    assert not (tmp_path / "True" / ".work" / "offload").exists()


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_and_its_recipe(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    options = ["--text", text, "--tokens", 120, "--ranks", "1,2,4", "--layer-ranks", "2"]
    done = slip("plan", llama, out, *options, "--exchanges", 9, "--json")
    document = last_json(done)
    assert len(done.stdout.splitlines()) == 1
    assert document["report"]["exchanges"] <= 9
    assert document == json.loads((out / "plan.json").read_text())
    assert "Recommended" in done.stderr
    assert f"slip split {llama} SPLIT --recipe {out / 'recipe.json'}" in done.stderr
    report = last_json(slip("split", llama, tmp_path / "split", "--recipe", out / "recipe.json", "--json"))
    assert report["vault_macs"] == document["report"]["vault_macs"]
    assert report["vault_bytes"] == document["report"]["vault_bytes"]
    capsys.readouterr()
    assert run_here(monkeypatch, ["plan", llama, out, *options, "--vault-macs", "60%"]) == 0
    assert "Recommended" in capsys.readouterr().out


def test_bad_inputs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = families.make("llama", tmp_path / "bare")
    text, out = tmp_path / "text.txt", tmp_path / "o"
    text.write_text(TEXT)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty").write_text("")
    given = ["--text", text, "--ranks", "1,2", "--layer-ranks", "2"]
    cases: list[tuple[list[object], str]] = [
        (["plan", tmp_path / "nothing", out, *given], "is not a folder"),
        (["plan", bare, out, *given], "has no tokenizer"),
        (["plan", llama, out, "--text", tmp_path / "none"], "cannot be read"),
        (["plan", llama, out, "--text", tmp_path / "binary"], "no UTF-8 text"),
        (["plan", llama, out, "--text", tmp_path / "empty"], "the text has 0 tokens"),
        (["plan", llama, out, *given, "--vault-macs", "1%"], "no recipe meets this budget"),
        (["plan", llama, out, *given, "--vault-bytes", "lots"], "is no amount"),
        (["plan", llama, out, *given, "--device", "tpu9"], "no device 'tpu9'"),
        (["plan", llama, out, "--text", text, "--ranks", "1,x"], "--ranks"),
        (["plan", llama, text, *given], "cannot be written"),
    ]
    capsys.readouterr()
    for arguments, said in cases:
        status = run_here(monkeypatch, arguments)
        shown = capsys.readouterr()
        assert status == 2, (arguments, shown)
        assert said in shown.err, arguments
        assert len(shown.err.splitlines()) == 1, shown.err
    assert not out.exists()


def test_a_checkpoint_that_cannot_be_split_is_refused(llama: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(llama, damaged)
    os.truncate(damaged / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        plan(damaged, tmp_path / "out", TEXT, WISH)
