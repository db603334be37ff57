"""From a program in Triton to what the card runs: by Triton's own compiler, which needs no card and no `cc`.

Triton's launcher is what would need a C compiler on the user's machine; programs are launched through the
driver instead (`driver.Function`).  Triton keeps what it has compiled in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Final

from sliplm.arithmetic.kernels.cuda.tiles import Program
from sliplm.errors import CardError

_DIVISIBLE: Final = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """A program for one kind of card.

    Attributes:
        parameters: True for a pointer and False for an i32, in their order.
        shared: bytes of a block's fast memory; scratch: bytes of the card's memory that each block needs.
    """

    binary: bytes
    name: str
    parameters: tuple[bool, ...]
    warps: int
    shared: int
    scratch: int


@cache
def triton() -> str:
    """Triton's version.  Raises CardError without Triton."""
    try:
        import triton as library
    except Exception as error:  # whatever a broken installation raises
        raise CardError(
            "Triton, which compiles the card's programs, is not installed or broken: `pip install triton`, "
            f"or run on the CPU ({_first_line(error)})"
        ) from error
    version: str = library.__version__
    return version


def compiled(program: Program, *, aligned: bool, capability: int) -> Compiled:
    """Compile for cards of a capability (90 for 9.0); from several threads if wished.

    Args:
        aligned: the matrix has multiples of 16 rows and columns, and activations lie at multiples of 16.

    Raises CardError, also where Triton's compiler fails.
    """
    triton()
    programs = _programs(program.name)
    function, constants = getattr(programs, program.name), dict(program.constants)
    kinds = {name: programs.POINTERS.get(name, "i32") for name in function.arg_names if name not in constants}
    divisible = programs.divisible(function.arg_names, aligned=aligned)
    signature = {name: kinds.get(name, "constexpr") for name in function.arg_names}
    attributes = {(i,): _DIVISIBLE for i, name in enumerate(function.arg_names) if name in divisible}
    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        made = compile(
            ASTSource(function, signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": program.warps,
                "num_stages": program.stages,
                "enable_fp_fusion": False,  # floats are rounded as on the processor
            },
        )
    except Exception as error:  # whatever a compiler raises
        raise CardError(f"Triton {triton()} does not compile {program}: {_first_line(error)}") from error
    facts: Any = made.metadata
    parameters = tuple(kind.startswith("*") for kind in kinds.values())
    scratch = int(getattr(facts, "global_scratch_size", 0) or 0)
    return Compiled(made.asm["cubin"], facts.name, parameters, facts.num_warps, facts.shared, scratch)


def _programs(name: str) -> ModuleType:
    """Where a program is."""
    from sliplm.arithmetic.kernels.cuda import aes_programs, programs, vault_programs

    return next(each for each in (programs, vault_programs, aes_programs) if hasattr(each, name))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
