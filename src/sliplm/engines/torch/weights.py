"""What stands in a split layer where its weight was.

A module's own code goes on as ever, `F.linear(x, self.weight, self.bias)` or `F.conv2d`, padding of its own
included; PyTorch hands the call over to its weight (`__torch_function__`), and the product comes from the
worker.  So layers that inherit from `nn.Linear` or `nn.Conv2d` and do more than these work too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from sliplm.engines.modules import NOT_TRACED, GroupProduct, check_input, result_type
from sliplm.engines.torch.patches import patches_of
from sliplm.errors import InputError

_NAMES = (
    "shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_nested", "requires_grad", "grad_fn", "grad", "is_leaf", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size",
    "dim",
    "numel",
    "is_contiguous",
    "is_floating_point",
    "__len__",
    "element_size",
    "nelement",
)

ABOUT: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _NAMES] + [getattr(Tensor, name) for name in _METHODS]
)
"""Questions about a tensor that its values do not answer."""


def name_of(func: Any) -> str:
    """What a function of PyTorch is called; of a property its own name."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name == "__get__" else name


class Call(NamedTuple):
    """The arguments of `F.linear`, or of `F.conv2d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: str | int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Self:
        """From the arguments as they were given; torch calls the first one `input`."""
        named = {("x" if name == "input" else name): value for name, value in (kwargs or {}).items()}
        return cls(*args, **named)


class SplitWeight(Tensor):
    """Has a weight's shape and type, and no values: nobody has them in one place.

    Raises InputError for whatever is neither a question about its shape nor the product that was split.
    """

    group: GroupProduct
    member: int
    products: ClassVar[dict[Any, Callable[[Call], Tensor]]]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, group: GroupProduct, member: int
    ) -> SplitWeight:
        weight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("cpu"))
        weight.group, weight.member = group, member
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"SplitWeight({list(self.shape)}, group={self.group.name})"

    def __reduce_ex__(self, _: Any) -> NoReturn:
        self.group.__reduce__()

    def __deepcopy__(self, _: Any) -> NoReturn:
        self.group.__reduce__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in cls.products:
            call = Call.of(args, kwargs)
            if isinstance(call.weight, SplitWeight) and not isinstance(call.x, SplitWeight):
                product = cls.products[func]
                if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                    product = torch.compiler.disable(product, reason=NOT_TRACED)  # type: ignore[no-untyped-call]
                return product(call)
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise InputError(
            f"a split weight was given to {name_of(func)}: no party has it, and only the product that "
            "was traced can be computed; place this layer in the vault by a rule, and split again"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise InputError(f"a split weight was given to {func}: no party has it")


def _linear(call: Call) -> Tensor:
    """`F.linear`: [..., n] -> [..., rows] (SPEC steps 1 to 5)."""
    x, weight = call.x, cast(SplitWeight, call.weight)
    rows, columns = weight.shape
    check_input(weight.group.name, x, x.is_cpu and x.shape[-1:] == (columns,), f"[..., {columns}]")
    shape = (*x.shape[:-1], rows)
    if not x.numel():
        return x.new_zeros(shape, dtype=result_type(x))
    y = _tensor(weight.group.rows_of(weight.member, x), shape)
    return (y if call.bias is None else y + call.bias).to(result_type(x))


def _conv2d(call: Call) -> Tensor:
    """`F.conv2d`: [batch, channels, height, width] -> [batch, rows, down, across], each place a row of the
    product.
    """
    x, weight = call.x, cast(SplitWeight, call.weight)
    rows, channels = weight.shape[:2]
    patches = patches_of(tuple(weight.shape), call.stride, call.padding, call.dilation)
    fits = x.is_cpu and x.ndim in (3, 4) and x.shape[-3] == channels and call.groups == 1
    fits = fits and min(patches.places(*x.shape[-2:])) > 0
    check_input(weight.group.name, x, fits, f"[batch, {channels}, height, width]")
    batch, places = x.shape[:-3], patches.places(*x.shape[-2:])
    if not x.numel():
        return x.new_zeros((*batch, rows, *places), dtype=result_type(x))
    y = _tensor(weight.group.rows_of(weight.member, x, patches), (*batch, *places, rows)).movedim(-1, -3)
    return (y if call.bias is None else y + call.bias[:, None, None]).to(result_type(x)).contiguous()


def _tensor(rows: Any, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(shape))


SplitWeight.products = {F.linear: _linear, F.conv2d: _conv2d}
