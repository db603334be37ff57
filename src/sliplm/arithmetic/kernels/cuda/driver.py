"""NVIDIA's driver through ctypes: no CUDA toolkit, no compiler and no PyTorch is needed to run a program.

Every call is checked: what fails is a CardError with the driver's own words.  The driver holds a context for
each thread, so that whoever calls enters the card's first (`Device.enter`).
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_size_t,
    c_uint,
    c_uint64,
    c_ulonglong,
    c_void_p,
)
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sliplm import forks
from sliplm.errors import CardError

_LIBRARY: Final = "libcuda.so.1"
_NO_DEVICE: Final = 100

_ADDRESS, _HANDLE = POINTER(c_uint64), POINTER(c_void_p)
_CALLS: Final[dict[str, list[Any]]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [_HANDLE, c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [_ADDRESS, c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemHostAlloc": [_HANDLE, c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemcpyHtoD_v2": [c_uint64, c_void_p, c_size_t],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemCreate": [_ADDRESS, c_size_t, c_void_p, c_ulonglong],
    "cuMemRelease": [c_uint64],
    "cuMemAddressReserve": [_ADDRESS, c_size_t, c_size_t, c_uint64, c_ulonglong],
    "cuMemAddressFree": [c_uint64, c_size_t],
    "cuMemMap": [c_uint64, c_size_t, c_size_t, c_uint64, c_ulonglong],
    "cuMemUnmap": [c_uint64, c_size_t],
    "cuMemSetAccess": [c_uint64, c_size_t, c_void_p, c_size_t],
    "cuMemExportToShareableHandle": [c_void_p, c_uint64, c_int, c_ulonglong],
    "cuMemImportFromShareableHandle": [_ADDRESS, c_void_p, c_int],
    "cuMemsetD8Async": [c_uint64, ctypes.c_ubyte, c_size_t, c_void_p],
    "cuStreamCreate": [_HANDLE, c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, _HANDLE],
    "cuGraphInstantiateWithFlags": [_HANDLE, c_void_p, c_ulonglong],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuEventCreate": [_HANDLE, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuModuleLoadData": [_HANDLE, c_char_p],
    "cuModuleGetFunction": [_HANDLE, c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
}
_SHARED_MEMORY: Final = 97  # attribute: bytes that one block may have at most
_MAJOR, _MINOR = 75, 76  # attributes: compute capability
_DYNAMIC_SHARED: Final = 8  # attribute of a function
_OWN_STREAM: Final = 1  # waits for no default stream
_THIS_THREAD: Final = 1  # what other threads do meanwhile does not spoil a recording


@cache
def _library() -> ctypes.CDLL:
    """The driver, started.  Raises CardError."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise CardError(
            f"there is no NVIDIA driver on this machine ({_LIBRARY} cannot be loaded): install one, or run "
            "on the CPU"
        ) from error
    for name, arguments in _CALLS.items():
        try:
            getattr(library, name).argtypes = arguments
        except AttributeError as error:
            raise CardError(
                f"the NVIDIA driver is too old: it has no {name}; 525 or later is needed"
            ) from error
    code = library.cuInit(0)
    if code and code != _NO_DEVICE:
        raise CardError(f"the NVIDIA driver does not start: {_words(library, code)}")
    return library


def call(name: str, *arguments: Any) -> None:
    """One call of the driver.  Raises CardError with its words."""
    library = _library()
    code = getattr(library, name)(*arguments)
    if code:
        raise CardError(f"the card failed: {_words(library, code)} ({name})")


def _words(library: ctypes.CDLL, code: int) -> str:
    said = c_char_p()
    if library.cuGetErrorString(code, byref(said)) or said.value is None:
        return f"error {code}"
    return said.value.decode("utf-8", "replace")


def count() -> int:
    """How many cards this process may use; 0 without a driver.  Raises CardError for one that fails."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return 0
    found = c_int()
    return 0 if _library().cuDeviceGetCount(byref(found)) else found.value


def version() -> int:
    """The driver's version, as CUDA counts: 12040 for 12.4.  Raises CardError."""
    found = c_int()
    call("cuDriverGetVersion", byref(found))
    return found.value


class Device:
    """A card as the driver sees it.  Raises CardError.

    Attributes:
        name: as its maker calls it.
        capability: 90 for 9.0.
        shared_memory: bytes that one block of a program may have.
    """

    def __init__(self, ordinal: int) -> None:
        if ordinal >= count():
            _library()
            raise CardError(f"there is no card {ordinal}: this process sees {count()} (counted from 0)")
        device, context, name = c_int(), c_void_p(), ctypes.create_string_buffer(256)
        call("cuDeviceGet", byref(device), ordinal)
        call("cuDeviceGetName", name, len(name), device)
        call("cuDevicePrimaryCtxRetain", byref(context), device)
        self.ordinal, self.name, self._context = ordinal, name.value.decode("utf-8", "replace"), context
        self.capability = 10 * _attribute(device, _MAJOR) + _attribute(device, _MINOR)
        self.shared_memory = _attribute(device, _SHARED_MEMORY)

    def enter(self) -> None:
        """Make it the calling thread's card."""
        call("cuCtxSetCurrent", self._context)

    def free(self) -> int:
        """Bytes of its memory that nobody uses."""
        free, total = c_size_t(), c_size_t()
        call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value


def _attribute(device: c_int, number: int) -> int:
    found = c_int()
    call("cuDeviceGetAttribute", byref(found), number, device)
    return found.value


class Memory:
    """`size` bytes of the entered card, given back with the object.  Raises CardError."""

    def __init__(self, size: int) -> None:
        address = c_uint64()
        call("cuMemAlloc_v2", byref(address), max(size, 1))
        self.address, self.size = address.value, size
        weakref.finalize(self, release, forks.Process(), "cuMemFree_v2", address).atexit = False

    def write(self, offset: int, array: npt.NDArray[Any]) -> None:
        """Copy a C-contiguous array there, now: whatever stream reads it next."""
        if offset + array.nbytes > self.size:
            raise CardError(f"{array.nbytes} bytes at {offset} do not fit in {self.size}")
        call("cuMemcpyHtoD_v2", self.address + offset, array.ctypes.data, array.nbytes)
        call("cuStreamSynchronize", None)  # of ordinary memory the copy returns once it is staged


class Pinned:
    """`size` bytes of host memory that cards read and write at the same address.  Raises CardError."""

    def __init__(self, size: int) -> None:
        address = c_void_p()
        call("cuMemHostAlloc", byref(address), size, 0)
        if address.value is None:
            raise CardError("the driver gave no memory")
        self.address, self.size = address.value, size
        weakref.finalize(self, release, forks.Process(), "cuMemFreeHost", address).atexit = False
        self._elements: npt.NDArray[np.uint32] = np.ctypeslib.as_array(
            (ctypes.c_uint32 * (size // 4)).from_address(self.address)
        )

    def elements(self, rows: int, columns: int) -> npt.NDArray[np.uint32]:
        """Its beginning as uint32 [rows, columns]; it lives no longer than this object."""
        return self._elements[: rows * columns].reshape(rows, columns)


Rooms = dict[int, list[Pinned]]
"""Pinned memory that is free, by its size: to pin it anew, and to give it back, takes milliseconds."""


class _Held:
    """Pinned memory as an array that keeps it, and leaves it to others when it goes."""

    def __init__(self, memory: Pinned, shape: tuple[int, int], rooms: Rooms) -> None:
        self._memory, self._rooms = memory, rooms
        self.__array_interface__ = {
            "version": 3, "typestr": "<u4", "shape": shape, "data": (memory.address, False),
        }  # fmt: skip

    def __del__(self) -> None:
        self._rooms.setdefault(self._memory.size, []).append(self._memory)


def pinned_elements(rows: int, columns: int, rooms: Rooms) -> npt.NDArray[np.uint32]:
    """uint32 [rows, columns] in pinned memory of its own, of these or new.  Raises CardError."""
    size = max(4, 4 * rows * columns)
    try:
        memory = rooms.get(size, []).pop()
    except IndexError:
        memory = Pinned(size)
    return np.asarray(_Held(memory, (rows, columns), rooms))


def pinned_address(array: npt.NDArray[np.uint32]) -> int | None:
    """Where some rows of such an array lie; None for any other memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return array.ctypes.data if isinstance(base, _Held) and array.flags.c_contiguous else None


def release(process: forks.Process, name: str, *arguments: Any) -> None:
    """Give something back, for finalizers: nothing in a forked child, and no error."""
    if process.here:  # a forked child has none of its parent's cards
        getattr(_library(), name)(*arguments)  # also after a failure: nobody is left to hear of it


class Stream:
    """Work of a card in its order, with the marks that time it.  Raises CardError."""

    def __init__(self) -> None:
        self.handle = c_void_p()
        call("cuStreamCreate", byref(self.handle), _OWN_STREAM)

    def wait(self) -> None:
        """Until all of it is done."""
        call("cuStreamSynchronize", self.handle)

    def mark(self) -> c_void_p:
        """A point in it, for `elapsed`."""
        event = c_void_p()
        call("cuEventCreate", byref(event), 0)
        call("cuEventRecord", event, self.handle)
        return event

    def record(self) -> None:
        """What is asked from here to `recorded` is not done but remembered."""
        call("cuStreamBeginCapture_v2", self.handle, _THIS_THREAD)

    def recorded(self) -> Recording:
        """What was asked since `record`."""
        graph = c_void_p()
        call("cuStreamEndCapture", self.handle, byref(graph))
        return Recording(graph)


def elapsed(before: c_void_p, after: c_void_p) -> float:
    """Milliseconds between two marks, once both are passed; they are gone then."""
    spent = c_float()
    call("cuEventSynchronize", after)
    call("cuEventElapsedTime", byref(spent), before, after)
    for event in (before, after):
        call("cuEventDestroy_v2", event)
    return spent.value


class Recording:
    """Work that is launched as one."""

    def __init__(self, graph: c_void_p) -> None:
        self._handle = c_void_p()
        call("cuGraphInstantiateWithFlags", byref(self._handle), graph, 0)
        call("cuGraphDestroy", graph)
        weakref.finalize(self, release, forks.Process(), "cuGraphExecDestroy", self._handle).atexit = False

    def launch(self, stream: Stream) -> None:
        """Begin it, after what the stream has to do."""
        call("cuGraphLaunch", self._handle, stream.handle)


class Function:
    """A compiled program on the entered card.  Raises CardError."""

    def __init__(self, binary: bytes, name: str, shared: int, warps: int) -> None:
        module, self._handle = c_void_p(), c_void_p()
        call("cuModuleLoadData", byref(module), binary)
        call("cuModuleGetFunction", byref(self._handle), module, name.encode())
        call("cuFuncSetAttribute", self._handle, _DYNAMIC_SHARED, shared)
        self._shared, self._threads = shared, 32 * warps

    @property
    def begun_with(self) -> tuple[c_void_p, int, int]:
        """Its handle, threads of a block, and bytes of a block's memory."""
        return self._handle, self._threads, self._shared

    def launch(self, grid: tuple[int, int], arguments: list[c_uint64 | c_int], stream: Stream) -> None:
        """Ask for it: a grid of blocks, and its arguments in their order."""
        places = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        block = (self._threads, 1, 1)
        call("cuLaunchKernel", self._handle, *grid, 1, *block, self._shared, stream.handle, places, None)


class Prepared:
    """A function with room for its arguments, which is filled anew for each launch: for one thread.

    Args:
        pointers: which of the arguments are addresses; the others are 32-bit integers.
    """

    def __init__(self, function: Function, pointers: tuple[bool, ...]) -> None:
        handle, threads, shared = function.begun_with
        self._values: list[c_uint64 | c_int] = [c_uint64() if each else c_int() for each in pointers]
        every = [*self._values, c_uint64(0), c_uint64(0)]  # what Triton adds: memory of its own
        self._every = every  # which `_places` points to
        self._places = (c_void_p * len(every))(*(ctypes.addressof(value) for value in every))
        self._launch, self._function = _library().cuLaunchKernel, function
        self._before, self._after = handle, (threads, 1, 1, shared)

    def __call__(self, grid: tuple[int, int], arguments: tuple[int, ...], stream: int) -> None:
        """Ask for it on a stream, 0 for the default one.  Raises CardError."""
        for value, argument in zip(self._values, arguments, strict=True):
            value.value = argument
        code = self._launch(
            self._before, grid[0], grid[1], 1, *self._after, stream or None, self._places, None
        )
        if code:
            raise CardError(f"the card failed: {_words(_library(), code)} (cuLaunchKernel)")
