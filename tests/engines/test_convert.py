"""Checkpoint -> two shares: right, resumable, small in memory, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
from sliplm.engines.transformers.answer import load_tokenizer
from sliplm.engines.transformers.convert import split
from sliplm.errors import CheckpointError, RecipeError, SealError, ShareError
from sliplm.planning.counts import counts_for_shapes, report_for
from sliplm.shares.contents import secret_tensors
from sliplm.shares.keysource import find
from sliplm.shares.manifest import Attention
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.share import check_pair, open_vault, open_worker, read_vault_manifest

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
RECIPE = Recipe(rank=4)
EXPERTS = (Rule(pattern="*.mlp.experts", placement="vault"), Rule(pattern="*.mlp.gate", placement="vault"))


def whole_again(out: Path) -> dict[str, torch.Tensor]:
    """The weights that both shares together stand for, by module."""
    vault, worker = open_vault(out / "vault"), open_worker(out / "worker")
    check_pair(vault, worker)
    weights = {}
    for name, secrets in vault.groups.items():
        hidden = (worker.matrices[name] * secrets.scale[:, None]).astype(np.float32)
        inner = secrets.rotation_in().apply_transpose(hidden)
        rest = secrets.rotation_out().apply_transpose(np.ascontiguousarray(inner.T)).T
        stacked = torch.from_numpy(secrets.a @ secrets.b + rest)
        members = vault.members[name]
        for member, part in zip(members, torch.split(stacked, [m.rows for m in members]), strict=True):
            weights[member.module] = part
    return weights


def assert_same_model(model_dir: Path, out: Path, tolerance: float = 1e-3) -> None:
    """The shares hold every weight of the checkpoint, and the kept ones exactly."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    weights = whole_again(out)
    kept = families.kept_tensors(out / "vault")
    for module, weight in weights.items():
        original = model.get_submodule(module).weight.float()
        original = original.T if type(model.get_submodule(module)).__name__ == "Conv1D" else original
        assert torch.dist(weight, original) < tolerance * original.norm(), module
        assert f"{module}.weight" not in kept
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.removesuffix(".weight") not in weights and ".experts." not in name and name in kept:
            assert torch.equal(kept[name], parameter), name
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    for name, _ in model.named_parameters():
        assert name in kept or name.removesuffix(".weight") in weights or ".experts." in name or name in tied


def nothing_whole(out: Path) -> bool:
    return not (out / "vault").exists() and not (out / "worker").exists()


@pytest.mark.parametrize("family", families.DENSE)
def test_the_shares_hold_the_model(family: str, tmp_path: Path) -> None:
    model = families.make(family, tmp_path / "model")
    steps: list[tuple[int, int, str]] = []
    report = split(model, tmp_path / "out", RECIPE, progress=lambda *step: steps.append(step))
    assert_same_model(model, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["vault", "worker"]
    assert [name for _, _, name in steps] == [*open_vault(tmp_path / "out" / "vault").groups, ""]
    assert steps[-1][0] == steps[-1][1] == sum(g.rows * g.columns for g in report.groups)


def test_the_vault_is_a_model_folder(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "spiece.model"):
        (model / name).write_text("{}")
    for name in ("pytorch_model.bin", "train.py", "notes.txt"):
        (model / name).write_text("x")
    split(model, tmp_path / "out", RECIPE)
    vault = tmp_path / "out" / "vault"
    assert {file.name for file in vault.iterdir()} == {
        "config.json", "generation_config.json", "manifest.json", "model.safetensors", "seal.json",
        "share.safetensors", "tokenizer.json", "tokenizer_config.json", "merges.txt", "spiece.model",
        "ledger.sealed",
    }  # fmt: skip
    config = json.loads((vault / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "slip"}
    assert config["tie_word_embeddings"] is False  # the head was split off, the embedding stays whole
    kept = families.kept_tensors(vault)
    assert "model.embed_tokens.weight" in kept
    assert "lm_head.weight" not in kept


@pytest.fixture(scope="module")
def with_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with named chat templates and the steps of sentence-transformers."""
    tmp_path = tmp_path_factory.mktemp("folders")
    templates = {"default": "one", "tool_use": "two"}
    model = families.make_with_tokenizer("llama", tmp_path / "model", template=templates, num_hidden_layers=1)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    steps = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (model / "modules.json").write_text(json.dumps(steps))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (model / "1_Pooling" / "other.txt").write_text("x")
    (model / "additional_chat_templates" / "notes.py").write_text("x")
    (model / "tekken.json").write_text("{}")
    split(model, tmp_path / "out", RECIPE)
    return tmp_path / "out" / "vault"


def test_named_templates_and_steps_of_sentence_transformers_go_along(with_folders: Path) -> None:
    files = open_vault(with_folders).files
    inside = {name for name in files if "/" in name}
    assert inside == {"additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"}
    assert {"modules.json", "tekken.json"} <= set(files)
    assert load_tokenizer(files).chat_template == {"default": "one", "tool_use": "two"}


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "additional_chat_templates/tool_use.jinja"])
@pytest.mark.parametrize("change", ["alter", "remove", "add"])
def test_what_lies_in_their_folders_is_checked(
    with_folders: Path, name: str, change: str, tmp_path: Path
) -> None:
    file = shutil.copytree(with_folders, tmp_path / "vault") / name
    if change == "alter":
        file.write_bytes(file.read_bytes()[:-1] + b"X")
    elif change == "remove":
        file.unlink()
    else:
        (file.parent / "more.jinja").write_text("evil")
    with pytest.raises(ShareError, match=r"altered|cannot be read|not one of the files"):
        open_vault(tmp_path / "vault")


@pytest.mark.parametrize(
    "step",
    [
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "1_Pooling", "type": "mine.Pooling"},
        {"path": "../1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "1_Pooling"},
        7,
    ],
)
def test_a_step_that_cannot_go_along_is_refused_before_the_split(step: object, tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model", num_hidden_layers=1)
    (model / "modules.json").write_text(json.dumps([step]))
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        split(model, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()


def test_a_head_in_the_vault_stays_tied(tmp_path: Path) -> None:
    model = families.make("gpt2", tmp_path / "model")
    report = split(
        model, tmp_path / "out", Recipe(rank=2, rules=(Rule(pattern="lm_head", placement="vault"),))
    )
    config = json.loads((tmp_path / "out" / "vault" / "config.json").read_text())
    assert config.get("tie_word_embeddings", True)
    assert report.exchanges == len(report.groups) - 1
    assert report.groups[-1].name == "lm_head"
    assert report.groups[-1].vault_macs.whole == 300 * 60
    assert_same_model(model, tmp_path / "out")


def test_everything_in_the_vault(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    report = split(model, tmp_path / "out", Recipe(placement="vault"))
    assert (report.exchanges, report.worker_bytes, report.vault_macs_share) == (0, 0, 1.0)
    check_pair(open_vault(tmp_path / "out" / "vault"), open_worker(tmp_path / "out" / "worker"))
    assert_same_model(model, tmp_path / "out")


def test_a_head_stored_beside_a_tied_embedding_is_the_one_that_is_split(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = (
        tensors["model.embed_tokens.weight"] * 3
    )  # transformers then does not tie them
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    split(model, tmp_path / "out", RECIPE)
    head = whole_again(tmp_path / "out")["lm_head"]
    assert torch.dist(head, tensors["lm_head.weight"]) < 1e-3 * head.norm()


def test_a_tied_embedding_stored_as_the_head_only(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    split(model, tmp_path / "out", RECIPE)
    kept = families.kept_tensors(tmp_path / "out" / "vault")
    assert torch.equal(kept["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert_same_model(model, tmp_path / "out")


def test_an_older_checkpoint_without_the_prefix_and_with_masks(tmp_path: Path) -> None:
    model = families.make("gpt2", tmp_path / "model")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(model / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    split(model, tmp_path / "out", RECIPE)
    assert_same_model(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    model = families.make("qwen2", tmp_path / "model", dtype=dtype, max_shard="60KB")
    assert (model / "model.safetensors.index.json").exists()
    assert len(list(model.glob("*.safetensors"))) > 3
    split(model, tmp_path / "out", RECIPE)
    assert_same_model(model, tmp_path / "out")
    kept = families.kept_tensors(tmp_path / "out" / "vault")
    assert {tensor.dtype for tensor in kept.values()} == {dtype}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stay_in_the_vault_if_the_recipe_says_so(family: str, tmp_path: Path) -> None:
    model = families.make(family, tmp_path / "model")
    some = Recipe(rank=4, rules=(Rule(pattern="*.experts.down_proj.1", placement="vault"),))
    with pytest.raises(RecipeError, match=r'the pattern "model\.layers\.[01]\.mlp\.experts\.down_proj\.\*"'):
        split(model, tmp_path / "out", some)
    assert nothing_whole(tmp_path / "out")
    split(model, tmp_path / "out", Recipe(rank=4, rules=EXPERTS))
    assert_same_model(model, tmp_path / "out")
    theirs, ours = load_file(model / "model.safetensors"), families.kept_tensors(tmp_path / "out" / "vault")
    experts = [name for name in theirs if ".experts." in name]
    assert experts
    assert all(torch.equal(theirs[name], ours[name]) for name in experts)


# --- what is refused --------------------------------------------------------------------------------------


def _sharded(folder: Path) -> Path:
    return families.make("qwen2", folder, max_shard="60KB")


def _change(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        for file in model.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                new = change(tensors[name].clone())
                tensors = {
                    k: (new if k == name else v) for k, v in tensors.items() if k != name or new is not None
                }
                save_file(
                    {k: v for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"}
                )

    return apply


def _poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return change


def _only_bin(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _no_weights(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()


def _first_shard(model: Path) -> Path:
    return min(model.glob("*.safetensors"))


def _cut_shard(model: Path) -> None:
    os.truncate(_first_shard(model), _first_shard(model).stat().st_size - 5)


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        path = model / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def _outside(weights: dict[str, str]) -> None:
    weights["lm_head.weight"] = "../model.safetensors"


def _config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 180}))


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"

BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "no config.json"),
    "pickle only": (_only_bin, "save_pretrained"),
    "no weights": (_no_weights, "complete checkpoint"),
    "missing shard": (lambda m: _first_shard(m).unlink(), "00001.*missing"),
    "cut shard": (_cut_shard, "00001.*truncated"),
    "empty shard": (lambda m: os.truncate(_first_shard(m), 0), "00001.*truncated"),
    "bad index": (lambda m: (m / "model.safetensors.index.json").write_text("[]"), "index"),
    "shard outside": (_index(_outside), "outside the folder"),
    "shard lacks": (_index(lambda w: w.update({"x.weight": w["lm_head.weight"]})), "lacks x.weight"),
    "tensor missing": (_index(lambda w: w.pop(Q)), Q),
    "norm missing": (_index(lambda w: w.pop(NORM)), NORM),
    "NaN": (_change(Q, _poison(float("nan"))), Q),
    "infinite": (_change(Q, _poison(float("-inf"))), Q),
    "NaN in what is kept": (_change(NORM, _poison(float("nan"))), NORM),
    "wrong shape": (_change(Q, lambda t: t[:-1].clone()), Q),
    "other config": (_config, "config.json calls for"),
    "integers": (_change(Q, lambda t: t.to(torch.int8)), "before quantisation"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_named_and_leaves_nothing_that_looks_whole(what: str, tmp_path: Path) -> None:
    model = _sharded(tmp_path / "model")
    harm, word = BAD[what]
    harm(model)
    with pytest.raises(CheckpointError, match=word):
        split(model, tmp_path / "out", RECIPE)
    assert nothing_whole(tmp_path / "out")


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        split(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (Recipe(rank=65), "rank 65 is more than"),
        (Recipe(rules=(Rule(pattern="*.down_proj", rank=99),)), "down_proj: rank 99"),
        (Recipe(rules=(Rule(pattern="lm_haed", rank=9),)), "lm_haed"),
    ],
)
def test_a_recipe_that_does_not_fit(recipe: Recipe, word: str, tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match=word):
        split(model, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_haar_rotation_that_is_too_wide_is_refused_at_once(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model", vocab_size=9000)
    with pytest.raises(RecipeError, match=r"lm_head.*too wide"):
        split(model, tmp_path / "out", Recipe(rank=2, rotation="haar"))
    split(
        model,
        tmp_path / "out",
        Recipe(rank=2, rotation="haar", rules=(Rule(pattern="lm_head", rotation="fast"),)),
    )


@pytest.mark.parametrize("side", ["vault", "worker"])
def test_nothing_is_overwritten(side: str, tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    (tmp_path / "out" / side).mkdir(parents=True)
    with pytest.raises(ShareError, match=f"{side} exists"):
        split(model, tmp_path / "out", RECIPE)
    assert [f.name for f in (tmp_path / "out").iterdir()] == [side]


def test_a_split_model_is_not_split_again(tmp_path: Path) -> None:
    split(families.make("llama", tmp_path / "model"), tmp_path / "out", RECIPE)
    with pytest.raises(CheckpointError, match="already split"):
        split(tmp_path / "out" / "vault", tmp_path / "again")


# --- crashes and full disks -----------------------------------------------------------------------------

# splits, and stops for ever before the group whose number is given
CHILD = """
import sys, time
from sliplm.engines.transformers.convert import split
from sliplm.shares.recipe import Recipe
calls = 0
def progress(done, total, name):
    global calls
    if calls == int(sys.argv[3]):
        print("waiting", flush=True)
        time.sleep(600)
    calls += 1
split(sys.argv[1], sys.argv[2], Recipe(rank=4), progress=progress, i_know="i_know" in sys.argv)
"""


def kill_before_group(number: int, model: Path, out: Path, *more: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model), str(out), str(number), *more],
        env=ENV,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"waiting\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)


def journal(out: Path) -> list[str]:
    lines = (out / ".partial" / "journal").read_text().splitlines()
    return [json.loads(line)["group"] for line in lines[1:]]


def test_a_killed_split_is_continued(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    kill_before_group(3, model, out)
    assert nothing_whole(out)
    assert len(journal(out)) == 3
    assert (out / ".partial" / "vault").stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in (out / ".partial" / "vault").iterdir()} == {0o600}
    with (out / ".partial" / "journal").open("a") as file:
        file.write('{"group": "model.la')  # a line cut off by the crash
    kill_before_group(5, model, out)
    assert nothing_whole(out)
    assert len(journal(out)) == 5
    seed = "model.layers.0.mlp.gate_proj+up_proj/seed"
    first = load_arrays(out / ".partial" / "vault" / "share.safetensors")[seed]
    split(model, out, RECIPE)
    last = load_arrays(out / "vault" / "share.safetensors")[seed]
    assert np.array_equal(first, last)  # the third group was not done again
    assert_same_model(model, out)
    assert not (out / ".partial").exists()


# splits, and kills itself at the system call whose number is given
WRITES = """
import os, signal, sys
from sliplm.engines.transformers.convert import split
from sliplm.shares.recipe import Recipe
real, left = os.pwrite, int(sys.argv[3])
def pwrite(*args):
    global left
    done, left = real(*args), left - 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
os.pwrite = pwrite
split(sys.argv[1], sys.argv[2], Recipe(rank=4))
"""


def runs(data: bytes) -> set[bytes]:
    """Every run of 16 bytes, but for those of padding and the like."""
    every = {data[i : i + 16] for i in range(len(data) - 15)}
    return {run for run in every if len(set(run)) > 5}


def on_disk(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.rglob("*") if file.is_file()]


def clear_secrets(out: Path) -> dict[str, bytes]:
    vault = open_vault(out / "vault")
    found = {name: t.numpy().tobytes() for name, t in families.kept_tensors(out / "vault").items()}
    for group in vault.groups.values():
        found |= {name: array.tobytes() for name, array in secret_tensors(group).items()}
    return found | {"the data key": vault.data_key, "the owner's key": find(None).secret}


def test_no_secret_touches_the_disk_in_clear_not_even_when_killed(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    seen: list[bytes] = []
    for writes in (1, 3, 12, 40, 75):
        run = [sys.executable, "-c", WRITES, str(model), str(out), str(writes)]
        assert subprocess.run(run, check=False, env=ENV, timeout=120).returncode == -signal.SIGKILL
        assert nothing_whole(out)
        seen += on_disk(out)
    assert len(journal(out)) > 2
    split(model, out, RECIPE)
    seen += on_disk(out)
    written = set().union(*map(runs, seen))
    secrets = clear_secrets(out)
    assert len(secrets) > 50
    for name, secret in secrets.items():
        assert not runs(secret) & written, name
    # the search finds what is there: the worker's integers are public
    public = load_arrays(out / "worker" / "share.safetensors")
    assert all(runs(array.tobytes()) <= written for array in public.values())
    assert_same_model(model, out)


def test_a_split_is_continued_with_its_key_only(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    kill_before_group(3, model, out)
    with pytest.raises(SealError, match=r"another key.*remove .*\.partial"):
        split(model, out, RECIPE, key=bytes(32))
    assert len(journal(out)) == 3
    split(model, out, RECIPE)
    assert_same_model(model, out)


def test_without_its_seal_a_split_begins_anew(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    kill_before_group(3, model, out)
    (out / ".partial" / "vault" / "seal.json").unlink()
    split(model, out, RECIPE, key=bytes(32))
    assert open_vault(out / "vault", bytes(32)).groups
    with pytest.raises(SealError, match="another key"):
        open_vault(out / "vault")


@pytest.mark.parametrize("what", ["recipe", "model"])
def test_work_for_another_recipe_or_model_is_not_used(what: str, tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    kill_before_group(3, model, out)
    if what == "model":
        shutil.rmtree(model)
        families.make("llama", model, seed=1)
    split(model, out, Recipe(rank=5) if what == "recipe" else RECIPE)
    assert {s.b.shape[0] for s in open_vault(out / "vault").groups.values()} == {5 if what == "recipe" else 4}
    assert_same_model(model, out)


def test_a_crash_between_the_last_two_renames_is_made_good(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    split(model, out, RECIPE)
    other = tmp_path / "other"
    kill_before_group(2, model, other, "i_know")  # for a journal with this model's key
    shutil.move(out / "worker", other / "worker")
    shutil.rmtree(other / ".partial" / "vault")
    shutil.rmtree(other / ".partial" / "worker")
    shutil.move(out / "vault", other / ".partial" / "vault")
    with (other / ".partial" / "journal").open("a") as file:
        file.write('{"done": true}\n')
    split(model, other, RECIPE)
    assert_same_model(model, other)
    assert not (other / ".partial").exists()


def test_two_processes_do_not_split_into_one_folder(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model), str(out), "2"], env=ENV, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"waiting\n"
        with pytest.raises(ShareError, match="another process"):
            split(model, out, RECIPE)
        assert len(journal(out)) == 2  # the other's work is untouched
    finally:
        child.kill()
        child.communicate(timeout=60)


LIMITED = """
import resource, sys
from sliplm.engines.transformers.convert import split
from sliplm.errors import ShareError, SlipWarning
from sliplm.shares.recipe import Recipe
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    split(sys.argv[1], sys.argv[2], Recipe(rank=4))
except ShareError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_a_typed_error_and_the_next_run_succeeds(tmp_path: Path) -> None:
    model, out = families.make("llama", tmp_path / "model"), tmp_path / "out"
    run = [sys.executable, "-c", LIMITED, str(model), str(out), "100000"]
    said = subprocess.run(run, check=False, env=ENV, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0
    assert "bytes needed" in said.stdout
    assert nothing_whole(out)
    split(model, out, RECIPE)
    assert_same_model(model, out)


def _tmpfs(folder: Path, size: int) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None
        and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )


def test_a_full_disk_is_a_typed_error_and_keeps_the_work(tmp_path: Path) -> None:
    model, disk = families.make("llama", tmp_path / "model"), tmp_path / "disk"
    if not _tmpfs(disk, 2 << 20):
        pytest.skip("mounting a small disk takes root")
    try:
        out, filler = disk / "out", disk / "filler"
        filler.write_bytes(bytes((2 << 20) - 200_000))
        with pytest.raises(ShareError, match=r"\d+ bytes, but only \d+ are free"):
            split(model, out, RECIPE)
        assert nothing_whole(out)
        filler.unlink()
        kill_before_group(4, model, out)
        _fill(disk)
        with pytest.raises(ShareError, match="no room"):
            split(model, out, RECIPE)
        assert nothing_whole(out)
        assert len(journal(out)) >= 4
        filler.unlink()
        split(model, out, RECIPE)
        assert_same_model(model, out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


# --- memory ----------------------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
from sliplm.engines.transformers.convert import split
from sliplm.arithmetic.likely import unevenness
from sliplm.shares.recipe import Recipe
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
split(sys.argv[1], sys.argv[2], Recipe(rank=4))  # a small model first: code, caches, thread pools
unevenness(bytes(32), 64)  # which small models do without
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
before = kilobytes("VmRSS")
split(sys.argv[3], sys.argv[4], Recipe(rank=4))
print(kilobytes("VmHWM") - before)
"""


def test_the_model_is_never_held_whole(tmp_path: Path) -> None:
    small = families.make("llama", tmp_path / "small")
    model = families.make(
        "llama",
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=700,
        num_hidden_layers=24,
        vocab_size=3000,
    )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 60e6
    run = [sys.executable, "-c", MEASURED, small, tmp_path / "out1", model, tmp_path / "out2"]
    done = subprocess.run(
        [str(word) for word in run], check=True, env=ENV, capture_output=True, text=True, timeout=300
    )
    grown = int(done.stdout.splitlines()[-1]) * 1024
    assert grown < 0.6 * size, f"{grown} bytes more for a model of {size}"


# --- the report ------------------------------------------------------------------------------------------


def test_the_report(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model")
    out = tmp_path / "out"
    report = split(model, out, Recipe(rank=4, rules=(Rule(pattern="*.o_proj", precision=8),)))
    assert report == report_for(read_vault_manifest(out / "vault"))
    assert json.loads(report.to_json())["exchanges"] == 9 == report.exchanges
    group = report.groups[0]  # q, k, v: 128 x 64, rank 4
    assert (group.rows, group.columns, group.plain_macs) == (128, 64, 128 * 64)
    macs = group.vault_macs
    assert (macs.low_rank, macs.checks, macs.fixed_point) == (4 * 192, 2 * 192, 3 * 64 + 4 * 128)
    assert macs.rotations > 0
    assert macs.total == group.vault_macs_share * group.plain_macs
    assert (group.bytes_to_worker, group.bytes_from_worker) == (4 * 64, 4 * 128)
    assert group.error is not None
    assert 1e-5 < group.error < 2e-3
    assert report.groups[1].error is not None
    assert report.groups[1].error > 4 * group.error
    # bytes are those of the tensors on disk: headers apart
    for name, counted in (("worker/share", report.worker_bytes), ("vault/model", report.kept_bytes)):
        assert 0 <= (out / f"{name}.safetensors").stat().st_size - counted < 8192
    secret = (out / "vault" / "share.safetensors").stat().st_size
    assert 0 <= secret - (report.vault_bytes - report.kept_bytes) < 8192
    # two layers of 4 heads of 16: scores and values
    assert report.attention_macs == {c: 2 * 2 * 4 * 16 * c for c in (128, 512, 2048)}


def test_a_window_bounds_the_attention(tmp_path: Path) -> None:
    report = split(families.make("gemma2", tmp_path / "model"), tmp_path / "out", RECIPE)
    assert report.attention_macs[2048] == 2 * 4 * 24 * (32 + 2048)


def test_shapes_are_counted_without_weights() -> None:
    shapes = {
        f"layers.{i}.{name}": shape
        for i in range(32)
        for name, shape in {
            "qkv": (3 * 4096, 4096), "o": (4096, 4096), "gate+up": (2 * 11008, 4096), "down": (4096, 11008),
        }.items()
    }  # fmt: skip
    shapes["lm_head"] = (32000, 4096)
    attention = [Attention(heads=32, head_dim=128)] * 32
    report = counts_for_shapes(shapes, Recipe(), kept_bytes=2 * 32000 * 4096, attention=attention)
    assert report.plain_macs == 6_607_077_376
    assert report.exchanges == 129
    assert report.worker_bytes == 2 * report.plain_macs
    assert 0.005 < report.vault_macs_share < 0.02
    assert report.vault_bytes_share < 0.04
    assert 5.3e6 < report.mask_bytes < 5.7e6  # what the dealer sends for one token
    plain = counts_for_shapes(shapes, Recipe(rotation="none"))
    assert plain.vault_macs.rotations == 0
    assert plain.attention_macs == {}
    whole = counts_for_shapes({"lm_head": (32000, 4096)}, Recipe(placement="vault"))
    assert (whole.vault_macs_share, whole.exchanges, whole.worker_bytes) == (1.0, 0, 0)
