"""A model to measure, wherever it fits: on the device, or left on the disk."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sliplm.engines.transformers.layout import Layout
from sliplm.errors import CheckpointError, InputError
from sliplm.report import need

ROOM = 1.25  # a model, and what a forward pass takes beside it


def device_named(name: str | None) -> torch.device:
    """cpu, cuda or cuda:N; the first GPU if there is one and None is given.

    Raises:
        InputError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"no device {name!r} here: choose cpu, cuda or cuda:N") from error
    return device


def open_model(
    model_dir: Path, layout: Layout, device: torch.device, offload: bool | None, folder: Path
) -> PreTrainedModel:
    """Load a checkpoint in float32, for inference.

    Args:
        offload: leave the weights on the disk and read each layer's when it is reached; None: if they do not
            fit into free memory.
        folder: for what has to be converted on the way to the disk.

    Raises:
        CheckpointError: transformers cannot load it.  ReportError: accelerate is wanted and not installed.
    """
    # float32 products in float32, on a GPU too: differences between variants must not be rounding
    torch.set_float32_matmul_precision("highest")
    size = 4 * sum(math.prod(shape) for shape in layout.parameters.values())
    if offload is None:
        offload = size * ROOM > free_memory(device)
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    try:
        if not offload:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, **options).to(device)
        else:
            need("accelerate")
            folder.mkdir(mode=0o700, exist_ok=True)
            model = AutoModelForCausalLM.from_pretrained(
                model_dir, device_map={"": "disk"}, offload_folder=str(folder), **options
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {model_dir}: {error}") from error
    return model.eval().requires_grad_(False)


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free
