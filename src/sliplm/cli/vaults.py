"""What the commands that run a split model have in common: its folder, its workers, its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sliplm.errors import InputError
from sliplm.shares.folders import side_of


def vault_of(out: Path) -> Path:
    """The vault folder of a split, or the folder itself."""
    return out / "vault" if (out / "vault").is_dir() else out


def checked(vault: Path, tokenizer: Path | None) -> Any:
    """Refuse what cannot generate before anything is opened; the tokenizer that was named, or None."""
    from sliplm.engines.transformers.answer import load_tokenizer
    from sliplm.engines.transformers.companions import has_tokenizer
    from sliplm.engines.transformers.load import can_generate

    if not can_generate(vault):
        raise InputError(
            f"{vault} holds a model that does not generate text, such as an encoder: call it in Python, by "
            "sliplm.open or sliplm.load (a plain PyTorch module: sliplm.open_module)"
        )
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    if side_of(vault) == "vault" and not has_tokenizer(vault):
        raise InputError(
            f"no tokenizer came with the checkpoint that was split into {vault}: name a folder that has the "
            "model's, with --tokenizer FOLDER; or call the model in Python, which takes token ids"
        )
    return None


def tokenizer_of(model: Any) -> Any:
    """The vault's own."""
    from sliplm.engines.transformers.answer import load_tokenizer

    return load_tokenizer(model.slip.files)


@contextmanager
def opened(out: Path, vault: Path, workers: list[str], chosen: dict[str, Any]) -> Iterator[Any]:
    """The model, with the workers that were named, or with one that is started here."""
    import sliplm

    if workers:
        model: Any = sliplm.load(vault, workers, **chosen)
        with closing(model.slip):
            yield model
    elif vault != out or not (out / "manifest.json").exists():
        with sliplm.open(out, **chosen) as model:
            yield model
    else:
        raise InputError(
            f"{out} is one of the two folders that a split wrote: name a worker with --worker, "
            f"or give {out.resolve().parent}, and a worker is started from it"
        )
