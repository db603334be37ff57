"""Record a real run of `slip demo` as docs/demo.svg: python docs/make_demo_svg.py (about two minutes)."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from sliplm.cli.demo import show
from sliplm.cli.screen import quiet, split_with_progress
from sliplm.examples.demo import prepare

TARGET = Path(__file__).with_name("demo.svg")


def main() -> None:
    """Run it on a recording console, which is no terminal: moving parts would be recorded frame by frame."""
    quiet()
    screen = Console(record=True, width=112, file=io.StringIO(), highlight=False)
    show(screen, prepare(None, split_with_progress), columns=True)
    svg = screen.export_svg(title="slip demo", theme=MONOKAI, unique_id="demo")
    svg = re.sub(
        r"@font-face \{.*?\}", "", svg, flags=re.DOTALL
    )  # nobody who looks at it calls a font server
    TARGET.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
