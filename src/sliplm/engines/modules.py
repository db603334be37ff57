"""The split layers of a hybrid model: linear layers whose products come from elsewhere.

The members of a group (q, k and v, say) read one input and share one exchange.  The first member
called asks for the whole group's product; the others, called with the same tensor, take their rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from sliplm import forks
from sliplm.engines.idle import quietly
from sliplm.engines.oncard import OnCard
from sliplm.errors import InputError, ShareError
from sliplm.parties.adapters import chosen
from sliplm.secrecy import Secret
from sliplm.shares.manifest import Member

Floats = NDArray[np.float32]

NOT_TRACED = "its product comes from a worker, and a recording would answer with that of the example"

Patches = Callable[[Tensor], Tensor]
"""A convolution's input -> its rows [rows, n]; two are equal where they do the same."""


class Products(Protocol):
    """Whoever multiplies: the vault, or in tests both shares in one process."""

    def product(self, group: str, x: Floats) -> Floats:
        """Return `W x` for each row: float32 [rows, n] -> float32 [rows, m], without bias."""


class Closeable(Secret):
    """Before a loaded model's own class: it closes its vault, at the end of a with block if it stands in one.

    It is closed without a word too, when nothing refers to the vault any more.
    """

    slip: Any

    def close(self) -> None:
        """Let go of the workers, and of a worker process made for it; harmless when done already."""
        self.slip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def derive(model: nn.Module, base: type[Closeable], members: Mapping[str, Any]) -> None:
    """Give a model a class of its own, of the same name, between `base` and its class; its forward keeps
    torch's threads out of a worker's way.
    """
    kind = type(model)
    members = {**members, "forward": quietly(members.get("forward", kind.forward))}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    model.__class__ = type(kind.__name__, (base, kind), {**named, **members})


def refuse_in_children(model: nn.Module) -> None:
    """Have a forked child's first forward raise ForkError: before any product torch would wait for threads of
    its own, which no child has.
    """
    model.register_forward_pre_hook(partial(_at_home, forks.Process()))


def _at_home(process: forks.Process, *_: object) -> None:
    if not torch.compiler.is_compiling():  # each product asks too
        process.check()


def refuse_script(*_: object) -> NoReturn:
    """What torch.jit.script asks a module for first: its `__prepare_scriptable__`."""
    raise InputError(
        "a model with split layers cannot be scripted: TorchScript cannot ask a worker for products. Call "
        "the model itself"
    )


class GroupProduct:
    """One group's product, computed once per input and handed out once to each member.

    An input is recognised by identity and contents: it must be the very tensor, and hold what it held, for
    writes through `.data` or a numpy view are counted by nobody.  Each
    thread has its own product at hand, so that several `generate` may run at once; it counts for the adapter
    that was chosen when it was made.

    Args:
        name: the group's name in the share.
        rows: output features of each member, in row order.
        source: who multiplies.  It may be set later, before the first call.
    """

    def __init__(self, name: str, rows: Sequence[int], source: Products | None) -> None:
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        self.name = name
        self.source = source
        self._spans = tuple((end - n, end) for n, end in zip(rows, ends, strict=True))
        self._everyone = (1 << len(rows)) - 1
        self._held = _Held()
        self._on_card = OnCard(name, len(rows))

    def on_card(self, index: int, x: Tensor) -> Tensor:
        """Return member `index`'s part of the product for x [..., n] on a card: a view [..., out_features] in
        x's type, or float32 for float64.
        """
        if self.source is None:
            raise InputError(f"group {self.name} has no vault: load the model with sliplm.load")
        start, end = self._spans[index]
        rows = self._spans[-1][1]
        product = self._on_card.product(self.source, index, x, rows)
        return product.view(*x.shape[:-1], rows)[..., start:end]

    def rows_of(self, index: int, x: Tensor, patches: Patches | None = None) -> Floats:
        """Return member `index`'s part of the product: [..., n] -> float32 [rows, out_features].

        Args:
            patches: what makes the rows [rows, n] of x, for a convolution; None takes x as it is.
        """
        values, bit = _values(x), 1 << index
        if self._everyone == bit:
            return self._compute(values, patches)
        held = self._held
        now, held.now = held.now, None  # an error must leave nothing behind
        if now is None or not now.serves(bit, x, values, patches):
            now = _AtHand(x, values, patches, self._everyone)
            now.product = self._compute(values, patches)
        now.waiting ^= bit
        if now.waiting:
            held.now = now
        start, end = self._spans[index]
        return now.product[:, start:end]

    def _compute(self, values: Floats, patches: Patches | None) -> Floats:
        if self.source is None:
            raise InputError(f"group {self.name} has no vault: load the model with sliplm.load")
        if patches is not None:
            values = patches(torch.from_numpy(values)).contiguous().numpy()
        return self.source.product(self.name, values.reshape(-1, values.shape[-1]))

    def __reduce__(self) -> NoReturn:
        raise InputError("a model with split layers cannot be copied or pickled: load its vault folder again")


class Split(nn.Module):
    """A module without the weights `lacks`: to set or load one is refused, for it would change no answer."""

    lacks: Collection[str]

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever; raises InputError for a split weight."""
        self._refuse(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As ever; raises InputError for a split weight."""
        self._refuse(name)
        super().register_buffer(name, tensor, persistent)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in self.lacks:
            if prefix + name in state_dict:
                self._refuse(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse(self, name: str) -> None:
        if name in self.lacks:
            raise InputError(
                f"a split layer's {name} cannot be set or loaded, no party has it: change the original and "
                "split it again"
            )

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks:
            raise AttributeError(f"the {name} of a split layer is split: no party has it")
        return super().__getattr__(name)


class SlipLinear(Split):
    """A linear layer whose weight is split: it has a bias at most, and no `weight`.

    Args:
        in_features: width n of the input.
        out_features: rows of this member.
        bias: the bias [out_features], which stays in the vault, or None.
        group: the product it shares.
        index: its place in the group.
    """

    bias: nn.Parameter | None
    lacks = ("weight",)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, group: GroupProduct, index: int
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group = group
        self.index = index
        self._wanted = f"[..., {in_features}]"
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `W x + bias` [..., out_features] in x's dtype (under autocast in autocast's), computed in
        float32 (SPEC steps 1 to 5).

        Args:
            x: floating point [..., in_features] on the CPU, or on an NVIDIA card.

        Raises:
            InputError: x is elsewhere, of another width or type, holds NaN or infinity, or needs a gradient.
            WorkerError: no worker gave a right product.
        """
        if (
            torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        ):  # not to be traced; the decorator would cost every call 3 us
            return cast(Tensor, torch.compiler.disable(self.forward, reason=NOT_TRACED)(x))  # type: ignore[no-untyped-call]
        group, shape = self.group, x.shape
        check_input(group.name, x, bool(shape) and shape[-1] == self.in_features, self._wanted)
        dtype = result_type(x)
        if 0 in shape:
            return x.new_zeros((*shape[:-1], self.out_features), dtype=dtype)
        if not x.is_cpu:
            y = group.on_card(self.index, x)
            bias = self._parameters["bias"]
            return (y if bias is None else y + bias).to(dtype)
        rows = group.rows_of(self.index, x)
        # numpy slices and reshapes several times faster than torch: this runs hundreds of times a token
        y = torch.from_numpy(np.ascontiguousarray(rows).reshape(*shape[:-1], self.out_features))
        bias = self._parameters["bias"]
        if bias is not None:
            y = y + bias
        return y if dtype is torch.float32 else y.to(dtype)

    def extra_repr(self) -> str:
        """Sizes and the group's name: nothing secret."""
        bias = self._parameters["bias"] is not None
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={bias}, group={self.group.name}"


def result_type(x: Tensor) -> torch.dtype:
    """Of a product with x, as PyTorch's own products have it: x's, or autocast's."""
    kind = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def check_input(group: str, x: Tensor, fits: bool, wanted: str) -> None:
    """Raise InputError unless x fits, is floating point, on the CPU or a card, has values and needs no
    gradient.
    """
    if torch.compiler.is_exporting() or torch._C._is_tracing():
        refuse_recording(group)
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or (
        type(x) is not Tensor and isinstance(x, FakeTensor)
    ):
        raise InputError(
            f"group {group} needs the values of its input, which torch.func (vmap, grad, jvp) and fake "
            "tensors do not have: call the model with a batch in the place of vmap"
        )
    if not fits or not (x.is_cpu or x.is_cuda) or not x.is_floating_point():
        raise InputError(
            f"group {group} takes floating-point tensors {wanted} on the CPU or an NVIDIA card and got "
            f"{x.dtype} {list(x.shape)} on {x.device}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"group {group} has no gradient, so a split model cannot be trained: call it in torch.no_grad()"
        )


def refuse_recording(group: str) -> NoReturn:
    """Raise InputError: no tracer sees what a worker answers."""
    raise InputError(f"group {group} cannot be traced or exported: {NOT_TRACED}. Call the model itself")


# A strict export runs it instead of reading it, and so ends with this error instead of one of the compiler's;
# torch.compiler.assume_constant_result says so too, and loads the whole compiler for that.
refuse_recording._dynamo_marked_constant = True  # type: ignore[attr-defined]


def replace(
    model: nn.Module, groups: Mapping[str, Sequence[Member]], source: Products | None
) -> tuple[GroupProduct, ...]:
    """Replace the members of all groups in `model` by `SlipLinear`; nothing is changed if any does not fit.

    Returns:
        The groups' products, in the order of `groups`.

    Raises:
        ShareError: a member is not in the model, is no linear layer, has another size or is named twice.
    """
    modules = dict(model.named_modules())
    seen: set[str] = set()
    for name, members in groups.items():
        if len({_check(modules, name, member, seen) for member in members}) != 1:
            raise ShareError(f"the members of group {name} do not read one width: it is of another model")
    products = []
    for name, members in groups.items():
        group = GroupProduct(name, [member.rows for member in members], source)
        for index, member in enumerate(members):
            old = modules[member.module]
            parent, _, leaf = member.module.rpartition(".")
            new = SlipLinear(_sizes(old)[0], member.rows, old.bias, group, index)
            setattr(modules[parent], leaf, new.train(old.training))
        products.append(group)
    return tuple(products)


class _AtHand:
    """A product for the members in the bit set `waiting`, with what it is of."""

    __slots__ = ("_bytes", "_chosen", "_input", "_patches", "_shape", "product", "waiting")

    product: Floats

    def __init__(self, x: Tensor, values: Floats, patches: Patches | None, waiting: int) -> None:
        self.waiting = waiting
        self._input, self._patches, self._chosen = x, patches, chosen()
        self._shape, self._bytes = values.shape, values.tobytes()  # numpy copies and compares bytes fastest

    def serves(self, bit: int, x: Tensor, values: Floats, patches: Patches | None) -> bool:
        return (
            bool(self.waiting & bit)
            and x is self._input
            and self._chosen is chosen()
            and patches == self._patches
            and values.shape == self._shape
            and values.tobytes() == self._bytes
        )


class _Held(threading.local):
    """The product at hand in this thread."""

    now: _AtHand | None = None


def _values(x: Tensor) -> Floats:
    """What x holds, as float32: x itself where it is that."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    values: Floats = x.contiguous().numpy()
    return values


def _check(modules: Mapping[str, nn.Module], group: str, member: Member, seen: set[str]) -> int:
    """Return the width that a member reads, or say why it cannot be replaced."""
    module = modules.get(member.module)
    if not isinstance(module, nn.Linear | Conv1D):
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise ShareError(
            f"group {group} needs a linear layer {member.module}, and the model has {found}: "
            "load the share with the model class that it was split from (a language model's is "
            "AutoModelForCausalLM)"
        )
    width, rows = _sizes(module)
    if rows != member.rows:
        raise ShareError(f"{member.module} has {rows} rows, the share {member.rows}: it is of another model")
    if member.module in seen:
        raise ShareError(f"the share names {member.module} twice: split the model again")
    seen.add(member.module)
    return width


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise TypeError(f"{type(module).__name__} is no linear layer")
