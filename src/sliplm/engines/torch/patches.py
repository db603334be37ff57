"""A convolution as one product: its input's patches, a row each, times the weight as a matrix.

`conv2d(x, w)` at one place is the scalar product of each filter with the patch of x that lies under it.  So
with `w` [rows, channels, height, width] read as [rows, n], n = channels * height * width, and one row of n
numbers for each image and place, it is the same product as that of a linear layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F  # noqa: N812  as everybody calls it

Pair = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """How a convolution cuts its input; `padding` is zeros on the left, right, top and bottom."""

    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch * places, n], places in reading order; an input without
        batch is one image.
        """
        x = x if x.ndim == 4 else x[None]
        if any(self.padding):
            x = F.pad(x, self.padding)
        if self.kernel == (1, 1):  # nothing to gather: every place is its own patch
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
            return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        cut = F.unfold(x, self.kernel, dilation=self.dilation, stride=self.stride)
        return cut.transpose(1, 2).reshape(-1, cut.shape[1])

    def places(self, height: int, width: int) -> Pair:
        """The size of the output; nothing positive where the input is smaller than the kernel."""
        left, right, top, bottom = self.padding
        sizes = (height + top + bottom, width + left + right)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        down, across = ((size - r) // s + 1 for size, r, s in zip(sizes, reach, self.stride, strict=True))
        return down, across

    def rows(self, shape: tuple[int, ...]) -> int:
        """How many rows an input [batch, channels, height, width], or without batch, makes."""
        down, across = self.places(*shape[-2:])
        return math.prod(shape[:-3]) * down * across


def patches_of(
    weight: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
) -> Patches:
    """The patches of `torch.nn.functional.conv2d` with a weight of this shape and these arguments."""
    kernel, across = (weight[2], weight[3]), _pair(dilation)
    if padding == "same":  # torch puts the odd one at the right and at the bottom
        total = [d * (k - 1) for d, k in zip(across, kernel, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        sides = (left, total[1] - left, top, total[0] - top)
    elif isinstance(padding, str):  # "valid"
        sides = (0, 0, 0, 0)
    else:
        down, right = _pair(padding)
        sides = (right, right, down, down)
    return Patches(kernel, _pair(stride), sides, across)


def _pair(value: int | tuple[int, ...]) -> Pair:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])
