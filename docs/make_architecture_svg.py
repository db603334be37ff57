"""Draw docs/pictures/architecture.svg: python docs/make_architecture_svg.py (a second).

The rooms and the two ways through them are laid out here; what else lives on a floor is read from src/sliplm.
tests/test_documents.py compares the picture with what this draws, and the ways with docs/ARCHITECTURE.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

HOUSE = Path(__file__).parents[1] / "src" / "sliplm"
TARGET = Path(__file__).parent / "pictures" / "architecture.svg"

WEIGHT = (
    "engines/transformers/convert.py", "engines/transformers/checkpoint.py", "engines/transformers/layout.py",
    "engines/transformers/plan.py", "engines/writing.py", "engines/source.py", "shares/splitting.py",
    "arithmetic/equilibration.py", "arithmetic/rotation.py", "arithmetic/fixedpoint.py",
    "arithmetic/field.py", "shares/contents.py", "shares/sealing.py", "shares/tensorfile.py",
    "shares/manifest.py", "shares/ledger.py",
)  # fmt: skip
"""The files that a weight passes, in order."""

TOKEN = (
    "engines/modules.py", "engines/modules.py", "parties/vault.py", "parties/exchange.py",
    "parties/supply.py", "masks/maskpool.py", "parties/codec.py", "network/link.py", "protocol/vault_side.py",
    "protocol/frames.py", "network/transport.py", "network/listener.py", "parties/worker.py",
    "protocol/worker_side.py", "arithmetic/kernels/__init__.py", "protocol/worker_side.py",
    "network/transport.py", "protocol/vault_side.py", "parties/codec.py", "parties/codec.py",
    "parties/codec.py", "engines/modules.py",
)  # fmt: skip
"""The files that a token passes, in order."""

WIDTH, LEFT, RIGHT = 960, 14, 946
RED, BLUE, INK, GREY, LINE = "#b4450a", "#1f5fae", "#1b1f24", "#57606a", "#c3cad2"
ROOM_WIDTH, ROOM_HEIGHT = 92, 46
COLUMNS = (268, 380, 492, 604, 718, 832)  # left edges; the fifth column lies on the wire
WIRE = COLUMNS[4] + ROOM_WIDTH // 2
LINE_WIDTH = 96
NAMES_WIDTH = 34  # characters beside rooms; a floor without rooms has them across

Point = tuple[float, float]


class Floor(NamedTuple):
    """A package: its rows of rooms by column, and its height."""

    package: str
    tint: str
    height: int
    rows: tuple[dict[int, str], ...] = ()


FLOORS = (
    Floor("report", "#f6f8fa", 32),
    Floor("examples", "#f6f8fa", 32),
    Floor("serving", "#f6f8fa", 46),
    Floor("engines", "#fff8ec", 198, (
        {0: "convert", 1: "checkpoint", 2: "layout", 3: "plan"}, {0: "source", 1: "writing", 4: "modules"})),
    Floor("planning", "#f6f8fa", 52, ({},)),
    Floor("parties", "#eef5fd", 106, ({0: "codec", 1: "supply", 2: "exchange", 3: "vault", 5: "worker"},)),
    Floor("network", "#f6f8fa", 80, ({2: "link", 4: "transport", 5: "listener"},)),
    Floor("protocol", "#eef5fd", 80, ({2: "vault_side", 4: "frames", 5: "worker_side"},)),
    Floor("masks", "#f6f8fa", 80, ({1: "maskpool"},)),
    Floor("shares", "#fff8ec", 148, (
        {1: "manifest", 2: "ledger"}, {0: "splitting", 1: "tensorfile", 2: "sealing", 3: "contents"})),
    Floor("arithmetic", "#eef5fd", 164, (
        {0: "equilibration", 1: "rotation", 2: "fixedpoint", 3: "field", 5: "kernels"},)),
    Floor("cluster", "#f6f8fa", 32),
)  # fmt: skip
"""From the roof down, without what is drawn by itself."""


class Room(NamedTuple):
    """A module's place."""

    x: float
    y: float
    path: str

    def at(self, side: str, shift: float = 0) -> Point:
        """The middle of a side (n, e, s, w), moved along it."""
        middle_x, middle_y = self.x + ROOM_WIDTH / 2, self.y + ROOM_HEIGHT / 2
        return {
            "n": (middle_x + shift, self.y),
            "s": (middle_x + shift, self.y + ROOM_HEIGHT),
            "w": (self.x, middle_y + shift),
            "e": (self.x + ROOM_WIDTH, middle_y + shift),
        }[side]


def stem(path: str) -> str:
    """The name of a file's module: that of its folder for `__init__.py`."""
    file = Path(path)
    return file.parent.name if file.name == "__init__.py" else file.stem


def names(package: str, rooms: Iterable[str]) -> list[str]:
    """The modules of a package that have no room, those of subpackages after the subpackage's name."""
    used = set(rooms)
    found: list[str] = []
    for folder in sorted({file.parent for file in (HOUSE / package).rglob("*.py")}):
        own = [file.stem for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
        own = [name for name in own if str((folder / name).relative_to(HOUSE)) not in used]
        attacks = [name[:3] for name in own if re.match(r"a\d\d_", name)]
        own = [name for name in own if name[:3] not in attacks]
        found += [f"{folder.name}/"] * (folder != HOUSE / package)
        found += [attacks[0], "…", attacks[-1], *own] if attacks else own
    return found


def wrapped(words: Iterable[str], width: int) -> list[str]:
    """Lines of words."""
    lines = [""]
    for word in words:
        if lines[-1] and (len(lines[-1]) + 2 + len(word) > width or word.endswith("/")):
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    return lines


def text(x: float, y: float, words: str, *, size: int = 13, fill: str = GREY, more: str = "") -> str:
    """A line of text; two spaces stay two."""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"'
    return f'<text {place} xml:space="preserve"{more}>{words}</text>'


def box(
    x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE, more: str = ""
) -> str:
    """A rectangle."""
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} fill="{fill}" stroke="{stroke}"{more}/>'


def way(points: Sequence[Point], colour: str, *, back: bool = False) -> str:
    """A line with a head."""
    place = " ".join(f"{x:g},{y:g}" for x, y in points)
    head = "red" if colour == RED else "blue"
    dashes = ' stroke-dasharray="5 4"' if back else ""
    return f'<polyline points="{place}" stroke="{colour}" marker-end="url(#{head})"{dashes}/>'


def labels(path: str) -> list[tuple[str, str]]:
    """The numbers of a room's stops, with their colours; neighbours are joined."""
    found: list[tuple[str, str]] = []
    for stops, colour in ((WEIGHT, RED), (TOKEN, BLUE)):
        numbers = [i for i, file in enumerate(stops, 1) if file == path]
        while numbers:
            run = [n for i, n in enumerate(numbers) if n == numbers[0] + i]
            found.append((f"{run[0]}" if len(run) == 1 else f"{run[0]}\u2013{run[-1]}", colour))
            numbers = numbers[len(run) :]
    return found


def draw_room(room: Room) -> list[str]:
    """A room with its numbers over its name."""
    out = [box(room.x, room.y, ROOM_WIDTH, ROOM_HEIGHT, "#ffffff", "#8c959f", ' rx="4"')]
    x = room.x + 4
    for label, colour in labels(room.path):
        width = 10 + 7 * len(label)
        out.append(box(x, room.y + 5, width, 17, colour, colour, ' rx="8"'))
        bold = ' font-weight="700" text-anchor="middle"'
        out.append(text(x + width / 2, room.y + 18, label, fill="#ffffff", more=bold))
        x += width + 2
    out.append(text(room.x + 7, room.y + 38, stem(room.path), size=14, fill=INK))
    return out


def draw_floor(floor: Floor, top: float) -> tuple[list[str], dict[str, Room]]:
    """A floor with its names, and its rooms."""
    out = [box(LEFT, top, RIGHT - LEFT, floor.height, floor.tint)]
    files = {stem(path): path for path in (*WEIGHT, *TOKEN) if path.startswith(f"{floor.package}/")}
    rooms: dict[str, Room] = {}
    count = len(floor.rows)
    for i, row in enumerate(floor.rows):
        y = top + (floor.height - count * ROOM_HEIGHT) * (i + 1) / (count + 1) + i * ROOM_HEIGHT
        rooms |= {name: Room(COLUMNS[column], y, files[name]) for column, name in row.items()}
    out.append(text(LEFT + 10, top + 21, floor.package, size=15, fill=INK, more=' font-weight="700"'))
    others = names(floor.package, [room.path.removesuffix(".py") for room in rooms.values()])
    if not floor.rows:
        lines = wrapped(others, LINE_WIDTH)
        out += [text(COLUMNS[0], top + 20 + 15 * i, line) for i, line in enumerate(lines)]
    for i, line in enumerate(wrapped(others, NAMES_WIDTH) if floor.rows else ()):
        out.append(text(LEFT + 10, top + 38 + 15 * i, line))
    return out, rooms


def draw_top(top: float) -> tuple[list[str], float]:
    """The roof and the attic: cli, then attacks beside sensitivity."""
    peak, middle = top, WIDTH / 2
    roof = f"{middle - 150},{peak} {middle + 150},{peak} {RIGHT + 8},{peak + 62} {LEFT - 8},{peak + 62}"
    centre = ' text-anchor="middle"'
    bold = ' font-weight="700"'
    out = [f'<polygon points="{roof}" fill="#eceff3" stroke="{LINE}"/>']
    out.append(text(middle, peak + 24, "cli", size=15, fill=INK, more=bold + centre))
    out.append(text(middle, peak + 46, "  ".join(names("cli", ())), more=centre))
    top, height, wall = peak + 62, 80, 572
    for package, x, width in (("attacks", LEFT, wall - LEFT), ("sensitivity", wall, RIGHT - wall)):
        out.append(box(x, top, width, height, "#f6f8fa"))
        out.append(text(x + 10, top + 21, package, size=15, fill=INK, more=bold))
        for i, line in enumerate(wrapped(names(package, ()), 80 if package == "attacks" else 54)):
            out.append(text(x + 10, top + 40 + 15 * i, line))
    return out, top + height


def draw_ground(top: float) -> tuple[list[str], float]:
    """Four modules side by side, and errors under all."""
    out, quarter = [], (RIGHT - LEFT) / 4
    bold = ' font-weight="700"'
    for x, name, what in (
        (LEFT, "places", "where files go"),
        (LEFT + quarter, "closing", "what is closed, and when"),
        (LEFT + 2 * quarter, "durable", "files that no crash halves"),
        (LEFT + 3 * quarter, "forks", "whose process it is"),
    ):
        out.append(box(x, top, quarter, 30, "#eceff3"))
        out.append(text(x + 10, top + 20, name, size=15, fill=INK, more=bold))
        out.append(text(x + 90, top + 20, what))
    out.append(box(LEFT - 8, top + 30, RIGHT - LEFT + 16, 30, "#dfe4ea"))
    out.append(text(LEFT + 10, top + 50, "errors", size=15, fill=INK, more=bold))
    out.append(text(LEFT + 90, top + 50, "one tree of all errors"))
    return out, top + 60


def weight_ways(at: dict[str, Room]) -> list[str]:
    """Through engines, down to shares and arithmetic, and up to the two folders."""
    across = ("convert", "checkpoint", "layout", "plan")
    pairs = [*pairwise(across)]
    pairs += [("equilibration", "rotation"), ("rotation", "fixedpoint"), ("fixedpoint", "field")]
    out = [way([at[a].at("e"), at[b].at("w")], RED) for a, b in pairs]
    back = (("writing", "source"), ("contents", "sealing"), ("sealing", "tensorfile"))
    out += [way([at[a].at("w"), at[b].at("e")], RED) for a, b in back]
    down, turn = at["plan"].at("s"), at["writing"].at("e")
    out.append(way([down, (down[0], turn[1]), turn], RED))
    start, end, lane = at["source"].at("w"), at["splitting"].at("w"), COLUMNS[0] - 11
    out.append(way([start, (lane, start[1]), (lane, end[1]), end], RED))
    out.append(way([at["splitting"].at("s"), at["equilibration"].at("n")], RED))
    out.append(way([at["field"].at("n"), at["contents"].at("s")], RED))
    out.append(way([at["tensorfile"].at("n"), at["manifest"].at("s")], RED))
    out.append(way([at["manifest"].at("e"), at["ledger"].at("w")], RED))
    ledger, gap = at["ledger"].at("e"), COLUMNS[3] - 10
    out.append(way([ledger, (COLUMNS[3], ledger[1])], RED))
    over = at["ledger"].y - 8
    out.append(
        way([ledger, (gap, ledger[1]), (gap, over), (WIRE + 44, over), (WIRE + 44, ledger[1] - 15)], RED)
    )
    return out


def token_ways(at: dict[str, Room], planning: float) -> list[str]:
    """Out to the worker (whole lines), and back (dashes)."""
    upper, lower = planning + 18, planning + 36
    start, end = at["modules"].at("s", 14), at["vault"].at("n")
    out = [way([start, (start[0], lower), (end[0], lower), end], BLUE)]
    for a, b in (("vault", "exchange"), ("exchange", "supply")):
        out.append(way([at[a].at("w"), at[b].at("e")], BLUE))
    x = at["supply"].at("s", -20)
    out.append(way([x, (x[0], at["maskpool"].y)], BLUE))
    start, end = at["maskpool"].at("w"), at["codec"].at("s", -30)
    out.append(way([start, (end[0], start[1]), end], BLUE))
    start, end = at["codec"].at("s", 30), at["link"].at("w")
    out.append(way([start, (start[0], end[1]), end], BLUE))
    out.append(way([at["link"].at("s"), at["vault_side"].at("n")], BLUE))
    out.append(way([at["vault_side"].at("e", 10), at["frames"].at("w", 10)], BLUE))
    out.append(way([at["frames"].at("n", -24), at["transport"].at("s", -24)], BLUE))
    out.append(way([at["transport"].at("e", -10), at["listener"].at("w", -10)], BLUE))
    out.append(way([at["listener"].at("n"), at["worker"].at("s")], BLUE))
    start, end, lane = at["worker"].at("e"), at["worker_side"].at("e"), COLUMNS[5] + ROOM_WIDTH + 11
    out.append(way([start, (lane, start[1]), (lane, end[1]), end], BLUE))
    out.append(way([at["worker_side"].at("s", 22), at["kernels"].at("n", 22)], BLUE))
    # and back
    out.append(way([at["kernels"].at("n", -6), at["worker_side"].at("s", -6)], BLUE, back=True))
    start, end, lane = at["worker_side"].at("w"), at["transport"].at("e", 12), COLUMNS[5] - 11
    out.append(way([start, (lane, start[1]), (lane, end[1]), end], BLUE, back=True))
    start, end, lane = at["transport"].at("w"), at["vault_side"].at("e", -10), COLUMNS[3] + 46
    out.append(way([start, (lane, start[1]), (lane, end[1]), end], BLUE, back=True))
    start, end = at["vault_side"].at("w"), at["codec"].at("s")
    out.append(way([start, (end[0], start[1]), end], BLUE, back=True))
    start, end = at["codec"].at("n"), at["modules"].at("s", -20)
    out.append(way([start, (start[0], upper), (end[0], upper), end], BLUE, back=True))
    return out


def draw_wire(top: float, bottom: float, folders: float) -> list[str]:
    """What divides the vault's machine from the worker's, and the folder that each has."""
    out = [f'<path d="M{WIRE} {top}V{bottom}" stroke="{GREY}" stroke-width="2" stroke-dasharray="2 5"/>']
    bold = ' font-weight="700"'
    out.append(text(WIRE - 10, top + 14, "vault", fill=INK, more=bold + ' text-anchor="end"'))
    out.append(text(WIRE + 10, top + 14, "worker", fill=INK, more=bold))
    out.append(text(WIRE - 10, folders - 94, "the wire", more=' text-anchor="end"'))
    for x, width, name in ((COLUMNS[3], ROOM_WIDTH, "out/vault"), (WIRE + 10, 72, "out/worker")):
        out.append(box(x, folders - 14, width, 28, "#ffffff", RED, ' rx="4" stroke-dasharray="3 2"'))
        out.append(text(x + width / 2, folders + 4, name, fill=RED, more=' text-anchor="middle"'))
    return out


def draw_legend(y: float) -> list[str]:
    """What the colours say."""
    whole, dashes = f'stroke="{BLUE}" stroke-width="2"', ' stroke-dasharray="5 4"'
    return [
        box(LEFT, y - 13, 26, 17, RED, RED, ' rx="8"'),
        text(LEFT + 34, y, "the way of one weight, offline", size=14, fill=INK),
        box(258, y - 13, 26, 17, BLUE, BLUE, ' rx="8"'),
        text(291, y, "the way of one token, online:", size=14, fill=INK),
        f'<path d="M484 {y - 4}h32" {whole}/>',
        text(522, y, "to the worker", size=14, fill=INK),
        f'<path d="M620 {y - 4}h32" {whole}{dashes}/>',
        text(658, y, "and back", size=14, fill=INK),
        text(RIGHT, y, "imports point down", size=14, fill=INK, more=' text-anchor="end"'),
    ]


def picture() -> str:
    """The whole picture."""
    out = draw_legend(28)
    more, y = draw_top(46)
    out += more
    at: dict[str, Room] = {}
    tops: dict[str, float] = {}
    for floor in FLOORS:
        tops[floor.package] = y
        more, rooms = draw_floor(floor, y)
        out += more
        at |= rooms
        y += floor.height
    wire = draw_wire(tops["parties"], y, at["ledger"].at("e")[1])
    more, height = draw_ground(y)
    out += more + wire
    lines = [*weight_ways(at), *token_ways(at, tops["planning"])]
    out += ['<g fill="none" stroke-width="2" stroke-linejoin="round">', *lines, "</g>"]
    for room in at.values():
        out += draw_room(room)
    shape = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5.5" markerHeight="5.5" orient="auto"'
    heads = [
        f'<marker id="{name}" {shape}><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for name, colour in (("red", RED), ("blue", BLUE))
    ]
    size = f'width="{WIDTH}" height="{height + 12:g}" viewBox="0 0 {WIDTH} {height + 12:g}"'
    font = "font-family=\"'Segoe UI', 'Helvetica Neue', Helvetica, Arial, sans-serif\""
    title = "<title>The packages as floors, and the ways of a weight and of a token through them</title>"
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">', title]
    head += ["<defs>", *heads, "</defs>", f'<rect width="{WIDTH}" height="{height + 12:g}" fill="#ffffff"/>']
    return "\n".join([*head, *out, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
