"""A small network that reads handwritten digits, trained in seconds on scikit-learn's real scans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sliplm.errors import FetchError
from sliplm.examples.fetch import build_once, working

if TYPE_CHECKING:
    from torch import Tensor, nn

HELD_OUT = 597  # the last scans
EPOCHS, BATCH, RATE = 30, 100, 2e-3


@dataclass(frozen=True)
class Digits:
    """Scans of 8 x 8 pixels, float32 [count, 64] from 0 to 1, and what they show, int64 [count]."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """1200 scans to train on, and 597 to test with.

    Raises:
        FetchError: scikit-learn is not installed.
    """
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FetchError("the scans of digits are scikit-learn's: pip install scikit-learn") from error
    found = load_digits()
    images, labels = torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target).long()
    return (
        Digits(images[:-HELD_OUT], labels[:-HELD_OUT]),
        Digits(images[-HELD_OUT:], labels[-HELD_OUT:]),
    )


def digits_skeleton() -> nn.Module:
    """The network without its training: 64 pixels, 256 and 128 hidden units, 10 digits."""
    from torch import nn

    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    return module.train(False)


def digits_mlp() -> nn.Module:
    """The trained network, in evaluation mode; the first call trains it, later ones read it from the cache.

    Raises:
        FetchError: scikit-learn is not installed, or the cache cannot be written.
    """
    from safetensors.torch import load_file

    module = digits_skeleton()
    module.load_state_dict(load_file(build_once("digits-mlp-v1.safetensors", _make)))
    return module


def accuracy(module: nn.Module, data: Digits) -> float:
    """The share of scans that are read right."""
    import torch

    with torch.inference_mode():
        return float((module(data.images).argmax(1) == data.labels).float().mean())


def train_digits(seed: int = 0) -> nn.Module:
    """Train the network on the first 1200 scans: some seconds.

    Raises:
        FetchError: scikit-learn is not installed.
    """
    import torch

    train, _ = digits()
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        module = digits_skeleton()
        optimiser = torch.optim.Adam(module.parameters(), lr=RATE, weight_decay=1e-5)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(train.labels)).split(BATCH):  # type: ignore[no-untyped-call]
                loss = torch.nn.functional.cross_entropy(module(train.images[batch]), train.labels[batch])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return module


def _make(target: Path) -> None:
    from safetensors.torch import save_file

    with working("Training a network on scans of digits ..."):
        save_file(train_digits().state_dict(), target, metadata={"format": "pt"})
