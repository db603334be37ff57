"""A model to measure, wherever it fits: on the device, or left on the disk and read layer by layer."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sliplm.engines.transformers.layout import Layout
from sliplm.errors import CheckpointError, InputError
from sliplm.filesystem import utf8_name
from sliplm.report import need

ROOM = 1.25  # a model, and what a forward pass takes beside it
_M_MMAP_THRESHOLD = -3  # of mallopt


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
        offload: leave the weights where they are on the disk and read each when it is reached (with a GPU:
            those that do not fit into the GPUs' memory, or else into this machine's); None: if the model does
            not fit into free memory.
        folder: for what has to be converted on the way.

    Raises:
        CheckpointError: transformers cannot load it.  ReportError: accelerate is wanted and not installed.
    """
    # float32 products in float32, on a GPU too: differences between variants must not be rounding
    torch.set_float32_matmul_precision("highest")
    size = 4 * sum(math.prod(shape) for shape in layout.parameters.values())
    if offload is None:
        offload = size * ROOM > free_memory(device)
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    if offload:
        need("accelerate")
        _give_memory_back()
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what is wanted here
        folder.mkdir(mode=0o700, exist_ok=True)
        options |= {"offload_folder": str(folder), **_places(device)}
    try:
        with utf8_name(model_dir) as named:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(named, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {model_dir}: {error}") from error
    model.eval().requires_grad_(False)
    return model if offload else model.to(device)


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
    except (OSError, ValueError):  # not Linux, or no such limit
        pass
    return free


def _places(device: torch.device) -> dict[str, Any]:
    """Where accelerate may put the weights."""
    if device.type == "cpu":
        return {"device_map": {"": "disk"}}  # what memory is free caches the files' pages by itself
    room: dict[int | str, int] = {
        i: int(0.7 * free_memory(torch.device("cuda", i))) for i in range(torch.cuda.device_count())
    }
    return {
        "device_map": "auto",
        "max_memory": room | {"cpu": free_memory(torch.device("cpu")) // 2},
    }


def _give_memory_back() -> None:
    """Let a dropped weight's memory go back to the system at once.

    glibc would keep it and, with activations between, use it for nothing else: the process grows by several
    times the model.  A fixed threshold makes every large block a mapping of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 64 << 10)
