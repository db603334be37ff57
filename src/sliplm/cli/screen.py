"""What the commands share: two consoles, numbers for people, a progress bar for a split, quiet libraries."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from sliplm.engines.progress import SplitBar, spinner
from sliplm.errors import SlipWarning
from sliplm.shares.keysource import described, new_key_file

if TYPE_CHECKING:
    from sliplm.planning.counts import SplitReport
    from sliplm.shares.recipe import Recipe


def console(*, json: bool = False) -> Console:
    """For people: stdout, or stderr where stdout is for one JSON document."""
    return Console(stderr=json, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """One line on stdout; in ASCII where stdout, or UTF-8, cannot hold its names."""
    text = json.dumps(document, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(document)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say(text: str, *, err: bool = False) -> None:
    """A line on stdout, or stderr, in the encoding that it has."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def settle_streams() -> None:
    """Let what a terminal's encoding cannot hold be written as \\xNN or \\uNNNN, and never be an error."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def quiet() -> None:
    """Keep transformers' bars and warnings off the screen; what goes wrong still raises."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()


def warn_of_new_key() -> None:
    """Say that the user's key file was made just now."""
    text = new_key_file()
    Console(stderr=True, highlight=False).print(Text(text, style="bold yellow"), soft_wrap=True)


def key_option(key: str | None) -> str:
    """The same --key for a suggested command; a command's arguments may be secret, and are not repeated."""
    if key is None:
        return ""
    return " --key command:..." if key.startswith("command:") else f" --key {shlex.quote(key)}"


def split_with_progress(
    model: Path,
    out: Path,
    recipe: Recipe,
    key: str | None = None,
    *,
    warned: list[str] | None = None,
    **options: Any,
) -> SplitReport:
    """`sliplm.split` with a bar on stderr; says which key seals, and if it continues an earlier run.

    Args:
        warned: takes the text of each SlipWarning, which is also shown.
        options: further ones of `sliplm.split`.

    Raises: as `sliplm.split`.
    """
    import sliplm

    asks = key is not None and key.startswith(("passphrase", "command:"))
    with SplitBar(out, late=asks) as bar, showing_warnings(bar.say, warned):
        report = sliplm.split(model, out, recipe, key=key, progress=bar.update, **options)
    used = Text(f"the vault share is sealed with {described(key)}", style="dim")
    Console(stderr=True, highlight=False).print(used, soft_wrap=True)
    return report


def add_difference(table: Table, report: SplitReport) -> None:
    """What a split against a public base keeps and loses, as rows of (name, figure, text)."""
    if report.left_out is not None and report.change is not None:
        worst = max((g.left_out or 0.0 for g in report.groups), default=0.0)
        ranks = [group.rank for group in report.groups if group.placement == "split"]
        table.add_row("difference", percent(report.change), Text(f"of the norm of {report.base}'s matrices"))
        table.add_row("kept of it", percent(1 - report.left_out**2),
                      f"of its energy, at ranks {min(ranks)} to {max(ranks)}")  # fmt: skip
        gone = "at the worker" if report.tail == "worker" else "lost"
        table.add_row(
            gone, percent(report.left_out), f"of its norm; of the matrix that loses most {percent(worst)}"
        )
    for adapter in report.adapters:
        where = f"in {adapter.groups} groups, whole; {percent(adapter.macs_share)} of work for its tokens"
        table.add_row(Text(f"adapter {adapter.name}"), size(adapter.bytes), where)


def warn_of_tail(screen: Console, report: SplitReport) -> None:
    """Say loudly what the owner asked for by name."""
    if report.tail == "worker":
        text = (
            f"The tail of your difference is at the worker: whoever has {report.base} subtracts it, reads "
            "the tail in clear, and learns the span of what was kept. Do not give this share away."
        )
        screen.print(Text(f"\n{text}", style="bold red"), soft_wrap=True)


def size(count: float) -> str:
    """Bytes, in powers of a thousand: 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def number(count: float) -> str:
    """A large count: 135 M."""
    for unit in ("", " k", " M", " G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.4g} T"


def percent(share: float) -> str:
    """A share of one: 1.2 %."""
    return f"{100 * share:.3g} %" if share < 1 else f"{100 * share:,.0f} %"


def printable(text: str) -> str:
    """Without control characters: a model's text must not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Waiting(contextlib.AbstractContextManager["Waiting"]):
    """What is being waited for, on stderr where it is a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None

    def __exit__(self, *_: object) -> None:
        self.over()

    def on(self, what: str) -> None:
        """Show it, in place of what was shown."""
        if self._status is None:
            self._status = self._console.status("", spinner=spinner(self._console))
            self._status.start()
        self._status.update(Text(what, style="dim"))

    def over(self) -> None:
        """Take it away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, text: str, style: str) -> None:
        """Print a line above it."""
        self._console.print(Text(text, style=style), soft_wrap=True)


def _say(text: str, style: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text, style=style), soft_wrap=True)


@contextlib.contextmanager
def showing_warnings(
    say: Callable[[str, str], None] = _say, warned: list[str] | None = None
) -> Iterator[None]:
    """Show what sliplm warns of at once, in yellow; other libraries' warnings stay as they are.

    Args:
        say: takes a line and its style.
        warned: takes the text of each SlipWarning.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", SlipWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, SlipWarning):
                usual(message, category, *where)
                return
            say(f"warning: {message}", "yellow")
            if warned is not None:
                warned.append(str(message))

        warnings.showwarning = show  # type: ignore[assignment]  # put back by catch_warnings
        yield
