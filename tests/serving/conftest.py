"""One split model and one server for all tests here."""

from __future__ import annotations

from served import model, running, slow

__all__ = ["model", "running", "slow"]
