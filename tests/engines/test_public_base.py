"""Fine-tunes of a public model: the worker has the base alone, the vault what differs, exactly."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
from sliplm.arithmetic import kernels
from sliplm.arithmetic.equilibration import column_factors, divided
from sliplm.engines.modules import replace as replace_layers
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.load import open as open_split
from sliplm.engines.transformers.perplexity import divergence
from sliplm.errors import CheckpointError, InputError, RecipeError
from sliplm.examples import tiny_gpt2
from sliplm.parties.adapters import Adapters
from sliplm.parties.codec import GroupCodec
from sliplm.parties.local_worker import LocalWorker
from sliplm.planning.counts import report_for
from sliplm.shares.manifest import Member
from sliplm.shares.publicbase import energy_rank, split_base, split_difference
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.share import check_pair, open_vault, open_worker, read_vault_manifest
from sliplm.shares.splitting import LowRank, squared_values
from sliplm.shares.tensorfile import read_header
from test_cli import last_json, run_here, slip
from test_convert import whole_again
from tuning import merged, tokens, train_full, train_lora

IDS = tokens(9, rows=2, length=20)
TEXT = tokens(10, rows=1, length=400)[0]


class Scene(NamedTuple):
    """A public base, two adapters to it, a full fine-tune of it, and splits against it."""

    base: Path
    adapters: dict[str, Path]
    full: Path
    alone: Path  # split of the base alone
    two: Path  # with both adapters


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("public")
    base = families.make("llama", folder / "base")
    families.byte_tokenizer().save_pretrained(base)
    adapters = {
        "fr": train_lora(base, folder / "fr", seed=1),
        "de": train_lora(base, folder / "de", seed=2, r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
    }
    full = train_full(base, folder / "full", seed=3, frozen="layers.1.mlp")
    split(base, folder / "alone", base=base)
    split(base, folder / "two", base=base, adapters=adapters)
    return Scene(base, adapters, full, folder / "alone", folder / "two")


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def rounded_base(scene: Scene) -> PreTrainedModel:
    """The base with the worker's integers times their scales in the place of its matrices."""
    model = AutoModelForCausalLM.from_pretrained(scene.base, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        for module, weight in whole_again(scene.alone).items():
            model.get_submodule(module).weight.copy_(weight)
    return model.eval()


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


# --- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fr", "de"])
def test_nothing_of_an_adapter_is_approximated(scene: Scene, name: str) -> None:
    """What it adds to each product, beside what peft's own layers add in float64: equal up to float32's
    rounding of the sum.
    """
    local = reference(scene.two)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(scene.base), scene.adapters[name]
        )
    tuned = tuned.double().requires_grad_(False)
    changed = 0
    for group in read_vault_manifest(scene.two / "vault").groups:
        x = torch.randn(5, group.columns, generator=torch.Generator().manual_seed(changed))
        plain = local.slip.product(group.name, x.numpy())
        with local.slip.adapter(name):
            added = local.slip.product(group.name, x.numpy()).astype(np.float64) - plain
        layers = [tuned.get_submodule(f"base_model.model.{member.module}") for member in group.members]
        truth = np.concatenate(
            [
                (layer(x.double()) - getattr(layer, "base_layer", layer)(x.double())).numpy()
                for layer in layers
            ],
            1,
        )
        assert (np.abs(added - truth) <= 1e-6 * (np.abs(plain) + np.abs(truth).max())).all(), group.name
        changed += bool(truth.any())
    assert changed == {"fr": 8, "de": 4}[name]


@pytest.mark.parametrize("name", ["fr", "de"])
def test_an_adapter_gives_the_logits_of_peft_s_own_merged_model(scene: Scene, name: str) -> None:
    """Merged into the *rounded* base, peft's model differs by what the base alone differs by: the rounding of
    the inputs, about 16 bits here.  Merged into the original, the base's 12 bits come to it: far below bf16.
    """
    hybrid = reference(scene.two, adapter=name)
    found = logits(hybrid)
    input_error = distance(logits(reference(scene.alone)), logits(rounded_base(scene)))
    error = distance(found, logits(merged(rounded_base(scene), scene.adapters[name])))
    assert error < 1e-4
    assert error < 1.5 * input_error
    truth = merged(scene.base, scene.adapters[name])
    half = merged(scene.base, scene.adapters[name]).to(torch.bfloat16)
    assert distance(found, logits(truth)) < distance(logits(half).float(), logits(truth)) / 10
    assert divergence(hybrid, truth, TEXT) < divergence(half, truth, TEXT) / 100
    assert distance(logits(reference(scene.alone)), logits(truth)) > 0.1  # the adapter does count


def test_the_hybrid_with_an_adapter_is_the_reference_bit_for_bit(scene: Scene) -> None:
    local = reference(scene.two)
    with open_split(scene.two, adapter="fr") as model:
        assert torch.equal(logits(model), logits(reference(scene.two, adapter="fr")))
        traffic = set()
        for name in ("de", "base", None, "fr"):
            with model.slip.adapter(name), local.slip.adapter(name):
                before = model.slip.counters.as_dict()
                assert torch.equal(logits(model), logits(local))
                after = model.slip.counters.as_dict()
                seen = ("exchanges", "rows", "bytes_sent", "bytes_received")
                traffic.add(tuple(after[field] - before[field] for field in seen))
                following = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
                assert torch.equal(
                    following, local.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
                )
        assert model.slip.quarantined == {}
        assert len(traffic) == 1  # a worker sees as much of one adapter as of another
    with reference(scene.two).slip.adapter("base"):
        assert torch.equal(logits(local), logits(reference(scene.alone)))


def test_the_worker_s_folder_is_the_base_s_whatever_the_adapter(scene: Scene, tmp_path: Path) -> None:
    expected = contents(scene.alone / "worker")
    assert sorted(expected) == ["manifest.json", "share.safetensors"]
    assert contents(scene.two / "worker") == expected
    split(scene.base, tmp_path / "one", base=scene.base, adapters={"x": scene.adapters["de"]})
    assert contents(tmp_path / "one" / "worker") == expected
    split(scene.full, tmp_path / "full", Recipe(rank=3), base=scene.base)
    assert contents(tmp_path / "full" / "worker") == expected
    copy = shutil.copytree(scene.base, tmp_path / "elsewhere")
    split(copy, tmp_path / "again", base=copy)
    assert contents(tmp_path / "again" / "worker") == expected
    split(scene.base, tmp_path / "eight", Recipe(precision=8), base=scene.base)
    other = contents(tmp_path / "eight" / "worker")
    assert other["share.safetensors"] != expected["share.safetensors"]
    assert json.loads(other["manifest.json"])["split_id"] != json.loads(expected["manifest.json"])["split_id"]


def test_the_worker_s_integers_are_the_base_s(scene: Scene) -> None:
    """Recomputed here from the checkpoint: nothing else can have gone in."""
    model = AutoModelForCausalLM.from_pretrained(scene.base)
    worker, members = open_worker(scene.two / "worker"), open_vault(scene.two / "vault").members
    for name, w in worker.matrices.items():
        weight = np.concatenate(
            [model.get_submodule(m.module).weight.detach().numpy() for m in members[name]]
        )
        weight = divided(weight, column_factors(weight))
        scale = (np.abs(weight).max(axis=1) / np.float32(2047)).astype(np.float32)
        assert np.array_equal(w, np.rint(weight / scale[:, None]).astype(np.int16))


def test_two_vaults_share_nothing_but_the_worker(scene: Scene) -> None:
    """M1, M42: fresh seeds and challenges, and pools of their own."""
    one, two = open_vault(scene.alone / "vault"), open_vault(scene.two / "vault")
    assert one.split_id == two.split_id
    assert one.pool_name not in (two.pool_name, one.split_id)
    for name, secrets in one.groups.items():
        assert secrets.seed != two.groups[name].seed
        assert not np.array_equal(secrets.c, two.groups[name].c)
    check_pair(one, open_worker(scene.two / "worker"))


def test_one_worker_serves_the_vaults_of_several_owners(scene: Scene, tmp_path: Path) -> None:
    split(scene.full, tmp_path / "full", Recipe(rank=8), base=scene.base)
    with LocalWorker(scene.alone / "worker") as worker, ExitStack() as stack:
        share = {"share": scene.alone / "worker"}
        one = load(scene.two / "vault", [worker.address], adapter="de", **share)
        two = load(tmp_path / "full" / "vault", [worker.address], **share)
        for model in (one, two):
            stack.enter_context(closing(model.slip))
        for _ in range(2):
            assert torch.equal(logits(one), logits(reference(scene.two, adapter="de")))
            assert torch.equal(logits(two), logits(reference(tmp_path / "full")))


def test_one_folder_holds_the_pools_of_vaults_that_share_a_worker(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "anchors"))
    ids = IDS[:1, :8]
    for out in (scene.alone, scene.two):
        assert run_here(monkeypatch, ["deal", out / "vault", tmp_path / "pool", "--tokens", 64]) == 0
    with LocalWorker(scene.alone / "worker") as worker:
        for out in (scene.alone, scene.two):
            model = load(out / "vault", [worker.address], pool=tmp_path / "pool")
            with closing(model.slip):
                assert torch.equal(logits(model, ids), logits(reference(out), ids))
                assert model.slip.counters.rows_dealt == 0


# --- chosen per request -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:this thread answers with")
def test_threads_with_different_adapters_do_not_disturb_each_other(scene: Scene) -> None:
    names = ["fr", "de", "base", "fr", "de"]
    expected = {name: logits(reference(scene.two, adapter=name)) for name in set(names)}
    wrong: list[str] = []
    start = threading.Barrier(len(names))
    with open_split(scene.two, adapter="de") as model:

        def request(name: str) -> None:
            start.wait(30)
            for _ in range(4):
                with model.slip.adapter(name):
                    if not torch.equal(logits(model), expected[name]):
                        wrong.append(name)
            if not torch.equal(logits(model), expected["de"]):  # the default again
                wrong.append(f"after {name}")

        with model.slip.adapter("base"):  # of this thread alone
            threads = [threading.Thread(target=request, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            assert torch.equal(logits(model), expected["base"])
    assert wrong == []


def test_the_choice_of_one_model_is_not_another_s() -> None:
    one, two = Adapters(["fr", "de"], "fr"), Adapters(["fr"])
    with one("de"):
        assert (one.current, two.current) == ("de", None)
        with two("fr"), one(None):
            assert (one.current, two.current) == (None, "fr")
        assert (one.current, two.current) == ("de", None)
    assert (one.current, two.current) == ("fr", None)
    with pytest.raises(InputError, match=r"no adapter 'it': it has fr, de, and 'base'"):
        one("it")
    with pytest.raises(InputError, match="it has none"):
        Adapters([], "fr")


def test_an_unknown_adapter_is_refused(scene: Scene) -> None:
    with pytest.raises(InputError, match="no adapter 'it'"):
        reference(scene.two, adapter="it")
    model = reference(scene.two)
    with pytest.raises(InputError, match="no adapter 'it'"):
        model.slip.adapter("it")
    with LocalWorker(scene.two / "worker") as worker, pytest.raises(InputError, match="no adapter 'it'"):
        load(scene.two / "vault", [worker.address], adapter="it")


class _Chosen:
    """A product that tells which adapter was chosen."""

    def __init__(self) -> None:
        self.adapter = Adapters(["one"])

    def product(self, _: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.full((len(x), 5), 1.0 if self.adapter.current else 0.0, np.float32)


def test_a_choice_between_q_and_k_is_a_new_product() -> None:
    source = _Chosen()
    model = nn.ModuleDict({"q": nn.Linear(4, 2, bias=False), "k": nn.Linear(4, 3, bias=False)})
    replace_layers(model, {"q+k": (Member("q", 2), Member("k", 3))}, source)
    x = torch.ones(1, 4)
    with torch.no_grad():
        with source.adapter("one"):
            assert float(model["q"](x).sum()) == 2.0
        assert float(model["k"](x).sum()) == 0.0


# --- the mathematics --------------------------------------------------------------------------------------


def product(secrets: Any, w: Any, x: np.ndarray[Any, Any], adapter: str | None) -> np.ndarray[Any, Any]:
    codec = GroupCodec(secrets)
    out = np.empty((len(x), codec.m), np.float32)
    codec.here(x, out, kernels.prepare(w).product, adapter)
    return out


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_stacked_factors_are_the_merged_matrix(members: list[tuple[int, int]], n: int, seed: int) -> None:
    """Members (rows, rank) read one input: what an adapter adds to the stacked matrix is block by block."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    base = draw(sum(rows for rows, _ in members), n)
    merged_matrix, parts, first = base.astype(np.float64), [], 0
    for rows, rank in members:
        if rank:
            a, b = draw(rows, rank), draw(rank, n)
            parts.append(LowRank(first, a, b))
            merged_matrix[first : first + rows] += a.astype(np.float64) @ b
        first += rows
    made = split_base("g", base, 12)
    secrets = replace(made.secrets, adapters={"x": tuple(parts)})
    x = draw(3, n)
    plain, adapted = product(secrets, made.w, x, None), product(secrets, made.w, x, "x")
    assert np.array_equal(plain, product(made.secrets, made.w, x, None))
    added = x.astype(np.float64) @ (merged_matrix - base).T
    size = np.abs(plain) + np.abs(x) @ np.abs(merged_matrix - base).T.astype(np.float32) + 1e-30
    assert (np.abs((adapted.astype(np.float64) - plain) - added) <= 2e-6 * size).all()


@settings(max_examples=25)
@given(st.integers(2, 10), st.integers(2, 10), st.floats(0.01, 1.0), st.integers(0, 2**32 - 1))
def test_the_rank_of_an_energy_is_the_smallest(m: int, n: int, energy: float, seed: int) -> None:
    difference = np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)
    rank = energy_rank(squared_values(difference), energy)
    kept = np.cumsum(np.linalg.svd(difference.astype(np.float64), compute_uv=False) ** 2)
    assert kept[rank - 1] >= energy * kept[-1] * (1 - 1e-9)
    assert rank == 1 or kept[rank - 2] < energy * kept[-1] * (1 + 1e-9)
    assert energy_rank(squared_values(np.zeros((m, n), np.float32)), energy) == 0


def test_the_difference_is_cut_as_well_as_can_be() -> None:
    rng = np.random.default_rng(4)
    base = rng.standard_normal((30, 20)).astype(np.float32)
    weight = base + 0.1 * rng.standard_normal((30, 20)).astype(np.float32)
    values = np.linalg.svd((weight - base).astype(np.float64), compute_uv=False)
    for rank in (0, 5, 20):
        made, (norm, of_base, tail) = split_difference("g", weight, base, rank=rank, precision=12)
        assert np.array_equal(made.w, split_base("g", base, 12).w)
        assert norm == pytest.approx(math.sqrt((values**2).sum()), rel=1e-6)
        assert of_base == pytest.approx(float(np.linalg.norm(base)), rel=1e-6)
        assert tail == pytest.approx(math.sqrt((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-5)


# --- a full fine-tune -------------------------------------------------------------------------------------


def differences(scene: Scene) -> dict[str, np.ndarray[Any, Any]]:
    """W - W_base of every group, from the checkpoints."""
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (scene.full, scene.base))
    found = {}
    for group in read_vault_manifest(scene.alone / "vault").groups:
        found[group.name] = np.concatenate(
            [
                (model.get_submodule(m.module).weight - base.get_submodule(m.module).weight).detach().numpy()
                for m in group.members
            ]
        ).astype(np.float64)
    return found


@pytest.mark.parametrize("recipe", [Recipe(rank=4), Recipe(energy=0.9), Recipe(rank=60)])
def test_the_loss_that_is_reported_is_the_true_one(scene: Scene, tmp_path: Path, recipe: Recipe) -> None:
    report = split(scene.full, tmp_path / "out", recipe, base=scene.base)
    vault, truth = open_vault(tmp_path / "out" / "vault"), differences(scene)
    lost = total = 0.0
    for group in report.groups:
        difference, secrets = truth[group.name], vault.groups[group.name]
        rest = difference - secrets.a.astype(np.float64) @ secrets.b
        norm = np.linalg.norm(difference)
        lost, total = lost + np.linalg.norm(rest) ** 2, total + norm**2
        if not norm:
            assert "layers.1.mlp" in group.name  # it was not trained, and costs nothing
            assert (group.rank, group.change, group.left_out) == (0, 0.0, 0.0)
            continue
        assert group.left_out == pytest.approx(np.linalg.norm(rest) / norm, rel=1e-3, abs=1e-6)
        if recipe.energy is not None:
            energies = np.cumsum(np.linalg.svd(difference, compute_uv=False) ** 2) / norm**2
            assert group.rank == np.searchsorted(energies, 0.9) + 1
            assert 1 - group.left_out**2 >= 0.9 - 1e-6
        else:
            assert group.rank == recipe.rank
    assert report.left_out == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert report == report_for(read_vault_manifest(tmp_path / "out" / "vault"))
    assert contents(tmp_path / "out" / "worker") == contents(scene.alone / "worker")


def test_the_full_rank_is_the_fine_tune_and_less_is_less(scene: Scene, tmp_path: Path) -> None:
    truth = AutoModelForCausalLM.from_pretrained(scene.full)
    half = AutoModelForCausalLM.from_pretrained(scene.full, dtype=torch.bfloat16)
    found = {}
    for rank in (0, 8, 64):
        split(scene.full, tmp_path / str(rank), Recipe(rank=rank), base=scene.base)
        found[rank] = divergence(reference(tmp_path / str(rank)), truth, TEXT)
    assert found[64] < divergence(half, truth, TEXT) / 100
    assert found[64] < found[8] < found[0]
    with open_split(tmp_path / "8") as model:
        assert torch.equal(logits(model), logits(reference(tmp_path / "8")))
    kept = families.kept_tensors(tmp_path / "8" / "vault")
    for name, tensor in truth.state_dict().items():
        if name in kept:  # norms and the embedding are the fine-tune's
            assert torch.equal(kept[name], tensor), name


def test_the_tail_goes_to_the_worker_only_by_name(scene: Scene, tmp_path: Path) -> None:
    dropped = split(scene.full, tmp_path / "drop", Recipe(rank=4), base=scene.base)
    given_away = split(scene.full, tmp_path / "tail", Recipe(rank=4, tail="worker"), base=scene.base)
    assert (dropped.tail, given_away.tail) == ("drop", "worker")
    assert given_away.left_out == pytest.approx(dropped.left_out)
    expected, worker = contents(scene.alone / "worker"), contents(tmp_path / "tail" / "worker")
    assert worker["share.safetensors"] != expected["share.safetensors"]
    assert worker["manifest.json"] != expected["manifest.json"]
    truth = AutoModelForCausalLM.from_pretrained(scene.full)
    for module, weight in whole_again(tmp_path / "tail").items():
        original = truth.get_submodule(module).weight
        assert torch.dist(weight, original) < 1e-3 * original.norm()
    assert divergence(reference(tmp_path / "tail"), truth, TEXT) < 0.1 * divergence(
        reference(tmp_path / "drop"), truth, TEXT
    )


@pytest.mark.parametrize("tail", ["worker", "drop"])
def test_whoever_has_the_base_reads_a_tail_at_the_worker(scene: Scene, tmp_path: Path, tail: Any) -> None:
    """Why M43: from the worker's folder and the public model alone, the tail comes out, and with it the span
    of what the vault kept.  Without the tail nothing of the fine-tune is there to be read.
    """
    split(scene.full, tmp_path / "out", Recipe(rank=4, tail=tail), base=scene.base)
    model, vault = AutoModelForCausalLM.from_pretrained(scene.base), open_vault(tmp_path / "out" / "vault")
    truth, overlaps = differences(scene), []
    for name, w in open_worker(tmp_path / "out" / "worker").matrices.items():
        if not truth[name].any():
            continue
        members = [
            model.get_submodule(member.module).weight.detach().numpy() for member in vault.members[name]
        ]
        base, integers = np.concatenate(members), w.astype(np.float64)
        level = column_factors(base)  # a function of the base: he has it too
        public = divided(base, level).astype(np.float64)
        scale = (integers * public).sum(1) / (integers**2).sum(1)  # the row scales, guessed
        found = (integers * scale[:, None] - public) * level
        rest = truth[name] - vault.groups[name].a.astype(np.float64) @ vault.groups[name].b
        cosine = (found * rest).sum() / np.linalg.norm(found) / np.linalg.norm(rest)
        assert cosine > 0.95 if tail == "worker" else abs(cosine) < 0.1, name
        if w.shape[0] < 2 * w.shape[1]:  # too few rows: rounding covers what follows
            continue
        empty = np.linalg.svd(found)[2][-4:]  # the directions of the input that the tail lacks
        overlaps.append(np.linalg.norm(empty @ vault.groups[name].b.T.astype(np.float64)) ** 2 / 4)
    assert len(overlaps) == 4
    assert min(overlaps) > 0.9 if tail == "worker" else max(overlaps) < 0.3


def test_an_adapter_to_a_full_fine_tune(scene: Scene, tmp_path: Path) -> None:
    adapter = train_lora(scene.full, tmp_path / "adapter", seed=5)
    split(scene.full, tmp_path / "out", Recipe(rank=64), base=scene.base, adapters={"more": adapter})
    truth = merged(scene.full, adapter)
    assert distance(logits(reference(tmp_path / "out", adapter="more")), logits(truth)) < 2e-3
    assert contents(tmp_path / "out" / "worker") == contents(scene.alone / "worker")


def test_more_tokens_than_the_base_keep_the_head_whole(scene: Scene, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(scene.full)
    model.resize_token_embeddings(304, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r'Rule\(pattern="lm_head", placement="vault"\)'):
        split(tmp_path / "wide", tmp_path / "out", base=scene.base)
    head = (Rule(pattern="lm_head", placement="vault"),)
    split(tmp_path / "wide", tmp_path / "out", Recipe(rank=64, rules=head), base=scene.base)
    split(scene.base, tmp_path / "alone", Recipe(rules=head), base=scene.base)
    assert contents(tmp_path / "out" / "worker") == contents(tmp_path / "alone" / "worker")
    assert distance(logits(reference(tmp_path / "out")), logits(model.eval())) < 2e-3


def test_a_fine_tune_that_has_untied_its_head(scene: Scene, tmp_path: Path) -> None:
    """The base ties head and embedding: the worker has its head, whatever became of both."""
    model = AutoModelForCausalLM.from_pretrained(scene.full)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 1.1)
    model.save_pretrained(tmp_path / "untied")
    split(tmp_path / "untied", tmp_path / "out", Recipe(rank=64), base=scene.base)
    assert contents(tmp_path / "out" / "worker") == contents(scene.alone / "worker")
    assert distance(logits(reference(tmp_path / "out")), logits(model.eval())) < 2e-3


def test_real_weights(tmp_path: Path) -> None:
    """A GPT-2 that was trained, an adapter to it, a worker process: ten times closer than bf16, and more."""
    adapter = train_lora(
        tiny_gpt2(), tmp_path / "adapter", r=4, steps=4, target_modules="all-linear", fan_in_fan_out=True
    )
    split(tiny_gpt2(), tmp_path / "alone", base=tiny_gpt2())
    split(tiny_gpt2(), tmp_path / "out", base=tiny_gpt2(), adapters={"x": adapter})
    assert contents(tmp_path / "out" / "worker") == contents(tmp_path / "alone" / "worker")
    truth, half = merged(tiny_gpt2(), adapter), merged(tiny_gpt2(), adapter).to(torch.bfloat16)
    local, text = reference(tmp_path / "out", adapter="x"), TEXT[:200]
    with open_split(tmp_path / "out", adapter="x") as model:
        assert torch.equal(logits(model), logits(local))
    assert divergence(local, truth, text) < divergence(half, truth, text) / 10
    assert divergence(reference(tmp_path / "out"), truth, text) > 10 * divergence(half, truth, text)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Conv1D, biases, tied heads: a full rank gives the fine-tune back."""
    base = families.make(family, tmp_path / "base")
    full = train_full(base, tmp_path / "full")
    split(full, tmp_path / "out", Recipe(energy=1.0), base=base)
    split(base, tmp_path / "alone", base=base)
    assert contents(tmp_path / "out" / "worker") == contents(tmp_path / "alone" / "worker")
    truth = AutoModelForCausalLM.from_pretrained(full)
    assert distance(logits(reference(tmp_path / "out")), logits(truth)) < 2e-3


# --- counted, continued, refused --------------------------------------------------------------------------


def test_what_an_adapter_costs_is_counted(scene: Scene) -> None:
    manifest = read_vault_manifest(scene.two / "vault")
    report = report_for(manifest)
    assert [adapter.name for adapter in report.adapters] == ["fr", "de"]
    header = read_header(scene.two / "vault" / "share.safetensors")
    for adapter in report.adapters:
        stored = [entry for name, entry in header.items() if f"/adapter/{adapter.name}/" in name]
        assert adapter.bytes == sum(entry.nbytes for entry in stored)
    model = AutoModelForCausalLM.from_pretrained(scene.base)
    layers = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))]
    macs = sum(3 * sum(model.get_submodule(name).weight.shape) for name in layers)
    assert report.adapters[1].macs == macs
    assert report.adapters[1].macs_share == macs / report.plain_macs
    files = [(scene.two / "vault" / f"{name}.safetensors") for name in ("share", "model")]
    on_disk = sum(entry.nbytes for file in files for entry in read_header(file).values())
    assert report.vault_bytes == on_disk
    assert (report.base, report.left_out) == ("base", None)


def test_an_interrupted_split_goes_on(scene: Scene, tmp_path: Path) -> None:
    def stop(done: int, total: int, _: str) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    arguments = (scene.full, tmp_path / "out", Recipe(energy=0.8))
    with pytest.raises(KeyboardInterrupt):
        split(*arguments, base=scene.base, progress=stop)
    report = split(*arguments, base=scene.base)
    expected = split(scene.full, tmp_path / "other", Recipe(energy=0.8), base=scene.base)
    assert report == expected
    assert contents(tmp_path / "out" / "worker") == contents(scene.alone / "worker")
    assert torch.equal(logits(reference(tmp_path / "out")), logits(reference(tmp_path / "other")))


def test_a_wrong_base_is_refused(scene: Scene, tmp_path: Path) -> None:
    other = families.make("llama", tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match="no fine-tune of"):
        split(scene.full, tmp_path / "out", base=other)
    narrow = families.make("llama", tmp_path / "narrow", intermediate_size=160)
    with pytest.raises(CheckpointError, match="gate_proj"):
        split(scene.full, tmp_path / "out", base=narrow)
    gpt2 = families.make("gpt2", tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="has no group"):
        split(scene.full, tmp_path / "out", base=gpt2)
    with pytest.raises(CheckpointError, match="not a folder"):
        split(scene.full, tmp_path / "out", base=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "options", "word"),
    [
        (Recipe(rotation="fast"), {"base": "base"}, "nothing to rotate"),
        (Recipe(rules=(Rule(pattern="lm_head", rotation="haar"),)), {"base": "base"}, "nothing to rotate"),
        (Recipe(rank=4), {"base": "base"}, "its own base"),
        (Recipe(energy=0.5), {"base": "base"}, "its own base"),
        (Recipe(tail="worker"), {"base": "base"}, "its own base"),
        (Recipe(energy=0.5), {}, "name the base"),
        (Recipe(rules=(Rule(pattern="lm_head", energy=0.5),)), {}, "name the base"),
        (Recipe(tail="worker"), {}, "name the base"),
        (Recipe(), {"adapters": {"fr": "fr"}}, "beside a public base"),
        (Recipe(), {"base": "base", "adapters": {"base": "fr"}}, "cannot be called 'base'"),
        (Recipe(), {"base": "base", "adapters": {"a/b": "fr"}}, "cannot be called 'a/b'"),
        (
            Recipe(rules=(Rule(pattern="*.q_proj", placement="vault"),)),
            {"base": "base", "adapters": {"fr": "fr"}},
            r'q_proj, .*placement "split"',
        ),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(
    scene: Scene, tmp_path: Path, recipe: Recipe, options: dict[str, Any], word: str
) -> None:
    given_options = dict(options)
    if "base" in given_options:
        given_options["base"] = scene.base
    if "adapters" in given_options:
        given_options["adapters"] = {name: scene.adapters["fr"] for name in given_options["adapters"]}
    with pytest.raises(RecipeError, match=word):
        split(scene.base, tmp_path / "out", recipe, **given_options)


def test_a_rule_s_rank_and_energy_take_each_other_s_place() -> None:
    rules = (Rule(pattern="a", energy=0.5), Rule(pattern="b", rank=3), Rule(pattern="[cd]", rank=2))
    recipe = Recipe(energy=0.9, rules=(*rules, Rule(pattern="d", energy=0.25)))
    found = {name: recipe.for_group(name) for name in "abcde"}
    assert {name: (c.rank, c.energy) for name, c in found.items()} == {
        "a": (0, 0.5), "b": (3, None), "c": (2, None), "d": (0, 0.25), "e": (0, 0.9),
    }  # fmt: skip


# --- the commands -----------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command line in this process: what it shows, spaces made one."""

    def command(*arguments: object, status: int = 0) -> str:
        assert run_here(monkeypatch, [*arguments]) == status
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    return command


def test_the_commands(scene: Scene, tmp_path: Path, run: Callable[..., str]) -> None:
    out, adapters = (
        tmp_path / "out",
        ["--adapter", f"fr={scene.adapters['fr']}", "--adapter", scene.adapters["de"]],
    )
    done = slip("split", scene.base, out, "--base", scene.base, *adapters, "--json")
    assert [adapter["name"] for adapter in last_json(done)["adapters"]] == ["fr", "de"]
    assert "nothing of yours" in done.stderr
    assert "can be restored" not in done.stderr
    shown = run("inspect", out)
    assert "public base alone" in shown
    assert "adapter fr" in shown
    assert "hide nothing" in run("inspect", out / "worker")
    assert '"public_base": true' in run("inspect", out / "worker", "--json")
    told = [
        run("generate", out, "--prompt", "ab", "--max-new-tokens", 8, *choice, "--json")
        for choice in ([], ["--adapter", "base"], ["--adapter", "fr"])
    ]
    texts = [re.search(r'"text": "(.*?)", "tokens"', shown)[1] for shown in told]
    assert texts[0] == texts[1] != texts[2]


def test_the_commands_for_a_full_fine_tune(scene: Scene, tmp_path: Path, run: Callable[..., str]) -> None:
    base = ["--base", scene.base]
    shown = run("split", scene.full, tmp_path / "one", *base, "--energy", 0.9)
    assert "kept of it" in shown
    assert "lost" in shown
    assert "Do not give" not in shown
    assert "kept of it" in run("inspect", tmp_path / "one")
    shown = run("split", scene.full, tmp_path / "two", *base, "--rank", 3, "--tail-to-worker")
    assert "Do not give this share away" in shown
    assert "Do not give this share away" in run("inspect", tmp_path / "two")
    assert "hide nothing" not in run("inspect", tmp_path / "two" / "worker")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("energy = 0.5\n")
    run("split", scene.full, tmp_path / "three", *base, "--recipe", recipe)
    assert read_vault_manifest(tmp_path / "three" / "vault").recipe.energy == 0.5
    refused = (
        ["--rank", 3, "--energy", 0.5],
        ["--rotation", "fast"],
        ["--adapter", "a=b", "--adapter", "a=c"],
    )
    for options in refused:
        run("split", scene.full, tmp_path / "four", *base, *options, status=2)
    assert not (tmp_path / "four").exists()


def test_reading_an_adapter_needs_no_peft(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = (Path(__file__).parents[2] / "src").rglob("*.py")
    assert not [
        file for file in sources if re.search(r"^\s*(import|from) peft\b", file.read_text(), re.MULTILINE)
    ]
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it, by whatever way, is an error now
    split(scene.base, tmp_path / "out", base=scene.base, adapters={"fr": scene.adapters["fr"]})
    assert contents(tmp_path / "out" / "worker") == contents(scene.alone / "worker")
