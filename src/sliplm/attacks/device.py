"""Where attacks run."""

from __future__ import annotations

import torch

from sliplm.errors import InputError


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def devices(wanted: str, jobs: int) -> tuple[torch.device, ...]:
    """The devices of `jobs` processes: all GPUs of this machine in turn, or the CPU.

    Args:
        wanted: "cpu", "cuda", or "auto" for GPUs where there are any.

    Raises:
        InputError: another word, or no GPU.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {wanted}: choose cpu, cuda or auto")
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not count:
        raise InputError("--device cuda: PyTorch finds no GPU here; use --device cpu, or a build with CUDA")
    if not count:
        return (torch.device("cpu"),) * jobs
    return tuple(torch.device("cuda", i % count) for i in range(jobs))
