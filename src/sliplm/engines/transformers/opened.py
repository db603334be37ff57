"""What the vault keeps whole, decrypted for transformers: in memory, never on a disk."""

from __future__ import annotations

import mmap
import os
import shutil
import weakref
from pathlib import Path

from sliplm import places
from sliplm.errors import ShareError
from sliplm.shares.share import MODEL, VaultShare, open_tensors
from sliplm.shares.tensorfile import lay_out


class OpenedModel:
    """`model.safetensors` of a vault in clear, as an anonymous file in memory.

    transformers reads a checkpoint by its path, and the path must end in `.safetensors`: `path` is a symbolic
    link in a private folder to this process's own descriptor, so that only this process can follow it.

    Raises:
        SealError, ShareError: as `share.open_tensors`; or there is no memory for it.
    """

    def __init__(self, vault: VaultShare) -> None:
        folder = places.new_folder()
        self._descriptor = os.memfd_create("sliplm-model", os.MFD_CLOEXEC)
        # also when loading fails halfway and nobody calls close
        self.close = weakref.finalize(self, _forget, self._descriptor, folder)
        try:
            _decrypt(vault, self._descriptor)
            link = folder / MODEL
            link.symlink_to(f"/proc/self/fd/{self._descriptor}")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | MemoryError):
                raise ShareError(
                    f"{vault.path / MODEL} cannot be opened in memory ({error}); make room"
                ) from error
            raise
        self.path = str(link)


def _decrypt(vault: VaultShare, descriptor: int) -> None:
    specs = {tensor.name: tensor.spec for tensor in vault.manifest.kept_tensors}
    head, starts, size = lay_out(specs.values(), {"format": "pt"})
    os.posix_fallocate(descriptor, 0, size)  # no memory is an error now, and not a signal later
    view = memoryview(mmap.mmap(descriptor, size))  # unmapped with its last view: closing it would be refused
    view[: len(head)] = head
    places = {name: view[start : start + specs[name].nbytes] for name, start in starts.items()}
    open_tensors(vault.path / MODEL, vault.data_key, specs, places)


def _forget(descriptor: int, folder: Path) -> None:
    os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
