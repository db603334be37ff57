"""A bar on the terminal for a split, which may take hours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from sliplm.reading import open_regular
from sliplm.shares.tensorfile import read_header

NAMES_FROM = 120  # characters of a terminal below which a bar has no room for names
NAME = 44  # characters of one that are shown, the last ones

Update = Callable[[int, int, str], None]
"""Called with the weights done, the weights in all, and the name of the group that comes next."""


@contextlib.contextmanager
def shown(progress: Update | None, out: Path) -> Iterator[Update]:
    """The caller's own progress, or a bar where stderr is a terminal, or nothing."""
    if progress is not None:
        yield progress
    elif sys.stderr is not None and sys.stderr.isatty():
        with SplitBar(out) as bar:
            yield bar.update
    else:
        yield lambda done, total, name: None


def named(console: Console) -> tuple[TextColumn, ...]:
    """The column for what is worked on, where a terminal has room for it."""
    wide = console.width >= NAMES_FROM
    return (TextColumn("{task.fields[name]}", style="dim", markup=False),) if wide else ()


def cut(name: str) -> str:
    """The end of a name that is long."""
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


class SplitBar(contextlib.AbstractContextManager["SplitBar"]):
    """Groups and bytes of the worker's share that are written, and the time left.

    The sizes come from the header of the worker's unfinished file, which is there before its first group.

    Args:
        late: show it from the first group on, as a passphrase is asked for before.
    """

    def __init__(self, out: Path, *, late: bool = False) -> None:
        self._late = late
        self._partial = out / ".partial"
        self._console = Console(stderr=True, highlight=False)
        self._sizes: dict[str, int] | None = None
        self._groups = self._bytes = 0
        self._name = ""
        self._bar = Progress(
            TextColumn("splitting"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(compact=True),
            *named(self._console),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, counts="", name="")

    def __enter__(self) -> SplitBar:
        if not self._late:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str, style: str) -> None:
        """Print a line above the bar."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def update(self, done: int, total: int, name: str) -> None:
        """As `sliplm.split` calls it: before each group, and at the end with no name."""
        self._bar.start()
        sizes = self._sizes = self._first() if self._sizes is None else self._sizes
        if self._name:
            self._groups += 1
            self._bytes += sizes.get(self._name, 0)
        self._name = name
        written, whole = decimal(self._bytes), decimal(sum(sizes.values()))
        counts = f"{self._groups} of {len(sizes)} groups, {written} of {whole}"
        self._bar.update(self._task, completed=done, total=total, counts=counts, name=cut(name))

    def _first(self) -> dict[str, int]:
        """Bytes of each group in the worker's share."""
        try:
            files = sorted(self._partial.glob("worker*/share.safetensors"))
            header = {name: entry for file in files for name, entry in read_header(file).items()}
            with open_regular(self._partial / "journal") as file:
                journal = file.read().split(b"\n")[1:-1]
        except (OSError, ValueError):  # a bar without sizes is better than no split
            return {}
        kept = sum(b'"group"' in line for line in journal)
        if kept:
            self._console.print(f"continuing an earlier run: {kept} of {len(header)} groups are done")
        return {name: entry.nbytes for name, entry in header.items()}


def spinner(console: Console) -> str:
    """The name of what turns while somebody waits, in letters that the console has."""
    return "line" if console.options.ascii_only else "dots"
