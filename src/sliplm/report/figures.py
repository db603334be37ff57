"""Line charts in one style: matplotlib without a screen, colour-blind safe, labels beside the lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sliplm.durable import replace
from sliplm.report import need
from sliplm.shares.tensorfile import write_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, without yellow, which is too pale for a line
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")  # beyond the palette, a line is told apart by its dashes
GREY, INK = "#8a8a8a", "#222222"
DPI = 160
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "text.parse_math": False,  # a layer's name is no formula
}


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        name: of its file, without `.png`.
        caption: what it shows, in a sentence or two; also read aloud.
        png: the file.
    """

    name: str
    caption: str
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Line:
    """A line of a chart; `band` is (low, high) about each y."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Axis:
    """An axis; `base` is that of a logarithmic one (2 or 10), `ticks` where it has its numbers."""

    title: str
    base: int | None = None
    ticks: Sequence[float] | None = None
    low: float | None = None
    high: float | None = None


def line_chart(
    name: str,
    caption: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    title: str = "",
    levels: Sequence[tuple[str, float]] = (),
    markers: bool = True,
) -> Picture:
    """Draw lines, each with its label at its right end, and `levels`: named horizontal references.

    Raises:
        ReportError: matplotlib is not installed.
    """
    need("matplotlib")
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.1), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Axes = figure.add_subplot()
        axes.set_title(title)
        for i, line in enumerate(lines):
            colour, dash = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
            axes.plot(line.x, line.y, dash, color=colour, marker="o" if markers else None)
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=colour, alpha=0.1, linewidth=0)
        for _, level in levels:
            axes.axhline(level, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        _scale(axes, "x", x)
        _scale(axes, "y", y)
        ends = [(line.label, line.x[-1], line.y[-1], PALETTE[i % len(PALETTE)]) for i, line in
                enumerate(lines) if line.x]  # fmt: skip
        ends += [(label, axes.get_xlim()[1], level, GREY) for label, level in levels]
        _label(axes, ends)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return Picture(name, caption, data.getvalue())


def save_png(picture: Picture, folder: Path) -> Path:
    """Write `folder/NAME.png`.

    Raises:
        ShareError: it cannot be written.
    """
    path = folder / f"{picture.name}.png"
    try:
        replace(path, picture.png, lasting=False)
    except OSError as error:
        raise write_error(path, len(picture.png), error) from error
    return path


def _scale(axes: Axes, which: str, axis: Axis) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    one = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(axis.title)
    if axis.base is not None:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=axis.base)
        one.set_minor_locator(NullLocator())
    if axis.low is not None or axis.high is not None:
        (axes.set_xlim if which == "x" else axes.set_ylim)(axis.low, axis.high)
    if axis.ticks is not None:
        one.set_major_locator(FixedLocator(list(axis.ticks)))
    elif axis.base == 10:
        low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
        subs = (
            (1.0,) if high > 1e3 * low else (1.0, 3.0) if high > 30 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        )
        one.set_major_locator(LogLocator(10, subs=subs, numticks=12))
    one.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _number(value: float) -> str:
    """A tick: 20, 0.5, 10 000, 3 M, 1e+09."""
    if 1e6 <= value < 1e9:
        return f"{value / 1e6:.6g}\u202fM"
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}"
    return f"{value:,.6g}".replace(",", "\u202f")


def _label(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Put the labels to the right of the axes, at their lines' height but apart from each other."""
    axes.figure.canvas.draw()  # only now are the scales settled
    box = axes.get_window_extent()
    shown = [
        (min(max((axes.transData.transform((x, y))[1] - box.y0) / box.height, 0.0), 1.0), label, colour)
        for label, x, y, colour in ends
    ]
    shown.sort(key=lambda end: end[0])
    heights = spread([height for height, _, _ in shown], 0.052)
    for (height, label, colour), at in zip(shown, heights, strict=True):
        axes.annotate(
            label,
            (1.0, height),
            xytext=(1.035, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved as little as is needed to be `gap` apart: neighbours that are too close become
    a block about their mean."""
    blocks: list[tuple[float, int]] = []  # centre, how many
    for place in places:
        centre, count = place, 1
        while blocks and blocks[-1][0] + blocks[-1][1] * gap / 2 > centre - count * gap / 2:
            before, many = blocks.pop()
            centre = (before * many + centre * count) / (many + count)
            count += many
        blocks.append((centre, count))
    return [centre + (i - (count - 1) / 2) * gap for centre, count in blocks for i in range(count)]
