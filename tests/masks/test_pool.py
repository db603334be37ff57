"""Masks on disk: no row is handed out twice, whatever happens to the process, the disk and the folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from disk import Disk, Killed, copy_folder
from sliplm import durable
from sliplm.arithmetic.field import P, derive_key
from sliplm.errors import MaskError, PoolError
from sliplm.masks import maskfile, pool
from sliplm.masks.anchor import Anchor, CommandAnchor, FileAnchor, file_anchor
from sliplm.masks.masks import Dealt, Fresh, Masks
from sliplm.masks.pool import DiskPool
from sliplm.masks.poolfolder import PoolWriter, stock

SHAPES = ((4, 6), (3, 5))
W = [np.arange(m * n).reshape(m, n) - 9 for m, n in SHAPES]
SPLIT = "ab" * 16
SECRET = bytes(range(32))


def pool_key(label: str) -> bytes:
    return derive_key(SECRET, f"pool/{label}")


def product(group: int, key: bytes, r: np.ndarray) -> np.ndarray:
    return np.array(
        [[int(v) % P for v in W[group].astype(object) @ row.astype(object)] for row in r], np.uint32
    )


def dealt(group: int, fresh: Fresh) -> Dealt:
    return Dealt(product(group, *fresh()))


def opened(folder: Path, anchor: Anchor, reserve: int = 3) -> DiskPool:
    return DiskPool(folder, SPLIT, pool_key, SHAPES, anchor, reserve=reserve)


def deal(folder: Path, anchor: Anchor, *batches: tuple[int, int]) -> None:
    with PoolWriter(folder, SPLIT, pool_key, SHAPES, anchor) as writer:
        for group, rows in batches:
            writer.add(group, rows, dealt)


def right(group: int, masks: Masks) -> bool:
    return np.array_equal(masks.u, product(group, b"", masks.r))


@pytest.fixture
def anchor(tmp_path: Path) -> FileAnchor:
    return FileAnchor(tmp_path / "anchors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pool"


def files(folder: Path) -> list[Path]:
    return sorted((folder / SPLIT).glob("*.masks"))


# --- the plain way -----------------------------------------------------------------------------------------


def test_masks_are_masks(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 5), (1, 4), (0, 7))
    seen = set()
    with opened(folder, anchor) as masks:
        assert [masks.available(group) for group in (0, 1)] == [12, 4]
        for group, rows in ((0, 1), (0, 6), (1, 4), (0, 5)):
            taken = masks.take(group, rows)
            assert taken.r.shape == (rows, SHAPES[group][1])
            assert right(group, taken)
            seen |= {row.tobytes() for row in taken.r}
        assert len(seen) == 16
        with pytest.raises(PoolError, match=r"0 masks are left for group 0, and 1 are needed.*slip deal"):
            masks.take(0, 1)
        assert files(folder) == []  # what is used up is deleted
    with pytest.raises(PoolError, match="closed"):
        masks.take(0, 1)


def test_one_reservation_serves_all_groups(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 40), (1, 40))
    state = folder / SPLIT / "state.json"
    with opened(folder, anchor, reserve=8) as masks:
        masks.take(0, 1)
        written = state.read_bytes()
        masks.take(1, 8)
        masks.take(0, 7)
        assert state.read_bytes() == written
        masks.take(1, 20)
        assert state.read_bytes() != written
        written = state.read_bytes()
        masks.take(0, 20)
        assert state.read_bytes() == written
    assert [group.burnt for group in stock(folder, SPLIT, pool_key, SHAPES)] == [28, 28]


def test_too_large_a_request_burns_nothing(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 5), (1, 5))
    with opened(folder, anchor) as masks:
        with pytest.raises(PoolError, match="5 masks are left"):
            masks.take(0, 6)
        assert right(0, masks.take(0, 5))


def test_batches_that_are_added_meanwhile_are_found(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 2))
    with opened(folder, anchor) as masks:
        masks.take(0, 2)
        deal(folder, anchor, (0, 4), (1, 2))
        assert right(0, masks.take(0, 4))
        assert right(1, masks.take(1, 2))
        deal(folder, anchor, (0, 3))
        masks._looked -= 10
        assert masks.available(0) == 3


def test_reserved_rows_are_lost_and_nothing_else(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 10), (1, 10))
    with opened(folder, anchor, reserve=4) as masks:
        masks.take(0, 1)
    with opened(folder, anchor, reserve=4) as masks:
        assert [masks.available(group) for group in (0, 1)] == [6, 6]


def test_a_number_is_used_once_though_its_batch_is_gone(
    folder: Path, anchor: FileAnchor, tmp_path: Path
) -> None:
    """A burnt batch that comes back from a backup stays burnt, beside new ones."""
    deal(folder, anchor, (0, 3))
    old = files(folder)[0]
    shutil.copy(old, tmp_path)
    with opened(folder, anchor) as masks:
        first = masks.take(0, 3).r
        deal(folder, anchor, (0, 3))
        shutil.copy(tmp_path / old.name, old)
        second = masks.take(0, 3).r
        with pytest.raises(PoolError, match="0 masks are left"):
            masks.take(0, 1)
    assert not {row.tobytes() for row in first} & {row.tobytes() for row in second}


def test_what_is_prepared_is_read_before_it_is_taken(
    folder: Path, anchor: FileAnchor, tmp_path: Path
) -> None:
    deal(folder, anchor, (0, 40))
    with opened(folder, anchor, reserve=32) as masks:
        masks.prepare(0, 3)  # nothing is burnt yet, and `prepare` burns nothing
        assert masks.available(0) == 40
        first = masks.take(0, 16)
        masks.prepare(0, 16)
        for file in folder.rglob("*.masks"):
            file.rename(tmp_path / file.name)
        second = masks.take(0, 16)
        assert right(0, first)
        assert right(0, second)
        assert len({row.tobytes() for row in (*first.r, *second.r)}) == 32
        masks.prepare(0, 8)
        masks.renew()
        with pytest.raises(PoolError):  # what was prepared and not taken is gone, and the file too
            masks.take(0, 8)


def test_many_takers_never_get_the_same_mask(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, *[(0, 50)] * 4)
    taken: list[bytes] = []
    with opened(folder, anchor, reserve=7) as masks:

        def taker() -> None:
            for _ in range(16):
                taken.extend(row.tobytes() for row in masks.take(0, 3).r)

        threads = [threading.Thread(target=taker) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(taken)) == len(taken) == 4 * 16 * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_no_mask(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 8))
    with opened(folder, anchor) as masks:
        masks.take(0, 1)
        child = os.fork()
        if child == 0:
            outcome = 1
            try:
                masks.take(0, 1)
            except MaskError:
                outcome = 0
            os._exit(outcome)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert right(0, masks.take(0, 1))


def test_no_secret_on_disk_or_in_repr(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 4))
    with opened(folder, anchor) as masks:
        batch = masks._stocks[0].batches[0]
        text = repr(masks) + repr(batch) + repr(masks._owner) + repr(anchor)
        everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        taken = masks.take(0, 4)
        for secret in (SECRET, masks._owner.secret, batch._r_key, batch._u_key):
            assert secret not in everything
            assert secret.hex().encode() not in everything
            assert repr(secret) not in text
        assert taken.u.tobytes()[:16] not in everything
        assert taken.r.tobytes()[:16] not in everything
    for path in [folder / SPLIT, *(folder / SPLIT).iterdir()]:
        assert path.stat().st_mode & 0o077 == 0


# --- damage ------------------------------------------------------------------------------------------------


def test_an_altered_row_is_not_used(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 20))
    path = files(folder)[0]
    data = bytearray(path.read_bytes())
    data[-maskfile.row_bytes(SHAPES[0][0]) - 1] ^= 1  # row 18
    path.write_bytes(data)
    with opened(folder, anchor) as masks:
        assert right(0, masks.take(0, 16))
        with pytest.raises(PoolError, match="altered in row 18"):
            masks.take(0, 1)


@pytest.mark.parametrize("change", ["cut", "longer", "header", "empty", "renamed", "other group", "swapped"])
def test_a_damaged_batch_is_refused_before_any_row(folder: Path, anchor: FileAnchor, change: str) -> None:
    deal(folder, anchor, (0, 4), (0, 4))
    path, second = files(folder)
    data = path.read_bytes()
    if change == "cut":
        path.write_bytes(data[:-1])
    elif change == "longer":
        path.write_bytes(data + b"\0")
    elif change == "header":
        path.write_bytes(data[:70] + bytes([data[70] ^ 1]) + data[71:])
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "renamed":
        path.rename(path.with_name(path.name.replace("0000000001", "0000000009")))
    elif change == "other group":
        path.rename(path.with_name("0001" + path.name[4:]))
    else:
        path.write_bytes(second.read_bytes())
    with pytest.raises(PoolError, match=r"cannot be used.*delete this file"):
        opened(folder, anchor)


def test_rows_that_change_places_are_noticed(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 2))
    path, size = files(folder)[0], maskfile.row_bytes(SHAPES[0][0])
    data = path.read_bytes()
    path.write_bytes(data[: -2 * size] + data[-size:] + data[-2 * size : -size])
    with opened(folder, anchor) as masks, pytest.raises(PoolError, match="altered in row 0"):
        masks.take(0, 1)


def test_batches_of_another_pool_are_refused(folder: Path, anchor: FileAnchor, tmp_path: Path) -> None:
    deal(folder, anchor, (0, 2))
    deal(tmp_path / "other", anchor, (1, 2))
    shutil.copy(files(tmp_path / "other")[0], folder / SPLIT)
    with pytest.raises(PoolError, match="another pool"):
        opened(folder, anchor)


def _edit(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        state = json.loads(path.read_bytes())
        change(state)
        path.write_text(json.dumps(state))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b" " * (2 << 20)),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        _edit(lambda state: state.update(burnt=[[0, 0, 0], [0, 0, 0]])),
        _edit(lambda state: state.update(pool_id="0" * 32)),
        _edit(lambda state: state.update(tokens=["0" * 32])),
        _edit(lambda state: state.update(mac="0" * 64)),
        _edit(lambda state: state.update(burnt=[[0, 0, 0]])),
        _edit(lambda state: state.update(more=1)),
    ],
)  # fmt: skip
def test_an_altered_state_opens_nothing(
    folder: Path, anchor: FileAnchor, damage: Callable[[Path], None]
) -> None:
    deal(folder, anchor, (0, 4), (1, 4))
    with opened(folder, anchor) as masks:
        masks.take(0, 1)
    damage(folder / SPLIT / "state.json")
    for use in (opened, deal):
        with pytest.raises(PoolError, match="altered"):
            use(folder, anchor)


def test_a_lost_state_makes_no_new_pool_of_old_masks(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 4))
    (folder / SPLIT / "state.json").unlink()
    with pytest.raises(PoolError, match="holds no pool"):
        opened(folder, anchor)
    with pytest.raises(PoolError, match=r"without their state\.json"):
        deal(folder, anchor, (0, 4))


def test_another_vaults_key_opens_nothing(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 4))
    with pytest.raises(PoolError, match="another vault"):
        DiskPool(folder, SPLIT, lambda label: bytes(32), SHAPES, anchor)
    with pytest.raises(PoolError, match="holds no pool"):
        DiskPool(folder, "cd" * 16, pool_key, SHAPES, anchor)
    with pytest.raises(PoolError, match="hexadecimal"):
        DiskPool(folder, "../..", pool_key, SHAPES, anchor)


# --- copies, backups, twins --------------------------------------------------------------------------------


def test_a_second_opener_is_refused_until_the_first_ends(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 8))
    code = (
        "import sys; from pathlib import *; sys.path[:0] = ['tests/masks', 'tests/support']\n"
        "import test_pool as t\n"
        "from sliplm.masks.anchor import *\n"
        f"t.opened({folder!r}, FileAnchor({anchor._folder!r})).take(0, 1)\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(PoolError, match="in use by another vault"):
            opened(folder, anchor)
        deal(folder, anchor, (0, 1))  # dealing is allowed meanwhile
        other.kill()
    with opened(folder, anchor) as masks:
        assert right(0, masks.take(0, 1))


def test_two_dealers_do_not_meet(folder: Path, anchor: FileAnchor) -> None:
    with PoolWriter(folder, SPLIT, pool_key, SHAPES, anchor):
        with pytest.raises(PoolError, match="in use by another `slip deal`"):
            deal(folder, anchor)


def test_a_copy_dies_when_the_original_moves_on(folder: Path, anchor: FileAnchor, tmp_path: Path) -> None:
    deal(folder, anchor, (0, 20))
    shutil.copytree(folder, tmp_path / "copy")
    with opened(folder, anchor) as masks:
        masks.take(0, 1)
    for use in (opened, deal):
        with pytest.raises(PoolError, match=r"copy or a restored backup"):
            use(tmp_path / "copy", anchor)


def test_a_copy_that_moves_on_kills_the_original(folder: Path, anchor: FileAnchor, tmp_path: Path) -> None:
    """They run at the same time; whoever reserves first goes on."""
    deal(folder, anchor, (0, 20))
    with opened(folder, anchor) as masks:
        first = masks.take(0, 3).r
        shutil.copytree(folder, tmp_path / "copy")
        with opened(tmp_path / "copy", anchor) as twin:
            second = twin.take(0, 3).r
            with pytest.raises(PoolError, match="a copy of it was opened"):
                masks.take(0, 1)
            with pytest.raises(PoolError, match="a copy of it was opened"):
                masks.take(0, 1)
            assert masks.available(0) == 0
            third = twin.take(0, 3).r
    rows = [row.tobytes() for part in (first, second, third) for row in part]
    assert len(set(rows)) == 9


def test_a_copy_on_another_machine_does_not_open(folder: Path, anchor: FileAnchor, tmp_path: Path) -> None:
    """It was copied before its first use, even."""
    deal(folder, anchor, (0, 20))
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(PoolError, match=r"copy or a restored backup"):
        opened(tmp_path / "copy", FileAnchor(tmp_path / "anchors of another machine"))


def test_a_pool_that_was_never_finished_opens_nowhere(folder: Path, tmp_path: Path) -> None:
    """Killed at any system call while it is made: it can be made again, and no half of it opens elsewhere."""
    for calls in range(40):
        root = tmp_path / str(calls)
        disk, anchor = Disk(root), FileAnchor(root / "anchors")
        durable.make_folder(root / "pool" / SPLIT)
        durable.make_folder(root / "anchors")
        done = True
        try:
            with disk.watched(kill_after=calls):
                deal(root / "pool", anchor, (0, 2))
        except Killed:
            done = False
        with pytest.raises(PoolError):
            opened(root / "pool", FileAnchor(root / "others"))
        if not (root / "pool" / SPLIT / "state.json").exists():
            deal(root / "pool", anchor, (0, 2))
        with opened(root / "pool", anchor) as masks:
            assert masks.available(0) in (0, 2)
        if done:
            return
    pytest.fail("a pool takes more system calls than this test tries")


class Twin:
    """A pool with the same memory, as after a snapshot of the machine is started twice."""

    def __init__(self, masks: DiskPool, folder: Path) -> None:
        twin = object.__new__(DiskPool)
        twin.__dict__.update(masks.__dict__)
        twin._guard, twin._locked = threading.Lock(), None
        twin._folder = pool.Folder(folder, SPLIT, pool_key, SHAPES)
        twin._tokens = list(masks._tokens)
        twin._stocks = []
        for old in masks._stocks:
            new = pool._Stock(old.position)
            new.hand, new.batches = old.hand.copy(), list(old.batches)
            twin._stocks.append(new)
        self.masks = twin


@pytest.mark.parametrize("sign", ["renew", "clock"])
@pytest.mark.parametrize("same", [False, True], ids=["random", "the generator is set back too"])
def test_of_two_twins_in_memory_one_goes_on(
    folder: Path, anchor: FileAnchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str, same: bool
) -> None:
    deal(folder, anchor, (0, 60), (1, 60))
    masks = opened(folder, anchor, reserve=8)
    masks.take(0, 2)
    shutil.copytree(folder, tmp_path / "copy")
    twin = Twin(masks, tmp_path / "copy").masks
    twin._clocks = type(masks._clocks)()
    if sign == "renew":
        masks.renew()
        twin.renew()
    else:
        real = time.clock_gettime_ns
        monkeypatch.setattr(time, "clock_gettime_ns", lambda c: real(c) + (c == time.CLOCK_REALTIME) * 10**11)
    if same:
        monkeypatch.setattr("sliplm.masks.poolfolder.secrets.token_bytes", lambda count: bytes(count))
    rows = masks.take(0, 10 if same else 2).r.tolist()
    with pytest.raises(PoolError, match="copy of it was opened"):
        twin.take(0, 2)
    assert masks.renewals == 1
    rows += masks.take(0, 2).r.tolist()
    assert len({tuple(row) for row in rows}) == len(rows)
    masks.close()
    if same:  # the twin's token is on its disk, and no other one: it does not open
        with pytest.raises(PoolError, match="copy"):
            opened(tmp_path / "copy", anchor)


# --- full disks and anchors --------------------------------------------------------------------------------


def test_a_full_disk_costs_nothing(tmp_path: Path) -> None:
    folder, anchor = tmp_path / "pool", FileAnchor(tmp_path / "anchors")
    deal(folder, anchor, (0, 8), (1, 8))
    disk = Disk(tmp_path)
    disk.adopt(tmp_path)
    with opened(folder, anchor) as masks:
        disk.full = True
        with disk.watched():
            with pytest.raises(PoolError, match=r"No space left.*make room.*no mask was handed out"):
                masks.take(0, 1)
            with pytest.raises(PoolError, match=r"No space left.*what was dealt before is there"):
                deal(folder, Willing(), (0, 2))
        disk.full = False
        assert masks.available(0) == 8
        assert right(0, masks.take(0, 1))
        assert len(files(folder)) == 2
        assert not list((folder / SPLIT).glob(".*"))


def test_a_really_full_disk(folder: Path, anchor: FileAnchor) -> None:
    """A limit on file sizes, set by the system, stands in for the disk's end."""
    deal(folder, anchor, (0, 8), (1, 8))
    code = (
        "import sys, resource, signal; from pathlib import *\n"
        "sys.path[:0] = ['tests/masks', 'tests/support']; import test_pool as t\n"
        "from sliplm.masks.anchor import *; from sliplm.errors import *\n"
        f"masks = t.opened({folder!r}, FileAnchor({anchor._folder!r}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (40, -1))\n"
        "try: masks.take(0, 1); print('not full')\n"
        "except PoolError: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "masks.take(0, 1); print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "fine\n"


class Willing:
    """An anchor that says yes to everything: what `Anchor` is there to prevent."""

    def swap(self, pool_id: str, old: str | None, new: str) -> bool:
        return True


class Flaky:
    """An anchor that can fail before or after the swap, or make it late."""

    def __init__(self, inner: Anchor) -> None:
        self.inner, self.mode = inner, "works"
        self.late: list[tuple[str, str | None, str]] = []

    def swap(self, pool_id: str, old: str | None, new: str) -> bool:
        if self.mode == "works" or old == new:
            if self.mode == "down":
                raise PoolError("the anchor is down")
            return self.inner.swap(pool_id, old, new)
        if self.mode == "after":
            self.inner.swap(pool_id, old, new)
        if self.mode == "late":
            self.late.append((pool_id, old, new))
        raise PoolError("the anchor failed")

    def deliver(self) -> None:
        while self.late:
            self.inner.swap(*self.late.pop(0))


@pytest.mark.parametrize("mode", ["down", "before", "after", "late"])
@pytest.mark.parametrize("again", [False, True], ids=["goes on", "opened again"])
def test_an_anchor_that_fails_stops_nobody_for_good(
    folder: Path, anchor: FileAnchor, mode: str, again: bool
) -> None:
    flaky = Flaky(anchor)
    deal(folder, flaky, (0, 60))
    masks = opened(folder, flaky)
    rows = masks.take(0, 3).r.tolist()
    for _ in range(3):
        flaky.mode = mode
        with pytest.raises(PoolError, match=r"anchor (is down|failed)"):
            masks.take(0, 2)
        flaky.mode = "works"
        flaky.deliver()
        if again:
            masks.close()
            masks = opened(folder, flaky)
        rows += masks.take(0, 3).r.tolist()
    masks.close()
    assert len({tuple(row) for row in rows}) == 12


SCRIPT = """
import sys, pathlib
place = pathlib.Path(sys.argv[1]); pool, old, new = sys.argv[2:]
if (place / "broken").exists(): print("no route to the database", file=sys.stderr); sys.exit(1)
if (place / "slow").exists(): import time; time.sleep(60)
file = place / pool
if (file.read_text() if file.exists() else "-") != old: sys.exit(3)
file.write_text(new)
"""


def test_an_anchor_behind_a_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "an anchor.py").write_text(SCRIPT)
    place = tmp_path / "a place; $HOME"
    place.mkdir()
    anchor = CommandAnchor(f"{sys.executable} '{tmp_path}/an anchor.py' '{place}'")
    deal(folder, anchor, (0, 20))
    shutil.copytree(folder, tmp_path / "copy")
    with opened(folder, anchor) as masks:
        assert right(0, masks.take(0, 1))
        with pytest.raises(PoolError, match="copy"):
            opened(tmp_path / "copy", anchor)
        (place / "broken").touch()
        with pytest.raises(PoolError, match="status 1: no route to the database"):
            masks.take(0, 5)
        (place / "broken").unlink()
        assert right(0, masks.take(0, 5))
        (place / "slow").touch()
        anchor._limit = 0.3
        with pytest.raises(PoolError, match=r"within 0.3 s"):
            masks.take(0, 5)


def test_commands_that_are_none() -> None:
    for command, what in (("", "empty"), ("'", "quotes")):
        with pytest.raises(PoolError, match=what):
            CommandAnchor(command)
    with pytest.raises(PoolError, match="does not start"):
        CommandAnchor("/nonexistent/anchor").swap("0" * 32, None, "1" * 32)
    assert "secret" not in repr(CommandAnchor("anchor --password secret"))


def test_a_file_anchor_swaps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_STATE", str(tmp_path / "state"))
    anchor, a, b, name = file_anchor(), "a" * 32, "b" * 32, "0" * 32
    assert not anchor.swap(name, a, b)
    assert anchor.swap(name, None, a)
    assert not anchor.swap(name, None, b)
    assert anchor.swap(name, a, a)
    assert anchor.swap(name, a, b)
    assert not anchor.swap(name, a, b)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / name).stat().st_mode & 0o777 == 0o600
    for wrong in ("../x", "A" * 32, ""):
        with pytest.raises(PoolError, match="hexadecimal"):
            anchor.swap(wrong, a, b)
    (tmp_path / "state" / name).write_text("?")
    with pytest.raises(PoolError, match="damaged"):
        anchor.swap(name, a, b)
    monkeypatch.delenv("SLIPLM_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert str(tmp_path / "xdg" / "sliplm" / "anchors") in repr(file_anchor())


def test_only_one_of_many_swaps(tmp_path: Path) -> None:
    anchor, name = FileAnchor(tmp_path), "0" * 32
    anchor.swap(name, None, "a" * 32)
    won: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda i=i: won.append(FileAnchor(tmp_path).swap(name, "a" * 32, f"{i:032x}"))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1


# --- everything at once ------------------------------------------------------------------------------------

GROUPS, ROWS, CALLS = st.integers(0, 1), st.integers(1, 7), st.integers(0, 14)


class CrashMachine(RuleBasedStateMachine):
    """One pool; kills between any two system calls, power cuts, full disks, failing anchors.

    No row comes out twice, and the pool opens again after whatever happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="pool-"))
        self.disk = Disk(self.root)
        self.anchor = Flaky(FileAnchor(self.root / "anchors"))
        self.seen: set[bytes] = set()
        self.running: dict[Path, DiskPool] = {}
        self.places = [self.root / "pool0"]
        deal(self.places[0], self.anchor, (0, 9), (1, 6))
        self.disk.adopt(self.root)

    def teardown(self) -> None:
        for place in list(self.running):
            self.end(place)
        shutil.rmtree(self.root)

    def end(self, place: Path) -> None:
        """The process is gone; nothing of it is closed but what the system closes."""
        masks = self.running.pop(place, None)
        if masks is not None:
            masks._unlock()

    def some_place(self, data: st.DataObject) -> Path:
        return data.draw(st.sampled_from(self.places))

    def start(self, place: Path, kill_after: int | None = None) -> DiskPool | None:
        if place not in self.running:
            try:
                with self.disk.watched(kill_after=kill_after):
                    self.running[place] = opened(place, self.anchor)
            except (PoolError, Killed):
                return None
        return self.running[place]

    def take_from(self, place: Path, group: int, rows: int, kill_after: int | None = None) -> None:
        masks = self.start(place, kill_after)
        if masks is None:
            return
        try:
            with self.disk.watched(kill_after=kill_after):
                taken = masks.take(group, rows)
        except PoolError:
            return
        except Killed:
            self.end(place)
            return
        assert len(taken.r) == rows
        assert right(group, taken)
        for row in taken.r:
            assert row.tobytes() not in self.seen, "a mask was handed out twice"
            self.seen.add(row.tobytes())

    @rule(data=st.data(), group=GROUPS, rows=ROWS)
    def take(self, data: st.DataObject, group: int, rows: int) -> None:
        self.take_from(self.some_place(data), group, rows)

    @rule(data=st.data(), group=GROUPS, rows=ROWS)
    def prepare(self, data: st.DataObject, group: int, rows: int) -> None:
        masks = self.start(self.some_place(data))
        if masks is not None:
            with contextlib.suppress(PoolError), self.disk.watched():
                masks.prepare(group, rows)

    @rule(data=st.data(), group=GROUPS, rows=ROWS, calls=CALLS, power=st.booleans())
    def take_and_crash(self, data: st.DataObject, group: int, rows: int, calls: int, power: bool) -> None:
        place = self.some_place(data)
        self.take_from(place, group, rows, calls)
        self.end(place)
        if power:
            self.cut(data)

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        for place in list(self.running):
            self.end(place)
        self.disk.power_cut(lambda: data.draw(st.booleans()))

    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.end(self.some_place(data))

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        place = self.some_place(data)
        if place in self.running:
            self.running.pop(place).close()

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        place = self.some_place(data)
        if place in self.running:
            self.running[place].renew()

    @rule(data=st.data(), group=GROUPS, rows=ROWS, calls=st.none() | CALLS, full=st.booleans())
    def add(self, data: st.DataObject, group: int, rows: int, calls: int | None, full: bool) -> None:
        self.disk.full = full
        try:
            with self.disk.watched(kill_after=calls):
                deal(self.some_place(data), self.anchor, (group, rows))
        except (PoolError, Killed):
            pass
        self.disk.full = False

    @rule(data=st.data(), group=GROUPS, rows=ROWS)
    def take_on_a_full_disk(self, data: st.DataObject, group: int, rows: int) -> None:
        self.disk.full = True
        self.take_from(self.some_place(data), group, rows)
        self.disk.full = False

    @rule(data=st.data(), group=GROUPS, rows=ROWS, mode=st.sampled_from(["down", "before", "after", "late"]))
    def take_with_a_failing_anchor(self, data: st.DataObject, group: int, rows: int, mode: str) -> None:
        self.anchor.mode = mode
        self.take_from(self.some_place(data), group, rows)
        self.anchor.mode = "works"

    @precondition(lambda self: self.anchor.late)
    @rule(data=st.data(), group=GROUPS, rows=ROWS, calls=CALLS)
    def a_late_swap_comes_while_one_takes(
        self, data: st.DataObject, group: int, rows: int, calls: int
    ) -> None:
        place = self.some_place(data)
        if self.start(place) is None:
            return
        self.disk.at_step = (calls, self.deliver)
        self.take_from(place, group, rows)

    def deliver(self) -> None:
        steps, self.disk.steps_left = self.disk.steps_left, None
        # one that holds the anchor's lock would wait for itself: then it comes afterwards
        if not _locked(self.root / "anchors" / "lock"):
            self.anchor.deliver()
        self.disk.steps_left = steps

    @rule()
    def late_swaps_come(self) -> None:
        with self.disk.watched():
            self.anchor.deliver()


def _locked(path: Path) -> bool:
    try:
        os.close(durable.lock(path, wait=False))
    except BlockingIOError:
        return True
    return False


class LivingMachine(CrashMachine):
    """The pool was never copied, so it has to live, whatever happened."""

    @invariant()
    def it_opens_and_gives(self) -> None:
        place = self.places[0]
        masks = self.running.get(place)
        if masks is not None and masks._over is None:
            return
        self.end(place)
        with self.disk.watched():
            masks = self.running[place] = opened(place, self.anchor)
            left = masks.available(0)
        if left:
            before = len(self.seen)
            self.take_from(place, 0, 1)
            assert len(self.seen) == before + 1 or masks._over is not None
        self.end(place)


class CopyMachine(CrashMachine):
    """And copies and backups of the folder, taken at any moment and used at any other, at the same time."""

    @precondition(lambda self: len(self.places) < 4)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        self.copied(self.some_place(data))

    def copied(self, place: Path) -> None:
        copy = self.root / f"pool{len(self.places)}"
        copy_folder(self.disk, place, copy)
        self.places.append(copy)

    @precondition(lambda self: len(self.places) < 4)
    @rule(data=st.data(), group=GROUPS, rows=ROWS, calls=CALLS)
    def copy_between_two_calls(self, data: st.DataObject, group: int, rows: int, calls: int) -> None:
        place = self.some_place(data)
        if self.start(place) is not None:
            self.disk.at_step = (calls, lambda: self.copied(place))
            self.take_from(place, group, rows)

    @rule(data=st.data(), alive=st.booleans())
    def restore(self, data: st.DataObject, alive: bool) -> None:
        """One place gets another's content; the process there may not even notice."""
        source, target = self.some_place(data), self.some_place(data)
        if source != target:
            if not alive:
                self.end(target)
            copy_folder(self.disk, source, target)

    @precondition(lambda self: len(self.places) > 1)
    @rule(data=st.data(), group=GROUPS, rows=ROWS, other=ROWS, calls=CALLS)
    def two_take_at_once(self, data: st.DataObject, group: int, rows: int, other: int, calls: int) -> None:
        """The second one's whole request comes between two system calls of the first."""
        place, second = data.draw(st.permutations(self.places))[:2]
        if self.start(place) is None or self.start(second) is None:
            return

        def meanwhile() -> None:
            if not _locked(self.root / "anchors" / "lock"):
                self.take_from_inside(second, group, other)

        self.disk.at_step = (calls, meanwhile)
        self.take_from(place, group, rows)

    def take_from_inside(self, place: Path, group: int, rows: int) -> None:
        try:
            taken = self.running[place].take(group, rows)
        except PoolError:
            return
        for row in taken.r:
            assert row.tobytes() not in self.seen, "a mask was handed out twice"
            self.seen.add(row.tobytes())

    @rule(data=st.data())
    def mix(self, data: st.DataObject) -> None:
        """Batches of one place appear in another, where they may have been used up."""
        source, target = self.some_place(data), self.some_place(data)
        for path in files(source):
            if not (target / SPLIT / path.name).exists():
                shutil.copy(path, target / SPLIT)
        self.disk.adopt(target)


TestLiving = LivingMachine.TestCase
TestLiving.settings = settings(max_examples=40, stateful_step_count=30)
TestCopies = CopyMachine.TestCase
TestCopies.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools without an anchor."""
    monkeypatch.setattr(FileAnchor, "swap", lambda self, pool_id, old, new: True)


def test_the_machine_finds_masks_that_are_used_twice(blind: None) -> None:
    with pytest.raises(AssertionError, match="handed out twice"):
        run_state_machine_as_test(
            CopyMachine,
            settings=settings(
                max_examples=200, stateful_step_count=30, phases=[Phase.generate], database=None
            ),
        )


# --- who dealt ---------------------------------------------------------------------------------------------

X, Y, NOBODY = (bytes([i]) * 32 for i in (7, 8, 9))


def deal_by(folder: Path, anchor: Anchor, mark: bytes, group: int, rows: int) -> None:
    with PoolWriter(folder, SPLIT, pool_key, SHAPES, anchor) as writer:
        writer.add(group, rows, lambda group, fresh: Dealt(product(group, *fresh()), (mark,)))


def test_a_pool_knows_who_dealt_and_another_process_learns_it(folder: Path, anchor: FileAnchor) -> None:
    deal(folder, anchor, (0, 2))
    deal_by(folder, anchor, X, 0, 2)
    deal_by(folder, anchor, Y, 1, 2)
    for _ in range(2):
        with opened(folder, anchor) as masks:
            assert masks.dealers() == {X, Y}


def test_who_dealt_is_remembered_when_the_batch_is_used_up(folder: Path, anchor: FileAnchor) -> None:
    """The last message under its masks may still be under way, to be sent to whoever connects next."""
    deal_by(folder, anchor, X, 0, 4)
    with opened(folder, anchor, reserve=4) as masks:
        masks.take(0, 4)
        assert not files(folder)
        assert masks.dealers() == {X}


@pytest.mark.parametrize("taken", [0, 1])
def test_what_a_fallen_one_dealt_is_dropped_also_in_hand(
    folder: Path, anchor: FileAnchor, taken: int
) -> None:
    """A file that is used up is gone while some of its rows are still in hand."""
    deal_by(folder, anchor, X, 0, 4)
    with opened(folder, anchor, reserve=4) as masks:
        if taken:
            masks.take(0, taken)
        assert masks.drop({NOBODY}) == 0
        assert masks.drop({X}) == 4 - taken
        assert not files(folder)
        with pytest.raises(PoolError, match="0 masks are left"):
            masks.take(0, 1)
        deal_by(folder, anchor, X, 0, 4)  # what comes later counts no more
        deal_by(folder, anchor, Y, 0, 2)
        assert right(0, masks.take(0, 2))
        with pytest.raises(PoolError, match="0 masks are left"):
            masks.take(0, 1)


def test_what_one_who_is_asked_online_deals_meanwhile_is_not_used(folder: Path, anchor: FileAnchor) -> None:
    deal_by(folder, anchor, Y, 0, 2)
    with opened(folder, anchor) as masks:
        masks.shun({X})
        deal_by(folder, anchor, X, 0, 4)
        assert right(0, masks.take(0, 2))
        with pytest.raises(PoolError, match="0 masks are left"):
            masks.take(0, 1)
