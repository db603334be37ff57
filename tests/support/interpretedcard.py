"""A card without a card: its programs in Triton's interpreter, its memory in this process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fakecard import FakeDevice, FakeMemory, at, cards
from sliplm.arithmetic.kernels.cuda import card as real
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.tiles import Program

KINDS = ["interpreted", pytest.param("real", marks=pytest.mark.cuda)]


def open_card(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card of either kind, entered; or why there is none."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "real":
        if not cards() or interpreting:
            pytest.skip("needs an NVIDIA card: `make test-gpu` on a machine with one")
        found = real.card(0)
        found.device.enter()
        return found
    if not interpreting or importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, and TRITON_INTERPRET=1 in the environment")
    return InterpretedCard(monkeypatch)


def fetched(card: Any, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """What lies on a card."""
    got = np.empty(shape, dtype)
    if isinstance(card, InterpretedCard):
        got[:] = at(address, shape, dtype)
    else:
        driver.call("cuStreamSynchronize", None)
        driver.call("cuMemcpyDtoHAsync_v2", got.ctypes.data, address, got.nbytes, None)
        driver.call("cuStreamSynchronize", None)
    return got


class InterpretedCard:
    """As `Card`, for the vault's programs; `asked` counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "Memory", FakeMemory)
        monkeypatch.setattr(driver, "Pinned", FakeMemory)
        monkeypatch.setattr(driver, "call", _call)
        self.device, self.asked = FakeDevice(), list[str]()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def prepared(self, program: Program, *, aligned: bool) -> Callable[..., None]:
        from sliplm.arithmetic.kernels.cuda import aes_programs, vault_programs

        programs = vault_programs if hasattr(vault_programs, program.name) else aes_programs
        function = getattr(programs, program.name)

        def call(grid: tuple[int, int], arguments: tuple[int, ...], stream: int) -> None:
            self.asked.append(program.name)
            names = [name for name in function.arg_names if name not in dict(program.constants)]
            kinds = [programs.POINTERS.get(name) for name in names]
            if aligned:
                rounded = programs.divisible(names, aligned=True)
                pairs = zip(names, arguments, strict=True)
                assert not any(value % 16 for name, value in pairs if name in rounded)
            values = [
                value if kind is None else _pointer(value, kind)
                for value, kind in zip(arguments, kinds, strict=True)
            ]
            with np.errstate(all="ignore"):
                function[grid](*values, **dict(program.constants))

        return call


def _call(name: str, *arguments: Any) -> None:
    if name == "cuMemsetD8Async":
        to, value, size, _ = arguments
        FakeMemory.fill(to, value, size)
    elif name in {"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2"}:
        to, source, size, _ = arguments
        ctypes.memmove(to, source, size)
    else:
        assert name in {"cuStreamSynchronize", "cuStreamCreate"}


def _pointer(address: int, kind: str) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    to = tl.str_to_ty(kind, None)
    return tl.tensor(TensorHandle(np.array([address], np.uint64), to), to)
