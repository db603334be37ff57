"""Mixtures of experts: every family's fused experts, split, against the model itself; what a worker sees."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import families
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from sliplm.cli import app
from sliplm.engines.experts import SlipExperts
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.thief import thief
from sliplm.errors import InputError, MaskError, RecipeError, ShareError
from sliplm.masks.expected import rows_for
from sliplm.network.transport import Connection
from sliplm.parties.worker import Worker
from sliplm.planning.counts import report_for
from sliplm.protocol.worker_side import Several, WorkerSide
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.share import open_worker, read_vault_manifest

SMALL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
}
RECIPE = Recipe(rank=4)
TOKENS = torch.randint(3, 299, (2, 7), generator=torch.Generator().manual_seed(1))


class Watching(Worker):
    """Honest; remembers of each frame of several groups who got how many rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(open_worker(folder), threads=1)
        self.frames: list[dict[int, int]] = []

    def _answer_several(self, connection: Connection, side: WorkerSide, asked: Several) -> None:
        self.frames.append(dict(asked.parts))
        super()._answer_several(connection, side, asked)


@contextmanager
def served(out: Path, **options: Any) -> Iterator[tuple[PreTrainedModel, Watching]]:
    worker, ready = Watching(out / "worker"), threading.Event()
    address = f"unix:{out / 'w.sock'}"
    thread = threading.Thread(target=worker.serve, args=(address, None, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(60)
        model: Any = load(out / "vault", [address], **({"ahead": 0} | options))
        with closing(model.slip):
            yield model, worker
    finally:
        worker.stop()
        thread.join(60)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    split(families.make("qwen3_moe", folder / "model", **SMALL), folder / "out", RECIPE)
    return folder


@pytest.mark.parametrize("family", families.MIXTURES)
def test_every_family_equals_its_quantised_model(family: str, tmp_path: Path) -> None:
    """Bit for bit, with two exchanges for a layer's experts; and that one is close to the model itself."""
    folder = families.make(family, tmp_path / "model", **SMALL)
    report = split(folder, tmp_path / "out", RECIPE)
    whole = [group.name for group in report.groups if group.placement == "vault"]
    assert [name.rpartition(".")[2] for name in whole] in (["gate"], ["router"])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantised = reference(tmp_path / "out")
    with torch.no_grad(), served(tmp_path / "out") as (model, worker):
        wanted, near, found = (m(TOKENS).logits for m in (plain, quantised, model))
        counted = model.slip.counters.exchanges
    assert torch.equal(near, found)
    logs = [x.log_softmax(-1) for x in (near, wanted)]
    assert functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean() < 1e-5
    assert len(worker.frames) == 2
    assert (
        counted == report.exchanges == report_for(read_vault_manifest(tmp_path / "out" / "vault")).exchanges
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe"])
def test_both_stored_forms_are_read(family: str, tmp_path: Path) -> None:
    """One tensor for each expert, as these models are published, and fused, as transformers 5 has them."""
    families.make(family, tmp_path / "single", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "single", dtype=torch.float32)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    answers = []
    for form in ("single", "fused"):
        split(tmp_path / form, tmp_path / f"{form}-out", RECIPE, i_know=True)
        with torch.no_grad():
            answers.append(reference(tmp_path / f"{form}-out")(TOKENS).logits)
    with torch.no_grad():
        wanted = model(TOKENS).logits
    for answer in answers:
        assert torch.dist(answer, wanted) < 0.02 * wanted.norm()


def test_one_weight_of_the_experts_may_stay_whole(tmp_path: Path) -> None:
    folder = families.make("gpt_oss", tmp_path / "model", **SMALL)
    rule = Rule(pattern="*.experts.down_proj.*", placement="vault")
    report = split(folder, tmp_path / "out", Recipe(rank=4, rules=(rule,)))
    assert report.exchanges == 4
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted, found = (m(TOKENS).logits for m in (model, reference(tmp_path / "out")))
    assert torch.dist(wanted, found) < 0.02 * wanted.norm()


def test_the_worker_knows_experts_by_secret_numbers(mixture: Path, tmp_path: Path) -> None:
    """One order for a layer; another split has another one (16 experts are alike once in 2 10^13 splits)."""
    folder, orders = families.make("qwen3_moe", tmp_path / "model", **SMALL, num_experts=16), []
    for out in (tmp_path / "a", tmp_path / "b"):
        split(folder, out, RECIPE, i_know=True)
        experts = [g for g in read_vault_manifest(out / "vault").groups if g.expert is not None]
        for weight in ("gate_up_proj", "down_proj"):
            mine = [g for g in experts if g.expert.weight == weight]
            assert [g.name.rpartition(".")[2] for g in mine] == [str(i) for i in range(16)]
            orders.append([g.expert.number for g in mine])
    assert orders[0] == orders[1]
    assert orders[2] == orders[3]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == list(range(16))


def test_routing_can_be_hidden(mixture: Path) -> None:
    """M: without the option the frames tell who was chosen, with it they depend on the number of tokens."""
    with torch.no_grad():
        wanted = reference(mixture / "out")(TOKENS).logits
        with served(mixture / "out") as (model, worker):
            assert torch.equal(model(TOKENS).logits, wanted)
            assert [sum(frame.values()) for frame in worker.frames] == [2 * TOKENS.numel()] * 2
            model(TOKENS[:1, :1])
            assert all(len(frame) == 2 for frame in worker.frames[-2:]), "two of four are chosen"
        with served(mixture / "out", hide_routing=True) as (model, worker):
            assert torch.equal(model(TOKENS).logits, wanted)
            assert [set(frame.values()) for frame in worker.frames] == [{TOKENS.numel()}] * 2
            assert [len(frame) for frame in worker.frames] == [4, 4]
            assert torch.equal(
                model(TOKENS.flip(1)).logits, reference(mixture / "out")(TOKENS.flip(1)).logits
            )
            assert worker.frames[2:] == worker.frames[:2]


def test_experts_refuse_what_they_cannot_do(mixture: Path) -> None:
    model = reference(mixture / "out")
    (experts,) = (module for module in model.modules() if isinstance(module, SlipExperts))
    x = torch.zeros(0, 64)
    assert experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 64)
    with pytest.raises(AttributeError, match="split"):
        _ = experts.gate_up_proj
    one = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(InputError, match="NaN"):
        experts(torch.full((1, 64), torch.nan), one, torch.ones(1, 2))
    with pytest.raises(InputError, match="gradient"):
        experts(torch.ones(1, 64, requires_grad=True), one, torch.ones(1, 2))
    other = families.make("qwen3_moe", mixture / "other", **SMALL, num_experts=3)
    plain = AutoModelForCausalLM.from_pretrained(other)
    from sliplm.engines.experts import replace_experts

    with pytest.raises(ShareError, match="4 experts"):
        replace_experts(plain, read_vault_manifest(mixture / "out" / "vault").groups, None)
    rows = torch.zeros(2, 64), torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2)
    for strict in (False, True):
        with pytest.raises(InputError, match="cannot be traced or exported"):
            torch.export.export(experts, rows, strict=strict)


def test_more_groups_than_messages_can_number_are_refused_before_the_split(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliplm.engines.writing.MAX_GROUPS", 10)  # qkv, o, lm_head and 8 of experts
    with pytest.raises(RecipeError, match=r"11 groups .* at most 10 groups"):
        split(mixture / "model", tmp_path / "out", RECIPE, i_know=True)
    assert not (tmp_path / "out" / "vault").exists()
    assert not list((tmp_path / "out").glob(".partial/*/*"))
    rule = Rule(pattern="*.down_proj.*", placement="vault")  # as the message says
    assert (
        split(mixture / "model", tmp_path / "out", Recipe(rank=4, rules=(rule,)), i_know=True).exchanges == 4
    )


def test_experts_are_counted_by_their_use(mixture: Path) -> None:
    manifest = read_vault_manifest(mixture / "out" / "vault")
    report = report_for(manifest)
    experts = [group for group in report.groups if group.exchange]
    assert len(experts) == 8
    assert {group.use for group in experts} == {0.5}
    assert sum(group.plain_macs for group in experts) == 2 * (80 * 64 + 40 * 64)
    assert sum(group.bytes_to_worker for group in experts) == 4 * 2 * (64 + 40)
    assert report.exchanges == 5
    with torch.no_grad(), served(mixture / "out") as (model, _):
        model(TOKENS)
        counters = model.slip.counters
        assert counters.bytes_sent == TOKENS.numel() * report.bytes_to_worker
        assert counters.bytes_received == TOKENS.numel() * report.bytes_from_worker


def test_masks_are_kept_by_expected_use(mixture: Path) -> None:
    """Half the rows for an expert that sees half of the tokens; all where every expert gets every row."""
    for options, kept in (({}, 4), ({"hide_routing": True}, 8)):
        with served(mixture / "out", ahead=8, **options) as (model, _), torch.no_grad():
            vault: Any = model.slip
            assert vault.wait_dealt(120)
            ready = [vault._supply.memory.available(i) for i in range(len(vault.groups))]
            wanted = [kept if ".experts." in name else 8 for name in vault.groups]
            assert all(want - 2 < found <= want + 2 for want, found in zip(wanted, ready, strict=True))
            assert torch.equal(model(TOKENS).logits, reference(mixture / "out")(TOKENS).logits)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of eight experts are chosen, by a router that was never trained to choose all alike."""
    folder = tmp_path_factory.mktemp("eight")
    split(families.make("qwen3_moe", folder / "model", **SMALL, num_experts=8), folder / "out", RECIPE)
    return folder


def deal(folder: Path, pool: Path, *words: object) -> dict[str, Any]:
    command = ["deal", str(folder / "out" / "vault"), str(pool), *map(str, words), "--json"]
    result = CliRunner().invoke(app, command)
    if result.exception is not None:
        raise result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_pool_serves_about_the_tokens_that_it_was_dealt_for(
    eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the pool alone, one token at a time and a prompt; then it is dealt by what it has seen."""
    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "state"))
    before = deal(eight, tmp_path / "pool", "--tokens", 192)
    assert before["tokens"] == 192
    rows = {".experts." in g["name"]: g["ready"] for g in before["groups"]}
    assert rows == {False: 192, True: rows_for(192, 0.5)}
    words = torch.randint(3, 299, (1, 128), generator=torch.Generator().manual_seed(7))
    options = {"share": None, "pool": tmp_path / "pool"}
    with served(eight / "out", **options) as (model, worker), torch.no_grad():
        assert torch.equal(model(words[:, :100]).logits, reference(eight / "out")(words[:, :100]).logits)
        for word in words[0, 100:]:
            model(word[None, None])
        assert model.slip.counters.rows_dealt == 0
        seen = sum(map(Counter, worker.frames), Counter())
    after = deal(eight, tmp_path / "pool", "--status")
    burnt = [group["burnt"] for group in after["groups"]]
    assert all(
        128 <= b <= 192 for b, g in zip(burnt, after["groups"], strict=True) if ".experts." not in g["name"]
    )
    assert all(burnt[i] >= count for i, count in seen.items())
    assert 0 < after["tokens"] <= 192 - 128
    again = deal(eight, tmp_path / "pool", "--tokens", 400)
    often, seldom = max(seen, key=seen.__getitem__), min(seen, key=seen.__getitem__)
    assert seen[often] > 1.5 * seen[seldom], "this router favours some"
    assert again["groups"][often]["ready"] > again["groups"][seldom]["ready"]
    whole = deal(eight, tmp_path / "other", "--tokens", 20, "--hide-routing")
    assert {group["ready"] for group in whole["groups"]} == {20}


def test_an_expert_without_masks_is_dealt_for_on_demand(
    eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens at a few experts, of a pool for few tokens: what is missing the vault deals itself."""
    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "state"))
    deal(eight, tmp_path / "pool", "--tokens", 8)
    words = torch.full((1, 40), 7)
    with torch.no_grad():
        wanted = reference(eight / "out")(words).logits
        with served(eight / "out", pool=tmp_path / "pool", share=eight / "out" / "worker") as (model, _):
            assert torch.equal(model(words).logits, wanted)
            assert model.slip.counters.rows_dealt_late > 0
        with served(eight / "out", pool=tmp_path / "pool") as (model, _):
            with pytest.raises(MaskError, match=r"deal more with `slip deal`"):
                model(words)


def test_dealing_for_tokens_gives_experts_what_they_are_expected_to_need(eight: Path) -> None:
    with served(eight / "out") as (model, _):
        vault: Any = model.slip
        vault.deal(100)
        ready = [vault._supply.memory.available(i) for i in range(len(vault.groups))]
        assert ready == [rows_for(100, 0.5) if ".experts." in name else 100 for name in vault.groups]
        (name,) = [name for name in vault.groups if name.endswith("gate_up_proj.3")]
        vault.deal(5, [name])
        assert vault._supply.memory.available(vault.groups.index(name)) == rows_for(100, 0.5) + 5


def test_inspect_shows_experts_together(tmp_path: Path) -> None:
    """A row for a weight of all layers' experts, and what part of the tokens they see."""
    small = SMALL | {"num_hidden_layers": 2}
    split(families.make("qwen3_moe", tmp_path / "model", **small), tmp_path / "out", RECIPE)
    shown = {
        side: CliRunner().invoke(app, ["inspect", str(tmp_path / "out" / side)], env={"COLUMNS": "100"})
        for side in ("vault", "worker")
    }
    for name, result in shown.items():
        assert result.output.count(" x8 ") == 2, result.output
        assert [result.output.count(f"experts.{w}_proj") for w in ("gate_up", "down")] == [1, 1]
        assert result.output.count("for 50 % of the") == (2 if name == "vault" else 0), result.output
    assert "hide_routing" in shown["worker"].output


def test_a_thief_of_the_worker_share_has_no_model(mixture: Path) -> None:
    model = thief(mixture / "model", mixture / "out")
    plain = AutoModelForCausalLM.from_pretrained(mixture / "model", dtype=torch.float32)
    (name,) = [name for name, _ in plain.named_parameters() if name.endswith("experts.gate_up_proj")]
    mine, true = model.get_parameter(name), plain.get_parameter(name)
    assert torch.allclose(mine.norm(dim=-1), true.norm(dim=-1), rtol=1e-3)
    assert abs(functional.cosine_similarity(mine.flatten(), true.flatten(), dim=0)) < 0.1


def test_a_trained_mixture_keeps_its_perplexity(tmp_path: Path) -> None:
    """Trained for seconds on a text with a rule (each token follows from the one before)."""
    folder = families.make("mixtral", tmp_path / "model", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = torch.Generator().manual_seed(3)
    following = torch.randperm(290, generator=words)
    steps = [torch.randint(290, (8, 1), generator=words)]
    for _ in range(23):
        steps.append(following[steps[-1]])
    text = torch.cat(steps, dim=1) + 3
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        model(text, labels=text).loss.backward()
        optimiser.step()
    model.eval().save_pretrained(tmp_path / "trained")
    split(tmp_path / "trained", tmp_path / "out", RECIPE)
    with torch.no_grad():
        one, two = (m(text, labels=text) for m in (model, reference(tmp_path / "out")))
    logs = [x.logits.log_softmax(-1) for x in (two, one)]
    assert one.loss < 1.0, "it has learnt something (untrained: 5.7)"
    assert abs(one.loss - two.loss) < 1e-3
    assert functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean() < 1e-4


def test_generation_goes_on(mixture: Path) -> None:
    with served(mixture / "out", dtype=torch.bfloat16) as (model, _), torch.no_grad():
        one = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
        two = reference(mixture / "out", dtype=torch.bfloat16).generate(
            TOKENS[:1], max_new_tokens=4, do_sample=False
        )
    assert np.array_equal(one, two)
