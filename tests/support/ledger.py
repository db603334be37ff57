"""What the security tests tried, what was detected, and what leaked: counted, and printed as one table."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

LONG = os.environ.get("SLIP_SECURITY") == "long"
"""Whether the long sizes are asked for."""


def size(ci: int, long: int) -> int:
    """How many of something to try: `ci` in every test run, `long` with SLIP_SECURITY=long."""
    return long if LONG else ci


@dataclass
class Row:
    """One attack or fault.

    Attributes:
        tries: how often it was tried.
        detected: how often it was noticed and answered as stated.
        leaked: how often something was lost or leaked: a wrong product used, a mask used twice, a secret
            seen.  Counted, never assumed.
    """

    name: str
    tries: int
    detected: int
    leaked: int
    note: str = ""


class Ledger:
    """The rows so far; a name that is recorded again adds to its row."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.printed = False

    def record(self, name: str, tries: int, detected: int, leaked: int, note: str = "") -> None:
        """Add the counts of one attack or fault."""
        row = self.rows.setdefault(name, Row(name, 0, 0, 0))
        row.tries += int(tries)
        row.detected += int(detected)
        row.leaked += int(leaked)
        row.note = note or row.note

    def table(self) -> str:
        """The rows as a table for a terminal."""
        table = Table(title="Attacks and faults" + (" (long sizes)" if LONG else ""))
        table.add_column("attack or fault", overflow="fold")
        for heading in ("tries", "detected", "lost or leaked"):
            table.add_column(heading, justify="right")
        table.add_column("note", overflow="fold")
        for row in self.rows.values():
            table.add_row(row.name, f"{row.tries:,}", f"{row.detected:,}", f"{row.leaked:,}", row.note)
        console = Console(width=132, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
        with console.file:
            console.print(table)
        return console.export_text()


LEDGER = Ledger()


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """The ledger of this run: `ledger.record(name, tries, detected, leaked, note="")`."""
    return LEDGER


def summary(reporter: pytest.TerminalReporter) -> None:
    """Print the table once; with SLIP_LEDGER=PATH write it there too, as JSON."""
    if LEDGER.printed or not LEDGER.rows:
        return
    LEDGER.printed = True
    reporter.write_line("")
    for line in LEDGER.table().splitlines():
        reporter.write_line(line)
    path = os.environ.get("SLIP_LEDGER")
    if path:
        rows = [asdict(row) for row in LEDGER.rows.values()]
        Path(path).write_text(json.dumps({"long": LONG, "rows": rows}) + "\n", encoding="utf-8")
