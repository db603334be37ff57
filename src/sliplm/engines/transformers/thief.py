"""The model that a worker's share alone is worth: what a thief gets who runs it.

Everything here errs in the thief's favour.  Beside the worker's integers, which he has, he is given what
the vault keeps whole or what he could only guess:

    the configuration, the tokenizer, the embedding (and the LM head where it is tied to it), norms, biases;
    which rows of a group belong to which layer;
    the true norm of every row of every matrix, for the scales that stay in the vault.

What he lacks is what a split hides: the removed triplets (SPEC split step 1) and the basis (step 2).
A thief who also trains is the business of the red team, not of this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sliplm.engines.transformers.layout import architecture, read_config
from sliplm.errors import ShareError
from sliplm.filesystem import utf8_name
from sliplm.shares.manifest import ExpertOf
from sliplm.shares.shards import open_beside
from sliplm.shares.share import read_vault_manifest


def thief(model_dir: Path | str, out_dir: Path | str, *, model_class: Any = None) -> PreTrainedModel:
    """Load a checkpoint with every split matrix replaced by the worker's integers, row norms restored.

    Args:
        model_dir: the checkpoint that was split; only what is listed above is used of it.
        out_dir: the folder that `split` wrote.
        model_class: the class that was split, or its Auto class; None takes the class that the checkpoint
            names, else AutoModelForCausalLM.

    Raises:
        ShareError: a folder is missing, damaged, or of another model.
    """
    worker, groups = (
        open_beside(Path(out_dir)),
        read_vault_manifest(Path(out_dir) / "vault").groups,
    )
    model_class = model_class or architecture(read_config(Path(model_dir))) or AutoModelForCausalLM
    with utf8_name(Path(model_dir)) as folder:
        model: PreTrainedModel = model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    tied = getattr(model.get_input_embeddings(), "weight", None)
    modules = dict(model.named_modules())
    for group in groups:
        if group.expert is not None:
            _replace_expert(modules.get(group.expert.module), group.expert, worker.matrices[group.name])
            continue
        first = 0
        for member in group.members:
            rows = worker.matrices[group.name][first : first + member.rows]
            first += member.rows
            module = modules.get(member.module)
            if not isinstance(module, nn.Linear | Conv1D):
                raise ShareError(
                    f"{model_dir} has no linear layer {member.module}: give the model that was split"
                )
            if module.weight is not tied:
                _replace(module, rows, member.module)
    return model.requires_grad_(False)


def _replace_expert(module: nn.Module | None, expert: ExpertOf, rows: np.ndarray[Any, Any]) -> None:
    fused = None if module is None else dict(module.named_parameters(recurse=False)).get(expert.weight)
    if module is None or fused is None or expert.number >= len(fused):
        raise ShareError(
            f"the model has no expert {expert.number} in {expert.module}: give the one that was split"
        )
    true = fused.data[expert.number]
    true = true.T if module.is_transposed else true
    true.copy_(_with_norms(torch.from_numpy(rows.astype(np.float32)), true.clone()))


def _replace(module: nn.Linear | Conv1D, rows: np.ndarray[Any, Any], name: str) -> None:
    transposed = isinstance(module, Conv1D)
    true = module.weight.detach().T if transposed else module.weight.detach()
    if true.shape != rows.shape:
        raise ShareError(
            f"{name} is {list(true.shape)}, the share {list(rows.shape)}: give the model that was split"
        )
    guess = _with_norms(torch.from_numpy(rows.astype(np.float32)), true)
    module.weight = nn.Parameter(guess.T.contiguous() if transposed else guess)


def _with_norms(rows: Tensor, true: Tensor) -> Tensor:
    """Scale each row [columns] to the norm of the true one."""
    norms = rows.norm(dim=1, keepdim=True).clamp_min(1.0)  # integers: below 1 is a row of zeros
    scaled: Tensor = rows * (true.norm(dim=1, keepdim=True) / norms)
    return scaled
