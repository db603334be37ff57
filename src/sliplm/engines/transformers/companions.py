"""The files of a checkpoint that go along with a split model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from sliplm.engines.transformers.checkpoint import Checkpoint
from sliplm.errors import CheckpointError, SlipWarning
from sliplm.reading import read_bounded
from sliplm.shares.share import CONFIG

MAX_FILE_BYTES = 256 << 20


GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model",
    "sentencepiece.bpe.model", "spm.model", "spm_char.model", "bpe.codes", "source.spm", "target.spm",
    "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "emoji.json",
    "normalizer.json", "word_shape.json", "word_pronunciation.json", "tiktoken.model", "tekken.json",
)  # fmt: skip
PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)  # fmt: skip
SENTENCE = (
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "sentence_xlm-roberta_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
    "sentence_mpnet_config.json", "sentence_albert_config.json",
)  # fmt: skip
COPIED = (*GENERATION, *TOKENIZER, *PROCESSOR, *SENTENCE)
"""The files of a checkpoint that are copied into the vault's folder, if they are there; beside them only chat
templates that have a name, and the settings of what sentence-transformers does after the model.
"""

# each alone is a tokenizer to some class; tokenizer_config.json where bytes are the vocabulary
_ALONE = frozenset(TOKENIZER) - {
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja", "merges.txt",
}  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_TEMPLATE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.jinja")
_WEIGHTLESS = ("Pooling", "Normalize")
_STEP = re.compile(r"[0-9]+_[A-Za-z0-9_]+")  # as sentence-transformers names the folder of a step: 1_Pooling

# what in them names code that came with the checkpoint
_CODE = ("auto_map", "custom_pipelines", "custom_generate")


def companions(checkpoint: Checkpoint, *, untied: bool) -> dict[str, bytes]:
    """config.json of the split model, generation settings, tokenizer and preprocessor files, by name.

    Args:
        untied: a tied weight was split off.
    """
    source = checkpoint.path
    config = _json_of(source / "config.json")
    for name in _CODE:
        config.pop(name, None)  # `layout.read_config` has seen that transformers' own classes serve
    config["quantization_config"] = {"quant_method": "slip"}
    if untied:
        config["tie_word_embeddings"] = False
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = _dtype(checkpoint)  # transformers would look for it in the sealed weights
    return {CONFIG: json.dumps(config, indent=2).encode(), **copied(source)}


def copied(source: Path) -> dict[str, bytes]:
    """The files of a folder that go along as they are, but for the code that they name; by name.

    Raises:
        CheckpointError: one cannot be read, or is not what its name says.
    """
    files = {}
    for name in (*COPIED, *_templates(source), *_steps(source)):
        path = source / name
        if path.exists():
            data = _read(path)
            files[name] = _without_code(path, data) if name.endswith("_config.json") else data
    return files


def may_change(name: str) -> bool:
    """Whether a file of a vault is one of those that `copied` takes."""
    folder, _, last = name.rpartition("/")
    if folder:
        step = _STEP.fullmatch(folder) and last == CONFIG
        return bool(step or (folder == _TEMPLATES and _TEMPLATE.fullmatch(last)))
    return name in COPIED


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint or a vault has one, by the names of its files."""
    return any((folder / name).is_file() for name in _ALONE)


def names_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names hold a tokenizer."""
    return not _ALONE.isdisjoint(names)


def _read(path: Path) -> bytes:
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy it again") from error
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is longer than {MAX_FILE_BYTES} bytes: this is no {path.name}")
    return data


def _templates(source: Path) -> Iterable[str]:
    """The chat templates that have a name; transformers looks for no others."""
    folder = source / _TEMPLATES
    found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return [f"{_TEMPLATES}/{name}" for name in found if _TEMPLATE.fullmatch(name)]


def _steps(source: Path) -> Iterable[str]:
    """Settings of sentence-transformers' steps after the model: how it pools, that it normalises.

    Raises:
        CheckpointError: a step may have weights or code of its own; without it the vectors would be others.
    """
    path = source / "modules.json"
    if not path.exists():
        return []
    try:
        steps = json.loads(_read(path))
        named = [(str(step["path"]).strip("/"), str(step["type"])) for step in steps]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no list of sentence-transformers' modules; copy it again"
        ) from error
    found = []
    for folder, kind in named:
        if not folder and kind.rpartition(".")[2] == "Transformer":
            continue
        known = kind.startswith("sentence_transformers.") and kind.rpartition(".")[2] in _WEIGHTLESS
        if not known or not _STEP.fullmatch(folder):
            raise CheckpointError(
                f"{path}: the step {folder} ({kind}) may have weights or code of its own and stays out; "
                "move modules.json away, split, and do this step on the model's output yourself"
            )
        found.append(f"{folder}/config.json")
    return found


def check_code(source: Path) -> None:
    """Refuse a checkpoint whose tokenizer or processor is code of its own, which is never run.

    Where a class of transformers has the name that is asked for, it is taken instead, with a warning.

    Raises:
        CheckpointError: there is such a file, or a step of sentence-transformers that cannot go along; the
            message names it.
    """
    _steps(source)
    for name in COPIED:
        path = source / name
        if name.endswith("_config.json") and path.exists():
            found = _json_of(path)
            code = _named_code(found)
            if not code:
                continue
            wanted = [str(found[key]) for key in _CLASSES if found.get(key)]
            if not wanted or not all(_built_in(one) for one in wanted):
                raise CheckpointError(
                    f"{path} names code that came with the checkpoint ({', '.join(code)}), never run, "
                    f"and transformers has no {' or '.join(wanted) or 'class'} of its own for it: save the "
                    "tokenizer in the form of tokenizer.json, or move the file away and split without it"
                )
            warnings.warn(
                f"{path} names code of its own ({', '.join(code)}): it is not run and not copied; "
                f"transformers' own {', '.join(wanted)} serves",
                SlipWarning,
                stacklevel=2,
            )


_CLASSES = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")


def _named_code(config: dict[str, Any]) -> list[str]:
    """Where the code lies that a configuration names: "modeling_x.Y" and the like; empty for none."""
    found: list[str] = []
    for key in _CODE:
        value = config.get(key)
        values = value.values() if isinstance(value, dict) else [value]
        for item in values:
            found += [str(one) for one in (item if isinstance(item, list) else [item]) if one]
    return list(dict.fromkeys(found))


def _built_in(name: str) -> bool:
    """Whether transformers has a class of this name, by itself or as its fast or slow kin."""
    plain = name.removesuffix("Fast")
    return any(hasattr(transformers, one) for one in (name, plain, f"{plain}Fast"))


def _without_code(path: Path, data: bytes) -> bytes:
    """A configuration file as it is, but for the code that it names."""
    config = _json_of(path, data)
    if not any(key in config for key in _CODE):
        return data
    return json.dumps({k: v for k, v in config.items() if k not in _CODE}, indent=2).encode()


def _json_of(path: Path, data: bytes | None = None) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(path, MAX_FILE_BYTES) if data is None else data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return found


def _dtype(checkpoint: Checkpoint) -> str:
    """The type of the checkpoint's first floating tensor, as transformers would find it."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    types = (entry.dtype for entry in checkpoint.entries.values())
    return next((names[dtype] for dtype in types if dtype in names), "float32")
