"""What holds secrets is neither copied nor written: no pickle, no deep copy, no `torch.save`."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from sliplm.errors import SecretError


class Secret:
    """A mix-in for what holds keys, masks or a vault's part: its objects stay in their process."""

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Called by pickle, copy, torch.save and multiprocessing.  Raises: SecretError."""
        raise SecretError(
            f"a {type(self).__name__} holds secrets and cannot be copied or pickled: pass the vault's "
            "folder on, and open it where it is used"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Raises: SecretError."""
        self.__reduce_ex__(2)
