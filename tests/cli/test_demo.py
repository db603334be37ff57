"""The demonstration: the hybrid is the original, and what a thief gets is worthless."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import families
import sliplm
from sliplm.cli import demo as screen
from sliplm.engines.transformers.answer import answer, encode, load_tokenizer
from sliplm.engines.transformers.perplexity import perplexity
from sliplm.engines.transformers.thief import thief
from sliplm.errors import InputError, ShareError
from sliplm.examples import cache_dir, smollm2
from sliplm.examples.demo import HYBRID, ORIGINAL, THIEF, WHO, Prepared, Watcher, compare, prepare, trio
from sliplm.planning.counts import report_for
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import read_vault_manifest
from ties import same_up_to_ties

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "COLUMNS": "100"}
TEXT = "The vault keeps the small secret part, and the worker computes on masked numbers. " * 8


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp(request.param)
    families.make_with_tokenizer(request.param, folder / "model")
    sliplm.split(folder / "model", folder, Recipe(rank=4))
    return Prepared(folder / "model", folder, report_for(read_vault_manifest(folder / "vault")))


def test_compare(prepared: Prepared) -> None:
    console = Console(width=100, record=True)
    with trio(prepared) as three, screen._Stage(console, columns=True) as stage:
        found = compare(three, stage, prompts=["Hello", "Who?"], new_tokens=6, text=TEXT, text_tokens=100)
    for done_round in found.rounds:
        ids = encode(three.tokenizer, done_round.prompt)["input_ids"]
        mine, theirs = (done_round.answers[who].tokens for who in (HYBRID, ORIGINAL))
        assert same_up_to_ties(three.models[ORIGINAL], ids, mine, theirs)
    assert found.text_tokens == 100
    assert found.perplexity[HYBRID] == pytest.approx(found.perplexity[ORIGINAL], rel=0.01)
    stolen, own = (dict(three.models[who].named_parameters()) for who in (THIEF, ORIGINAL))
    norms = [((stolen[name] - w).norm().item(), w.norm().item()) for name, w in own.items()]
    apart = max(change / norm for change, norm in norms if norm > 0)
    assert apart > 0.5  # of so small a model the perplexities may be close
    assert found.perplexity[THIEF] != found.perplexity[ORIGINAL]
    assert found.counters["rows_dealt_late"] > 0  # perplexity is not dealt for ahead
    document = json.loads(json.dumps(found.as_dict()))
    assert document["same_tokens"] is found.same
    assert set(document["rounds"][0]["answers"]) == set(WHO)
    console.print(screen._results(prepared.report, found))
    text = console.export_text()
    assert "> Who?" in text
    assert f"{sum(done_round.same for done_round in found.rounds)} of 2" in text


def test_masks_are_dealt_before_an_answer(prepared: Prepared) -> None:
    late: dict[str, list[float]] = {"before": [], "after": []}

    class Note(Watcher):
        def answered(self, who: str, _: object) -> None:
            if who == ORIGINAL:
                late["before"].append(three.models[HYBRID].slip.counters.exchanges)
            if who == HYBRID:
                late["after"].append(three.models[HYBRID].slip.counters.exchanges)

    with trio(prepared) as three:
        vault = three.models[HYBRID].slip
        found = compare(three, Note(), prompts=["Hello"], new_tokens=6, text=TEXT, text_tokens=20)
        tokens = len(found.rounds[0].answers[HYBRID].tokens)
        assert late["after"][0] - late["before"][0] == tokens * prepared.report.exchanges
        assert vault.counters.exchanges > late["after"][0]


def test_thief_has_the_true_norms_and_nothing_else_of_the_matrices(prepared: Prepared) -> None:
    original = AutoModelForCausalLM.from_pretrained(prepared.model)
    stolen = thief(prepared.model, prepared.out)
    split = {
        member.module
        for group in read_vault_manifest(prepared.out / "vault").groups
        for member in group.members
    }
    tied = original.get_input_embeddings().weight
    for name, module in original.named_modules():
        guess = stolen.get_submodule(name)
        if name not in split:
            for key, parameter in module.named_parameters(recurse=False):
                assert torch.equal(parameter, guess.get_parameter(key))
        elif module.weight is tied:
            assert torch.equal(tied, guess.weight)  # he is given the embedding
        else:
            axis = 0 if type(module).__name__ == "Conv1D" else 1
            torch.testing.assert_close(
                guess.weight.norm(dim=axis), module.weight.norm(dim=axis), rtol=1e-4, atol=1e-5
            )
            cosine = torch.cosine_similarity(guess.weight.flatten(), module.weight.flatten(), dim=0)
            assert abs(cosine) < 0.1, name


def test_thief_of_another_model(prepared: Prepared, tmp_path: Path) -> None:
    families.make("opt", tmp_path / "other")
    with pytest.raises(ShareError, match="give the model that was split"):
        thief(tmp_path / "other", prepared.out)


def test_perplexity_against_a_sum_by_hand(prepared: Prepared) -> None:
    model = AutoModelForCausalLM.from_pretrained(prepared.model)
    tokens = torch.randint(0, 200, (23,), generator=torch.Generator().manual_seed(0))
    losses = []
    for part in (tokens[:11], tokens[11:22]):  # a last window of one token predicts nothing
        with torch.no_grad():
            logs = model(part[None]).logits[0].log_softmax(-1)
        losses += [-logs[i, part[i + 1]].item() for i in range(len(part) - 1)]
    assert perplexity(model, tokens, 11) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    with pytest.raises(InputError):
        perplexity(model, tokens[:1])


def test_answer_streams_its_text(prepared: Prepared) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(prepared.model), load_tokenizer(prepared.model)
    inputs = encode(tokenizer, "Hello")
    shown: list[str] = []
    found = answer(model, tokenizer, inputs, new_tokens=12, show=shown.append)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 5:]
    assert found.tokens == tuple(expected.tolist())
    assert found.text == shown[-1] == tokenizer.decode(expected, skip_special_tokens=True)
    assert found.prompt_tokens == 5
    with pytest.raises(InputError, match="no chat template"):
        encode(tokenizer, "Hello", chat=True)


def test_prepare_twice(tmp_path: Path) -> None:
    if not (cache_dir() / "SmolLM2-135M-Instruct-v1").exists():
        pytest.skip("SmolLM2 is not in the cache")
    calls = []

    def split(model: Path, out: Path, recipe: Recipe) -> sliplm.planning.counts.SplitReport:  # type: ignore[name-defined]
        calls.append(model)
        for name in ("vault", "worker"):
            (out / name).mkdir()
        return report

    report = report_for(read_vault_manifest(prepare(None, sliplm.split).out / "vault"))
    made = prepare(tmp_path, split)
    assert made.model == tmp_path / "model"
    assert not made.model.is_symlink()
    assert (made.model / "model.safetensors").stat().st_nlink == 1  # changing it leaves the cache alone
    assert calls == [tmp_path / "model"]


def test_the_real_demo() -> None:
    """`slip demo` with SmolLM2: three prompts, three models, two thousand tokens of Wikipedia."""
    done = subprocess.run(
        [sys.executable, "-m", "sliplm", "demo", "--json"],
        env=ENV, capture_output=True, text=True, timeout=590, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "dequantised" in done.stderr
    out = Path(found["paths"]["vault"]).parent
    assert f"  slip generate {shlex.quote(str(out))}\n" in done.stderr  # what to type next
    source = smollm2()
    plain, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        load_tokenizer(source),
    )
    for done_round in found["rounds"]:
        ids = encode(tokenizer, done_round["prompt"], chat=True)["input_ids"]
        mine, theirs = (done_round["answers"][who]["tokens"] for who in (HYBRID, ORIGINAL))
        assert done_round["same_tokens"] is (mine == theirs)
        assert same_up_to_ties(plain, ids, mine, theirs)
    assert "Paris" in found["rounds"][0]["answers"][HYBRID]["text"]
    assert "Paris" not in found["rounds"][0]["answers"][THIEF]["text"]
    assert found["perplexity"][HYBRID] == pytest.approx(found["perplexity"][ORIGINAL], rel=0.01)
    assert found["perplexity"][THIEF] > found["uniform"]
    assert found["split"]["exchanges"] == 121
