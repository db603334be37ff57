"""A disk that can lose what was not synced, run full, and stop a process between any two system calls."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class Killed(BaseException):
    """The process ended here."""


class Node:
    """A file's content, whatever its name: what is there now lies on the real disk."""

    def __init__(self, path: str, synced: bytes) -> None:
        self.path, self.synced = path, synced


class Disk:
    """Watches all changes below a folder.  A file's unsynced bytes and a folder's unsynced changes may be
    lost in a power cut, each by itself."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.names: dict[str, Node] = {}
        self.safe: dict[str, Node] = {}  # names that survive a power cut
        self.pending: list[tuple[str, str, Node | None, str]] = []  # (folder, name, its node, name before)
        self.open_files: dict[int, Node | str] = {}
        self.full = False
        self.steps_left: int | None = None
        self.at_step: tuple[int, Callable[[], None]] | None = None

    @contextlib.contextmanager
    def watched(self, *, kill_after: int | None = None) -> Iterator[None]:
        """Run the block on this disk; after so many system calls it is killed."""
        self.steps_left = kill_after
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}
        self.real = real
        with contextlib.ExitStack() as stack:
            for name in real:
                stack.enter_context(mock.patch.object(os, name, getattr(self, name)))
            try:
                yield
            finally:
                self.steps_left, self.at_step = None, None

    def adopt(self, folder: Path) -> None:
        """Take what lies in a folder for synced."""
        for name in [name for name in self.names if Path(name).is_relative_to(folder)]:
            del self.names[name]
            self.safe.pop(name, None)
        self.pending = [op for op in self.pending if not Path(op[1]).is_relative_to(folder)]
        for path in folder.rglob("*"):
            if path.is_file():
                self.names[str(path)] = self.safe[str(path)] = Node(str(path), path.read_bytes())

    def power_cut(self, survives: Callable[[], bool]) -> None:
        """Forget what was not synced, except what `survives` by chance."""
        now = {id(node): Path(name).read_bytes() for name, node in self.names.items() if Path(name).exists()}
        for _, name, node, before in self.pending:
            if survives():
                if before:
                    self.safe.pop(before, None)
                if node is None:
                    self.safe.pop(name, None)
                else:
                    self.safe[name] = node
        for name in self.names:
            Path(name).unlink(missing_ok=True)
        contents = {}
        for name, node in self.safe.items():
            dirty = now.get(id(node), node.synced)
            contents[name] = dirty if survives() else node.synced
        self.names, self.pending, self.open_files = {}, [], {}
        for name, content in contents.items():
            Path(name).write_bytes(content)
            self.names[name] = Node(name, content)
        self.safe = dict(self.names)

    # --- the system calls ---------------------------------------------------------------------------------

    def step(self) -> None:
        if self.at_step is not None:
            count, action = self.at_step
            self.at_step = (count - 1, action) if count else None
            if not count:
                action()
        if self.steps_left is not None:
            if self.steps_left <= 0:
                raise Killed
            self.steps_left -= 1

    def open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        name = os.fspath(path)
        if not str(name).startswith(self.root) or not flags & (os.O_WRONLY | os.O_CREAT | os.O_DIRECTORY):
            return self.real["open"](path, flags, mode, **more)
        self.step()
        descriptor = self.real["open"](path, flags, mode, **more)
        if flags & os.O_DIRECTORY:
            self.open_files[descriptor] = name
            return descriptor
        if name not in self.names:
            self.names[name] = Node(name, b"")
            self.pending.append((str(Path(name).parent), name, self.names[name], ""))
        self.open_files[descriptor] = self.names[name]
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        if descriptor in self.open_files:
            self.step()
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
        return self.real["write"](descriptor, data)

    def fsync(self, descriptor: int) -> None:
        what = self.open_files.get(descriptor)
        if what is None:
            return self.real["fsync"](descriptor)
        self.step()
        if isinstance(what, Node):
            what.synced = Path(what.path).read_bytes()
            return None
        for folder, name, node, before in self.pending:
            if folder == what:
                if before:
                    self.safe.pop(before, None)
                if node is None:
                    self.safe.pop(name, None)
                else:
                    self.safe[name] = node
        self.pending = [op for op in self.pending if op[0] != what]
        return None

    def replace(self, old: Any, new: Any) -> None:
        if not str(new).startswith(self.root):
            return self.real["replace"](old, new)
        self.step()
        self.real["replace"](old, new)
        node = self.names.pop(str(old))
        node.path = str(new)
        self.names[str(new)] = node
        self.pending.append((str(Path(new).parent), str(new), node, str(old)))
        return None

    def unlink(self, path: Any, **more: Any) -> None:
        if not str(path).startswith(self.root):
            return self.real["unlink"](path, **more)
        self.step()
        self.real["unlink"](path, **more)
        self.names.pop(str(path), None)
        self.pending.append((str(Path(path).parent), str(path), None, ""))
        return None


def copy_folder(disk: Disk, source: Path, target: Path) -> None:
    """Put a copy in the place of a folder, as a backup program does."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    disk.adopt(target)
