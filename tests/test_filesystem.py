"""File systems that are full, read-only, or lack what a disk can: gone on without, or named as the cause.

What a kernel here can mount is mounted; what no file system here refuses is refused at the system call.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import families
import sliplm
from sliplm import filesystem
from sliplm.engines.transformers import opened
from sliplm.engines.transformers.load import reference
from sliplm.errors import (
    CredentialError,
    InputError,
    LedgerError,
    PoolError,
    ShareError,
    SlipError,
)
from sliplm.masks.anchor import FileAnchor
from sliplm.masks.poolfolder import PoolWriter
from sliplm.network import authority
from sliplm.parties.audit import AuditLog
from sliplm.parties.quarantine import Quarantine
from sliplm.places import NewFolder
from sliplm.shares import ledger
from sliplm.shares.keysource import find
from sliplm.shares.share import open_vault, open_worker
from sliplm.shares.tensorfile import free_bytes

NAMED = r"its file system, [a-z0-9]+, "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("llama", tmp_path_factory.mktemp("made") / "model", num_hidden_layers=1)


# --- what is refused at the system call ------------------------------------------------------------------


class Weak:
    """Everything below a folder lies on a file system that lacks some calls."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = str(root.resolve()), patch
        self.refused = 0

    def _below(self, where: Any) -> bool:
        if isinstance(where, int) or hasattr(where, "fileno"):
            number = where if isinstance(where, int) else where.fileno()
            where = Path(f"/proc/self/fd/{number}").readlink()
        return os.fsdecode(os.fspath(where)).startswith(self.root)

    def lack(self, module: Any, call: str, number: int, only: Callable[[Any], bool] = lambda _: True) -> None:
        real = getattr(module, call)

        def refusing(first: Any, *rest: Any, **more: Any) -> Any:
            if self._below(first) and only(first):
                self.refused += 1
                names = (str(first), None, str(rest[0])) if call in ("link", "replace", "rename") else ()
                raise OSError(number, os.strerror(number), *names)
            return real(first, *rest, **more)

        self.patch.setattr(module, call, refusing)


@pytest.fixture
def weak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weak:
    (tmp_path / "weak").mkdir()
    return Weak(tmp_path / "weak", monkeypatch)


def is_folder(where: Any) -> bool:
    return Path(f"/proc/self/fd/{where if isinstance(where, int) else where.fileno()}").is_dir()


def no_locks(weak: Weak, number: int = errno.ENOLCK) -> None:
    weak.lack(fcntl, "flock", number)


def no_folder_sync(weak: Weak, number: int = errno.EINVAL) -> None:
    weak.lack(os, "fsync", number, is_folder)


def deal(pool: Path, anchors: Path) -> None:
    with PoolWriter(pool, "0" * 32, lambda label: bytes(32), [(4, 8)], FileAnchor(anchors)) as writer:
        writer.add(0, 3, lambda group, key, r: np.zeros((len(r), 4), np.uint32))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_split_goes_on_without_what_it_can_do_without(
    model: Path, weak: Weak, number: int, tmp_path: Path
) -> None:
    no_folder_sync(weak, number)
    weak.lack(os, "posix_fallocate", number)
    weak.lack(os, "fchmod", errno.EPERM if number == errno.EINVAL else number)
    weak.lack(os, "link", number)
    out = Path(weak.root) / "out"
    sliplm.split(model, out, sliplm.Recipe(rank=4), ledger=tmp_path / "ledger")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "generation_config.json").write_text('{"max_new_tokens": 2}')
    assert sliplm.reseal(out / "vault", tmp_path / "new").changed
    assert open_vault(out / "vault").split_id == open_worker(out / "worker").split_id
    assert weak.refused > 10


def test_a_worker_share_is_read_where_shared_maps_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sliplm.split(model, tmp_path / "out", sliplm.Recipe(rank=4))
    wanted = open_worker(tmp_path / "out" / "worker")
    real, refused = np.memmap, []

    def private_only(*args: Any, mode: str, **more: Any) -> Any:
        if mode == "r":
            refused.append(mode)
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real(*args, mode=mode, **more)

    monkeypatch.setattr(np, "memmap", private_only)
    found = open_worker(tmp_path / "out" / "worker")
    assert refused
    for name, matrix in wanted.matrices.items():
        assert np.array_equal(found.matrices[name], matrix) and not found.matrices[name].flags.writeable


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_nothing_can_be_locked_whoever_needs_a_lock_says_so(
    model: Path, weak: Weak, number: int, tmp_path: Path
) -> None:
    no_locks(weak, number)
    root = Path(weak.root)
    wanted = rf"cannot be locked.*{NAMED}cannot do this: choose a folder on a local disk"
    with pytest.raises(ShareError, match=wanted):
        sliplm.split(model, root / "out", ledger=tmp_path / "ledger")
    with pytest.raises(LedgerError, match=rf"{wanted}.*SLIPLM_LEDGER"):
        sliplm.split(model, tmp_path / "out", ledger=root / "ledger")
    with pytest.raises(PoolError, match=wanted):
        deal(root / "pool", tmp_path / "anchors")
    with pytest.raises(PoolError, match=rf"{wanted}.*SLIPLM_STATE"):
        deal(tmp_path / "pool", root / "anchors")


def test_what_needs_no_lock_goes_on_without(
    weak: Weak, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_locks(weak)
    root = Path(weak.root)
    authority.init(root / "keys")
    authority.issue(root / "keys", "worker", "worker-2")
    assert authority.revoke(root / "keys", "worker-2")
    record = Quarantine(root / "state" / "quarantine.json")
    record.add("127.0.0.1:1", None, "worker", "lied")
    assert record.clear("127.0.0.1:1") and not record.entries()
    monkeypatch.setenv("TMPDIR", str(root))
    monkeypatch.setattr("tempfile.tempdir", None)
    with NewFolder() as folder:
        assert folder.path.is_relative_to(root)
    assert weak.refused > 3


def test_what_must_outlast_a_power_cut_is_refused_where_it_may_not(weak: Weak, tmp_path: Path) -> None:
    no_folder_sync(weak)
    root = Path(weak.root)
    wanted = rf"nothing lasts for sure.*{NAMED}cannot do this"
    with pytest.raises(PoolError, match=wanted):
        deal(root / "pool", tmp_path / "anchors")
    with pytest.raises(PoolError, match=wanted):
        deal(tmp_path / "pool", root / "anchors")
    with pytest.raises(LedgerError, match=wanted):
        ledger.Ledger(find(None), root / "ledger").check_room()
    Quarantine(root / "quarantine.json").add("127.0.0.1:1", None, "worker", "lied")
    assert Quarantine(root / "quarantine.json").entries()


def test_a_key_file_is_made_without_links(weak: Weak, monkeypatch: pytest.MonkeyPatch) -> None:
    weak.lack(os, "link", errno.EPERM)
    path = Path(weak.root) / "key"
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(path))
    made = find(None, new=True)
    assert weak.refused and made.made and find(None).secret == made.secret
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EEXIST, errno.EOPNOTSUPP])
def test_a_file_that_cannot_be_replaced_is_named_with_its_file_system(weak: Weak, number: int) -> None:
    weak.lack(os, "replace", number)
    with pytest.raises(InputError, match=rf"quarantine\.json.*{NAMED}cannot do this"):
        Quarantine(Path(weak.root) / "quarantine.json")._change(lambda old: old)
    with pytest.raises(CredentialError, match=rf"{NAMED}cannot do this|exists"):
        authority.init(Path(weak.root) / "keys")


def test_without_memfd_weights_lie_in_a_tmpfs_and_never_on_a_disk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sliplm.split(model, tmp_path / "out", sliplm.Recipe(rank=4))
    asked = []

    def missing(name: str, *_: Any) -> int:
        asked.append(name)
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    wanted = reference(tmp_path / "out").get_output_embeddings()
    monkeypatch.setattr(os, "memfd_create", missing)
    if filesystem.kind(Path("/dev/shm")) == "tmpfs":
        assert type(reference(tmp_path / "out").get_output_embeddings()) is type(wanted)
    monkeypatch.setattr(opened, "kind", lambda _: "ext4")
    with pytest.raises(ShareError, match="neither memfd nor a tmpfs"):
        reference(tmp_path / "out")
    assert len(asked) > 1


KINDS = {
    errno.ENOSPC: "full: make room", errno.EDQUOT: "quota.*used up", errno.EROFS: "mounted read-only",
}  # fmt: skip


@pytest.mark.parametrize("number", list(KINDS))
@pytest.mark.parametrize(
    "what", ["split", "ledger", "key", "keys", "pool", "anchor", "audit", "tmp", "reseal"]
)
def test_full_and_read_only_disks_are_told_apart(
    model: Path, weak: Weak, number: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(weak.root)
    if what == "reseal":
        sliplm.split(model, root / "out", sliplm.Recipe(rank=4))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "generation_config.json").write_text('{"max_new_tokens": 2}')
    monkeypatch.setenv("SLIPLM_KEY_FILE" if what == "key" else "UNUSED", str(root / "key"))
    monkeypatch.setattr("tempfile.tempdir", str(root) if what == "tmp" else None)
    ways: dict[str, Callable[[], object]] = {
        "split": lambda: sliplm.split(model, root / "out", ledger=tmp_path / "ledger"),
        "ledger": lambda: sliplm.split(model, tmp_path / "out", ledger=root / "ledger"),
        "key": lambda: find(None, new=True),
        "keys": lambda: authority.init(root / "keys"),
        "pool": lambda: deal(root / "pool", tmp_path / "anchors"),
        "anchor": lambda: deal(tmp_path / "pool", root / "anchors"),
        "audit": lambda: AuditLog(root / "audit.jsonl"),
        "tmp": NewFolder,
        "reseal": lambda: sliplm.reseal(root / "out" / "vault", tmp_path / "new"),
    }
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    real = os.open

    def opening(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & writes and str(path).startswith(weak.root):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(SlipError, match=KINDS[number]) as caught:
        ways[what]()
    assert "file system, " in str(caught.value)


def test_a_disk_that_does_not_say_how_full_it_is_counts_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(0, 0, 0))
    assert free_bytes(tmp_path) == sys.maxsize


# --- what a kernel here can mount ------------------------------------------------------------------------


MOUNTING = """
import json, subprocess, sys
from pathlib import Path

import sliplm
from sliplm import filesystem

folder, model = map(Path, sys.argv[1:])


def mount(options, disk):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def said(call):
    try:
        return str(call())
    except sliplm.errors.SlipError as error:
        return f"{type(error).__name__}: {error}"


disk, odd, new = folder / "disk", folder / "odd name\\\\x", folder / "new"
for each in (disk, odd, new):
    each.mkdir()
(new / "generation_config.json").write_text(json.dumps({"max_new_tokens": 2}))
(folder / "link").symlink_to(odd)
mount("size=64k", disk)
found = {"too small": said(lambda: sliplm.split(model, disk / "out"))}
mount("remount,size=324k", disk)
found["full"] = said(lambda: sliplm.split(model, disk / "out"))
mount("remount,size=4m", disk)
found["larger"] = said(lambda: sliplm.split(model, disk / "out").exchanges)
mount("remount,ro", disk)
found["read-only"] = said(lambda: sliplm.reseal(disk / "out" / "vault", new))
found["ledger"] = said(lambda: sliplm.split(model, folder / "out", ledger=disk / "ledger"))
mount("size=1m", odd)
found["kinds"] = [filesystem.kind(folder / name) for name in ("odd name\\\\x/a", "link/b")]
print(json.dumps(found))
"""


def test_a_small_disk_is_named_as_the_cause_and_the_split_goes_on_with_more_room(
    model: Path, tmp_path: Path
) -> None:
    """One that is too small, then one that runs full, then larger; and read-only at last."""
    assert filesystem.kind(Path("/proc/self")) == "proc"
    assert filesystem.kind(tmp_path / "not" / "there") == filesystem.kind(tmp_path)
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", MOUNTING, str(tmp_path), str(model)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if re.search("unshare: |permission denied|must be superuser", done.stderr):
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "61440 are free" in found["too small"]
    assert re.match("ShareError: .*its file system, tmpfs, is full", found["full"])
    assert found["larger"] == "5"
    assert re.match("ShareError: .*its file system, tmpfs, is mounted read-only", found["read-only"])
    assert re.match("LedgerError: .*its file system, tmpfs, is mounted read-only", found["ledger"])
    assert found["kinds"] == ["tmpfs", "tmpfs"]
