"""Pages and pictures: whole without a network, safe with any text, and what they are given is in them."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sliplm.report
from sliplm.errors import ReportError, ShareError
from sliplm.report import need
from sliplm.report.figures import Axis, Line, Picture, line_chart, save_png, spread
from sliplm.report.page import Section, Table, write_page

VOID = {"meta", "img", "br"}
EVIL = "<script>alert('x')</script> & \"quoted\""


class Strict(HTMLParser):
    """Checks that every element is closed in order; collects texts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
        assert "script" not in self.open


def parsed(path: Path) -> Strict:
    parser = Strict()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def assert_alone(path: Path) -> None:
    """The page loads nothing: no address but of data that it holds itself."""
    page = parsed(path)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith("data:image/png;base64,"), (tag, name, value[:80])
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//|url\(|@import", text)


def chart(**options: object) -> Picture:
    lines = [
        Line("first $x_1$", (1, 2, 4), (30.0, 500.0, 1e4)),
        Line(EVIL, (1, 2, 4), (25.0, 26.0, 30.0), ((24.0, 25.0, 26.0), (26.0, 27.0, 40.0))),
    ]
    x, y = Axis("rank", base=2, ticks=(1, 2, 4)), Axis("perplexity", base=10)
    return line_chart("chart", EVIL, lines, x, y, levels=(("uniform", 300.0),), **options)  # type: ignore[arg-type]


def test_a_page_holds_what_it_is_given_and_nothing_else(tmp_path: Path) -> None:
    table = Table(("kind", "value"), ((EVIL, "1,234.5"), ("b", "17 %")), caption="numbers")
    sections = [Section(EVIL, ("one", EVIL), (chart(title=EVIL),), (table,), code='{"a": "<b>"}')]
    write_page(tmp_path / "page.html", f"Report {EVIL}", ("lead",), sections)
    assert_alone(tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    shown = " ".join(page.texts)
    for text in (EVIL, "1,234.5", "17 %", "lead", "numbers", '{"a": "<b>"}'):
        assert text in shown
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(image.partition(",")[2]) for image in images] == [chart(title=EVIL).png]


def test_a_picture_is_a_png_with_ink_of_every_line(tmp_path: Path) -> None:
    picture = chart()
    path = save_png(picture, tmp_path)
    assert path.name == "chart.png"
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.size[0] > 1000
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x8A, 0x8A, 0x8A)):
        assert (pixels == colour).all(axis=1).sum() > 100, colour


def test_the_same_figures_give_the_same_picture() -> None:
    assert chart().png == chart().png


def test_a_chart_takes_many_lines_and_none() -> None:
    lines = [Line(f"line {i}", (1, 2), (1.0 + i, 2.0 + i)) for i in range(20)]
    assert line_chart("many", "", lines, Axis("x"), Axis("y")).png.startswith(b"\x89PNG")
    assert line_chart("none", "", [], Axis("x"), Axis("y")).png.startswith(b"\x89PNG")


@given(st.lists(st.floats(0, 1), max_size=20).map(sorted), st.floats(0.01, 0.2))
def test_labels_are_moved_apart(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    assert len(moved) == len(places)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(moved))
    if all(b - a >= gap for a, b in itertools.pairwise(places)):
        assert moved == pytest.approx(places)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliplm.report, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(
        ReportError, match=r"needs matplotlib, which is not installed; in the clone: pip install -e"
    ):
        need()
    with pytest.raises(ReportError, match="pip install"):
        chart()
    need("jinja2")


def test_what_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ShareError, match="cannot be written"):
        write_page(tmp_path / "none" / "page.html", "t", (), ())
    with pytest.raises(ShareError, match="cannot be written"):
        save_png(Picture("p", "", b""), tmp_path / "none")
