"""Generation settings, chat templates and tokenizer of a vault that exists, changed without another split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sliplm.engines.transformers.answer import load_tokenizer
from sliplm.engines.transformers.companions import (
    GENERATION,
    TOKENIZER,
    check_code,
    copied,
    may_change,
    names_tokenizer,
)
from sliplm.engines.transformers.opened import private_folder
from sliplm.engines.transformers.provenance import read_config
from sliplm.errors import CheckpointError, InputError, ShareError
from sliplm.shares.keysource import KeySpec
from sliplm.shares.manifest import PLAIN_MODULE
from sliplm.shares.revision import Revision


@dataclass(frozen=True)
class Resealed:
    """What became of a vault's files, by name; `same` are those of the folder that are there already."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    same: tuple[str, ...]


def reseal(
    vault_dir: Path | str,
    source: Path | str | None = None,
    *,
    key: KeySpec = None,
    remove: Iterable[str] = (),
) -> Resealed:
    """Change generation settings, chat templates, tokenizer and preprocessor files of a vault.

    Weights, worker share, pools and ledger stay as they are and still match.  At a crash the vault is the old
    one or the new one.  (`slip keys reseal` changes the key.)

    Args:
        vault_dir: the folder `vault` that `split` wrote.
        source: a folder with new files.  Those that a split copies are taken, by their exact names; others
            are not looked at.  A file of the vault that is not there stays.
        key: what the vault share is sealed with, see `keysource`; None takes the user's key file.
        remove: names of files of the vault that go.

    Raises:
        CheckpointError: the folder has none of these files, or one that cannot be used; nothing was changed.
        InputError: there is nothing to do, or a name cannot be removed.
        CredentialError: the key cannot be had.
        SealError: the key is another one.
        ShareError: the vault is incomplete or damaged, or cannot be written.
    """
    vault, gone = Path(vault_dir), tuple(dict.fromkeys(remove))
    if source is None and not gone:
        raise InputError("say what to change: a folder with new files, or names to remove")
    new = {} if source is None else _new(vault, Path(source))
    with Revision(vault, key) as revision:
        if revision.manifest.source.config_class == PLAIN_MODULE:
            raise ShareError(f"{vault} is the vault of a plain PyTorch module, which has no such files")
        old = revision.files
        for name in gone:
            _check_removal(vault, name, old, new)
        differ = {name: data for name, data in new.items() if old.get(name) != data}
        if differ or gone:
            left = {name: data for name, data in old.items() if name not in gone}
            _check_use(vault, Path(source or vault), {**left, **differ}, {*differ, *gone})
            revision.change(differ, gone)
    return Resealed(
        added=tuple(name for name in differ if name not in old),
        changed=tuple(name for name in differ if name in old),
        removed=gone,
        same=tuple(name for name in new if name not in differ),
    )


def _new(vault: Path, source: Path) -> dict[str, bytes]:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder: name one that holds the new files")
    if vault.is_dir() and source.samefile(vault):
        raise CheckpointError(
            f"{source} is the vault itself: copy the files to another folder, change them there, and name "
            "that one"
        )
    check_code(source)
    new = copied(source)
    if not new:
        raise CheckpointError(
            f"{source} has none of the files that a split copies, such as {GENERATION[0]}, {TOKENIZER[0]} or "
            "chat_template.jinja: give the files their usual names"
        )
    return new


def _check_removal(vault: Path, name: str, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> None:
    if name not in old or not may_change(name):
        names = ", ".join(sorted(filter(may_change, old))) or "none"
        raise InputError(f"{name} cannot be removed from {vault}: what can is {names}")
    if name in new:
        raise InputError(f"{name} is to be removed, and is in the folder of new files: choose one")


def _check_use(vault: Path, source: Path, files: Mapping[str, bytes], touched: set[str]) -> None:
    """Find out what transformers makes of the files, before anything is written.  Raises: CheckpointError."""
    again = "nothing was changed in the vault: correct it, and run the same command again"
    with private_folder(files) as folder:
        if not touched.isdisjoint(GENERATION) and GENERATION[0] in files:
            try:
                GenerationConfig.from_pretrained(folder).validate()
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{source / GENERATION[0]} cannot be used ({error}); {again}"
                ) from error
        if names_tokenizer(files) and any(name in TOKENIZER or name.endswith(".jinja") for name in touched):
            try:
                tokenizer = load_tokenizer(folder)
            except ShareError as error:
                raise CheckpointError(
                    f"the tokenizer's files of {source} cannot be used ({_reason(error)}); {again}"
                ) from error
            _check_templates(source, tokenizer, again)
            rows = getattr(read_config(folder, vault).get_text_config(), "vocab_size", None)
            if isinstance(rows, int) and len(tokenizer) > rows:
                raise CheckpointError(
                    f"the tokenizer in {source} has {len(tokenizer)} tokens and the model {rows}: it is "
                    f"another model's; {again}"
                )


def _check_templates(source: Path, tokenizer: PreTrainedTokenizerBase, again: str) -> None:
    found = tokenizer.chat_template
    for name in found if isinstance(found, dict) else [None] if found else []:
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], chat_template=name, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            which = f"the chat template {name}" if name else "the chat template"
            raise CheckpointError(f"{which} in {source} cannot be used ({error}); {again}") from error
        except Exception:  # noqa: S112 - it may want other messages than this one
            continue


def _reason(error: ShareError) -> str:
    return str(error.__cause__ or error).strip().split("\n")[0][:300]
