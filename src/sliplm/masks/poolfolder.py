"""A pool's folder: its state, its batches, and who adds them (`pool` says how they are used up).

    POOL/SPLIT_ID/state.json                 what is burnt, and the anchor's tokens; authenticated
                  GROUP-NUMBER-ID.masks      batches (`maskfile`), written by `slip deal`, immutable
                  vault.lock, deal.lock      one vault and one dealer at a time on this machine

Of the pool's secret nothing lies in the folder: it is made from the vault share's data key and the pool's id.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sliplm import durable
from sliplm.arithmetic.field import Elements, derive_key
from sliplm.closing import Closing
from sliplm.errors import MaskError, PoolError
from sliplm.filesystem import because
from sliplm.masks import maskfile
from sliplm.masks.anchor import Anchor
from sliplm.masks.maskfile import Drawn, MaskFile, Owner, Product
from sliplm.masks.masks import Dealt
from sliplm.reading import read_bounded
from sliplm.secrecy import Secret

STATE: Final = "state.json"
MAX_TOKENS: Final = 32
_STATE_BYTES: Final = (64 << 10, 64)  # of state.json at most: whatever the groups, and for each

PoolKey = Callable[[str], bytes]
"""label -> a 32-byte secret of the split, one for each label (`share.VaultShare.pool_key`)."""
Shape = tuple[int, int]

Hex16 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Position(NamedTuple):
    """Burnt of a group: all batches before `number`, `rows` of that one; `total` counts rows ever burnt."""

    number: int = 0
    rows: int = 0
    total: int = 0


class GroupStock(NamedTuple):
    """What a pool has for a group: rows not burnt, rows ever burnt, bytes of the batches on disk."""

    ready: int
    burnt: int
    bytes: int


class State(BaseModel):
    """`state.json`: tokens[0] is what the anchor held when it was written, the others what it may hold
    since; positions are (number, rows, total).
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["sliplm-pool"] = "sliplm-pool"
    version: Literal[2] = 2
    split_id: Hex16
    pool_id: Hex16
    tokens: Annotated[list[Hex16], Field(min_length=1, max_length=MAX_TOKENS)]
    burnt: Annotated[list[tuple[Count, Count, Count]], Field(fail_fast=True)]
    mac: Hex32 = "0" * 64

    def signed(self, secret: bytes) -> Self:
        text = self.model_dump_json(exclude={"mac"}).encode()
        return self.model_copy(update={"mac": hmac.digest(derive_key(secret, "state"), text, "sha256").hex()})


class Folder(Secret):
    """A pool's folder and what authenticates it."""

    def __init__(self, pool: Path, split_id: str, pool_key: PoolKey, shapes: Sequence[Shape]) -> None:
        if not re.fullmatch("[0-9a-f]{32}", split_id):
            raise PoolError("a split id has 32 hexadecimal digits; give that of the vault share")
        self.path, self.split_id, self.shapes = pool / split_id, split_id, list(shapes)
        self._pool_key = pool_key

    def owner(self, pool_id: str) -> Owner:
        """The pool of this id, with its secret."""
        return Owner(self.split_id, pool_id, self._pool_key(pool_id))

    def lock(self, name: str, user: str) -> int:
        """As `durable.lock`.  Raises: PoolError."""
        try:
            return durable.lock(self.path / name, wait=False)
        except FileNotFoundError:
            self.state()  # says so
            raise
        except BlockingIOError:
            raise PoolError(f"{self.path} is in use by another {user}: end it first") from None
        except OSError as error:
            raise PoolError(
                f"{self.path} cannot be locked {because(error, self.path, 'check its rights')}"
            ) from error

    def state(self) -> tuple[State, Owner]:
        """The state, verified.  Raises: PoolError when there is none, too."""
        found = self.find_state()
        if found is None:
            raise PoolError(f"{self.path} holds no pool of masks for this split: make one with `slip deal`")
        return found

    def find_state(self) -> tuple[State, Owner] | None:
        """The state, verified; None where there is none.  Raises: PoolError."""
        path, limit = self.path / STATE, _STATE_BYTES[0] + _STATE_BYTES[1] * len(self.shapes)
        try:
            data = read_bounded(path, limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PoolError(f"{path} cannot be read ({error.strerror}): check its rights") from error
        if len(data) > limit:
            raise self._damaged()
        try:
            state = State.model_validate_json(data)
        except ValidationError:
            raise self._damaged() from None
        owner = self.owner(state.pool_id)
        mine = hmac.compare_digest(state.signed(owner.secret).mac, state.mac)
        if not mine or state.split_id != self.split_id or len(state.burnt) != len(self.shapes):
            raise self._damaged()
        return state, owner

    def write_state(self, owner: Owner, tokens: Sequence[str], positions: Sequence[Position]) -> None:
        """Durable at the return.  Raises: OSError."""
        state = State(
            split_id=self.split_id, pool_id=owner.pool_id, tokens=list(tokens), burnt=list(positions)
        )  # fmt: skip
        durable.replace(self.path / STATE, state.signed(owner.secret).model_dump_json().encode())

    def names(self) -> Iterator[tuple[int, int, Path]]:
        """(group, number, path) of every batch."""
        try:
            paths = list(self.path.iterdir())
        except OSError as error:
            raise PoolError(f"{self.path} cannot be read ({error.strerror}): check its rights") from error
        for path in paths:
            name = maskfile.NAME.fullmatch(path.name)
            if name is not None and int(name[1]) < len(self.shapes):
                yield int(name[1]), int(name[2]), path

    def batches(self, owner: Owner, known: dict[Path, MaskFile]) -> dict[Path, MaskFile]:
        """All batches, those not known yet opened and verified.  Raises: PoolError."""
        found: dict[Path, MaskFile] = {}
        for group, _, path in self.names():
            try:
                found[path] = known.get(path) or MaskFile.open(path, owner, *self.shapes[group])
            except PoolError:
                if os.path.lexists(path):  # else a vault has just used it up
                    raise
        return found

    def _damaged(self) -> PoolError:
        return PoolError(
            f"{self.path / STATE} was altered, or belongs to another vault or release: delete the folder "
            f"{self.path} and deal again"
        )


def burnt_rows(position: Position, batch: MaskFile) -> int:
    """Rows of a batch that lie before a position."""
    if batch.number == position.number:
        return min(batch.rows, position.rows)
    return batch.rows if batch.number < position.number else 0


def next_token(secret: bytes, positions: Sequence[Position]) -> str:
    """A fresh token that commits to the positions: two that are equal stand for the same burnt rows, even
    where the system's generator was set back with the machine.
    """
    digest = hashlib.sha256(secrets.token_bytes(32) + repr([tuple(p) for p in positions]).encode()).digest()
    return hmac.digest(derive_key(secret, "token"), digest, "sha256")[:16].hex()


class PoolWriter(Secret, Closing):
    """Adds batches to a pool, which is made if there is none; a vault may be using it meanwhile.

    Args: as `DiskPool`.

    Raises: PoolError when the pool is a copy, restored or damaged, or another dealer is at work.
    """

    def __init__(
        self, pool: Path, split_id: str, pool_key: PoolKey, shapes: Sequence[Shape], anchor: Anchor
    ) -> None:
        self._folder = folder = Folder(pool, split_id, pool_key, shapes)
        try:
            durable.make_folder(folder.path)
        except OSError as error:
            raise PoolError(
                f"{folder.path} cannot be made {because(error, folder.path, 'check its rights')}"
            ) from error
        self._numbers: list[int] | None = None
        self._drawn: set[str] = set()  # and not put
        self._locked = folder.lock("deal.lock", "`slip deal`")
        try:
            self._owner = self._found(anchor) or self._made(anchor)
            for path in folder.path.glob(f".*.masks{durable.PART}"):
                durable.remove(path)  # of a dealer that was killed
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"PoolWriter({str(self._folder.path)!r}, secrets hidden)"

    def add(self, group: int, rows: int, product: Product) -> None:
        """Deal one batch; at the return it is there for good.

        Raises: PoolError when it cannot be written, and what `product` raises; then nothing was added.
        """
        drawn: list[Drawn] = []

        def fresh() -> tuple[bytes, Elements]:
            drawn.append(self.draw())
            return drawn[-1].r_key, drawn[-1].r(group, rows, self._folder.shapes[group][1])

        dealt = product(group, fresh)
        self.put(group, rows, drawn[-1], dealt)

    def draw(self) -> Drawn:
        """What one batch is dealt under: to be put once, or never."""
        drawn = maskfile.draw(self._owner)
        self._drawn.add(drawn.batch_id)
        return drawn

    def put(self, group: int, rows: int, drawn: Drawn, dealt: Dealt) -> None:
        """Add a batch whose products were checked.

        Raises: PoolError, and then nothing was added; MaskError for what is there already.
        """
        if drawn.batch_id not in self._drawn:
            raise MaskError("this batch was put before, or drawn elsewhere: its masks would be used twice")
        self._drawn.remove(drawn.batch_id)
        try:
            number = self._last_numbers()[group] + 1
            shape = self._folder.shapes[group]
            maskfile.write(self._folder.path, self._owner, group, number, shape, rows, drawn, dealt)
            self._last_numbers()[group] = number
        except OSError as error:
            raise PoolError(
                f"a batch cannot be written to {self._folder.path} "
                f"{because(error, self._folder.path, 'make room')}; what was dealt before is there"
            ) from error

    def _last_numbers(self) -> list[int]:
        """The highest number that each group has had; nobody else gives any while this one holds the lock."""
        if self._numbers is None:
            used = list(self._folder.names())
            state, _ = self._folder.state()  # after the names: what goes in between is in its positions
            self._numbers = [position[0] for position in state.burnt]
            for group, number, _ in used:
                self._numbers[group] = max(number, self._numbers[group])
        return self._numbers

    def close(self) -> None:
        """Let another dealer in."""
        if self._locked >= 0:
            os.close(self._locked)
            self._locked = -1

    def _found(self, anchor: Anchor) -> Owner | None:
        found = self._folder.find_state()
        if found is None:
            return None
        state, owner = found
        if not any(anchor.swap(state.pool_id, token, token) for token in reversed(state.tokens)):
            # a vault may have moved on since the state was read: then the state has, too
            again = self._folder.find_state()
            if again is None or again[0].tokens == state.tokens:
                raise PoolError(
                    f"{self._folder.path} is a copy or a restored backup, or its anchor is another one: "
                    "delete the folder and deal again"
                )
        return owner

    def _made(self, anchor: Anchor) -> Owner:
        if any(True for _ in self._folder.names()):
            raise PoolError(
                f"{self._folder.path} has masks without their {STATE}: delete the folder and deal again"
            )
        positions = [Position() for _ in self._folder.shapes]
        pool_id = secrets.token_hex(16)
        owner = self._folder.owner(pool_id)
        token = next_token(owner.secret, positions)
        # the anchor first: a state that the anchor does not know never opens anywhere
        if not anchor.swap(pool_id, None, token):
            raise PoolError("the anchor refused a new pool: it knows its random id already; check the anchor")
        try:
            self._folder.write_state(owner, [token], positions)
        except OSError as error:
            raise PoolError(
                f"{self._folder.path} cannot be written {because(error, self._folder.path, 'make room')}"
            ) from error
        return owner


def stock(pool: Path, split_id: str, pool_key: PoolKey, shapes: Sequence[Shape]) -> list[GroupStock]:
    """What a pool holds for each group, as its files say; the anchor is not asked, nothing is changed.

    Raises: PoolError when there is none, or it is damaged.
    """
    folder = Folder(pool, split_id, pool_key, shapes)
    state, owner = folder.state()
    found = [GroupStock(0, total, 0) for _, _, total in state.burnt]
    for batch in folder.batches(owner, {}).values():
        group = found[batch.group]
        found[batch.group] = GroupStock(
            group.ready + batch.rows - burnt_rows(Position(*state.burnt[batch.group]), batch),
            group.burnt,
            group.bytes + maskfile.file_bytes(batch.m, batch.rows),
        )
    return found
