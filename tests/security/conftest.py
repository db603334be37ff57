"""The ledger of attacks and faults, and its table after the run."""

from __future__ import annotations

import pytest

from ledger import ledger, summary

__all__ = ["ledger"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    summary(terminalreporter)
