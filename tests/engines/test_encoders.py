"""Encoders and other transformers that are no causal language models; MiniLM among them, as trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import sliplm
from sliplm.cli import main
from sliplm.engines.transformers.layout import architecture, discover
from sliplm.engines.transformers.load import can_generate, reference
from sliplm.engines.transformers.thief import thief
from sliplm.errors import CheckpointError, ShareError, SlipWarning
from sliplm.examples.minilm import embed, minilm
from sliplm.planning.counts import SplitReport
from sliplm.shares.recipe import Recipe, Rule

RECIPE = Recipe(rank=4)
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TOKENS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 2], [1, 2, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)}
SOUND = {"input_features": torch.linspace(-9, 9, 16 * 40).sin().reshape(1, 16, 40)}
ANSWER = {"decoder_input_ids": torch.tensor([[1, 4, 7]])}


@dataclass(frozen=True)
class Kind:
    """How to build a tiny random model, what it reads, and why something of it stays whole."""

    model: Callable[[], Any]
    inputs: dict[str, Tensor]
    groups: int = 8
    whole: str = ""


KINDS = {
    "BertModel": Kind(lambda: tf.BertModel(tf.BertConfig(vocab_size=300, **SMALL)), TOKENS, groups=9),
    "BertForSequenceClassification": Kind(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=300, num_labels=5, **SMALL)),
        TOKENS,
        groups=10,
    ),
    "DistilBertModel": Kind(
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(vocab_size=300, dim=48, n_layers=2, n_heads=4, hidden_dim=96)
        ),
        TOKENS,
    ),
    "LlamaModel": Kind(lambda: tf.LlamaModel(tf.LlamaConfig(vocab_size=300, **SMALL)), TOKENS),
    "ViTForImageClassification": Kind(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SMALL)
        ),
        IMAGE,
        groups=9,
        whole="Conv2d",
    ),
    "WhisperForConditionalGeneration": Kind(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=300, d_model=48, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16,
                max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        SOUND | ANSWER,
        groups=17,
        whole="Conv1d",
    ),
    "T5ForConditionalGeneration": Kind(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=300, d_model=48, d_kv=12, d_ff=96, num_layers=1, num_heads=4)
        ),
        TOKENS | {"decoder_input_ids": torch.tensor([[0, 4], [0, 5]])},
        groups=9,
        whole="reads its `weight`",
    ),
}  # fmt: skip


def make(name: str, folder: Path) -> Path:
    """Write a tiny random checkpoint of an architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[name].model().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as wide as trained ones, not 0.02 each
            if parameter.ndim > 1:
                parameter.mul_(parameter.shape[-1] ** -0.5 / parameter.std().clamp_min(1e-3))
    model.save_pretrained(folder)
    return folder


def quietly(model: Path, out: Path, whole: str = "") -> SplitReport:
    """Split with no rule; the warning says why something stays whole, if anything does."""
    with pytest.warns(SlipWarning, match=whole) if whole else nullcontext():
        return sliplm.split(model, out, RECIPE)


@pytest.mark.parametrize("name", KINDS)
def test_the_hybrid_is_the_quantised_model(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model = make(name, tmp_path / "model")
    report = quietly(model, tmp_path, kind.whole)
    assert report.exchanges == kind.groups
    original = getattr(tf, name).from_pretrained(model, dtype=torch.float32)
    yardstick = reference(tmp_path)
    with sliplm.open(tmp_path, timeout=20.0) as hybrid, torch.no_grad():
        assert type(hybrid).__name__ == type(yardstick).__name__ == name
        found, expected = hybrid(**kind.inputs)[0], original(**kind.inputs)[0]
        assert torch.equal(found, yardstick(**kind.inputs)[0])
        assert hybrid.slip.counters.exchanges == kind.groups
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_a_speech_model_generates(tmp_path: Path) -> None:
    quietly(make("WhisperForConditionalGeneration", tmp_path / "model"), tmp_path, "Conv1d")
    options = {"max_new_tokens": 6, "do_sample": False}
    with sliplm.open(tmp_path) as hybrid:
        assert torch.equal(
            hybrid.generate(**SOUND, **options), reference(tmp_path).generate(**SOUND, **options)
        )
    assert can_generate(tmp_path / "vault")


def test_groups_across_layers(tmp_path: Path) -> None:
    """Every layer of a decoder reads the encoder's output: one group, one exchange."""
    groups = discover(make("WhisperForConditionalGeneration", tmp_path)).groups
    shared = [group.modules for group in groups if "encoder_attn.k_proj" in group.modules[0]]
    assert shared == [
        tuple(f"model.decoder.layers.{i}.encoder_attn.{x}_proj" for i in (0, 1) for x in ("k", "v"))
    ]


def test_the_class_that_the_checkpoint_names(tmp_path: Path) -> None:
    def of(*names: str) -> object:
        return architecture(tf.BertConfig(architectures=list(names)))

    assert of("BertModel") is tf.BertModel
    assert of("LlamaForCausalLM") is tf.LlamaForCausalLM
    for other in ((), ("NoSuchModel",), ("BertConfig",), ("AutoModel",), ("logging",)):
        assert of(*other) is None
    model = make("BertModel", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for kind in ("CLIPModel", "GPT2LMHeadModel"):  # another family's
        (model / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
        with pytest.raises(CheckpointError, match=r"can be built|cannot be run|lacks"):
            discover(model) if kind == "CLIPModel" else sliplm.split(model, tmp_path / "out", RECIPE)


def test_another_class_of_the_same_weights(tmp_path: Path) -> None:
    sliplm.split(make("BertModel", tmp_path / "model"), tmp_path, RECIPE)
    with sliplm.open(tmp_path, model_class=tf.AutoModel) as hybrid, torch.no_grad():
        assert torch.equal(hybrid(**TOKENS)[0], reference(tmp_path)(**TOKENS)[0])
    with pytest.raises(ShareError, match="model class"):
        reference(tmp_path, model_class=tf.BertForMaskedLM)


def test_files_for_images_go_along(tmp_path: Path) -> None:
    model = make("ViTForImageClassification", tmp_path / "model")
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    recipe = Recipe(rank=4, rules=(Rule(pattern="*.projection", placement="vault"),))
    sliplm.split(model, tmp_path, recipe)
    assert (tmp_path / "vault" / "preprocessor_config.json").read_bytes() == (
        model / "preprocessor_config.json"
    ).read_bytes()


# --- MiniLM --------------------------------------------------------------------------------------------

SENTENCES = (
    "A man is eating a piece of bread.",
    "Someone has a meal.",
    "The stock market fell sharply today.",
    "Share prices dropped on Friday.",
    "A cheetah runs behind its prey.",
    "Where can I find a good bakery?",
)


@dataclass
class MiniLM:
    folder: Path
    tokenizer: Any
    original: Any
    hybrid: Any
    reference: Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniLM]:
    folder = tmp_path_factory.mktemp("minilm")
    with pytest.warns(SlipWarning, match="comes from nreimers/MiniLM"):  # its base, which others have
        sliplm.split(minilm(), folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "vault")
    original = tf.AutoModel.from_pretrained(minilm(), dtype=torch.float32)
    with sliplm.open(folder) as hybrid:
        yield MiniLM(folder, tokenizer, original, hybrid, reference(folder))


def test_embeddings(model: MiniLM) -> None:
    """The quantised model's bit for bit, close to the original's, and each sentence's order is the same."""
    found = embed(model.hybrid, model.tokenizer, SENTENCES)
    assert found.shape == (6, 384)
    assert torch.equal(found, embed(model.reference, model.tokenizer, SENTENCES))
    true = embed(model.original, model.tokenizer, SENTENCES)
    assert (found * true).sum(1).min() > 1 - 1e-5
    assert torch.equal((found @ found.T).argsort(1), (true @ true.T).argsort(1))
    assert int((true[0] @ true[1:].T).argmax()) == 0  # it knows what the sentences mean
    assert int((true[2] @ true[3:].T).argmax()) == 0


def test_a_thief_of_the_share_has_no_embeddings(model: MiniLM) -> None:
    stolen = thief(minilm(), model.folder)
    assert type(stolen).__name__ == "BertModel"
    true = embed(model.original, model.tokenizer, SENTENCES)
    assert (embed(stolen, model.tokenizer, SENTENCES) * true).sum(1).max() < 0.5


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[object]) -> int:
    monkeypatch.setattr("sys.argv", ["slip", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`slip split` and `slip inspect` take an encoder's folder; `slip generate` says what is wrong."""
    out = tmp_path / "out"
    assert run(monkeypatch, ["split", minilm(), out, "--rank", "8"]) == 0
    said = capsys.readouterr().out
    assert "25 groups of linear layers were split" in said
    assert "sliplm.open(" in said and "slip generate" not in said
    assert run(monkeypatch, ["inspect", out]) == 0
    assert "BertConfig, 22.7 M parameters" in capsys.readouterr().out
    assert run(monkeypatch, ["generate", out, "--prompt", "Hello"]) == 2
    assert "does not generate text" in capsys.readouterr().err


def test_the_command_line_and_a_plain_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8)).eval()
    sliplm.split_module(module, torch.zeros(1, 3, 12, 12), tmp_path, RECIPE)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, ["inspect", tmp_path]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Sequential (plain PyTorch module, " in said
    assert "8 x 27, 100 times" in said
    assert "a call in 1 exchanges" in said and "for each call dealt ahead" in said
    assert "8 groups" in said
    assert run(monkeypatch, ["inspect", tmp_path, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [group["positions"] for group in report["groups"]] == [100, 64]
    assert run(monkeypatch, ["generate", tmp_path, "--prompt", "Hello"]) == 2
    assert "open_module" in capsys.readouterr().err
