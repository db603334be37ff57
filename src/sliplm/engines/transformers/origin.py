"""Where a checkpoint comes from: how close it is to public models, and what its own files say.

A fast rotation is not claimed to hide a model from someone who has a close relative (SPEC section 10.5).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from sliplm.arithmetic.field import new_key
from sliplm.errors import SlipWarning
from sliplm.reading import open_regular
from sliplm.shares.sketch import Floats, Likeness, likeness, of_weights

Weights = Iterable[tuple[str, Floats]]
"""Name and stacked weight of each group, one in memory at a time."""

MAX_CARD_BYTES = 64 << 10
_NAME = re.compile(r"(\.{0,2}/)?[\w][\w.-]*(/[\w.-]+)*", re.ASCII)
_TUNED = re.compile(
    r"(?<![a-z])(fine[-_.]?tun(e|ed|ing)|ft|sft|dpo|rlhf|q?lora|merged)(?![a-z])", re.IGNORECASE
)


def compare(weights: Weights, public: Mapping[str, Weights]) -> dict[str, Likeness]:
    """How close a model is to each of several others; each is read once, by sketches under a fresh key."""
    key = new_key()
    ours = of_weights(weights, [key])[key]
    return {name: likeness(ours, of_weights(theirs, [key])[key]) for name, theirs in public.items()}


def warn_of_relatives(found: Mapping[str, Likeness], *, proven: bool, level: int) -> None:
    """Warn of each public model that is close.

    Args:
        proven: all groups have Haar rotations, which hide a model from those who have a relative too.
        level: as `warnings.warn` has it, from the caller on.
    """
    for name, how in found.items():
        if how.close and not proven:
            warnings.warn(
                f"this model is close to {name}: {how}. Whoever has {name} may fit a fast rotation to it and "
                "read what you changed; that a share hides this is not claimed. Split it against its base "
                f"(--base FOLDER), or with rotation haar; see docs/THREAT_MODEL.md",
                SlipWarning,
                stacklevel=level + 1,
            )


def warn_of_named_base(folder: Path, *, level: int) -> None:
    """Hint at the base that a checkpoint's own files name, or that its name says there is."""
    named = named_base(folder)
    if named is not None:
        file, base = named
        said, whose = f"{file} says that this model comes from {base}", base
    elif _TUNED.search(folder.resolve().name):
        said, whose = f"by its name {folder.resolve().name} is a fine-tune", "its base"
    else:
        return
    warnings.warn(
        f"{said}. If others can have {whose}, split against it, base=FOLDER (slip split --base FOLDER): the "
        "worker's share is then the base alone. To measure only how close they are: public=[FOLDER] "
        "(--public FOLDER). A fast rotation is not claimed to hide a model from who has a close relative",
        SlipWarning,
        stacklevel=level + 1,
    )


def named_base(folder: Path) -> tuple[str, str] | None:
    """(File, the one base that it names): README.md's front matter, adapter_config.json, or config.json."""
    cards = (("README.md", _front_matter), ("adapter_config.json", _adapter), ("config.json", _config))
    for file, read in cards:
        try:
            with open_regular(folder / file) as card:
                base = read(card.read(MAX_CARD_BYTES).decode())
        except (OSError, ValueError, RecursionError):  # no such file, or nothing that can be used: no hint
            continue
        if base is None or len(base) > 200 or not _NAME.fullmatch(base):
            continue
        if file != "config.json" or not _itself(folder, base):
            return file, base
    return None


def _itself(folder: Path, name: str) -> bool:
    """Whether a name is that of the folder: transformers once wrote where a model was loaded from."""
    place = folder.resolve()
    cached = [part.rpartition("--")[2] for part in place.parts if part.startswith("models--")]
    last = name.rstrip("/").rpartition("/")[2]
    return last.lower() in {one.lower() for one in (place.name, *cached)}


def _front_matter(text: str) -> str | None:
    """The value of `base_model` in YAML between two lines `---`: one name, or a list of one."""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    field = re.search(r"^base_model:[ \t]*(.*(?:\n[ \t]*- .*)*)$", head[1], re.MULTILINE) if head else None
    if field is None:
        return None
    names = [name.strip(" \t\"'[]") for name in re.split(r"\n[ \t]*- |,", field[1])]
    named = [name for name in names if name]
    return named[0] if len(named) == 1 else None


def _adapter(text: str) -> str | None:
    config = json.loads(text)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return base if isinstance(base, str) else None


def _config(text: str) -> str | None:
    config = json.loads(text)
    if not isinstance(config, dict):
        return None
    named = (config.get(name) for name in ("base_model_name_or_path", "_name_or_path"))
    return next((name for name in named if isinstance(name, str) and name), None)
