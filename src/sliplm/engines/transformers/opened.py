"""What transformers is given of a vault: a private folder of verified bytes, and its weights in memory.

transformers, and peft with it, load what they find in a folder, by its name.  So they are never given the
vault's folder, but a fresh one of mode 0700 in which there is nothing that was not verified: a file added to
the vault, or exchanged after the check, is not there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from torch import nn

from sliplm import places
from sliplm.errors import ShareError
from sliplm.filesystem import because, is_missing, kind, utf8_name
from sliplm.shares.share import MODEL, VaultShare, open_tensors
from sliplm.shares.tensorfile import lay_out

_MEMORY: Final = Path("/dev/shm")  # noqa: S108


@contextlib.contextmanager
def private_folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Small files in a folder of mode 0700 that is removed at the end of the block.

    Raises:
        ShareError: there is no room for them.
    """
    with _folder_of(files) as folder, utf8_name(folder.path) as named:
        yield named


class OpenedModel:
    """The verified small files of a vault, and `model.safetensors` in clear as an anonymous file in memory.

    transformers reads a checkpoint by its path, and the path must end in `.safetensors`: there is a symbolic
    link to this process's own descriptor, so that only this process can follow it.

    Attributes:
        folder: where they lie until `close`.
        path: of the weights.

    Raises:
        SealError, ShareError: as `share.open_tensors`; or there is no memory for it.
    """

    def __init__(self, vault: VaultShare) -> None:
        own, held = _folder_of(vault.files), ExitStack()
        self.folder = held.enter_context(utf8_name(own.path))
        try:
            self._descriptor = _memory_file()
        except OSError as error:
            held.close()
            own.close()
            advice = "make room"
            if is_missing(error):
                advice = f"there is neither memfd nor a tmpfs in {_MEMORY}: mount one there"
            raise ShareError(
                f"{vault.path / MODEL} cannot be opened in memory ({error}): {advice}"
            ) from error
        # also when loading fails halfway and nobody calls close
        self.close = weakref.finalize(self, _forget, self._descriptor, own, held)
        try:
            _decrypt(vault, self._descriptor)
            link = self.folder / MODEL
            link.symlink_to(f"/proc/self/fd/{self._descriptor}")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | MemoryError):
                raise ShareError(
                    f"{vault.path / MODEL} cannot be opened in memory ({error}): make room there, and let "
                    f"TMPDIR name a folder on a file system that has links"
                ) from error
            raise
        self.path = str(link)


def _memory_file() -> int:
    """A file in memory that has no name.  Raises: OSError."""
    try:
        return os.memfd_create("sliplm-model", os.MFD_CLOEXEC)
    except OSError as error:
        if not is_missing(error) or kind(_MEMORY) != "tmpfs":  # nothing in clear goes to a disk
            raise
    return os.open(_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _folder_of(files: Mapping[str, bytes]) -> places.NewFolder:
    try:
        folder = places.NewFolder()  # 0700
        for name, data in files.items():
            (folder.path / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder.path / name).write_bytes(data)
    except OSError as error:
        raise ShareError(
            "verified files cannot be put into a temporary folder "
            f"{because(error, places.temporary(), 'name another one in TMPDIR')}"
        ) from error
    return folder


def remade(model: nn.Module, name: str) -> bool:
    """Whether transformers itself makes a parameter that a checkpoint lacks: tables of sines, say."""
    for prefix, part in model.named_modules():
        patterns = getattr(part, "_keys_to_ignore_on_load_missing", None)
        if patterns and name.startswith(prefix):
            own = name.removeprefix(prefix).removeprefix(".")
            if any(re.search(pattern, own) for pattern in patterns):
                return True
    return False


def _decrypt(vault: VaultShare, descriptor: int) -> None:
    specs = {tensor.name: tensor.spec for tensor in vault.manifest.kept_tensors}
    head, starts, size = lay_out(specs.values(), {"format": "pt"})
    os.posix_fallocate(descriptor, 0, size)  # no memory is an error now, and not a signal later
    view = memoryview(mmap.mmap(descriptor, size))  # unmapped with its last view: closing it would be refused
    view[: len(head)] = head
    places = {name: view[start : start + specs[name].nbytes] for name, start in starts.items()}
    open_tensors(vault.path / MODEL, vault.data_key, specs, places)


def _forget(descriptor: int, folder: places.NewFolder, held: ExitStack) -> None:
    os.close(descriptor)
    held.close()
    folder.close()
