"""Where what transformers reads of a vault comes from: the verified files, whatever path it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sliplm.errors import ShareError
from sliplm.shares.share import CONFIG, VaultShare

# what an argument of from_pretrained may choose, and what transformers notes by itself
_CHOSEN = frozenset(
    (
        "dtype", "torch_dtype", "quantization_config", "name_or_path", "_name_or_path", "use_cache",
        "transformers_version", "return_dict", "output_attentions", "output_hidden_states",
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    )
)  # fmt: skip


def read_config(folder: Path, vault: Path) -> PretrainedConfig:
    """The configuration in a private folder of verified files.

    Raises:
        ShareError: this transformers cannot use it.
    """
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ShareError(f"{vault / CONFIG} cannot be used: split the model again") from error
    return found


def check_config(read: PretrainedConfig, folder: Path, vault: VaultShare) -> None:
    """Hold the configuration that transformers read from the vault's folder to the verified one.

    Args:
        read: what transformers made the model from.
        folder: a private folder of the vault's verified files.

    Raises:
        ShareError: they differ in what no argument of `from_pretrained` usually chooses.
    """
    verified = read_config(folder, vault.path)
    if type(verified) is not type(read):
        verified = verified.get_text_config()
    ours, theirs = _content(verified.to_dict()), _content(read.to_dict())
    other = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if other:
        raise ShareError(
            f"the model was built with another {', '.join(other[:3])} than {vault.path / CONFIG} holds: it "
            "was changed while it was read, or from_pretrained was told otherwise; leave that argument out, "
            "or use sliplm.load"
        )


def verified_generation(model: PreTrainedModel, folder: Path) -> None:
    """Let a model that is being loaded read its generation settings from `folder`, not from the vault's."""
    theirs = getattr(model, "adjust_generation_fn", None)
    if theirs is None:
        return

    def ours(generation_config: Any, auto: Any, piped: Any, _: Any, *rest: Any, **more: Any) -> None:
        del model.adjust_generation_fn  # once is enough
        theirs(generation_config, auto, piped, str(folder), *rest, **more)

    model.adjust_generation_fn = ours


def _content(value: Any) -> Any:
    """A configuration without what may be chosen when it is loaded, at every depth."""
    if isinstance(value, dict):
        return {name: _content(item) for name, item in value.items() if name not in _CHOSEN}
    return [_content(item) for item in value] if isinstance(value, list | tuple) else value
