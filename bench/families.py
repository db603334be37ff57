"""Every kind of model that transformers can build tiny: split with the defaults, run, compared.

    python bench/families.py [--only llama gpt2] [--kind causal other] [--plan]

Each family of the installed transformers that a configuration can be made for generically (small sizes, and a
table of exceptions) gets random weights and a checkpoint on the disk.  It is split with `Recipe()`, no rule
typed; the hybrid, with a worker process, must equal the quantised model (`reference`) bit for bit, and for
language models its KL divergence to the plain model must be below 1e-4; for other kinds the relative error of
every output below 2 %.  Each family runs in a process of its own.  `ok` passed, `refused` was refused before
the split with the reason that stands there, `failed` is everything else, `none`: no tiny checkpoint can be
made that the plain model itself loads and runs.  `whole` is the part of the weights that stays in the vault.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: as the command line does

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import sliplm
from _common import finish, machine
from sliplm.engines.transformers.inputs import candidates
from sliplm.engines.transformers.load import reference
from sliplm.engines.transformers.plan import make_plan
from sliplm.errors import SlipError

LIMIT = 120.0  # seconds a family
LARGEST = 60_000_000  # parameters: what the table has no small size for
KL = 1e-4
ERROR = 2e-2

SIZES: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("projection_dim", "embedding_size", "decoder_hidden_size", "model_dim"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"), 128)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim", "ffn_intermediate_size"), 128)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2)
    | dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4)
    | dict.fromkeys(("decoder_attention_heads",), 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2)
    | dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv", "global_head_dim"), 16)
    | dict.fromkeys(("vocab_size", "decoder_vocab_size", "entity_vocab_size"), 300)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 128)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24)
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
    | {"lru_width": 64, "attention_window": 4, "mamba_d_state": 8, "rotary_dim": 8}
)

MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
}
"""What a family wants otherwise."""

OTHERS = (  # noqa: SIM905
    "AlbertModel BartForConditionalGeneration BartForSequenceClassification BeitForImageClassification "
    "BertModel BertForMaskedLM BertForMultipleChoice BertForQuestionAnswering BertForSequenceClassification "
    "BertForTokenClassification BigBirdModel BlenderbotForConditionalGeneration BlipModel CLIPModel "
    "CLIPVisionModel CanineModel ConvNextForImageClassification Data2VecAudioModel DebertaV2Model "
    "DeiTForImageClassification Dinov2Model DistilBertModel DPTForDepthEstimation ElectraModel FNetModel "
    "FunnelModel HubertModel IBertModel LayoutLMModel LongformerModel LxmertModel MarianMTModel "
    "MBartForConditionalGeneration MobileViTForImageClassification ModernBertModel MPNetModel MT5Model "
    "NomicBertModel PegasusForConditionalGeneration ResNetForImageClassification RobertaModel RoFormerModel "
    "SegformerForSemanticSegmentation SiglipModel SpeechT5Model Speech2TextForConditionalGeneration "
    "SqueezeBertModel SwinForImageClassification T5ForConditionalGeneration T5EncoderModel "
    "ViTForImageClassification ViTMAEModel Wav2Vec2Model Wav2Vec2ForCTC WavLMModel "
    "WhisperForConditionalGeneration XLMRobertaModel XLNetModel ASTModel CvtForImageClassification "
    "VisionEncoderDecoderModel LlavaForConditionalGeneration Gemma3ForConditionalGeneration "
    "Qwen2VLForConditionalGeneration"
).split()


def families(kinds: list[str]) -> Iterator[tuple[str, str]]:
    """Kind and class of model of each family."""
    if "causal" in kinds:
        for kind, names in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
            yield kind, names if isinstance(names, str) else names[0]
    if "other" in kinds:
        for name in OTHERS:
            yield name, name


def tiny(config_class: type[PretrainedConfig], more: dict[str, Any]) -> PretrainedConfig:
    """A configuration of small sizes; its parts are made small too."""
    known = vars(config_class())
    sizes = {
        name: value
        for name, value in SIZES.items()
        if known.get(name) is not None and not isinstance(known[name], list | tuple)
    }
    parts = {
        name: tiny(part, more.get(name, {})).to_dict()
        for name, part in config_class.sub_configs.items()
        if isinstance(part, type) and part is not tf.AutoConfig and known.get(name) is not None
    }
    return config_class(**sizes | parts | {name: value for name, value in more.items() if name not in parts})


def build(kind: str, name: str) -> PreTrainedModel:
    """A model with random weights, about as wide as trained ones."""
    torch.manual_seed(0)
    model_class = getattr(tf, name)
    if name == "VisionEncoderDecoderModel":
        encoder, decoder = (
            tiny(tf.ViTConfig, {}),
            tiny(tf.BertConfig, {"is_decoder": True, "add_cross_attention": True}),
        )
        config: Any = tf.VisionEncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict())
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    else:
        config = tiny(model_class.config_class, MORE.get(kind, {}))
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters: not tiny")
    model = model_class(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
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
    """The first inputs that the model itself runs on."""
    last: Exception | None = None
    for inputs in candidates(model):
        try:
            outputs(model, inputs)
        except Exception as error:
            last = error
        else:
            return inputs
    raise RuntimeError(f"no inputs: {last}")


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
            build(kind, name).save_pretrained(source)
            plain = getattr(tf, name).from_pretrained(source, dtype=torch.float32).eval()
            inputs = runnable(plain)
            expected = outputs(plain, inputs)
        except Exception as error:
            return row | {"why": text(error)}
        started = time.perf_counter()
        try:
            plan = make_plan(source, sliplm.Recipe())
            if only_plan:
                return row | {"result": "ok", "split": len(plan.split), "whole": whole(plan)}
            row |= {"split": len(plan.split), "whole": whole(plan)}
            sliplm.split(source, out, ledger=Path(folder) / "ledger")
        except SlipError as error:
            return row | {"result": "refused", "why": text(error)}
        except Exception as error:
            return row | {"result": "failed", "why": f"split: {text(error)}"}
        try:
            yardstick = outputs(reference(out), inputs)
            with sliplm.open(out, timeout=60.0, ahead=0) as hybrid:
                found = outputs(hybrid, inputs)
        except Exception as error:
            return row | {"result": "failed", "why": f"run: {text(error)}"}
        row["seconds"] = round(time.perf_counter() - started, 1)
    row["equal"] = all(torch.equal(found[k], yardstick[k]) for k in expected)
    row["error"] = max(float((found[k] - v).norm() / v.norm().clamp_min(1e-9)) for k, v in expected.items())
    passed = row["equal"] and row["error"] < ERROR
    if causal and "logits" in expected:
        row["kl"] = divergence(found["logits"], expected["logits"])
        passed = row["equal"] and row["kl"] < KL
    return row | {"result": "ok" if passed else "failed", "why": "" if passed else "not equal, or too far"}


def whole(plan: Any) -> float:
    """The part of the weights that no worker has a part of."""
    split: int = sum(group.rows * group.columns for group, _ in plan.split)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--kind", nargs="*", default=["causal", "other"], choices=["causal", "other"])
    parser.add_argument("--plan", action="store_true", help="decide what would be split, and go no further")
    arguments = parser.parse_args()
    before = machine()
    rows = []
    for kind, name in families(arguments.kind):
        if arguments.only is None or kind in arguments.only:
            row = alone(kind, name, kind != name, arguments.plan)
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
