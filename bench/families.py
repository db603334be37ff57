"""Every kind of model that transformers can build tiny: split with the defaults, run, compared.

    python bench/families.py [--only llama gpt2] [--kind causal other] [--keep FOLDER] [--plan]

Each family of the installed transformers that a configuration can be made for generically (small sizes, a
layer of each kind, and a table of exceptions) gets random weights and a checkpoint on the disk.  It is split
with `Recipe()`, no rule typed; the hybrid, with a worker process, must equal the quantised model
(`reference`) bit for bit, also in the tokens that it generates, and for language models its KL divergence
to the plain model must be below 1e-4; for other kinds the relative error of every output below 2 %.  Each
family runs in a process of its own.  `ok` passed, `refused` was refused before the split with the reason
that stands there, `failed` is everything else, `none`: no tiny checkpoint can be made that the plain model
itself loads.  `whole` is the part of the weights that stays in the vault.  With --keep, rows are kept in a
folder, and a run that was stopped goes on there; after a change to the code take another folder.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: matrices as small as these are slower with more
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import re
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sliplm
from _common import finish, machine
from sliplm.arithmetic.equilibration import equilibrated
from sliplm.engines.transformers.inputs import candidates
from sliplm.engines.transformers.load import reference
from sliplm.engines.transformers.plan import make_plan
from sliplm.errors import SlipError

LIMIT = 300.0  # seconds a family
LAYERS = 4  # of different kinds, at most
LARGEST = 60_000_000  # parameters: what the table has no small size for
KL = 1e-4
ERROR = 2e-2

SIZES: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim"), 64)
    | dict.fromkeys(
        ("projection_dim", "embedding_size", "decoder_hidden_size", "model_dim", "word_embed_proj_dim"), 64
    )
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"), 128)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim", "ffn_intermediate_size"), 128)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2)
    | dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4)
    | dict.fromkeys(("decoder_attention_heads",), 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2)
    | dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv", "global_head_dim"), 16)
    | dict.fromkeys(
        (
            "vocab_size",
            "decoder_vocab_size",
            "entity_vocab_size",
            "vocab_size_per_layer_input",
            "encoder_hash_byte_group_vocab",
        ),
        300,
    )
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 128)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24)
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "index_topk": 16}
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2)
    | dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48
    )
    | dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1)
    | dict.fromkeys(("image_size",), 32)
    | dict.fromkeys(("patch_size",), 8)
    | dict.fromkeys(("max_source_positions",), 24)
    | dict.fromkeys(("num_mel_bins",), 16)
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
    | {"sliding_window": 32, "ssm_state_size": 8, "state_size": 8, "mamba_expand": 2, "time_step_rank": 8}
    | {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 16}
    | {"lru_width": 64, "attention_window": 4, "mamba_d_state": 8, "rotary_dim": 8}
)

NOTHING_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": SECTIONS, "sliding_attention": SECTIONS}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "blt": {"encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text"} | NOTHING_PER_LAYER},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 16},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "attention_head_size": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", *["linear_attention", "hybrid"] * 2],
        "num_hidden_layers": 5,
    },
    "zaya": {"num_experts_per_tok": 1},
    "Qwen2VLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "SwinForImageClassification": {
        "embed_dim": 48,
        "image_size": 56,
        "patch_size": 2,
        "depths": [1, 1],
        "num_heads": [3, 6],
    },
    "DPTForSemanticSegmentation": {"num_hidden_layers": 12},
}
"""What a family wants otherwise."""

OTHERS = (  # noqa: SIM905
    "AlbertModel BartForConditionalGeneration BartForSequenceClassification BeitForImageClassification "
    "BertModel BertForMaskedLM BertForMultipleChoice BertForQuestionAnswering "
    "BertForSequenceClassification BertForTokenClassification BigBirdModel "
    "BlenderbotForConditionalGeneration BlipModel CLIPModel CLIPVisionModel CanineModel "
    "ConvNextForImageClassification Data2VecAudioModel DebertaV2Model DeiTForImageClassification "
    "Dinov2Model DistilBertModel DPTForSemanticSegmentation ElectraModel FNetModel FunnelModel "
    "HubertModel IBertModel LayoutLMModel LongformerModel LxmertModel MarianMTModel "
    "MBartForConditionalGeneration MobileViTForImageClassification ModernBertModel MPNetModel MT5Model "
    "NomicBertModel PegasusForConditionalGeneration ResNetForImageClassification RobertaModel "
    "RoFormerModel SegformerForSemanticSegmentation SiglipModel SpeechT5Model "
    "Speech2TextForConditionalGeneration SqueezeBertModel SwinForImageClassification "
    "T5ForConditionalGeneration T5EncoderModel ViTForImageClassification ViTMAEModel Wav2Vec2Model "
    "Wav2Vec2ForCTC WavLMModel WhisperForConditionalGeneration XLMRobertaModel XLNetModel ASTModel "
    "CvtForImageClassification VisionEncoderDecoderModel LlavaForConditionalGeneration "
    "Gemma3ForConditionalGeneration Qwen2VLForConditionalGeneration"
).split()


def families(kinds: list[str]) -> Iterator[tuple[str, str]]:
    """Kind and class of model of each family."""
    if "causal" in kinds:
        for kind, names in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
            yield kind, names if isinstance(names, str) else names[0]
    if "other" in kinds:
        for name in OTHERS:
            yield name, name


def declared(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The settings of a kind of configuration with their defaults; what is None there it derives itself."""
    return {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.init and field.default is not dataclasses.MISSING
    }


def tiny(config_class: type[PretrainedConfig], more: dict[str, Any], each_kind: bool) -> PretrainedConfig:
    """A configuration of small sizes; its parts are made small too.

    With `each_kind` it has a layer of each kind that the default has; without, the first two.
    """
    settings = declared(config_class)
    known = default(config_class)
    sizes = {
        name: value
        for name, value in SIZES.items()
        if isinstance(settings.get(name), int | float) and isinstance(known.get(name, 0), int | float)
    }
    made = {  # where the family gives no default
        name: CONFIG_MAPPING[value["model_type"]]()
        for name, value in more.items()
        if isinstance(value, dict) and "model_type" in value
    }
    parts = {
        name: tiny(type(part), more.get(name, {}), each_kind).to_dict()
        for name, part in (known | made).items()
        if isinstance(part, PretrainedConfig)
    }
    if "num_key_value_heads" in sizes and known["num_key_value_heads"] == known.get("num_attention_heads"):
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]  # some have no groups of heads
    layers = kinds_of_layer(known, settings) if each_kind else {}
    small = sizes | layers | {k: v for k, v in more.items() if k not in parts and k != "model_type"} | parts
    config = config_class(**small)
    fit(config)
    return config


def default(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """What a configuration without arguments holds; nothing where it cannot be made."""
    try:
        found: dict[str, Any] = vars(config_class())
    except Exception:  # a few refuse their own defaults
        return {}
    return found


def kinds_of_layer(known: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Lists with one entry a layer, cut to the first layer of each kind, and how many layers that makes."""
    count_name = next((name for name in ("num_hidden_layers", "n_layers") if name in settings), "")
    count = known.get(count_name)
    lists = {
        name: value
        for name, value in known.items()
        if name in settings and isinstance(value, list | tuple) and len(value) == count
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())[:LAYERS]
    chosen = first if len(first) > 1 else [first[0]] * 2
    return {count_name: len(chosen)} | {name: [value[i] for i in chosen] for name, value in lists.items()}


def fit(config: PretrainedConfig) -> None:
    """Special tokens inside of the small vocabulary."""
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None) or SIZES["vocab_size"]
    outside = [
        name
        for name, value in vars(config).items()
        if re.search("_token_(id|index)$", name) and isinstance(value, int) and value >= size
    ]
    for number, name in enumerate(outside):
        setattr(config, name, size - 1 - number)


def configuration(kind: str, name: str, each_kind: bool) -> PretrainedConfig:
    """A small configuration of a family."""
    if name != "VisionEncoderDecoderModel":
        return tiny(getattr(tf, name).config_class, MORE.get(kind, {}), each_kind)
    encoder = tiny(tf.ViTConfig, {}, each_kind)
    decoder = tiny(tf.BertConfig, {"is_decoder": True, "add_cross_attention": True}, each_kind)
    config: Any = tf.VisionEncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict())
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def build(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights, about as wide as trained ones."""
    torch.manual_seed(0)
    model_class = getattr(tf, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters: not tiny")
    model = model_class(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                reads = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]  # images, rows
                parameter.copy_(torch.randn(parameter.shape) * reads**-0.5)
            elif key.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of floating point that a forward pass gives."""
    torch.manual_seed(0)  # a few draw: masks of a masked autoencoder
    with torch.no_grad():
        found = model(**inputs)
    return {k: v for k, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}


def runnable(model: PreTrainedModel) -> dict[str, Any]:
    """The longest inputs that the model itself runs on: other ones than those of the trial run, which takes
    the first."""
    failures: list[str] = []
    found: dict[int, dict[str, Any]] = {}
    for inputs in candidates(model):
        try:
            given = outputs(model, inputs)
        except Exception as error:
            failures.append(text(error))
        else:
            size = sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))
            if given:
                found.setdefault(size, inputs)
    if not found:
        raise Unrunnable(failures[0] if failures else "no inputs are known")
    return found[max(found)]


class Unrunnable(Exception):
    """The plain model of a checkpoint cannot be run on made-up inputs."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the plain model does: on which inputs it gives which outputs, and which tokens, if any."""

    inputs: dict[str, Any]
    outputs: dict[str, Tensor]
    tokens: Tensor | None


def checkpoint(kind: str, name: str, folder: Path) -> Expected | Unrunnable:
    """Write a tiny checkpoint that the plain model loads; what it gives, or why it cannot be run.

    Raises:
        RuntimeError: there is none.
    """
    failures: list[str] = []
    unrunnable: Unrunnable | None = None
    for each_kind in (True, False):
        try:
            shutil.rmtree(folder, ignore_errors=True)
            build(name, configuration(kind, name, each_kind)).save_pretrained(folder)
            plain = getattr(tf, name).from_pretrained(folder, dtype=torch.float32).eval()
            inputs = runnable(plain)
            return Expected(inputs, outputs(plain, inputs), continued(plain, inputs))
        except Unrunnable as error:
            unrunnable = error
        except Exception as error:
            failures.append(text(error))
    if unrunnable is not None:
        return unrunnable
    raise RuntimeError("; ".join(dict.fromkeys(failures)))


def continued(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
    """Four tokens that follow, with a cache; None where the model does not generate from such inputs."""
    torch.manual_seed(0)
    given = {k: v for k, v in inputs.items() if k != "use_cache"}
    with torch.no_grad(), contextlib.suppress(Exception):
        tokens = model.generate(**given, max_new_tokens=4, do_sample=False)
        return tokens if isinstance(tokens, Tensor) else None
    return None


def divergence(found: Tensor, plain: Tensor) -> float:
    """Mean KL of the hybrid's next tokens to the plain model's."""
    p, q = (logits.double().log_softmax(-1) for logits in (plain, found))
    each: Tensor = (p.exp() * (p - q)).sum(-1)
    return float(each.mean())


def judge(kind: str, name: str, causal: bool, only_plan: bool) -> dict[str, Any]:
    """Split one family, run it, compare."""
    row: dict[str, Any] = {"family": kind, "class": name, "result": "none", "why": ""}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model", Path(folder) / "out"
        try:
            expected = checkpoint(kind, name, source)
        except Exception as error:
            return row | {"why": text(error)}
        started = time.perf_counter()
        try:
            plan = make_plan(source, sliplm.Recipe())
            if isinstance(expected, Unrunnable):
                return row | {"result": "failed", "why": f"planned, but the plain model fails: {expected}"}
            row |= {"split": len(plan.split), "whole": whole(plan)}
            if only_plan:
                return row | {"result": "ok"}
            sliplm.split(source, out, ledger=Path(folder) / "ledger")
        except SlipError as error:
            return row | {"result": "refused", "why": text(error)}
        except Exception as error:
            return row | {"result": "failed", "why": f"split: {text(error)}"}
        try:
            row |= compared(out, expected, causal)
        except Exception as error:
            return row | {"result": "failed", "why": f"run: {text(error)}"}
        return row | {"seconds": round(time.perf_counter() - started, 1)}


def compared(out: Path, expected: Expected, causal: bool) -> dict[str, Any]:
    """Run a split in two processes, and compare with the quantised model and with the plain one."""
    yardstick = reference(out)
    best, tokens = outputs(yardstick, expected.inputs), None
    with sliplm.open(out, timeout=60.0, ahead=0) as hybrid:
        found = outputs(hybrid, expected.inputs)
        if expected.tokens is not None:
            tokens = continued(hybrid, expected.inputs)
    row: dict[str, Any] = {
        "equal": all(torch.equal(found[k], best[k]) for k in expected.outputs),
        "error": max(
            float((found[k] - v).norm() / v.norm().clamp_min(1e-9)) for k, v in expected.outputs.items()
        ),
    }
    if expected.tokens is not None:
        wanted = continued(yardstick, expected.inputs)
        row["generates"] = tokens is not None and wanted is not None and torch.equal(tokens, wanted)
    near = row["error"] < ERROR
    if causal and "logits" in expected.outputs:
        row["kl"] = divergence(found["logits"], expected.outputs["logits"])
        near = row["kl"] < KL
    failures = [
        what
        for what, right in (
            ("not equal to the quantised model", row["equal"]),
            ("other tokens than the quantised model", row.get("generates", True)),
            ("too far from the plain model", near),
            (
                "outputs that tell nothing",
                any(float(v.max()) > float(v.min()) for v in expected.outputs.values()),
            ),
        )
        if not right
    ]
    return row | {"result": "failed" if failures else "ok", "why": ", ".join(failures)}


def whole(plan: Any) -> float:
    """The part of the weights that no worker has a part of."""
    weights = {  # once, where several layers use one
        linear.weight: linear.rows * linear.columns for group, _ in plan.split for linear in group.members
    }
    tied = plan.stored.layout.tied
    split = sum(size for name, size in weights.items() if tied.get(name) not in weights)
    part: float = 1 - split / max(1, plan.model.parameters)
    return round(part, 3)


def text(error: BaseException) -> str:
    """In one line, with where it was raised."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())[:600]} ({Path(at.filename).name}:{at.lineno})"
    )


def child(pipe: Connection, *args: Any) -> None:
    """One family, in a process of its own."""
    warnings.simplefilter("ignore")
    tf.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null):
        pipe.send(judge(*args))


def alone(kind: str, name: str, causal: bool, only_plan: bool) -> dict[str, Any]:
    """`judge` in a process that may crash or hang."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, kind, name, causal, only_plan))
    process.start()
    theirs.close()
    row = {"family": kind, "class": name, "result": "failed", "why": "it crashed or took too long"}
    with contextlib.suppress(EOFError):
        if mine.poll(LIMIT):
            row = mine.recv()
    process.join(5)
    if process.is_alive():
        process.kill()
    return row


def remembered(folder: Path | None, kind: str, name: str, only_plan: bool) -> dict[str, Any]:
    """The family's row, from an earlier run where `folder` has it."""
    file = None if folder is None else folder / f"{kind}.json"
    if file is not None and file.exists():
        row: dict[str, Any] = json.loads(file.read_text())
        return row
    row = alone(kind, name, kind != name, only_plan)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--kind", nargs="*", default=["causal", "other"], choices=["causal", "other"])
    parser.add_argument("--keep", type=Path, help="a folder: rows are kept there, and not made again")
    parser.add_argument("--plan", action="store_true", help="decide what would be split, and go no further")
    arguments = parser.parse_args()
    before = machine()
    equilibrated(np.ones((4, 4), np.float32))  # compiled here once, and not again in every child
    rows = []
    for kind, name in families(arguments.kind):
        if arguments.only is None or kind in arguments.only:
            row = remembered(arguments.keep, kind, name, arguments.plan)
            rows.append(row)
            print(json.dumps(row), flush=True)
    table = Table("family", "result", "groups", "whole", "error", "KL", "why", width=80)
    for row in rows:
        error, kl = (f"{row[k]:.0e}" if k in row else "" for k in ("error", "kl"))
        table.add_row(
            row["family"],
            row["result"],
            str(row.get("split", "")),
            str(row.get("whole", "")),
            error,
            kl,
            row["why"][:200],
        )
    Console(width=80).print(table)
    counts = {
        kind: {r: sum(row["result"] == r for row in some) for r in ("ok", "refused", "failed", "none")}
        for kind, some in (
            ("causal", [row for row in rows if row["family"] != row["class"]]),
            ("other", [row for row in rows if row["family"] == row["class"]]),
        )
    }
    finish({"transformers": tf.__version__, "counts": counts, "families": rows, "machine": before})


if __name__ == "__main__":
    main()
